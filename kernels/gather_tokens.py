"""Rows of a token sequence by their ids, with an exact backward.

Source: the masked-token gather of He et al., "Masked Autoencoders Are Scalable Vision Learners" (2021), section 3.
The ids are unique, so backward adds nothing up: it writes every row once, the gradient's or zeros.

Shape suffixes: B = samples, L = tokens, K = tokens kept, D = width.
"""

# Launch keywords such as num_warps are not in a kernel's signature.
# pyright: reportCallIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from mnemos.kernels._common.launch import launch_counts
from mnemos.kernels._common.places import chunk_of, flat_rows, put_rows, row_tiles, slot_of_places

ROWS = 16  # of a tile: with 256 bf16 values each, four 16-byte accesses in flight per thread of four warps


# ---- reference: the definition. Any device, any dtype; CPU runs use it.
def gather_tokens_reference(x_BLD: Tensor, ids_BK: Tensor) -> Tensor:
    """Return what `gather_tokens` defines, in plain PyTorch."""
    rows = flat_rows(ids_BK, x_BLD.shape[1])
    return x_BLD.flatten(0, 1).index_select(0, rows).view(*ids_BK.shape, x_BLD.shape[2])


def gather_tokens_backward_reference(grad_BKD: Tensor, ids_BK: Tensor, num_tokens: int) -> Tensor:
    """Return the gradient [B, L, D] of the tokens."""
    B, _, D = grad_BKD.shape
    out_BLD = grad_BKD.new_zeros(B, num_tokens, D)
    put_rows(out_BLD.view(-1, D), flat_rows(ids_BK, num_tokens), grad_BKD.view(-1, D))
    return out_BLD


