"""gather_tokens: reference and device code, forward and backward, against loops. Rows are copied, so nothing may differ."""

from typing import Any

import pytest
import torch
from torch import Tensor

from mnemos.kernels._common.launch import launch_counts
from mnemos.kernels.gather_tokens import (
    gather_tokens,
    gather_tokens_backward_reference,
    gather_tokens_reference,
    launch_gather_tokens,
    launch_gather_tokens_backward,
)

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
SHAPES = [
    pytest.param(1, 1, 1, 1, id="smallest"),
    pytest.param(2, 5, 3, 7, id="B2-L5-K3-D7"),
    pytest.param(3, 9, 9, 4, id="K-equals-L"),
    pytest.param(2, 17, 1, 40, id="K1"),
    pytest.param(2, 6, 0, 8, id="nothing-asked-for"),
    pytest.param(3, 65, 48, 128, id="sample-decoder"),
    pytest.param(2, 197, 147, 512, id="decoder-image"),
    pytest.param(2, 145, 108, 512, id="decoder-volume"),
    pytest.param(1, 1000, 300, 768, id="base-text"),
    pytest.param(1, 37, 20, 1024, id="large"),
    pytest.param(1, 50, 49, 1280, id="huge"),
    pytest.param(1, 113, 17, 1408, id="giant-text"),
]
REAL_SHAPES = [
    pytest.param(128, 197, 147, 512, id="decoder-image"),
    pytest.param(128, 145, 108, 512, id="decoder-volume"),
    pytest.param(1, 14_001, 2_003, 768, id="base-text"),
    pytest.param(1, 28_000, 20_000, 1408, id="giant-text"),
]


