"""The linear layer: the same as torch's, whichever library computes it."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mnemos.kernels import linear as module
from mnemos.kernels.linear import linear, product

SHAPES = [((3,), 4, 5), ((2, 7), 33, 65), ((1, 1, 200), 96, 130), ((4, 0), 8, 8)]
ONEDNN = torch.backends.mkldnn.is_available()


@pytest.fixture(params=[False, pytest.param(True, marks=pytest.mark.skipif(not ONEDNN, reason="no oneDNN"))])
def through_onednn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(module, "_prefers_onednn", lambda: request.param)
    chosen: bool = request.param
    return chosen


def case(rows: tuple[int, ...], inner: int, outer: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(*rows, inner), (outer, inner), (outer,)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


@pytest.mark.parametrize(("rows", "inner", "outer"), SHAPES)
@pytest.mark.parametrize("with_bias", [True, False])
def test_value_and_gradients_are_those_of_fp64(
    rows: tuple[int, ...], inner: int, outer: int, with_bias: bool, through_onednn: bool
) -> None:
    values = case(rows, inner, outer, torch.float32)[: 3 if with_bias else 2]
    exact = [value.double().requires_grad_() for value in values]
    ours = [value.clone().requires_grad_() for value in values]
    expected, found = F.linear(*exact), linear(*ours)
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    expected.backward(upstream.double())
    found.backward(upstream)
    for mine, theirs in zip(
        [found, *(one.grad for one in ours)], [expected, *(one.grad for one in exact)], strict=True
    ):
        assert mine is not None and theirs is not None and mine.shape == theirs.shape
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-5, atol=3e-5)


def test_gradients_that_nobody_asks_for_are_not_made(
    through_onednn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weight, bias = case((3,), 4, 5, torch.float32)
    made: list[torch.Size] = []

    def counted(*inputs: Tensor) -> Tensor:
        out = product(*inputs)
        made.append(out.shape)
        return out

    monkeypatch.setattr(module, "product", counted)
    linear(x, weight.requires_grad_(), bias).sum().backward()
    assert x.grad is None and bias.grad is None and weight.grad is not None
    assert made == ([(3, 5), (5, 4)] if through_onednn else [])
    assert not linear(x, weight.detach(), bias).requires_grad


def test_transposed_inputs_are_taken_as_they_are(through_onednn: bool) -> None:
    x, weight, _ = case((40,), 24, 56, torch.float32)
    torch.testing.assert_close(product(x.t().contiguous().t(), weight.t().contiguous().t()), x @ weight.t())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_types_are_torchs_own(dtype: torch.dtype, through_onednn: bool) -> None:
    values = case((6,), 16, 24, dtype)
    assert torch.equal(linear(*values), F.linear(*values))
    assert linear(*values).dtype == dtype


def test_onednn_is_chosen_where_mkl_would_not_use_avx512(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {}
    for capability in ("AVX512", "AVX2"):
        for vendor in ("AuthenticAMD", "GenuineIntel"):
            monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda it=capability: it)
            monkeypatch.setattr(module.Path, "exists", lambda _: True)
            monkeypatch.setattr(module.Path, "read_text", lambda _, it=vendor, **__: f"vendor_id : {it}")
            module._prefers_onednn.cache_clear()
            answers[capability, vendor] = module._prefers_onednn()
    module._prefers_onednn.cache_clear()
    assert [case for case, chosen in answers.items() if chosen] == (
        [("AVX512", "AuthenticAMD")] if ONEDNN else []
    )
