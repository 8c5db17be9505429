"""Tokens at their places in a longer sequence, rows of a table at all the others.

Source: the decoder's input in He et al., "Masked Autoencoders Are Scalable Vision Learners" (2021), section 3, "MAE
decoder". A place that nobody saw holds mask token plus position, the same in every sample; so does whatever a network
makes of it before the places attend to each other. The table holds it once.
Rows are copied. Backward copies the tokens' gradient and adds the table's up in fp32, in an order that never changes.

Shape suffixes: B = samples, K = visible, N = prefix + K tokens, L = places, S = prefix + L rows, D = width.
"""

# Launch keywords such as num_warps are not in a kernel's signature.
# pyright: reportCallIssue=false

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from mnemos.kernels._common.launch import launch_counts, num_programs
from mnemos.kernels._common.places import flat_rows, put_rows
from mnemos.kernels.gather_tokens import launch_gather_tokens

ROWS = 4  # places of a tile, one for every warp, which looks it up alone: nothing goes through shared memory
ROW_BYTES = 512  # of a tile: 16 for every thread of a warp
SAMPLES = 2  # of a tile: they share the table's rows; 4 take too many registers on sm_80
PROGRAMS_PER_PROCESSOR = 10  # of backward, all at once; every one leaves its part of the table's gradient
CHUNK = 32  # ids compared at once, one by every lane of a warp
BLOCK = 1024  # values of the table's gradient a program adds the parts of


# ---- reference: the definition. Any device, any dtype; CPU runs use it.
def place_tokens_reference(
    tokens_BND: Tensor, table_LD: Tensor, visible_BK: Tensor, num_prefix: int
) -> Tensor:
    """Return what `place_tokens` defines, in plain PyTorch."""
    B, (L, D) = len(tokens_BND), table_LD.shape
    out_BSD = tokens_BND.new_empty(B, num_prefix + L, D)
    # Tokens are then written over a quarter of it: cheaper than to leave those places out.
    out_BSD[:, num_prefix:] = table_LD
    rows = flat_rows(_token_places(visible_BK, num_prefix), num_prefix + L)
    put_rows(out_BSD.view(-1, D), rows, tokens_BND.view(-1, D))
    return out_BSD


def place_tokens_backward_reference(
    grad_BSD: Tensor, visible_BK: Tensor, num_prefix: int, with_table: bool
) -> tuple[Tensor, Tensor]:
    """Return the gradients of tokens and table in the gradient's type; the second empty where it is not wanted."""
    (B, S, D), (L, device) = grad_BSD.shape, (grad_BSD.shape[1] - num_prefix, grad_BSD.device)
    grad_rows = grad_BSD.view(-1, D)
    rows = flat_rows(_token_places(visible_BK, num_prefix), S)
    grad_tokens_BND = grad_rows.index_select(0, rows).view(B, num_prefix + visible_BK.shape[1], D)
    if not with_table:
        return grad_tokens_BND, grad_BSD.new_empty(0)
    masked_LB = torch.ones(B, L, dtype=torch.bool, device=device).scatter_(1, visible_BK, False).t()
    place, sample = masked_LB.nonzero().unbind(1)
    count_L = masked_LB.sum(1)
    # One bag per place adds its rows up in fp32 as it reads them; nothing of the gradient's size is written.
    bags = sample * S + (place + num_prefix), grad_rows, count_L.cumsum(0) - count_L
    return grad_tokens_BND, F.embedding_bag(*bags, mode="sum")


def _token_places(visible_BK: Tensor, num_prefix: int) -> Tensor:
    """Return [B, N]: the row of every token in the full sequence."""
    prefix = torch.arange(num_prefix, device=visible_BK.device).expand(len(visible_BK), num_prefix)
    return torch.cat([prefix, visible_BK + num_prefix], 1)