def make(B: int, L: int, K: int, D: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return x, ids in no order, and the gradient of the rows asked for."""
    g = torch.Generator().manual_seed(L + D)
    ids = torch.stack([torch.randperm(L, generator=g)[:K] for _ in range(B)])
    x, grad = (torch.randn(B, rows, D, generator=g).to(dtype) for rows in (L, K))
    return x, ids, grad


def by_loop(x: Tensor, ids: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    out, grad_x = torch.zeros_like(grad), torch.zeros_like(x)
    for b in range(ids.shape[0]):
        for k, place in enumerate(ids[b].tolist()):
            out[b, k] = x[b, place]
            grad_x[b, place] = grad[b, k]
    return out, grad_x


@DTYPES
@pytest.mark.parametrize(("B", "L", "K", "D"), SHAPES)
def test_device_code_and_public_function_copy_rows_and_their_gradients(
    B: int, L: int, K: int, D: int, dtype: torch.dtype, device: torch.device
) -> None:
    x, ids, grad = make(B, L, K, D, dtype)
    expected, expected_grad = by_loop(x, ids, grad)

    before = launch_counts.copy()
    out = launch_gather_tokens(x.to(device), ids.to(device))
    grad_x = launch_gather_tokens_backward(grad.to(device), ids.to(device), L)
    for name in ("gather_tokens", "gather_tokens_backward"):
        assert launch_counts[name] == before[name] + 1
    assert out.dtype == grad_x.dtype == dtype
    assert out.cpu().equal(expected) and grad_x.cpu().equal(expected_grad)

    leaf = x.clone().requires_grad_()
    out = gather_tokens(leaf, ids)
    out.backward(grad)
    assert leaf.grad is not None
    assert out.equal(expected) and leaf.grad.equal(expected_grad)


def test_what_was_not_asked_for_does_not_leak(device: torch.device) -> None:
    x = torch.full((2, 20, 3), torch.nan)
    x[0, 17], x[1, 2] = 1.0, 2.0
    grad, ids = torch.full((2, 1, 3), torch.inf), torch.tensor([[17], [2]])
    expected = torch.tensor([1.0, 2.0])[:, None, None].expand(2, 1, 3)
    assert gather_tokens(x, ids).equal(expected)
    assert launch_gather_tokens(x.to(device), ids.to(device)).cpu().equal(expected)
    grad_x = gather_tokens_backward_reference(grad, ids, 20)
    launched = launch_gather_tokens_backward(grad.to(device), ids.to(device), 20)
    for ours in (grad_x, launched.cpu()):
        assert ours.isinf().sum() == 6 and ours[0, 17].isinf().all() and ours[1, 2].isinf().all()
        assert ours.nan_to_num(posinf=0.0).eq(0).all()


def test_gradient_is_that_of_the_output() -> None:
    x, ids, _ = make(2, 5, 3, 4, torch.float64)
    leaf = x.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: gather_tokens(x, ids), (leaf,))
    assert torch.autograd.gradcheck(lambda x: gather_tokens_reference(x, ids), (leaf,))
    (grad,) = torch.autograd.grad(gather_tokens(leaf, ids).sum(), leaf)  # arrives as one value without rows
    assert grad.sum() == ids.numel() * 4


def test_rows_in_the_middle_of_a_buffer_are_copied_whole() -> None:
    """Long words need their own alignment; a gradient that starts between two of them is copied by short ones."""
    _, ids, grad = make(2, 9, 4, 8, torch.float32)
    shifted = torch.cat([torch.zeros(1), grad.flatten()])[1:].view_as(grad)
    assert gather_tokens_backward_reference(shifted, ids, 9).equal(
        gather_tokens_backward_reference(grad, ids, 9)
    )


@DTYPES
def test_registered_as_a_custom_op(dtype: torch.dtype) -> None:
    x, ids, _ = make(2, 5, 3, 4, dtype)
    torch.library.opcheck(torch.ops.mnemos.gather_tokens, (x.requires_grad_(), ids))


def test_compiles_as_one_graph() -> None:
    x, ids, grad = make(2, 9, 4, 8, torch.float32)
    compiled = torch.compile(lambda x: gather_tokens(x * 2, ids + 0), fullgraph=True, backend="aot_eager")
    leaf = x.clone().requires_grad_()
    out = compiled(leaf)
    out.backward(grad)
    expected, expected_grad = by_loop(x * 2, ids, grad)
    assert leaf.grad is not None
    assert out.equal(expected) and leaf.grad.equal(expected_grad * 2)


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "another-batch": ({"ids_BK": torch.zeros(3, 2, dtype=torch.int64)}, r"\(2, 5, 3\).*\(3, 2\)"),
    "rows-alone": ({"x_BLD": torch.zeros(5, 3)}, r"\(5, 3\).*\[B, L, D\]"),
    "int32": ({"ids_BK": torch.zeros(2, 2, dtype=torch.int32)}, "int32; pass int64"),
    "x-transposed": ({"x_BLD": torch.zeros(5, 2, 3).transpose(0, 1)}, "contiguous"),
    "ids-sliced": ({"ids_BK": torch.zeros(2, 4, dtype=torch.int64)[:, ::2]}, "contiguous"),
}


@pytest.mark.parametrize(("change", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_named(change: dict[str, Any], message: str) -> None:
    good = {"x_BLD": torch.zeros(2, 5, 3), "ids_BK": torch.zeros(2, 2, dtype=torch.int64)}
    with pytest.raises(ValueError, match=message):
        gather_tokens(**(good | change))


@pytest.mark.gpu
@DTYPES
@pytest.mark.parametrize(("B", "L", "K", "D"), REAL_SHAPES)
def test_cuda_path_on_real_batches(B: int, L: int, K: int, D: int, dtype: torch.dtype) -> None:
    x, ids, grad = (tensor.cuda() for tensor in make(B, L, K, D, dtype))
    before = launch_counts.copy()
    leaf = x.clone().requires_grad_()
    out = gather_tokens(leaf, ids)
    out.backward(grad)
    for name in ("gather_tokens", "gather_tokens_backward"):
        assert launch_counts[name] == before[name] + 1
    assert leaf.grad is not None
    assert out.equal(gather_tokens_reference(x, ids))
    assert leaf.grad.equal(gather_tokens_backward_reference(grad, ids, L))
    torch.library.opcheck(torch.ops.mnemos.gather_tokens, (leaf, ids))
