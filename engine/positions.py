"""Positions on a grid: learned tables that interpolate, and fixed sine-cosine tables.

Shape suffixes: L = places of a grid, D = width; Z, Y, X = grid sizes.
"""

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor


def interpolate_table(table_LD: Tensor, grid: tuple[int, ...], to: tuple[int, ...]) -> Tensor:
    """Return a position table resampled from one grid to another, bicubic in plane and linear in depth.

    Args:
        table_LD: rows in C order over `grid`.
        grid: sizes the table was made for, (Y, X) or (Z, Y, X).
        to: sizes wanted; the same number of axes.

    Returns:
        [prod(to), D]; the table itself where the grids agree.
    """
    if grid == to:
        return table_LD
    width = table_LD.shape[1]
    in_plane = table_LD.float().reshape(-1, *grid[-2:], width).permute(0, 3, 1, 2)
    in_plane = F.interpolate(in_plane, size=to[-2:], mode="bicubic", align_corners=False)
    rows_ZLD = in_plane.permute(0, 2, 3, 1).reshape(in_plane.shape[0], -1, width)
    if len(grid) == 3 and grid[0] != to[0]:
        depth_LDZ = rows_ZLD.permute(1, 2, 0)
        rows_ZLD = F.interpolate(depth_LDZ, size=to[0], mode="linear", align_corners=False).permute(2, 0, 1)
    return rows_ZLD.reshape(-1, width).to(table_LD.dtype)


def sin_cos_table(grid: tuple[int, ...], width: int) -> Tensor:
    """Return fixed sine-cosine positions fp32 [prod(grid), width] (Vaswani et al., 2017, section 3.5, per axis).

    The width is divided over the axes in even parts; what is left over stays 0.
    """
    per_axis = width // len(grid) // 2 * 2
    table = torch.zeros(math.prod(grid), width)
    places = torch.cartesian_prod(*(torch.arange(size, dtype=torch.float64) for size in grid)).reshape(
        -1, len(grid)
    )
    frequency = 10_000.0 ** -(torch.arange(per_axis // 2, dtype=torch.float64) / (per_axis // 2))
    edges = [axis * per_axis for axis in range(len(grid) + 1)]
    for axis, (start, end) in enumerate(pairwise(edges)):
        angle = places[:, axis, None] * frequency
        table[:, start:end] = torch.cat([angle.sin(), angle.cos()], dim=1).float()
    return table
