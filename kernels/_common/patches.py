"""Where the values of a patch lie in an image or a volume, on the host and on the device.

An image is a volume of depth one. Patch ids run row-major over the grid of the (mirrored) sample; inside a patch the
order is (z, y, x, channel).

Shape suffixes: B = samples, K = patches asked for, P = values per patch, A = 2 or 3 spatial axes, C = stored channels.
"""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Types that copy their bytes unchanged, by size.
_WORDS = {16: torch.complex128, 8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}


def check_patches(
    images: Tensor,
    ids_BK: Tensor,
    patch: Sequence[int],
    channels: int,
    flip_BA: Tensor | None,
    per_sample: Sequence[Tensor | None],
) -> None:
    """Refuse shapes that do not fit each other; no value is read, that would wait for the device.

    Raises:
        ValueError: naming what came and what is allowed.
    """
    B, axes = images.shape[0], images.dim() - 2
    if axes not in (2, 3) or len(patch) != axes:
        raise ValueError(
            f"images {tuple(images.shape)} with patch {tuple(patch)}; pass [B, C, Y, X] with (y, x) or "
            "[B, C, Z, Y, X] with (z, y, x)"
        )
    if any(size % side for size, side in zip(images.shape[2:], patch, strict=True)):
        raise ValueError(f"images {tuple(images.shape)} are no whole multiple of the patch {tuple(patch)}")
    if images.shape[1] not in (1, channels):
        raise ValueError(f"images {tuple(images.shape)} must have 1 or channels={channels} channels")
    if ids_BK.dim() != 2 or ids_BK.shape[0] != B:
        raise ValueError(f"ids {tuple(ids_BK.shape)} must be [B, K] with B = {B}")
    if flip_BA is not None and (flip_BA.shape != (B, axes) or flip_BA.dtype != torch.bool):
        raise ValueError(f"flip {flip_BA.dtype} {tuple(flip_BA.shape)} must be bool [{B}, {axes}]")
    if any(values is not None and values.shape != (B,) for values in per_sample):
        shapes = [None if values is None else tuple(values.shape) for values in per_sample]
        raise ValueError(f"scale, shift, partner and weight must each be [{B}]; got {shapes}")
    tensors = (images, ids_BK, flip_BA, *per_sample)
    if not all(values is None or values.is_contiguous() for values in tensors):
        raise ValueError("every input must be contiguous; call .contiguous() where you made it")


def raw_patches(
    images: Tensor,
    ids_BK: Tensor,
    patch: Sequence[int],
    channels: int,
    flip_BA: Tensor | None = None,
    source_B: Tensor | None = None,
) -> Tensor:
    """Return the stored values [B, K, P] of the patches asked for, reading nothing else.

    Args:
        images: [B, C, Y, X] or [B, C, Z, Y, X], any type, contiguous.
        ids_BK: int64 patch ids in the grid of the mirrored sample.
        patch: (y, x) or (z, y, x).
        channels: channels of a patch; one stored channel is repeated.
        flip_BA: bool, the axes along which a sample is mirrored.
        source_B: int64, the image each sample reads instead of its own.
    """
    (B, C), (Z, Y, X), (side_z, side_y, side_x) = images.shape[:2], *_as_volume(images, patch)
    device, grid_y, grid_x = images.device, Y // side_y, X // side_x
    flip_z, flip_y, flip_x = (None,) * 3 if flip_BA is None else (None, *flip_BA.unbind(1))[-3:]
    iz_BK = ids_BK.div(grid_y * grid_x, rounding_mode="floor")
    iy_BK = ids_BK.div(grid_x, rounding_mode="floor") % grid_y
    ix_BK = _mirrored(ids_BK % grid_x, grid_x, flip_x)
    z_BKz = _mirrored(_along(iz_BK, side_z), Z, flip_z)
    y_BKy = _mirrored(_along(iy_BK, side_y), Y, flip_y)
    # A row of a patch lies in one piece; copied as few long words it costs a CPU a fraction of the time.
    word = _word(side_x * images.itemsize, int(images.storage_offset()) * images.itemsize)
    num_words = side_x * images.itemsize // word.itemsize
    sample_B = torch.arange(B, device=device) if source_B is None else source_B
    line_BKzy = (sample_B[:, None, None] * (C * Z) + z_BKz)[..., None] * Y + y_BKy[:, :, None]
    row_BKzy = line_BKzy * grid_x + ix_BK[:, :, None, None]
    row_BKzyC = row_BKzy[..., None] + torch.arange(C, device=device) * (Z * Y * grid_x)
    place = (row_BKzyC[..., None] * num_words + torch.arange(num_words, device=device)).flatten()
    values = images.view(word).flatten().index_select(0, place).view(images.dtype)
    values = values.view(*row_BKzyC.shape, side_x)
    if flip_x is not None:
        values = torch.where(flip_x.view(B, 1, 1, 1, 1, 1), values.flip(-1), values)
    return values.transpose(-1, -2).expand(*row_BKzy.shape, side_x, channels).flatten(2)


