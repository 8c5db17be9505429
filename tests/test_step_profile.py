"""bench/step_profile.py: its table, its mistakes, and one small profile from end to end."""

import argparse
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image
from tiny_data import TINY, make_tiny_sets

from mnemos.bench import step_profile, step_profile_run
from mnemos.bench.step_profile_roles import (
    BOOKKEEPING,
    OTHER,
    PYTHON,
    ROLES,
    UNPLACED,
    Breakdown,
    Role,
    read_trace,
)
from mnemos.bench.step_profile_table import as_text, headlines, table
from mnemos.bench.step_profile_work import Load, Work
from mnemos.sharding.errors import UserError
from mnemos.sharding.modalities import STORED_SIZES
from mnemos.sharding.reader import ShardSet

BENCH = Path(step_profile.__file__)


def breakdown(**ms: float) -> Breakdown:
    """Return a step of some roles; a double underscore stands for ": "."""
    rows = {role: Role() for role in ROLES}
    for name, taken in ms.items():
        rows[name.replace("__", ": ")] = Role(ms=taken, calls=2, names=Counter({"an op": taken}))  # type: ignore[arg-type]
    return Breakdown(step_ms=sum(ms.values()), on_device=False, rows=rows)


def test_a_row_has_its_rate_and_what_it_could_be() -> None:
    work = {
        "products: encoder": Work(4e9, 1e6),
        "attention": Work(1e6, 2e6),
        "GELU": Work(0, 3e6),
        "optimiser": Work(),
    }
    found = breakdown(products__encoder=8.0, attention=4.0, GELU=6.0, **{"weights, gradients": 2.0})
    rows = {row["role"]: row for row in table(found, work, 1e12, 1e9)}
    product, attention, gelu, total = (
        rows[name] for name in ("products: encoder", "attention", "GELU", "the step")
    )
    assert (product["could_ms"], product["of_product"], product["flop_per_s"]) == (4.0, 0.5, 5e11)
    assert (attention["could_ms"], attention["of_copy"]) == (2.0, 0.5)  # its bytes take longer than its FLOPs
    assert (gelu["could_ms"], gelu["bytes_per_s"]) == (3.0, 5e8)
    assert rows["weights, gradients"]["could_ms"] is None and "optimiser" not in rows
    assert (total["ms"], total["could_ms"], total["share"]) == (20.0, 9.0, 1.0)
    assert sum(row["share"] for row in rows.values()) == pytest.approx(2.0)
    text = as_text(list(rows.values()), on_device=False)
    assert "50 % of a product" in text and "50 % of a copy" in text and "host ms" not in text


def test_products_that_cannot_be_told_apart_share_a_row() -> None:
    work = {"products: encoder": Work(4e9, 0), "products: decoder": Work(2e9, 0)}
    rows = table(breakdown(products=9.0, products__encoder=3.0), work, 1e12, 1e9)
    assert [row["role"] for row in rows] == [UNPLACED, "the step"]
    assert (rows[0]["ms"], rows[0]["could_ms"], rows[0]["calls"]) == (12.0, 6.0, 4)


NOTHING = Load(
    samples=1, tokens=1, pairs=1, seen=0, places=0, scored=0, values=0, patch_values=0, raw_bytes=0, crops=False,
    estimate={},
)  # fmt: skip
ABOUT = {
    "kind": "image", "phase": "pretext", "preset": "base", "batch": 4, "precision": "fp32", "device": "cpu",
    "threads": "1", "ms": 10.0, "profiled_ms": 11.0, "steps": 1, "product_flop_per_s": 1e12, "copy_bytes_per_s": 1e9,
    "estimate_flop": 5e9, "other": 0.2,
}  # fmt: skip


