"""bench/gemm.py: what it multiplies, how it counts, and that it runs."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mnemos.bench import gemm
from mnemos.bench.gemm import Product, Timed


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure on the CPU everywhere: what is tested is the same, and quick."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_the_three_products_are_those_of_a_linear_layer() -> None:
    m, k, n = 5, 3, 4
    layer = torch.nn.Linear(k, n, bias=False)
    x, gradient = torch.randn(m, k, requires_grad=True), torch.randn(m, n)
    y = layer(x)
    y.backward(gradient)
    wanted = {
        "forward": (y, (x, layer.weight)),
        "dgrad": (x.grad, (gradient, layer.weight)),
        "wgrad": (layer.weight.grad, (gradient, x)),
    }
    for which, (result, operands) in wanted.items():
        product = Product(m=m, k=k, n=n, which=which)  # type: ignore[arg-type]
        torch.testing.assert_close(product.multiply(*operands), result)
        shapes = [tensor.shape for tensor in product.operands(torch.bfloat16, "cpu")]
        assert shapes == [tensor.shape for tensor in operands], which
        assert product.flops == 2 * m * k * n


def test_rates_are_those_of_the_median_and_slow_ones_are_low() -> None:
    one = Timed(Product(m=8, k=16, n=32, which="forward"), torch.float32, "cpu")
    one.seconds[:] = [1e-6, 2e-6, 3e-6, 4e-6, 5e-6]
    row = one.row()
    assert row["us"] == pytest.approx(3.0)
    assert row["tflop_per_s"] == pytest.approx(2 * 8 * 16 * 32 / 3e-6 / 1e12)
    assert row["tflop_per_s_p20"] < row["tflop_per_s"] < row["tflop_per_s_p80"]
    slow = np.percentile(one.seconds, 80)
    assert row["tflop_per_s_p20"] == pytest.approx(one.product.flops / slow / 1e12)


def test_a_window_is_the_mean_of_its_products(monkeypatch: pytest.MonkeyPatch) -> None:
    one = Timed(Product(m=8, k=16, n=32, which="forward"), torch.float32, "cpu")
    one.sets, one.turns, seconds = one.sets * 4, 3, iter((4.0, 8.0, 12.0))
    monkeypatch.setattr(one, "replay", lambda: next(seconds))
    one.window()
    assert one.seconds == [pytest.approx(2.0)], "24 s for three times four"


def test_it_runs_and_writes_a_line_for_every_product(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "gemm.jsonl"
    argv = ["--rows", "4", "6", "--sizes", "8x16", "--rounds", "2", "--dtype", "fp32", "--out", str(out)]
    assert gemm.main(argv) == 0
    lines: list[dict[str, Any]] = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    found = [(line["m"], line["k"], line["n"], line["pass"]) for line in lines]
    assert found == [(m, 8, 16, which) for m in (4, 6) for which in ("forward", "dgrad", "wgrad")]
    assert all(line["tflop_per_s"] > 0 and line["bench"] == "gemm" for line in lines)
    assert "TFLOP/s in fp32" in capsys.readouterr().out.splitlines()[-1]


def test_the_shapes_are_those_of_the_base_preset() -> None:
    from mnemos.engine.settings import ModelSettings

    model = ModelSettings()
    layers = set()
    for width, ffn in ((model.width, model.ffn), (model.decoder_width, 4 * model.decoder_width)):
        layers |= {(width, 3 * width), (width, width), (width, ffn), (ffn, width)}
    patch = model.image_patch**2 * 3
    layers |= {(patch, model.width), (model.width, model.decoder_width), (model.decoder_width, patch)}
    assert set(gemm.SIZES) == layers


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--rounds", "0"], "--rounds 0"),
        (["--rows", "0"], "--rows 0"),
        (["--sizes", "12"], "write for example 768x3072"),
        (["--sizes", "0x12"], "write for example 768x3072"),
        (["--out", "nowhere/x.jsonl"], "there is no folder nowhere"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_it_refuses(argv: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert gemm.main(argv) == 2
    assert said in capsys.readouterr().err