# ---- device code: tiles of rows by columns. Row r of a tile is its sample r // ROWS at its place r % ROWS, which counts
# from the first row of the sequence, prefix included. A tile's samples stay far below 2**31 values, only the batch
# passes it: so the first of them moves the pointer, and the others are offsets.
@triton.jit
def _tile(S, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return a program's number among those of its places and columns, its first place, and its columns."""
    tiles_across = tl.cdiv(D, COLUMNS)
    tiles_down = tl.cdiv(S, ROWS)
    program = tl.program_id(0)
    column = program % tiles_across * COLUMNS + tl.arange(0, COLUMNS)
    return program // (tiles_across * tiles_down), program // tiles_across % tiles_down * ROWS, column


@triton.jit
def _token_rows(ids_ptr, turn, place, asked, K, PREFIX: tl.constexpr, CHUNK: tl.constexpr):
    """Return which of its sample's tokens stands at a row's place, -1 where none does; `turn` is the sample's."""
    found = tl.full((place.shape[0], CHUNK), -1, tl.int32)
    for start in tl.range(0, K, CHUNK, loop_unroll_factor=2):  # two rounds wait for memory once
        slot = start + tl.arange(0, CHUNK)
        # Every row reads the ids for itself. -1 is the place of a row of the prefix, which is not looked up.
        source = ids_ptr + (turn * K)[:, None] + slot[None, :]
        ids = tl.load(source, mask=asked[:, None] & (slot < K)[None, :], other=-1).to(tl.int32)
        found = tl.where(ids == (place - PREFIX)[:, None], slot[None, :], found)
    slot = tl.max(found, 1)
    return tl.where(place < PREFIX, place, tl.where(slot >= 0, slot + PREFIX, -1))


@triton.jit
def _place_kernel(
    tokens_ptr,  # [B, PREFIX + K, D]
    table_ptr,  # [L, D]
    visible_ptr,  # [B, K] int64
    out_ptr,  # [B, S, D]
    B,
    S,
    K,
    PREFIX: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    SAMPLES: tl.constexpr,
):
    group, start, column = _tile(S, D, ROWS, COLUMNS)
    row = tl.arange(0, SAMPLES * ROWS)
    turn, place = row // ROWS, start + row % ROWS
    first = group.to(tl.int64) * SAMPLES
    asked = (place < S) & (first + turn < B)
    inside = asked[:, None] & (column < D)[None, :]
    # The table's rows are on their way while the ids are searched; after the first sample they come from L1.
    of_table = table_ptr + ((place - PREFIX) * D)[:, None] + column[None, :]
    table = tl.load(of_table, mask=inside & (place >= PREFIX)[:, None], other=0.0)
    token = _token_rows(visible_ptr + first * K, turn, place, asked, K, PREFIX, CHUNK)
    seen = (token >= 0)[:, None]
    source = tokens_ptr + first * (PREFIX + K) * D
    source += ((turn * (PREFIX + K) + token) * D)[:, None] + column[None, :]
    tokens = tl.load(source, mask=inside & seen, other=0.0)
    target = out_ptr + first * S * D
    target += ((turn * S + place) * D)[:, None] + column[None, :]
    tl.store(target, tl.where(seen, tokens, table), mask=inside)


@triton.jit
def _place_backward_kernel(
    grad_ptr,  # [B, S, D]
    visible_ptr,  # [B, K] int64
    grad_tokens_ptr,  # [B, PREFIX + K, D] out
    parts_ptr,  # [parts, L, D] fp32 out: sums over each part's samples
    each,  # samples of a part
    B,
    S,
    K,
    PREFIX: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    SAMPLES: tl.constexpr,
):
    part, start, column = _tile(S, D, ROWS, COLUMNS)
    row = tl.arange(0, SAMPLES * ROWS)
    turn, place = row // ROWS, start + row % ROWS
    first = part * each
    last = tl.minimum(first + each, B)
    inside = (place < S)[:, None] & (column < D)[None, :]
    offset = ((turn * S + place) * D)[:, None] + column[None, :]
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    source = grad_ptr + first.to(tl.int64) * S * D
    grad = tl.load(source + offset, mask=inside & (first + turn < last)[:, None], other=0.0)
    for step in range(first, last, SAMPLES):
        sample = tl.cast(step, tl.int64)
        asked = step + turn < last
        token = _token_rows(visible_ptr + sample * K, turn, place, asked, K, PREFIX, CHUNK)
        seen = (token >= 0)[:, None]
        # The next samples' values are on their way while these are used, and while the next ids are searched.
        source = grad_ptr + (sample + SAMPLES) * S * D
        coming = tl.load(source + offset, mask=inside & (step + SAMPLES + turn < last)[:, None], other=0.0)
        target = grad_tokens_ptr + sample * (PREFIX + K) * D
        target += ((turn * (PREFIX + K) + token) * D)[:, None] + column[None, :]
        tl.store(target, grad, mask=inside & (asked[:, None] & seen))
        masked = tl.where(seen, 0.0, grad.to(tl.float32))
        total += tl.sum(tl.reshape(masked, (SAMPLES, ROWS, COLUMNS)), 0)
        grad = coming
    place = start + tl.arange(0, ROWS)
    target = parts_ptr + (part.to(tl.int64) * (S - PREFIX) + place - PREFIX)[:, None] * D + column[None, :]
    tl.store(target, total, mask=((place >= PREFIX) & (place < S))[:, None] & (column < D)[None, :])


@triton.jit
def _add_parts_kernel(
    parts_ptr,  # [parts, values] fp32
    out_ptr,  # [values]
    num_parts,
    num_values,
    BLOCK: tl.constexpr,
):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < num_values
    total = tl.zeros((BLOCK,), tl.float32)
    for part in range(num_parts):
        source = parts_ptr + tl.cast(part, tl.int64) * num_values + place
        total += tl.load(source, mask=inside, other=0.0)
    tl.store(out_ptr + place, total.to(out_ptr.dtype.element_ty), mask=inside)


def _tiles(width: int, dtype: torch.dtype) -> dict[str, Any]:
    """Return the launch keywords of both kernels for rows of `width` values."""
    columns = min(ROW_BYTES // dtype.itemsize, triton.next_power_of_2(width))
    tile = {"ROWS": ROWS, "COLUMNS": columns, "CHUNK": CHUNK, "SAMPLES": SAMPLES}
    return {"D": width, **tile, "num_warps": ROWS}


def launch_place_tokens(tokens_BND: Tensor, table_LD: Tensor, visible_BK: Tensor, num_prefix: int) -> Tensor:
    """Run the forward device code; shapes were checked by the public function."""
    launch_counts["place_tokens"] += 1
    (B, K), (L, D) = visible_BK.shape, table_LD.shape
    S = num_prefix + L
    out_BSD = tokens_BND.new_empty(B, S, D)
    tiles = _tiles(D, tokens_BND.dtype)
    grid = (triton.cdiv(D, tiles["COLUMNS"]) * triton.cdiv(S, ROWS) * triton.cdiv(B, SAMPLES),)
    _place_kernel[grid](
        tokens_BND, table_LD, visible_BK, out_BSD, B, S, K, PREFIX=num_prefix, **tiles
    )  # fmt: skip
    return out_BSD


def launch_place_tokens_backward(
    grad_BSD: Tensor, visible_BK: Tensor, num_prefix: int, with_table: bool
) -> tuple[Tensor, Tensor]:
    """Run the backward device code: one pass over the gradient, and one over the parts of the table's.

    Returns:
        [B, N, D] and [L, D] in the gradient's type; the second empty where it is not wanted.
    """
    launch_counts["place_tokens_backward"] += 1
    if not with_table:  # every row has one source, and three quarters need not be read
        grad_tokens_BND = launch_gather_tokens(grad_BSD, _token_places(visible_BK, num_prefix))
        return grad_tokens_BND, grad_BSD.new_empty(0)
    (B, S, D), K = grad_BSD.shape, visible_BK.shape[1]
    L, tiles, groups = S - num_prefix, _tiles(D, grad_BSD.dtype), triton.cdiv(B, SAMPLES)
    tiles_of_one = triton.cdiv(D, tiles["COLUMNS"]) * triton.cdiv(S, ROWS)
    programs = num_programs(grad_BSD.device, tiles_of_one * groups, each=PROGRAMS_PER_PROCESSOR)
    each = triton.cdiv(groups, max(1, programs // tiles_of_one)) * SAMPLES
    num_parts = triton.cdiv(B, each)
    grad_tokens_BND = grad_BSD.new_empty(B, num_prefix + K, D)
    grad_table_LD = grad_BSD.new_empty(L, D)
    parts = grad_BSD.new_empty(num_parts, L, D, dtype=torch.float32)
    _place_backward_kernel[(tiles_of_one * num_parts,)](
        grad_BSD, visible_BK, grad_tokens_BND, parts, each, B, S, K, PREFIX=num_prefix, **tiles
    )  # fmt: skip
    _add_parts_kernel[(triton.cdiv(L * D, BLOCK),)](parts, grad_table_LD, num_parts, L * D, BLOCK)
    return grad_tokens_BND, grad_table_LD


# ---- custom ops: forward and backward, each for CUDA and CPU.
@torch.library.custom_op("mnemos::place_tokens", mutates_args=(), device_types="cuda")
def _fwd(tokens: Tensor, table: Tensor, visible: Tensor, num_prefix: int) -> Tensor:
    return launch_place_tokens(tokens, table, visible, num_prefix)


_fwd.register_kernel("cpu")(place_tokens_reference)


@_fwd.register_fake
def _(tokens, table, visible, num_prefix):
    return tokens.new_empty(tokens.shape[0], num_prefix + table.shape[0], table.shape[1])


@torch.library.custom_op("mnemos::place_tokens_backward", mutates_args=(), device_types="cuda")
def _bwd(grad: Tensor, visible: Tensor, num_prefix: int, with_table: bool) -> tuple[Tensor, Tensor]:
    return launch_place_tokens_backward(grad, visible, num_prefix, with_table)


_bwd.register_kernel("cpu")(place_tokens_backward_reference)


@_bwd.register_fake
def _(grad, visible, num_prefix, with_table):
    (B, S, D), K = grad.shape, visible.shape[1]
    return grad.new_empty(B, num_prefix + K, D), grad.new_empty((S - num_prefix, D) if with_table else (0,))


def _setup_context(ctx, inputs, output) -> None:
    *_, visible, ctx.num_prefix = inputs
    ctx.save_for_backward(visible)


def _backward(ctx, grad):
    (visible,) = ctx.saved_tensors
    with_table = ctx.needs_input_grad[1]
    # A sum's gradient comes as one value with strides of zero; a row here must be memory.
    grad_tokens, grad_table = _bwd(grad.contiguous(), visible, ctx.num_prefix, with_table)
    return grad_tokens, grad_table if with_table else None, None, None


_fwd.register_autograd(_backward, setup_context=_setup_context)


# ---- public function: checks, then one call. The only name engine/ imports.
def place_tokens(tokens_BND: Tensor, table_LD: Tensor, visible_BK: Tensor, *, num_prefix: int = 1) -> Tensor:
    """Return the full sequence: the prefix, then every place's token, or its row of the table where it has none.

    Args:
        tokens_BND: `num_prefix` tokens in front, then the K visible ones in the order of `visible_BK`; any floating
            type, contiguous like every input; takes the gradient, as does the next.
        table_LD: what stands at a place that is not visible, the same in every sample; the tokens' type.
        visible_BK: int64, 0 to L - 1, unique within a sample, in any order (values are not checked: that would wait
            for the device).

    Returns:
        [B, num_prefix + L, D] in the type of the tokens. In backward the table's rows get the sum over the samples in
        which they stand, made in fp32 (fp64 for fp64 on a CPU) and rounded once, the same in every run.

    Raises:
        ValueError: the shapes do not fit each other, the types differ, ids are not int64, or an input is not contiguous.
    """
    if (
        tokens_BND.dim() != 3
        or table_LD.dim() != 2
        or num_prefix < 0
        or visible_BK.shape != (tokens_BND.shape[0], tokens_BND.shape[1] - num_prefix)
        or table_LD.shape[1] != tokens_BND.shape[2]
        or table_LD.shape[0] < visible_BK.shape[1]
    ):
        raise ValueError(
            f"tokens {tuple(tokens_BND.shape)}, table {tuple(table_LD.shape)} and visible {tuple(visible_BK.shape)} "
            f"must be [B, {num_prefix} + K, D], [L, D] and [B, K] with K at most L"
        )
    if table_LD.dtype != tokens_BND.dtype:
        raise ValueError(
            f"table is {table_LD.dtype}, tokens are {tokens_BND.dtype}; cast one, or make both in one"
        )
    if visible_BK.dtype != torch.int64:
        raise ValueError(f"visible ids are {visible_BK.dtype}; pass int64")
    if not all(tensor.is_contiguous() for tensor in (tokens_BND, table_LD, visible_BK)):
        raise ValueError("every input must be contiguous; call .contiguous() where you made it")
    return _fwd(tokens_BND, table_LD, visible_BK, num_prefix)
