"""Decoder input: visible tokens at their places, the mask token elsewhere, plus positions.

Source: He et al., "Masked Autoencoders Are Scalable Vision Learners" (2021), section 3, "MAE decoder".
Token or mask token and position are added in fp32, whatever their types, and rounded once, to the tokens' type.

Shape suffixes: B = samples, N = prefix + K tokens from the encoder, K = visible, L = prefix + patches, D = width.
"""

# Launch keywords such as num_warps are not in a kernel's signature.
# pyright: reportCallIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from mnemos.kernels._common.launch import launch_counts, num_programs
from mnemos.kernels._common.places import chunk_of, flat_rows, put_rows, row_tiles, slot_of_places

ROWS = 8  # places of a tile: with 16, registers keep half as many programs on a multiprocessor
SAMPLES = 2  # samples that share one load of the positions
PROGRAMS_PER_PROCESSOR = 10  # of backward; every program leaves its part of the mask token's gradient


# ---- reference: the definition. Any device, any dtype; CPU runs use it.
def assemble_decoder_tokens_reference(
    tokens_BND: Tensor, mask_token_D: Tensor, positions_LD: Tensor, visible_BK: Tensor, num_prefix: int
) -> Tensor:
    """Return what `assemble_decoder_tokens` defines, in plain PyTorch; fp64 throughout for fp64 tokens."""
    dtype, inside = tokens_BND.dtype, torch.promote_types(tokens_BND.dtype, torch.float32)
    B, (L, D) = len(tokens_BND), positions_LD.shape
    positions_LD = positions_LD.to(inside)
    places_BN = _token_places(visible_BK, num_prefix)
    # What a place shows where nothing was seen there is the same in every sample.
    masked_LD = (mask_token_D.to(inside) + positions_LD).to(dtype)
    out_BLD = masked_LD.expand(B, L, D).contiguous()
    seen = positions_LD.index_select(0, places_BN.view(-1)).add_(tokens_BND.view(-1, D)).to(dtype)
    put_rows(out_BLD.view(-1, D), flat_rows(places_BN, L), seen)
    return out_BLD


