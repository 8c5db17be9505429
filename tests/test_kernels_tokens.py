"""gather_tokens, assemble_decoder_tokens and feature_mse against loops."""

import pytest
import torch
from compare import assert_as_accurate_as_eager
from torch import Tensor

from mnemos.kernels.assemble_decoder_tokens import assemble_decoder_tokens
from mnemos.kernels.feature_mse import feature_mse
from mnemos.kernels.gather_tokens import gather_tokens

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


# ---- gather_tokens
@DTYPES
@SHAPES
def test_gather_tokens_copies_rows_and_their_gradients(
    B: int, L: int, K: int, D: int, dtype: torch.dtype
) -> None:
    x, grad, ids = randn(0, B, L, D, dtype=dtype), randn(1, B, K, D, dtype=dtype), some_ids(B, L, K)
    leaf = x.clone().requires_grad_()
    out = gather_tokens(leaf, ids)
    out.backward(grad)
    expected = torch.zeros_like(x)
    for b in range(B):
        for k in range(K):
            assert out[b, k].equal(x[b, ids[b, k]])
            expected[b, ids[b, k]] = grad[b, k]
    assert leaf.grad is not None and leaf.grad.equal(expected)


def test_gather_tokens_reads_nothing_else_and_takes_any_strides() -> None:
    x = torch.full((4, 2, 3), torch.nan).transpose(0, 1)
    x[:, 2] = 1.0
    assert gather_tokens(x, torch.tensor([[2], [2]])).eq(1.0).all()


def test_gather_tokens_gradient_is_that_of_its_output() -> None:
    leaf = randn(0, 2, 5, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: gather_tokens(x, some_ids(2, 5, 2)), (leaf,))


def test_gather_tokens_names_the_shapes() -> None:
    with pytest.raises(ValueError, match=r"\(2, 5, 3\).*\(3, 2\)"):
        gather_tokens(torch.zeros(2, 5, 3), torch.zeros(3, 2, dtype=torch.int64))


# ---- assemble_decoder_tokens
def assembled_by_loop(tokens: Tensor, mask: Tensor, positions: Tensor, ids: Tensor, prefix: int) -> Tensor:
    rows = []
    for b in range(len(ids)):
        visible = {prefix + place: prefix + k for k, place in enumerate(ids[b].tolist())}
        visible.update({i: i for i in range(prefix)})
        for place in range(len(positions)):
            rows.append((tokens[b, visible[place]] if place in visible else mask) + positions[place])
    return torch.stack(rows).view(len(ids), *positions.shape)


@DTYPES
@pytest.mark.parametrize("prefix", [0, 1, 2])
@SHAPES
def test_assemble_matches_a_loop(B: int, L: int, K: int, D: int, prefix: int, dtype: torch.dtype) -> None:
    ids = some_ids(B, L, K)
    made = [
        randn(seed, *shape, dtype=dtype)
        for seed, shape in enumerate([(B, prefix + K, D), (D,), (prefix + L, D)])
    ]
    grad = randn(9, B, prefix + L, D, dtype=dtype)

    def run(ours: bool, at: torch.dtype) -> list[Tensor]:
        leaves = [tensor.to(at, copy=True).requires_grad_() for tensor in made]
        if ours:
            out = assemble_decoder_tokens(*leaves, ids, num_prefix=prefix)
        else:
            out = assembled_by_loop(*leaves, ids, prefix)
        grads = torch.autograd.grad(out, leaves, grad.to(at), allow_unused=True, materialize_grads=True)
        return [out.detach(), *grads]

    names = ("out", "grad tokens", "grad mask token", "grad positions")
    for name, *results in zip(
        names, run(True, dtype), run(False, dtype), run(False, torch.float64), strict=True
    ):
        assert_as_accurate_as_eager(name, *results)


def test_assemble_keeps_the_type_of_the_tokens() -> None:
    out = assemble_decoder_tokens(
        torch.ones(1, 2, 4, dtype=torch.bfloat16), torch.ones(4), torch.ones(4, 4), torch.tensor([[1]])
    )
    assert out.dtype == torch.bfloat16


def test_assemble_names_the_shapes() -> None:
    with pytest.raises(ValueError, match=r"\(1, 3, 4\).*\(1, 1\).*\[B, 1 \+ K, D\]"):
        assemble_decoder_tokens(
            torch.ones(1, 3, 4), torch.ones(4), torch.ones(4, 4), torch.ones(1, 1, dtype=torch.int64)
        )


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