def test_too_much_that_nobody_knows_is_said_and_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    found = breakdown(other=2.0, GELU=8.0)
    rows = table(found, {}, 1e12, 1e9)
    for share, code in ((0.2, 1), (0.15, 0)):
        monkeypatch.setattr(
            step_profile, "measure", lambda given, share=share: ({**ABOUT, "other": share}, rows, False)
        )
        flags = ["--kind", "image", "--out", str(tmp_path / "o"), "--json", str(tmp_path / "lines")]
        assert step_profile.main(flags) == code
        told = capsys.readouterr().out
        assert ("other is 20 % of the step, 15 % are allowed" in told and "an op" in told) == (code == 1)
        assert "50 % of a product" in told
    assert len((tmp_path / "lines").read_text().splitlines()) == 2
    assert "400.0 samples/s" in headlines(ABOUT) and "+10 %" in headlines(ABOUT)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--batch", "1"], "--batch is 1; 2 samples or more"),
        (["--steps", "0"], "--steps 0: nothing would be measured"),
        (["--json", "nowhere/lines"], "there is no folder nowhere"),
        (["--kind", "smell"], "invalid choice: 'smell'"),
    ],
)
def test_mistakes_are_one_sentence(flags: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert step_profile.main(["--kind", "image", *flags]) == 2
    complaint = capsys.readouterr().err
    assert said in complaint and complaint.count("\n") == 1


def asked(*flags: str) -> argparse.Namespace:
    """Return a command line's flags, with their defaults."""
    given = step_profile.make_parser().parse_args(flags)
    step_profile.check(given)
    return given


def test_data_without_the_kind_are_refused(tmp_path: Path) -> None:
    data = make_tiny_sets(tmp_path / "data", samples=8, modalities=["xray"])
    given = asked("--kind", "text", "--preset", "sample", "--data", str(data))
    with pytest.raises(UserError, match="holds no text set, only image; name a folder that has one"):
        step_profile.plan_for(given, tmp_path)


def test_the_plan_ends_with_the_asked_kind_and_carries_the_others(tmp_path: Path) -> None:
    given = asked("--kind", "image", "--preset", "sample", "--batch", "6", "--set", "training.seed=3")
    plan = step_profile.plan_for(given, tmp_path)
    assert {stage.manifest.kind for stage in plan.stages[:-1]} == {"text", "volume"}
    assert plan.stages[-1].manifest.kind == "image"
    settings = plan.settings
    assert (settings.training.batch, settings.rehearsal.mix_group, settings.training.seed) == (6, 6, 3)
    texts = next(stage for stage in plan.stages if stage.manifest.kind == "text")
    assert texts.manifest.tokenizer is not None
    assert (
        texts.manifest.tokenizer.vocab_size == STORED_SIZES["sample"].vocab
    )  # full: the word head costs its all
    reads = ShardSet(texts.data, "train")  # type: ignore[arg-type]
    lengths = [len(reads.read(place)) for place in range(len(reads))]
    assert len(lengths) == 32 and 0.55 < sum(lengths) / 32 / STORED_SIZES["sample"].text < 1.0


def test_a_real_step_from_end_to_end(tmp_path: Path) -> None:
    data = make_tiny_sets(tmp_path / "data", samples=8, modalities=["xray"])
    settings = [part for text in TINY if text.startswith("model.") for part in ("--set", text)]
    command = [
        sys.executable,
        str(BENCH),
        "--kind",
        "image",
        "--phase",
        "rehearsal",
        "--preset",
        "sample",
        "--detail",
    ]
    command += [
        "--batch",
        "4",
        "--steps",
        "2",
        "--precision",
        "fp32",
        "--data",
        str(data),
        "--out",
        str(tmp_path / "o"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *settings], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "o"
    profile = json.loads((folder / "step.json").read_text())
    *rows, total = profile["rows"]
    taken = {row["role"]: row["ms"] for row in rows}
    assert (
        sum(taken.values()) == pytest.approx(total["ms"]) == pytest.approx(profile["profiled_ms"], rel=1e-3)
    )
    assert {
        "products: tokenizer",
        "products: encoder",
        "products: teacher",
        "attention",
        "GELU",
        "losses",
    } <= set(taken)
    assert {"augmentation, pixels", "optimiser", "weights, gradients", BOOKKEEPING, PYTHON} <= set(taken)
    assert not {"products: decoder", "products: head", UNPLACED} & set(taken)
    assert (
        profile["other"] < step_profile.MOST_OTHER
        and profile["other"] == taken[OTHER] / profile["profiled_ms"]
    )
    encoder = next(row for row in rows if row["role"] == "products: encoder")
    assert encoder["gflop"] == pytest.approx(
        3 * 2 * 4 * 17 * (8 * 32**2 + 4 * 32 * 64) / 1e9
    )  # 17 tokens of 4 samples
    calls = sum(1 for event in read_trace(folder / "trace.json.gz") if event["name"] == "aten::gelu")
    assert calls == (2 + 2) * (2 + 1)  # blocks of student and teacher; two steps, and one before
    assert "image rehearsal" in done.stdout and "aten::gelu" in done.stdout
    assert done.stdout.startswith((folder / "step.txt").read_text())
    with Image.open(folder / "step.png") as picture:
        assert picture.width > 1000 and "where" in picture.text["Title"]  # type: ignore[attr-defined]
    assert not (tmp_path / "runs").exists()


def test_a_batch_is_mixed_in_runs_that_divide_it() -> None:
    assert [step_profile.mix_group(batch) for batch in (2, 6, 8, 21, 48, 128, 34)] == [2, 6, 8, 7, 16, 16, 2]


def test_ranges_are_taken_off_again() -> None:
    import torch
    from torch.profiler import profile

    class Owner:
        def method(self, value: int) -> int:
            return value + 1

    owner, module = Owner(), torch.nn.Linear(2, 2)
    subject = step_profile_run.Subject(
        do=module, batches=(), load=NOTHING, parameters=0, bf16=False,
        modules=[(module, "part")], methods=[(owner, "method", "work")],
    )  # fmt: skip
    with profile() as recorded, step_profile_run.ranges(subject):
        module(torch.zeros(1, 2))
        assert owner.method(1) == 2
        with pytest.raises(RuntimeError, match="mat1"):  # a forward that fails leaves no range open
            module(torch.zeros(1, 3))
        torch.ones(1).neg()
    counted = Counter(event.name for event in recorded.events())
    assert counted["mnemos/part"] == 2 and counted["mnemos/work"] == 1
    assert next(event for event in recorded.events() if event.name == "aten::neg").cpu_parent is None
    with profile() as recorded:
        module(torch.zeros(1, 2))
        owner.method(1)
    assert not [event for event in recorded.events() if event.name.startswith("mnemos/")]
    assert "method" not in vars(owner) and not module._forward_hooks and not module._forward_pre_hooks
