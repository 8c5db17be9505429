"""bench/step.py: the reference is ours in another form, and what it refuses, counts and puts back."""

import ast
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mnemos.bench import step, step_numerics, step_plain, step_rates
from mnemos.bench.step_data import make_sets
from mnemos.bench.step_inputs import KINDS
from mnemos.bench.step_reference import patchify
from mnemos.bench.step_rows import BENCH_PHASES, CLOSE
from mnemos.bench.step_sides import Side
from mnemos.bench.step_timing import summary, turns
from mnemos.engine import objectives
from mnemos.engine.patches import all_patches
from mnemos.engine.settings import ModelSettings
from mnemos.kernels._common.launch import launch_counts
from mnemos.sharding.modalities import STORED_SIZES
from mnemos.sharding.reader import ShardSet

REPOSITORY = Path(__file__).resolve().parents[1]
WORKER = Path(__file__).with_name("step_bench_worker.py")


@pytest.fixture(scope="module")
def answer(tiny_sets: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return what everything that needs a stage came to, in one process."""
    folder = tmp_path_factory.mktemp("step")
    file = folder / "answer.json"
    command = [sys.executable, str(WORKER), str(tiny_sets), str(folder / "work"), str(file)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(file.read_text())
    return {**found, "stderr": done.stderr, "stdout": done.stdout}


# ---- the reference
def test_fp32_losses_of_ours_and_the_reference_agree(answer: dict[str, Any]) -> None:
    assert set(answer["differences"]) == {"text None", "text 500", "image None", "volume None"}
    for case, by_phase in answer["differences"].items():
        assert set(by_phase) == set(BENCH_PHASES), case
        assert max(by_phase.values()) < CLOSE, (case, by_phase)


def test_they_agree_where_every_weight_is_drawn(answer: dict[str, Any]) -> None:
    assert len(answer["drawn"]) == 2 * len(KINDS)
    for case, (difference, loss) in answer["drawn"].items():
        assert difference < CLOSE and loss > 1e-3, (case, difference, loss)


@pytest.mark.parametrize(
    ("size", "patch", "channels"), [((8, 12), (4, 4), 3), ((4, 8, 12), (2, 4, 4), 1)], ids=["image", "volume"]
)
def test_patchify_has_the_order_of_ours(size: tuple[int, ...], patch: tuple[int, ...], channels: int) -> None:
    images = torch.rand(2, channels, *size)
    ones, zeros = torch.ones(2), torch.zeros(2)
    ours = all_patches(images, patch=patch, channels=channels, scale_B=ones, shift_B=zeros)
    assert torch.equal(patchify(images, patch), ours)


# ---- what is refused
def test_a_reference_with_another_weight_is_refused(answer: dict[str, Any]) -> None:
    code, _, written = answer["refused"]
    assert (code, written) == (1, False)
    refused = [line for line in answer["stderr"].splitlines() if line.startswith("refused")]
    assert "fp32 losses of ours and the reference differ by" in refused[0]


def test_a_slow_reference_is_refused(answer: dict[str, Any]) -> None:
    _, code, written = answer["refused"]
    assert (code, written) == (1, False)
    refused = [line for line in answer["stderr"].splitlines() if line.startswith("refused")]
    assert len(refused) == 2 and "of the published" in refused[1]


def test_rates_nobody_published_must_be_waived(answer: dict[str, Any]) -> None:
    assert answer["unasked"] == 2 and "or give --unchecked" in answer["stderr"]


def test_a_good_reference_is_timed(answer: dict[str, Any]) -> None:
    assert answer["passed"] == 0
    assert [(line["phase"], line["side"]) for line in answer["lines"]] == [
        ("pretext", "ours"),
        ("pretext", "no kernels"),
        ("pretext", "reference"),
    ]
    assert {"device", "commit", "torch"} <= answer["lines"][0].keys() and answer["lines"][0]["checked"]
    assert "compiled was not measured" in answer["stdout"]


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--rounds", "0"], "--rounds is 0"),
        (["--batch", "1"], "--batch is 1"),
        (["--numerics", "-1"], "--numerics is -1"),
        (["--preset", "official"], "--preset official"),
        (["--shards", "nowhere"], "no such folder"),
        (["--out", "nowhere/lines"], "no folder nowhere"),
        (["--kinds", "x"], "--kinds"),
    ],
    ids=["rounds", "batch", "numerics", "preset", "shards", "out", "kinds"],
)
def test_a_wrong_call_is_one_sentence(
    flags: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert step.main(flags) == 2
    told = capsys.readouterr().err
    assert complaint in told and told.count("\n") == 1


# ---- sides and windows
def test_all_sides_of_all_phases_are_measured(answer: dict[str, Any]) -> None:
    sides = [("ours", "device"), ("ours", "shards"), ("no kernels", "device"), ("reference", "device")]
    found = {(row["phase"], row["side"], row["data"]): row for row in answer["rows"]}
    assert set(found) == {(phase, *side) for phase in BENCH_PHASES for side in sides}
    for row in found.values():
        assert row["low"] <= row["samples_per_s"] <= row["high"] and row["mfu"] > 0
        assert (row["ratio"] == 1.0) == (row["side"] == "reference")


def _side(name: str, seconds: list[float]) -> Side:
    return Side(name=name, run=lambda: None, samples=8, seconds=seconds, host_seconds=[0.1] * len(seconds))


def test_sides_take_turns_forwards_and_backwards() -> None:
    assert "".join(side.name for side in turns([_side(name, []) for name in "ABC"], 3)) == "ABCCBAABC"


def test_ratios_are_medians_of_the_rounds_own() -> None:
    ours, reference = _side("ours", [1.0, 9.0, 2.0]), _side("reference", [2.0, 18.0, 2.0])
    row = summary(ours, [ours, reference], steps=2, flops=80.0, peak=100.0)
    assert row["ratio"] == pytest.approx(2.0) and row["samples_per_s"] == pytest.approx(4.0)
    assert row["mfu"] == pytest.approx(80.0 / 8 * 4.0 / 100.0) and row["peak_mb"] is None


def test_the_plain_definitions_are_in_effect_and_put_back(answer: dict[str, Any]) -> None:
    assert answer["plain"]["same"] == [False] and answer["plain"]["restored"]
    assert "mnemos" in answer["plain"]["told"]


def test_definitions_are_put_back_after_an_error() -> None:
    before = objectives.masked_patch_mse
    with pytest.raises(RuntimeError, match="midway"), step_plain.plain_definitions():
        assert objectives.masked_patch_mse is not before
        raise RuntimeError("midway")
    assert objectives.masked_patch_mse is before


def test_launched_device_code_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(launch_counts, "some_kernel", 0)
    with pytest.raises(step_plain.KernelRan, match="some_kernel"), step_plain.plain_definitions():
        launch_counts["some_kernel"] += 1


def test_every_kernel_the_training_step_imports_has_a_definition() -> None:
    imported = set()
    for path in (REPOSITORY / "engine").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mnemos.kernels."):
                name = str(node.module).removeprefix("mnemos.kernels.")
                source = (REPOSITORY / "kernels" / f"{name}.py").read_text(encoding="utf-8")
                if "@triton.jit" in source and name != "counter_rng":  # its device code serves other kernels
                    imported.add(name)
    assert imported and imported <= set(step_plain.PLAIN)


# ---- what is counted
def _model() -> ModelSettings:
    return ModelSettings()


@pytest.mark.parametrize(
    ("tokens", "places", "values", "phase", "giga"),
    [
        (50, 196, 768, "pretext", 58.5),
        (50, 196, 768, "rehearsal", 35.0),
        (197, 196, 768, "embedding", 35.1),
        (37, 144, 4096, "pretext", 45.7),
        (37, 144, 4096, "rehearsal", 28.1),
        (145, 144, 4096, "embedding", 26.3),
    ],
    ids=["2D pretext", "2D rehearsal", "2D embedding", "3D pretext", "3D rehearsal", "3D embedding"],
)
def test_useful_operations_are_those_of_the_method(
    tokens: int, places: int, values: int, phase: str, giga: float
) -> None:
    work = step_rates.Work(tokens=tokens, pairs=tokens**2, patches=tokens - 1, values=values)
    if phase == "pretext":
        decoder = {"decoder_tokens": places + 1, "decoder_pairs": (places + 1) ** 2}
        predicted = {"predicted": places - tokens + 1, "outputs": values}
        work = step_rates.Work(**{**vars(work), **decoder, **predicted})
    assert step_rates.useful_flops(work, _model(), phase) / 1e9 == pytest.approx(giga, rel=0.08)


def test_texts_count_their_own_tokens() -> None:
    full = step_rates.Work(tokens=112, pairs=112**2, predicted=17, outputs=49_411)
    half = step_rates.Work(tokens=56, pairs=56**2, predicted=17, outputs=49_411)
    assert step_rates.useful_flops(full, _model(), "pretext") / 1e9 == pytest.approx(62.9, rel=0.02)
    assert step_rates.useful_flops(half, _model(), "pretext") < 0.55 * 62.9e9


def test_a_share_is_of_the_scaled_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_rates, "gemm_rate", lambda *_: 0.5 * step_rates.THEIR_GEMM["fp32"])
    clock = iter([0.0, 4.0, 10.0, 14.0, 20.0, 24.0])
    monkeypatch.setattr(step_rates.time, "perf_counter", lambda: next(clock))
    cpu = torch.device("cpu")
    found = step_rates.share_of_published(lambda: None, 8, 4.0, "fp32", cpu)
    assert found == (2.0, 0.5, 1.0)  # 8 samples in 4 s; half of 4 a second is asked for


def test_published_rates_fit_only_what_they_were_measured_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    cpu = torch.device("cpu")
    assert step_rates.has_published_rate("base", 8, cpu)
    others = [("large", 8, cpu), ("base", 16, cpu), ("base", 8, torch.device("cuda"))]
    assert not any(step_rates.has_published_rate(*other) for other in others)
    assert set(step_rates.PUBLISHED) == {(kind, phase) for kind in KINDS for phase in BENCH_PHASES}


def test_the_rate_of_products_is_plausible() -> None:
    rate = step_rates.gemm_rate(torch.device("cpu"), "fp32", seconds=0.02)
    assert 1e8 < rate < 1e14


# ---- DeepSpeed's part, numerics, drawn data
def test_the_plain_loop_has_as_many_tensors_at_no_width(answer: dict[str, Any]) -> None:
    own, forced = answer["overhead"]
    assert forced["DeepSpeed"] == "ZeRO-1" and own["tensors"] == forced["tensors"] > 20
    for row in (own, forced):
        assert row["update ms"] > 0 and row["plain ms"] > 0


def test_bf16_is_judged_by_the_spread_of_seeds(answer: dict[str, Any]) -> None:
    rng = np.random.default_rng(0)
    base = np.linspace(6, 4, 100)
    fp32 = [base + 0.1 * rng.standard_normal() + 0.05 * rng.standard_normal(100) for _ in range(3)]
    assert step_numerics.compare(fp32[0] + 1e-3, fp32)["within_noise"]
    assert not step_numerics.compare(fp32[0] + 1.0, fp32)["within_noise"]
    assert math.isfinite(answer["numerics"]["bf16_from_fp32"]) and answer["numerics"]["fp32_seeds_apart"] > 0


def test_drawn_sets_have_the_sizes_of_the_preset(tmp_path: Path) -> None:
    sets = make_sets(tmp_path / "drawn", "base", 3)
    size = STORED_SIZES["base"]
    wanted = {"text": (size.text,), "image": size.image, "volume": size.volume}
    for kind, folder in sets.items():
        shards = ShardSet(folder, "train")
        assert len(shards) == 3 and shards.manifest.shape == wanted[kind] and shards.manifest.kind == kind