def _word(*num_bytes: int) -> torch.dtype:
    """Return the longest type whose size divides all these numbers of bytes."""
    return _WORDS[max(size for size in _WORDS if all(number % size == 0 for number in num_bytes))]


def _as_volume(images: Tensor, patch: Sequence[int]) -> tuple[Sequence[int], Sequence[int]]:
    return (1, *images.shape[2:])[-3:], (1, *patch)[-3:]


def _along(cell_BK: Tensor, side: int) -> Tensor:
    """Return the coordinates [B, K, side] that patches cover along one axis."""
    return cell_BK[:, :, None] * side + torch.arange(side, device=cell_BK.device)


def _mirrored(place: Tensor, size: int, flip_B: Tensor | None) -> Tensor:
    """Return coordinates counted from the other end in the mirrored samples."""
    if flip_B is None:
        return place
    return torch.where(flip_B.view(-1, *(1,) * (place.dim() - 1)), size - 1 - place, place)


def geometry(images: Tensor, patch: Sequence[int], channels: int) -> dict[str, Any]:
    """Return the keyword arguments that `patch_offsets` needs of a launch."""
    (Z, Y, X), (side_z, side_y, side_x) = _as_volume(images, patch)
    return {
        "Z": Z,
        "Y": Y,
        "X": X,
        "P": prod(patch) * channels,
        "STORED": images.shape[1],
        "CHANNELS": channels,
        "SIDE_Z": side_z,
        "SIDE_Y": side_y,
        "SIDE_X": side_x,
        "AXES": len(patch),
    }


@triton.jit
def patch_offsets(
    value,  # which of the P values: a scalar or a block of them
    patch_id,
    flip_ptr,  # [AXES] bool of this sample, or None
    Z,
    Y,
    X,
    STORED: tl.constexpr,  # channels in memory, 1 or CHANNELS
    CHANNELS: tl.constexpr,
    SIDE_Z: tl.constexpr,
    SIDE_Y: tl.constexpr,
    SIDE_X: tl.constexpr,
    AXES: tl.constexpr,
):
    """Return the places of values inside their sample's image."""
    grid_y = Y // SIDE_Y
    grid_x = X // SIDE_X
    patch_id = patch_id.to(tl.int32)  # one image stays far below 2**31 values; only the batch passes it
    z = patch_id // (grid_y * grid_x) * SIDE_Z + value // (CHANNELS * SIDE_X * SIDE_Y)
    y = patch_id // grid_x % grid_y * SIDE_Y + value // (CHANNELS * SIDE_X) % SIDE_Y
    x = patch_id % grid_x * SIDE_X + value // CHANNELS % SIDE_X
    if flip_ptr is not None:
        x = tl.where(tl.load(flip_ptr + AXES - 1), X - 1 - x, x)
        y = tl.where(tl.load(flip_ptr + AXES - 2), Y - 1 - y, y)
        if AXES == 3:
            z = tl.where(tl.load(flip_ptr), Z - 1 - z, z)
    offset = (z * Y + y) * X + x
    if STORED > 1:
        offset += value % CHANNELS * (Z * Y * X)
    return offset
