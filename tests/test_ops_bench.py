"""bench/op_cases.py, bench/cluster_cases.py and bench/ops.py: what is registered, what bytes are counted, and what is never timed."""

import argparse
import ast
import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mnemos.bench import op_timing, ops
from mnemos.bench.op_cases import BATCH, DTYPES, OPS
from mnemos.bench.op_entry import Op
from mnemos.bench.op_inputs import Arguments

REPO = Path(__file__).resolve().parents[1]
CPU, META = torch.device("cpu"), torch.device("meta")


def on_meta(op: str, case: str, dtype: torch.dtype = torch.bfloat16) -> Arguments:
    return OPS[op].cases[case](META, BATCH, dtype)


def test_every_launch_is_registered() -> None:
    registered = {
        alias.name
        for file in ("op_cases.py", "cluster_cases.py")
        for node in ast.walk(ast.parse((REPO / "bench" / file).read_text()))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    launches = {
        node.name
        for file in (REPO / "kernels").rglob("*.py")
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("launch_")
    }
    assert len(launches) > 8 and launches <= registered, launches - registered


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_every_entry_has_a_gate_and_counts_work(op: Op) -> None:
    assert (REPO / op.gate).is_file()
    for case, make in op.cases.items():
        for dtype in DTYPES.values():
            a = make(META, BATCH, dtype)
            assert all(work(a) > 0 for work in op.work.values()), case
            assert list(op.launches(a)), case


def test_least_bytes_by_hand() -> None:
    stream, row = 128 * 50 * 768 * 2, 768 * 2
    norm = on_meta("layer_scale_residual_norm", "base encoder image drop")
    work = OPS["layer_scale_residual_norm"].work
    assert (
        work["forward"](norm) == 4 * stream + 3 * row + 128 * 4
    )  # x, branch, x_new, normed; scale, weight, bias; keep
    # both gradients, x_new and branch read, two gradients written; scale and weight read, three gradients written
    assert work["backward"](norm) == 6 * stream + 5 * row + 128 * 4
    plain = on_meta("layer_scale_residual_norm", "base decoder image")
    assert work["backward"](plain) == 4 * 128 * 197 * 512 * 2 + 3 * 512 * 2

    num = 128 * 36  # visible patches of volumes, 16^3 int16, written as bf16; the mixture reads two
    mixed = on_meta("gather_patches", "base volume flip mix")
    per_sample = 4 + 4 + 3 + 8 + 4
    assert OPS["gather_patches"].work["forward"](mixed) == num * (4096 * (2 + 2 + 2) + 8) + 128 * per_sample

    grey = on_meta("masked_patch_mse", "base grey")
    read = 128 * 147 * (768 * 2 + 256 + 8) + 128 * 4
    assert OPS["masked_patch_mse"].work["both"](grey) == read + 128 * 147 * 768 * 2

    texts = on_meta("gather_tokens", "base encoder text", torch.float32)
    assert OPS["gather_tokens"].work["backward"](texts) == (2048 + 9587) * 768 * 4 + 2048 * 8


def test_ids_are_unique_ascending_and_in_range() -> None:
    for op, case, name, num in (
        ("gather_patches", "base volume", "ids", 144),
        ("gather_tokens", "base decoder image", "ids", 197),
        ("place_tokens", "base decoder image", "visible", 196),
    ):
        ids = OPS[op].cases[case](CPU, 2, torch.float32)[name]
        assert (ids.diff(dim=1) > 0).all() and ids.min() >= 0 and ids.max() < num, op


def doubled(x: Tensor) -> Tensor:
    return x * 2


def made_up(name: str = "made_up", **changes: Any) -> Op:
    op = Op(
        name=name,
        gate=f"test_{name}.py",
        ours=doubled,
        reference=lambda x: x + x,
        cases={"base one": lambda device, samples, dtype: {"x": torch.randn(samples, 64, dtype=dtype)}},
        work={"forward": lambda a: 2 * a["x"].nbytes, "backward": lambda a: 2 * a["x"].nbytes},
        launches=lambda a: iter(()),
        wanted=("x",),
    )
    return dataclasses.replace(op, **changes)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> argparse.Namespace:
    """Return the flags of a short run, whose tests lie in a folder of their own."""
    monkeypatch.setattr(op_timing, "TURNS", 2)
    monkeypatch.setattr(ops, "copy_bytes_per_s", lambda device: 1e9)
    monkeypatch.setattr(ops, "machine", lambda: {"device": "a machine"})
    monkeypatch.setattr(ops, "gate", partial(ops.gate, root=tmp_path))
    flags = ["--providers", "ours", "eager", "--dtype", "bf16", "--out", str(tmp_path / "rows.jsonl")]
    return ops.make_parser(False).parse_args(flags)


def test_a_red_test_file_keeps_its_operation_from_being_timed(
    quick: argparse.Namespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "test_green.py").write_text("def test_it(): pass\n")
    (tmp_path / "test_red.py").write_text("def test_it(): assert False\n")
    monkeypatch.setattr(ops, "OPS", {name: made_up(name) for name in ("red", "absent", "green")})
    quick.op = ["red", "absent", "green"]
    rows, refused = ops.time_all(quick, CPU)
    assert {row["op"] for row in rows} == {"green"}
    assert [line.split()[0] for line in refused] == ["red", "absent"] and "1 failed" in refused[0]
    written = [json.loads(line) for line in quick.out.read_text().splitlines()]
    assert {(row["pass"], row["provider"]) for row in written} == {
        (which, provider) for which in ("forward", "backward", "both") for provider in ("ours", "eager")
    }
    assert all(
        row["us_p20"] <= row["us"] <= row["us_p80"] and row["device"] == "a machine" for row in written
    )


@pytest.mark.parametrize(
    "wrong",
    [lambda x: x * 2.1, lambda x: x.detach() * 2 + x - x.detach(), lambda x: x * float("nan")],
    ids=["value", "gradient", "nan"],
)
def test_what_differs_from_its_definition_is_not_timed(wrong: Any) -> None:
    a = {"x": torch.randn(4, 64)}
    ops.check(made_up(), a)
    with pytest.raises(ops.Refused, match="differs"):
        ops.check(made_up(ours=wrong), a)


def test_rows_below_target_are_named() -> None:
    row = {"op": "o", "case": "c", "dtype": "bf16", "pass": "forward", "bound": "bytes"}
    rows = [
        {**row, "provider": "ours", "us": 10.0, "share_of_copy": 0.84},
        {**row, "provider": "compiled", "us": 9.0, "share_of_copy": 0.9},
        {**row, "case": "d", "provider": "ours", "us": 8.0, "share_of_copy": 0.85},
        {**row, "case": "d", "provider": "compiled", "us": 9.0, "share_of_copy": 0.8},
        {**row, "case": "e", "provider": "ours", "us": 8.0, "share_of_copy": 0.01, "bound": "latency"},
    ]
    found = ops.below_target(rows)
    assert len(found) == 2 and all(line.startswith("o c bf16 forward") for line in found)


@pytest.mark.parametrize("flags", [["--op", "nothing"], ["--out", "no/such/folder/rows.jsonl"], ["--passes"]])
def test_a_wrong_call_is_one_sentence(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert ops.main(flags) == 2
    assert capsys.readouterr().err.count("\n") == 1
