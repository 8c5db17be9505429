"""feature_mse against loops."""

import pytest
import torch
from compare import assert_as_accurate_as_eager
from torch import Tensor

from mnemos.kernels.feature_mse import feature_mse

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
SHAPES = pytest.mark.parametrize(
    ("B", "L", "K", "D"),
    [
        pytest.param(2, 5, 3, 7, id="B2-L5-K3-D7"),
        pytest.param(1, 1, 1, 1, id="smallest"),
        pytest.param(3, 9, 9, 4, id="K-equals-L"),
        pytest.param(2, 196, 49, 64, id="L196-K49"),
    ],
)


def randn(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32).to(dtype)


def some_ids(B: int, L: int, K: int) -> Tensor:
    return torch.rand(B, L, generator=torch.Generator().manual_seed(3)).argsort(1)[:, :K].sort(1).values


# ---- feature_mse
@DTYPES
@pytest.mark.parametrize("masked", [False, True], ids=["all", "valid"])
@SHAPES
def test_feature_mse_matches_a_loop(B: int, L: int, K: int, D: int, masked: bool, dtype: torch.dtype) -> None:
    student, teacher = randn(0, B, L, D, dtype=dtype), randn(1, B, L, D, dtype=dtype)
    valid = torch.zeros(B, L, dtype=torch.bool).scatter_(1, some_ids(B, L, K), True) if masked else None

    def by_loop(at: torch.dtype) -> tuple[Tensor, Tensor]:
        leaf = student.to(torch.float64 if at == torch.float64 else dtype, copy=True).requires_grad_()
        loss = torch.zeros((), dtype=at)
        for b in range(B):
            for n in range(L):
                if valid is None or valid[b, n]:
                    loss = loss + (leaf[b, n].to(at) - teacher[b, n].to(at)).square().mean()
        (grad,) = torch.autograd.grad(loss * 0.3, leaf)
        return loss.detach(), grad

    leaf = student.clone().requires_grad_()
    loss = feature_mse(leaf, teacher, valid)
    (grad,) = torch.autograd.grad(loss * 0.3, leaf)
    for name, *results in zip(
        ("loss", "grad"), (loss.detach(), grad), by_loop(torch.float32), by_loop(torch.float64), strict=True
    ):
        assert_as_accurate_as_eager(name, *results)


def test_feature_mse_ignores_nan_at_padding() -> None:
    student = torch.ones(1, 3, 2).requires_grad_()
    teacher = torch.tensor([[[0.0, 0.0], [torch.nan, torch.nan], [1.0, 1.0]]])
    loss = feature_mse(student, teacher, torch.tensor([[True, False, True]]))
    (grad,) = torch.autograd.grad(loss, student)
    assert loss == 1.0
    assert grad.tolist() == [[[1.0, 1.0], [0.0, 0.0], [0.0, 0.0]]]


def test_feature_mse_refuses_other_shapes_and_a_live_teacher() -> None:
    with pytest.raises(ValueError, match=r"\(1, 3, 2\).*\(1, 3, 1\)"):
        feature_mse(torch.ones(1, 3, 2), torch.ones(1, 3, 1))
    with pytest.raises(ValueError, match=r"\(3, 1\)"):
        feature_mse(torch.ones(1, 3, 2), torch.ones(1, 3, 2), torch.ones(3, 1, dtype=torch.bool))
    with pytest.raises(ValueError, match="teacher"):
        feature_mse(torch.ones(1, 3, 2), torch.ones(1, 3, 2, requires_grad=True))