# ---- device code: tiles of rows by columns. K and L of packed text differ in every batch, so they are not specialised.
@triton.jit(do_not_specialize=["num_rows", "L", "K"])
def _gather_tokens_kernel(
    x_ptr,  # [B, L, D]
    ids_ptr,  # [B * K] int64
    out_ptr,  # [B * K, D]
    num_rows,
    L,
    K,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    tiles_across = tl.cdiv(D, COLUMNS)
    program = tl.program_id(0)
    row = (program // tiles_across).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = program % tiles_across * COLUMNS + tl.arange(0, COLUMNS)
    asked = row < num_rows
    inside = asked[:, None] & (column < D)[None, :]
    source = row // K * L + tl.load(ids_ptr + row, mask=asked, other=0)
    values = tl.load(x_ptr + source[:, None] * D + column[None, :], mask=inside, other=0.0)
    tl.store(out_ptr + row[:, None] * D + column[None, :], values, mask=inside)


@triton.jit(do_not_specialize=["L", "K"])
def _gather_tokens_backward_kernel(
    grad_ptr,  # [B, K, D]
    ids_ptr,  # [B, K] int64
    out_ptr,  # [B, L, D]
    L,
    K,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    tiles_down = tl.cdiv(L, ROWS)
    program = tl.program_id(0)
    sample = (program // tiles_down).to(tl.int64)
    place = program % tiles_down * ROWS + tl.arange(0, ROWS)
    slot = slot_of_places(ids_ptr + sample * K, K, place, CHUNK)
    asked = slot >= 0
    source = sample * K + slot
    target = sample * L + place
    for start in range(0, D, COLUMNS):  # the search is paid once for the whole width
        column = start + tl.arange(0, COLUMNS)
        inside = (column < D)[None, :]
        values = tl.load(
            grad_ptr + source[:, None] * D + column[None, :], mask=asked[:, None] & inside, other=0.0
        )
        tl.store(out_ptr + target[:, None] * D + column[None, :], values, mask=(place < L)[:, None] & inside)


def launch_gather_tokens(x_BLD: Tensor, ids_BK: Tensor) -> Tensor:
    """Run the forward device code; shapes were checked by the public function."""
    launch_counts["gather_tokens"] += 1
    (B, K), (L, D) = ids_BK.shape, x_BLD.shape[1:]
    out_BKD = x_BLD.new_empty(B, K, D)
    tiles = row_tiles(D, ROWS)
    grid = (triton.cdiv(B * K, ROWS) * triton.cdiv(D, tiles["COLUMNS"]),)
    _gather_tokens_kernel[grid](x_BLD, ids_BK, out_BKD, B * K, L, K, **tiles)
    return out_BKD


def launch_gather_tokens_backward(grad_BKD: Tensor, ids_BK: Tensor, num_tokens: int) -> Tensor:
    """Run the backward device code; every row of the result is written exactly once."""
    launch_counts["gather_tokens_backward"] += 1
    B, K, D = grad_BKD.shape
    out_BLD = grad_BKD.new_empty(B, num_tokens, D)
    tiles = row_tiles(D, ROWS)
    grid = (B * triton.cdiv(num_tokens, ROWS),)
    _gather_tokens_backward_kernel[grid](grad_BKD, ids_BK, out_BLD, num_tokens, K, **tiles, CHUNK=chunk_of(K))
    return out_BLD


# ---- custom ops: forward and backward, each for CUDA and CPU.
@torch.library.custom_op("mnemos::gather_tokens", mutates_args=(), device_types="cuda")
def _fwd(x: Tensor, ids: Tensor) -> Tensor:
    return launch_gather_tokens(x, ids)


_fwd.register_kernel("cpu")(gather_tokens_reference)


@_fwd.register_fake
def _(x, ids):
    return x.new_empty(*ids.shape, x.shape[2])


@torch.library.custom_op("mnemos::gather_tokens_backward", mutates_args=(), device_types="cuda")
def _bwd(grad: Tensor, ids: Tensor, num_tokens: int) -> Tensor:
    return launch_gather_tokens_backward(grad, ids, num_tokens)


_bwd.register_kernel("cpu")(gather_tokens_backward_reference)


@_bwd.register_fake
def _(grad, ids, num_tokens):
    return grad.new_empty(grad.shape[0], num_tokens, grad.shape[2])


def _setup_context(ctx, inputs, output) -> None:
    x, ids = inputs
    ctx.num_tokens = x.shape[1]
    ctx.save_for_backward(ids)


def _backward(ctx, grad):
    (ids,) = ctx.saved_tensors
    # A sum's gradient comes as one value with strides of zero; a row here must be memory.
    return _bwd(grad.contiguous(), ids, ctx.num_tokens), None


_fwd.register_autograd(_backward, setup_context=_setup_context)


# ---- public function: checks, then one call. The only name engine/ imports.
def gather_tokens(x_BLD: Tensor, ids_BK: Tensor) -> Tensor:
    """Return x[b, ids[b, k], :].

    Args:
        x_BLD: tokens, any floating type, contiguous; takes the gradient.
        ids_BK: int64, contiguous, 0 to L - 1, unique within a sample, in any order (values are not checked: that
            would wait for the device).

    Returns:
        [B, K, D] in the type of x. In backward the tokens that were not asked for get exactly zero.

    Raises:
        ValueError: the shapes do not fit each other, ids are not int64, or an input is not contiguous.
    """
    if x_BLD.dim() != 3 or ids_BK.dim() != 2 or x_BLD.shape[0] != ids_BK.shape[0]:
        raise ValueError(
            f"x {tuple(x_BLD.shape)} and ids {tuple(ids_BK.shape)} must be [B, L, D] and [B, K] of the same B"
        )
    if ids_BK.dtype != torch.int64:
        raise ValueError(f"ids are {ids_BK.dtype}; pass int64")
    if not (x_BLD.is_contiguous() and ids_BK.is_contiguous()):
        raise ValueError("x and ids must be contiguous; call .contiguous() where you made them")
    return _fwd(x_BLD, ids_BK)
