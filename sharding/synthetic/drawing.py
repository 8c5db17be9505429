"""What all generators draw with: seeded streams, anti-aliased edges, smooth random fields.

Legend of array suffixes: N samples, Z, Y, X grid axes. Everything is float32; parameters of a sample are shaped so
that they broadcast against the grid.
"""

import zlib
from typing import Any

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[Any]  # float32 by intent; NumPy's stubs lose the width in mixed arithmetic


def stream(seed: int, *names: str | int) -> np.random.Generator:
    """Return the random generator of one named part of the data: same seed and names, same numbers.

    Args:
        seed: the data set's seed, at least 0.
        names: what the numbers are for, for example ("xray", "train", 12).
    """
    words = [name if isinstance(name, int) else zlib.crc32(name.encode()) for name in names]
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, *words])))


def uniform(rng: np.random.Generator, low: float, high: float, num: int, axes: int = 2) -> F32:
    """Draw one value per sample, [num, 1, ...] with ``axes`` trailing axes of size 1."""
    return rng.uniform(low, high, (num, *[1] * axes)).astype(np.float32)


# These three are called for every drawn shape and work in place: fresh memory costs more than the arithmetic.
def edge(distance: F32, width: float) -> F32:
    """Return 1 inside (distance < 0) and 0 outside, with a smooth ramp ``width`` wide across the boundary."""
    t = distance * (-1 / width)
    t += 0.5
    np.clip(t, 0, 1, out=t)
    ramp = t * -2
    ramp += 3
    ramp *= t
    ramp *= t
    return np.asarray(ramp)


def ellipse(x: F32, y: F32, radius_x: F32 | float, radius_y: F32 | float) -> F32:
    """Return an approximate signed distance to an ellipse around the origin, in the units of x and y."""
    across, along = x / radius_x, y / radius_y
    across *= across
    along *= along
    q = across + along
    np.sqrt(q, out=q)
    q -= 1
    q *= np.minimum(radius_x, radius_y)
    return np.asarray(q, np.float32)


def mix(base: F32, colour: F32 | float, share: F32) -> F32:
    """Return ``base`` with ``share`` (0 to 1) of it replaced by ``colour``."""
    mixed = share * (colour - base)
    mixed += base
    return np.asarray(mixed, np.float32)


def turn(x: F32, y: F32, angle: F32 | float) -> tuple[F32, F32]:
    """Rotate coordinates by ``angle`` radians: the drawn shape turns by the same angle, clockwise as displayed."""
    c, s = np.cos(angle), np.sin(angle)
    return np.asarray(c * x + s * y, np.float32), np.asarray(c * y - s * x, np.float32)


def by_rank(field: F32, curve: F32) -> F32:
    """Replace the values of each field [N, Y, X] by those of ``curve`` [N, Y * X], ascending, keeping their order."""
    flat = field.reshape(len(field), -1)
    values = np.empty(flat.shape, np.float32)
    np.put_along_axis(
        values, np.argsort(flat, axis=1, kind="stable"), np.broadcast_to(curve, flat.shape), axis=1
    )
    return values.reshape(field.shape)


def upsampler(size: int, cells: int) -> F32:
    """Return the [size, cells + 3] matrix that interpolates a random lattice by cubic B-splines."""
    position = np.linspace(0, cells, size, endpoint=False) + 0.5 * cells / size
    whole = np.floor(position).astype(int)
    t = position - whole
    weights = np.stack([(1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3], 1) / 6
    matrix = np.zeros((size, cells + 3), np.float32)
    for tap in range(4):
        matrix[np.arange(size), whole + tap] = weights[:, tap]
    return matrix


def smooth_field(rng: np.random.Generator, num: int, size: int, cells: int) -> F32:
    """Draw smooth random fields [num, size, size] of about unit variance with ``cells`` bumps along an axis."""
    matrix = upsampler(size, cells)
    lattice = rng.standard_normal((num, cells + 3, cells + 3), np.float32)
    return np.asarray((matrix @ lattice @ matrix.T) * 2.1, np.float32)


def smooth_volume(
    rng: np.random.Generator, num: int, shape: tuple[int, int, int], cells: tuple[int, int, int]
) -> F32:
    """Draw smooth random fields [num, Z, Y, X] of about unit variance with ``cells`` bumps along each axis."""
    up_z, up_y, up_x = (upsampler(size, count) for size, count in zip(shape, cells, strict=True))
    lattice = rng.standard_normal((num, *(count + 3 for count in cells)), np.float32)
    plane = up_y @ lattice @ up_x.T
    return np.asarray(np.einsum("zk,nkyx->nzyx", up_z, plane) * 3.0, np.float32)


def slab_axes(shape: tuple[int, int, int], spacing_mm: tuple[float, float, float]) -> tuple[F32, F32, F32]:
    """Return z [Z, 1, 1], y [Y, 1] and x [X] of a volume's voxels in millimetres from its centre."""
    z, y, x = (
        (np.arange(size, dtype=np.float32) - (size - 1) / 2) * step
        for size, step in zip(shape, spacing_mm, strict=True)
    )
    return z[:, None, None], y[:, None], x


def pick_voxel(organ: npt.NDArray[np.bool_], share: float) -> tuple[int, int, int] | None:
    """Return the voxel a ``share`` (0 to 1) of the way through ``organ`` [Z, Y, X], well inside the volume.

    None where the organ has no voxel outside the margin of a quarter (Z) and a sixth (Y, X).
    """
    depth, height, width = organ.shape
    top, front, right = depth // 4, height // 6, width // 6
    inner = organ[top:-top, front:-front, right:-right]
    spots = np.flatnonzero(inner)
    if not len(spots):
        return None
    z, y, x = np.unravel_index(spots[min(int(share * len(spots)), len(spots) - 1)], inner.shape)
    return int(z) + top, int(y) + front, int(x) + right


def around(
    voxel: tuple[int, int, int], shape: tuple[int, int, int], spacing_mm: tuple[float, float, float]
) -> tuple[F32, F32]:
    """Return distance in millimetres from ``voxel`` and angle in the plane about it, for every voxel [Z, Y, X]."""
    z, y, x = (
        axis - axis.ravel()[place] for axis, place in zip(slab_axes(shape, spacing_mm), voxel, strict=True)
    )
    return np.sqrt(z * z + y * y + x * x), np.arctan2(y, x)[None]
