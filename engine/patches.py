"""Small arithmetic on patches that baselines and pictures share.

Shape suffixes: B = samples, L = patches of a sample, K = some of them, P = values per patch, C = channels.
"""

from collections.abc import Sequence
from itertools import chain
from math import prod

import torch
from torch import Tensor

EPS = 1e-6  # added to a patch's variance, as masked_patch_mse does


def patch_grid(size: Sequence[int], patch: Sequence[int]) -> tuple[int, ...]:
    """Return the number of patches along each axis of a sample of `size`."""
    return tuple(side // edge for side, edge in zip(size, patch, strict=True))


def all_patches(
    images: Tensor, *, patch: Sequence[int], channels: int, scale_B: Tensor, shift_B: Tensor
) -> Tensor:
    """Return fp32 [B, L, P]: the model values of every patch, in the order the model sees them.

    Args:
        images: [B, C, Y, X] or [B, 1, Z, Y, X], as stored.
        patch: (y, x) or (z, y, x).
        channels: channels of a patch; one stored channel is repeated.
        scale_B, shift_B: fp32 [B], model value = stored * scale + shift.
    """
    size, axes = images.shape[2:], len(patch)
    blocks = images.reshape(*images.shape[:2], *chain(*zip(patch_grid(size, patch), patch, strict=True)))
    grids, edges = range(2, 2 + 2 * axes, 2), range(3, 3 + 2 * axes, 2)
    stored = blocks.permute(0, *grids, *edges, 1).reshape(images.shape[0], -1, prod(patch), images.shape[1])
    scale, shift = (number.float().view(-1, 1, 1, 1) for number in (scale_B, shift_B))
    values = torch.addcmul(shift, stored.float(), scale)
    return values.expand(-1, -1, -1, channels).flatten(2)


def patch_statistics(values_BKP: Tensor) -> tuple[Tensor, Tensor]:
    """Return each patch's mean and sqrt(unbiased variance + EPS), both [B, K, 1].

    The pretext target of a value is (value - mean) / deviation.
    """
    variance_BK1, mean_BK1 = torch.var_mean(values_BKP, dim=-1, keepdim=True)
    return mean_BK1, (variance_BK1 + EPS).sqrt()


def join_patches(values_BLP: Tensor, *, size: Sequence[int], patch: Sequence[int], channels: int) -> Tensor:
    """Return [B, channels, *size], the samples whose patches these are: the inverse of `all_patches`.

    Args:
        values_BLP: all patches of the samples, rows of the grid first; a patch's values as (row, column,
            channel) or (z, y, x, channel).
        size: (Y, X) or (Z, Y, X).
        patch: the patch's edges along the same axes.
        channels: channels of a patch.
    """
    axes = len(size)
    blocks = values_BLP.reshape(values_BLP.shape[0], *patch_grid(size, patch), *patch, channels)
    axis_pairs = [(1 + axis, 1 + axes + axis) for axis in range(axes)]  # each axis: its grid, then its edge
    interleaved = [dim for pair in axis_pairs for dim in pair]
    return blocks.permute(0, 1 + 2 * axes, *interleaved).reshape(-1, channels, *size)
