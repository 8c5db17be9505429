"""Which of a sample's ids stands at a place, on the host and on the device, and the tiles that copy rows of tokens.

Shape suffixes: B = samples, K = ids of a sample, R = rows, S = rows written, D = width.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_COLUMNS = 256  # bf16 values: 16 bytes for each thread of a warp
MAX_CHUNK = 256  # ids compared at once: few enough rounds for a packed text's thousands, no spills

_NOWHERE = tl.constexpr(-(2**31))  # below every place, also below those in front of the first id


def row_tiles(width: int, rows: int) -> dict[str, Any]:
    """Return the launch keywords of a kernel that copies rows of `width` values, so many at a time."""
    columns = min(MAX_COLUMNS, triton.next_power_of_2(width))
    return {"D": width, "ROWS": rows, "COLUMNS": columns, "num_warps": 4}


def chunk_of(num_ids: int) -> int:
    """Return how many ids `slot_of_places` compares at once."""
    return min(MAX_CHUNK, max(16, triton.next_power_of_2(num_ids)))


def flat_rows(ids_BK: Tensor, num_tokens: int) -> Tensor:
    """Return [B * K] int64: where each sample's ids lie among the rows of all samples."""
    first_B1 = torch.arange(0, ids_BK.shape[0] * num_tokens, num_tokens, device=ids_BK.device)[:, None]
    return (ids_BK + first_B1).view(-1)


def put_rows(out_RD: Tensor, rows_S: Tensor, values_SD: Tensor) -> None:
    """Write values into rows of a fresh `out_RD`; both are contiguous."""
    num_bytes, offset = (number * out_RD.itemsize for number in (out_RD.shape[1], values_SD.storage_offset()))
    traced = out_RD.requires_grad or values_SD.requires_grad  # autograd does not see through a change of type
    if out_RD.device.type == "cpu" and num_bytes % 16 == offset % 16 == 0 and not traced:
        # Few long words instead of many short ones: a third of the time.
        out_RD, values_SD = out_RD.view(torch.complex128), values_SD.view(torch.complex128)
    out_RD.index_copy_(0, rows_S, values_SD)


@triton.jit
def slot_of_places(
    ids_ptr,  # [K] int64 of one sample, unique, in any order
    num_ids,
    place,  # block of int32
    CHUNK: tl.constexpr,
):
    """Return k where ids[k] is the place, -1 where none is."""
    found = tl.full((place.shape[0], CHUNK), -1, tl.int32)
    for start in range(0, num_ids, CHUNK):
        slot = start + tl.arange(0, CHUNK)
        ids = tl.load(ids_ptr + slot, mask=slot < num_ids, other=_NOWHERE).to(tl.int32)
        found = tl.where(place[:, None] == ids[None, :], slot[None, :], found)
    return tl.max(found, 1)