def assemble_decoder_tokens_backward_reference(
    grad_BLD: Tensor, visible_BK: Tensor, num_prefix: int, with_positions: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of tokens, mask token and positions; the last two in fp32, or in fp64 for fp64."""
    B, L, D = grad_BLD.shape
    inside = torch.promote_types(grad_BLD.dtype, torch.float32)
    rows = flat_rows(_token_places(visible_BK, num_prefix), L)
    grad_rows = grad_BLD.view(-1, D)
    masked = torch.ones(B * L, dtype=torch.bool, device=grad_BLD.device).index_fill_(0, rows, False)
    grad_mask_D = grad_rows.index_select(0, masked.nonzero().view(-1)).sum(0, dtype=inside)
    grad_tokens_BND = grad_rows.index_select(0, rows).view(B, num_prefix + visible_BK.shape[1], D)
    return grad_tokens_BND, grad_mask_D, _grad_positions(grad_BLD, with_positions)


def _token_places(visible_BK: Tensor, num_prefix: int) -> Tensor:
    """Return [B, N]: the place of every token in the full sequence."""
    prefix = torch.arange(num_prefix, device=visible_BK.device).expand(len(visible_BK), num_prefix)
    return torch.cat([prefix, visible_BK + num_prefix], 1)


def _grad_positions(grad_BLD: Tensor, wanted: bool) -> Tensor:
    """Return the sum over the batch, [L, D], or nothing; positions are trained in one preset only."""
    inside = torch.promote_types(grad_BLD.dtype, torch.float32)
    return grad_BLD.sum(0, dtype=inside) if wanted else grad_BLD.new_empty(0, dtype=inside)


# ---- device code: tiles of places by columns.
@triton.jit
def _token_rows(visible_ptr, K, place, PREFIX: tl.constexpr, CHUNK: tl.constexpr):
    """Return which of a sample's tokens stands at a place, -1 where the mask token does."""
    slot = slot_of_places(visible_ptr, K, place - PREFIX, CHUNK)
    return tl.where(place < PREFIX, place, tl.where(slot >= 0, slot + PREFIX, -1))


@triton.jit
def _assemble_kernel(
    tokens_ptr,  # [B, PREFIX + K, D]
    mask_token_ptr,  # [D]
    positions_ptr,  # [L, D]
    visible_ptr,  # [B, K] int64
    out_ptr,  # [B, L, D]
    B,
    L,
    K,
    PREFIX: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    SAMPLES: tl.constexpr,
):
    tiles_across = tl.cdiv(D, COLUMNS)
    tiles_down = tl.cdiv(L, ROWS)
    program = tl.program_id(0)
    column = program % tiles_across * COLUMNS + tl.arange(0, COLUMNS)
    place = program // tiles_across % tiles_down * ROWS + tl.arange(0, ROWS)
    first = program // (tiles_across * tiles_down) * SAMPLES
    inside = (place < L)[:, None] & (column < D)[None, :]
    # One sample stays far below 2**31 values; only the batch passes it.
    offset = place[:, None] * D + column[None, :]
    position = tl.load(positions_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    mask_token = tl.load(mask_token_ptr + column, mask=column < D, other=0.0).to(tl.float32)
    for step in range(SAMPLES):
        sample = (first + step).to(tl.int64)
        if sample < B:
            token = _token_rows(visible_ptr + sample * K, K, place, PREFIX, CHUNK)
            seen = inside & (token >= 0)[:, None]
            source = tokens_ptr + sample * (PREFIX + K) * D + (token[:, None] * D + column[None, :])
            values = tl.load(source, mask=seen, other=0.0).to(tl.float32)
            values = tl.where(seen, values, mask_token[None, :]) + position
            tl.store(out_ptr + sample * L * D + offset, values.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _assemble_backward_kernel(
    grad_ptr,  # [B, L, D]
    visible_ptr,  # [B, K] int64
    grad_tokens_ptr,  # [B, PREFIX + K, D] out
    partial_ptr,  # [programs, D] fp32 out: sums over the masked places each program met
    num_tiles,  # B times the tiles of places
    programs,
    L,
    K,
    PREFIX: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    tiles_across = tl.cdiv(D, COLUMNS)
    tiles_down = tl.cdiv(L, ROWS)
    column = tl.program_id(0) % tiles_across * COLUMNS + tl.arange(0, COLUMNS)
    program = tl.program_id(0) // tiles_across
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for tile in range(program, num_tiles, programs):
        sample = tl.cast(tile // tiles_down, tl.int64)
        place = tile % tiles_down * ROWS + tl.arange(0, ROWS)
        inside = (place < L)[:, None] & (column < D)[None, :]
        source = grad_ptr + sample * L * D + (place[:, None] * D + column[None, :])
        token = _token_rows(visible_ptr + sample * K, K, place, PREFIX, CHUNK)
        grad = tl.load(source, mask=inside, other=0.0)
        seen = (token >= 0)[:, None]
        target = grad_tokens_ptr + sample * (PREFIX + K) * D + (token[:, None] * D + column[None, :])
        tl.store(target, grad, mask=inside & seen)
        total += tl.where(seen, 0.0, grad.to(tl.float32))
    tl.store(partial_ptr + program.to(tl.int64) * D + column, tl.sum(total, 0), mask=column < D)


def launch_assemble_decoder_tokens(
    tokens_BND: Tensor, mask_token_D: Tensor, positions_LD: Tensor, visible_BK: Tensor, num_prefix: int
) -> Tensor:
    """Run the forward device code; shapes were checked by the public function."""
    launch_counts["assemble_decoder_tokens"] += 1
    (B, K), (L, D) = visible_BK.shape, positions_LD.shape
    out_BLD = tokens_BND.new_empty(B, L, D)
    tiles = row_tiles(D, ROWS)
    tiles_of_one = triton.cdiv(D, tiles["COLUMNS"]) * triton.cdiv(L, ROWS)
    _assemble_kernel[(tiles_of_one * triton.cdiv(B, SAMPLES),)](
        tokens_BND, mask_token_D, positions_LD, visible_BK, out_BLD, B, L, K,
        PREFIX=num_prefix, **tiles, CHUNK=chunk_of(K), SAMPLES=SAMPLES,
    )  # fmt: skip
    return out_BLD


def launch_assemble_decoder_tokens_backward(
    grad_BLD: Tensor, visible_BK: Tensor, num_prefix: int, with_positions: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the backward device code: one pass over the gradient for tokens and mask token.

    Returns:
        [B, N, D] in the gradient's type; fp32 [D]; fp32 [L, D], or empty where it is not wanted.
    """
    launch_counts["assemble_decoder_tokens_backward"] += 1
    (B, L, D), K = grad_BLD.shape, visible_BK.shape[1]
    tiles = row_tiles(D, ROWS)
    num_tiles, tiles_across = B * triton.cdiv(L, ROWS), triton.cdiv(D, tiles["COLUMNS"])
    each = max(1, PROGRAMS_PER_PROCESSOR // tiles_across)
    programs = num_programs(grad_BLD.device, num_tiles, each=each)
    grad_tokens_BND = grad_BLD.new_empty(B, num_prefix + K, D)
    partial = grad_BLD.new_empty(programs, D, dtype=torch.float32)
    _assemble_backward_kernel[(programs * tiles_across,)](
        grad_BLD, visible_BK, grad_tokens_BND, partial, num_tiles, programs, L, K,
        PREFIX=num_prefix, **tiles, CHUNK=chunk_of(K),
    )  # fmt: skip
    return grad_tokens_BND, partial.sum(0), _grad_positions(grad_BLD, with_positions)


# ---- custom ops: forward and backward, each for CUDA and CPU.
@torch.library.custom_op("mnemos::assemble_decoder_tokens", mutates_args=(), device_types="cuda")
def _fwd(tokens: Tensor, mask_token: Tensor, positions: Tensor, visible: Tensor, num_prefix: int) -> Tensor:
    return launch_assemble_decoder_tokens(tokens, mask_token, positions, visible, num_prefix)


_fwd.register_kernel("cpu")(assemble_decoder_tokens_reference)


@_fwd.register_fake
def _(tokens, mask_token, positions, visible, num_prefix):
    return tokens.new_empty(tokens.shape[0], *positions.shape)


@torch.library.custom_op("mnemos::assemble_decoder_tokens_backward", mutates_args=(), device_types="cuda")
def _bwd(
    grad: Tensor, visible: Tensor, num_prefix: int, with_positions: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return launch_assemble_decoder_tokens_backward(grad, visible, num_prefix, with_positions)


_bwd.register_kernel("cpu")(assemble_decoder_tokens_backward_reference)


@_bwd.register_fake
def _(grad, visible, num_prefix, with_positions):
    inside = torch.promote_types(grad.dtype, torch.float32)
    (B, L, D), K = grad.shape, visible.shape[1]
    grad_positions = grad.new_empty((L, D) if with_positions else 0, dtype=inside)
    return grad.new_empty(B, num_prefix + K, D), grad.new_empty(D, dtype=inside), grad_positions


def _setup_context(ctx, inputs, output) -> None:
    _, mask_token, positions, visible, ctx.num_prefix = inputs
    ctx.dtypes = mask_token.dtype, positions.dtype
    ctx.save_for_backward(visible)


def _backward(ctx, grad):
    (visible,) = ctx.saved_tensors
    mask_dtype, positions_dtype = ctx.dtypes
    with_positions = ctx.needs_input_grad[2]
    # A sum's gradient comes as one value with strides of zero; a row here must be memory.
    grad_tokens, grad_mask, grad_positions = _bwd(grad.contiguous(), visible, ctx.num_prefix, with_positions)
    grad_positions = grad_positions.to(positions_dtype) if with_positions else None
    return grad_tokens, grad_mask.to(mask_dtype), grad_positions, None, None


_fwd.register_autograd(_backward, setup_context=_setup_context)


# ---- public function: checks, then one call. The only name engine/ imports.
def assemble_decoder_tokens(
    tokens_BND: Tensor, mask_token_D: Tensor, positions_LD: Tensor, visible_BK: Tensor, *, num_prefix: int = 1
) -> Tensor:
    """Return the full sequence the decoder sees.

    Args:
        tokens_BND: `num_prefix` class tokens, then the K visible tokens in the order of `visible_BK`; any floating
            type, contiguous like every input; takes the gradient, as do the next two.
        mask_token_D: stands at every patch that is not visible; fp32 or the tokens' type.
        positions_LD: `num_prefix` rows for the class tokens, then one per patch; added everywhere; fp32 or the
            tokens' type.
        visible_BK: int64 patch ids (the prefix not counted), unique within a sample, in any order.
        num_prefix: class tokens in front, at least 0.

    Returns:
        [B, L, D] in the type of the tokens; the sums are made in fp32 and rounded once.

    Raises:
        ValueError: the shapes do not fit each other, ids are not int64, or an input is not contiguous.
    """
    if (
        tokens_BND.dim() != 3
        or positions_LD.dim() != 2
        or num_prefix < 0
        or visible_BK.shape != (tokens_BND.shape[0], tokens_BND.shape[1] - num_prefix)
        or positions_LD.shape[1] != tokens_BND.shape[2]
        or mask_token_D.shape != positions_LD.shape[1:]
        or positions_LD.shape[0] < tokens_BND.shape[1]
    ):
        raise ValueError(
            f"tokens {tuple(tokens_BND.shape)}, mask token {tuple(mask_token_D.shape)}, positions "
            f"{tuple(positions_LD.shape)} and visible {tuple(visible_BK.shape)} must be [B, {num_prefix} + K, D], "
            f"[D], [{num_prefix} + patches, D] and [B, K]"
        )
    if visible_BK.dtype != torch.int64:
        raise ValueError(f"visible ids are {visible_BK.dtype}; pass int64")
    tensors = (tokens_BND, mask_token_D, positions_LD, visible_BK)
    if not all(tensor.is_contiguous() for tensor in tensors):
        raise ValueError("every input must be contiguous; call .contiguous() where you made it")
    return _fwd(tokens_BND, mask_token_D, positions_LD, visible_BK, num_prefix)
