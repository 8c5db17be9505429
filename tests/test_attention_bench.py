"""bench/attention.py: what is wrong is not timed, and a machine writes its own rows alone."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mnemos.bench import attention as bench
from mnemos.kernels.attention import BACKENDS
from mnemos.sharding.command import USER_MISTAKE, run_command

SHAPE = bench.Shape(name="small", tokens=9, heads=2, width=8, cpu_batch=3)
TEXTS = bench.Shape(name="texts", tokens=9, heads=2, width=8, cpu_batch=3, packed=True, causal=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", [SHAPE, TEXTS], ids=lambda shape: shape.name)
def test_a_backend_that_is_a_little_off_is_found(
    shape: bench.Shape, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = bench.make_case(shape, dtype, torch.device("cpu"))
    assert bench.candidates(case)[:2] == ["definition", "sdpa"]
    assert bench.is_right(case, "definition") and bench.is_right(case, "sdpa")

    def off(qkv: Tensor, *rest: Any) -> Tensor:
        return BACKENDS["definition"](qkv, *rest) * 1.1

    def off_in_backward(qkv: Tensor, *rest: Any) -> Tensor:
        return BACKENDS["definition"](qkv, *rest) + (qkv - qkv.detach())[:, :, 0]

    for wrong in (off, off_in_backward):
        monkeypatch.setitem(BACKENDS, "sdpa", wrong)
        assert not bench.is_right(case, "sdpa")


def test_lengths_lie_around_two_thirds_and_the_first_is_whole() -> None:
    case = bench.make_case(
        bench.Shape(name="many", tokens=112, heads=1, width=8, cpu_batch=200, packed=True),
        torch.float32,
        torch.device("cpu"),
    )
    assert case.lengths is not None and case.lengths[0] == 112 == max(case.lengths)
    assert sum(case.lengths[1:]) / 199 == pytest.approx(112 * 2 / 3, rel=0.05)
    assert case.qkv.shape[1] == sum(case.lengths)


def test_rows_of_other_devices_stay(tmp_path: Path) -> None:
    table = tmp_path / "table.json"
    rows = [{"device": "Some GPU", "backend": "sdpa"}, {"device": "cpu", "backend": "sdpa"}]
    table.write_text(json.dumps({"rows": rows}))
    bench.write_table(table, [{"device": "cpu", "backend": "definition"}])
    assert json.loads(table.read_text())["rows"] == [rows[0], {"device": "cpu", "backend": "definition"}]
    assert list(tmp_path.iterdir()) == [table]


def test_no_threads_is_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(bench.bench, ["--threads", "0"]) == USER_MISTAKE
    assert "--threads 0" in capsys.readouterr().err
