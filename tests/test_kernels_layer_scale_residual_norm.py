"""layer_scale_residual_norm against the formulas, forward and backward."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from compare import assert_as_accurate_as_eager
from torch import Tensor
from torch.nn.functional import layer_norm

from mnemos.kernels.layer_scale_residual_norm import layer_scale_residual_norm

EPS = 1e-5
NAMES = ("x_new", "normed", "grad x", "grad branch", "grad scale", "grad weight", "grad bias")


def residual(x: Tensor, branch: Tensor, scale: Tensor, keep: Tensor | None) -> Tensor:
    return x + scale * (branch if keep is None else branch * keep.to(x.dtype)[:, None, None])


def by_formula(
    x: Tensor, branch: Tensor, scale: Tensor, weight: Tensor, bias: Tensor, keep: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the definition, written out."""
    x_new = residual(x, branch, scale, keep)
    centred = x_new - x_new.mean(-1, keepdim=True)
    variance = centred.square().mean(-1, keepdim=True)
    return x_new, centred / (variance + EPS).sqrt() * weight + bias


def by_eager(
    x: Tensor, branch: Tensor, scale: Tensor, weight: Tensor, bias: Tensor, keep: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return what a model written without the op computes."""
    x_new = residual(x, branch, scale, keep)
    return x_new, layer_norm(x_new, weight.shape, weight, bias, EPS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("dropped", [False, True], ids=["kept", "droppath"])
@pytest.mark.parametrize(
    ("B", "L", "D"),
    [
        pytest.param(2, 3, 5, id="B2-L3-D5"),
        pytest.param(1, 1, 2, id="smallest"),
        pytest.param(16, 17, 192, id="sample-encoder"),
        pytest.param(2, 197, 512, id="base-decoder"),
    ],
)
def test_matches_the_formula(B: int, L: int, D: int, dropped: bool, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    shapes = [(B, L, D), (B, L, D), (D,), (D,), (D,)]
    made = [torch.randn(*shape, generator=g).to(dtype) for shape in shapes]
    made[0] += 2.0  # a mean that is not zero
    upstream = [torch.randn(B, L, D, generator=g).to(dtype) for _ in range(2)]
    keep = (torch.rand(B, generator=g) < 0.7).float() / 0.7 if dropped else None

    def run(fn: Callable[..., tuple[Tensor, Tensor]], at: torch.dtype) -> list[Tensor]:
        leaves = [tensor.to(at, copy=True).requires_grad_() for tensor in made]
        out = fn(*leaves, keep)
        grads = torch.autograd.grad(out, leaves, [grad.to(at) for grad in upstream])
        return [*(tensor.detach() for tensor in out), *grads]

    def ours(x: Tensor, branch: Tensor, scale: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        weight, bias, keep = rest
        return layer_scale_residual_norm(x, branch, scale, keep, weight, bias, EPS)

    runs = run(ours, dtype), run(by_eager, dtype), run(by_formula, torch.float64)
    for name, *results in zip(NAMES, *runs, strict=True):
        assert_as_accurate_as_eager(name, *results)


def test_a_dropped_branch_leaves_no_trace() -> None:
    x, branch = torch.randn(2, 3, 4), torch.randn(2, 3, 4, requires_grad=True)
    ones = torch.ones(4)
    x_new, normed = layer_scale_residual_norm(x, branch, ones, torch.tensor([0.0, 2.0]), ones, ones, EPS)
    (grad,) = torch.autograd.grad(x_new.sum() + normed.square().sum(), branch)
    assert x_new[0].equal(x[0]) and grad[0].eq(0).all()
    torch.testing.assert_close(x_new[1], x[1] + 2 * branch[1])


def test_bf16_statistics_are_fp32_in_forward_and_backward() -> None:
    """The mean of 256 and 258 is no bf16 number; kept as one, it would turn -1, 1 into -2, 0 or 0, 2."""
    x = 256.0 + 2.0 * (torch.arange(64) % 2).to(torch.bfloat16).view(1, 1, 64)
    weight, zeros = torch.ones(64, dtype=torch.bfloat16, requires_grad=True), torch.zeros_like(x[0, 0])
    _, normed = layer_scale_residual_norm(x, torch.zeros_like(x), zeros, None, weight, zeros, EPS)
    (grad,) = torch.autograd.grad(normed.sum(), weight)
    expected = torch.tensor([-1.0, 1.0], dtype=torch.bfloat16).repeat(32)
    assert normed.flatten().equal(expected) and grad.equal(expected)


def test_shapes_are_named() -> None:
    x, vector = torch.zeros(2, 3, 4), torch.zeros(4)
    with pytest.raises(ValueError, match=r"\(2, 3, 4\).*\(2, 3, 5\)"):
        layer_scale_residual_norm(x, torch.zeros(2, 3, 5), vector, None, vector, vector, EPS)
    with pytest.raises(ValueError, match=r"\(5,\)"):
        layer_scale_residual_norm(x, x, vector, None, vector, torch.zeros(5), EPS)
    with pytest.raises(ValueError, match=r"keep \(3,\) must be \[2\]"):
        layer_scale_residual_norm(x, x, vector, torch.ones(3), vector, vector, EPS)
