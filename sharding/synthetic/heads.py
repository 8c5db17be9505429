"""MR-like slabs of a head, with the contrast of T1, T2, FLAIR or proton density weighting.

Anatomy in millimetres around the middle of the head (x to the patient's left, y to the back, z to the crown), drawn
as shells of a ball that is squeezed into a head, with ventricles and grey nuclei inside; every tissue then takes the
brightness of the scan's weighting, and the receiving coil shades the whole.

Legend: N samples, Z, Y, X voxels.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mnemos.sharding.synthetic.drawing import (
    F32,
    around,
    edge,
    ellipse,
    mix,
    pick_voxel,
    slab_axes,
    smooth_volume,
    turn,
    uniform,
)

CLASSES = ("healthy", "tumour")
UNITS = 100  # stored steps of a signal of 1

Draw = Callable[[float, float], float]

# Brightness of fat, bone, fluid, grey matter, white matter, tumour core, rim and oedema by weighting.
TISSUES = np.array(
    [
        [1.00, 0.08, 0.18, 0.52, 0.85, 0.35, 0.95, 0.50],  # T1, contrast agent given
        [0.75, 0.06, 1.00, 0.62, 0.38, 0.85, 0.55, 0.88],  # T2
        [0.70, 0.06, 0.10, 0.66, 0.45, 0.55, 0.75, 0.95],  # FLAIR
        [0.80, 0.10, 0.85, 0.82, 0.60, 0.80, 0.75, 0.92],  # proton density
    ],
    np.float32,
)


class _Tissues(NamedTuple):
    """Brightness of each tissue in each sample, [N, 1, 1, 1]; the order of TISSUES."""

    fat: F32
    bone: F32
    fluid: F32
    grey: F32
    white: F32
    core: F32
    rim: F32
    oedema: F32


def draw_heads(
    labels: npt.NDArray[np.int_],
    rng: np.random.Generator,
    shape: tuple[int, int, int],
    spacing_mm: tuple[float, float, float],
) -> F32:
    """Draw slabs of one patient: signal [N, Z, Y, X], at least 0, in arbitrary units of about 1.

    Args:
        labels: indices into CLASSES, [N].
        rng: source of all randomness.
        shape: (Z, Y, X) voxels.
        spacing_mm: (Z, Y, X).
    """
    num = len(labels)

    def person(low: float, high: float) -> float:
        return float(rng.uniform(low, high))

    def scan(low: float, high: float) -> F32:
        return uniform(rng, low, high, num, 3)

    # Where the slab lies in the head; the head about fills the field of view.
    z_mm, y_mm, x_mm = slab_axes(shape, spacing_mm)
    zoom = np.exp(scan(0.3, 0.62))
    x, y = turn(x_mm, y_mm, scan(-0.3, 0.3))
    x, y = x / zoom + scan(-20, 20), y / zoom + scan(-26, 26)
    z = z_mm / zoom + scan(-28, 44) + 0.12 * scan(-1, 1) * x + 0.12 * scan(-1, 1) * y

    weighting = rng.dirichlet(np.full(len(TISSUES), 0.15), num)  # mostly one, sometimes between two
    brightness = weighting @ TISSUES * np.exp(rng.normal(0, 0.07, (num, TISSUES.shape[1])))
    tissues = _Tissues(*brightness.T.astype(np.float32)[..., None, None, None])

    warp = smooth_volume(rng, num, shape, (1, 5, 5))
    q = (
        (x / person(70, 78)) ** 2
        + (y / person(90, 98)) ** 2
        + (z / np.where(z > 0, np.float32(92), np.float32(120))) ** 2
    )
    depth = (1 - np.sqrt(q)) * 84  # millimetres below the skin
    signal = _shells(x, y, z, depth, warp, tissues, person)
    signal = _inside(signal, x, y, z, depth, warp, tissues, person)
    dice = rng.random(
        (num, 5), np.float32
    )  # drawn for every sample, so that a label changes nothing but the tumour
    for i in np.flatnonzero(labels):
        signal[i] = _add_tumour(
            signal[i], depth[i], _Tissues(*(tissue[i] for tissue in tissues)), dice[i], spacing_mm
        )

    tilt = scan(0, 2 * np.pi)
    slope = scan(0.35, 1.0) / 96 * (x_mm * np.cos(tilt) + y_mm * np.sin(tilt))
    coil = np.exp(slope + 0.1 * smooth_volume(rng, num, shape, (1, 2, 2)))
    noise = scan(0.0015, 0.004) * rng.standard_normal((2, *signal.shape), np.float32)
    return np.asarray(np.hypot(signal * coil + noise[0], noise[1]), np.float32)


def _shells(x: F32, y: F32, z: F32, depth: F32, warp: F32, t: _Tissues, person: Draw) -> F32:
    """Return scalp, skull, fluid, the folded cortex over white matter, and the fissure between the halves."""
    signal = mix(np.full_like(depth, 0.05), t.fat, edge(-depth, 4))
    signal = mix(signal, t.bone, edge(person(5, 8) - depth, 4))
    signal = mix(signal, t.fluid, edge(13 - depth, 4))
    fold = np.cos(round(person(11, 16)) * np.arctan2(y, x) + 0.06 * z + 2.5 * warp + person(0, 6))
    signal = mix(signal, t.grey, edge(15 + 3 * fold * np.maximum(fold, 0) - depth, 4))
    signal = mix(signal, t.white, edge(22.5 + 3 * fold - depth, 8))
    side = np.abs(x + 1.2 * warp)
    ends = 32 - np.abs(y) - 0.3 * z  # the fissure is deep in front and behind, shallow in the middle
    signal = mix(signal, t.grey, edge(side - 6, 3) * edge(ends - 2, 8) * edge(14 - depth, 3))
    return mix(signal, t.fluid, edge(side - 1.5, 3) * edge(ends + 2, 8) * edge(12 - depth, 3))


def _inside(signal: F32, x: F32, y: F32, z: F32, depth: F32, warp: F32, t: _Tissues, person: Draw) -> F32:
    """Paint the deep grey nuclei, the ventricles, and below them the cerebellum and the brain stem."""
    side = np.abs(x + 1.2 * warp)
    deep = edge(np.abs(z + 2) - 16, 8)
    signal = mix(signal, t.grey, edge(ellipse(side - 11, y - 12, 9, 14), 4) * deep)
    px, py = turn(side - 27, y, -0.35)
    signal = mix(signal, t.grey, edge(ellipse(px, py, 7, 18), 4) * deep)
    signal = mix(signal, t.grey, edge(ellipse(side - 14, y + 24, 6, 11), 4) * edge(np.abs(z - 4) - 18, 8))
    large = person(0.7, 1.5)
    horn = ellipse(side - 5 - 0.006 * (y - 2) ** 2, y - 4, 4.5 + 3.5 * large, 26 + 8 * large)
    signal = mix(signal, t.fluid, edge(horn, 4) * edge(np.abs(z - 10) - 13 - 2 * large, 6))
    signal = mix(signal, t.fluid, edge(ellipse(side, y - 8, 2 + 1.5 * large, 15), 3) * edge(z - 4, 6))

    low = edge(z + 30, 8) * edge(14 - depth, 4)
    folia = 0.5 + 0.5 * np.cos(0.5 * np.hypot(x, y - 42) + warp)
    signal = mix(signal, mix(t.grey, t.white, 0.5 * folia), edge(ellipse(x, y - 42, 48, 32), 5) * low)
    signal = mix(signal, t.white, edge(ellipse(x, y - 8, 15, 13), 4) * low)
    return mix(signal, t.fluid, edge(ellipse(x, y - 24, 8, 5), 3) * low)


def _add_tumour(
    signal: F32, depth: F32, t: _Tissues, dice: F32, spacing_mm: tuple[float, float, float]
) -> F32:
    """Return one slab [Z, Y, X] with a ring-enhancing tumour and its oedema in the brain."""
    share, size, thick, lump, spread = dice
    voxel = pick_voxel(depth > 26, share)
    assert voxel is not None, "the field of view always holds brain"
    distance, angle = around(voxel, signal.shape, spacing_mm)
    distance = distance * (1 + 0.07 * np.sin(3 * angle + 6 * lump))
    radius = 9 + 9 * size
    halo = radius + 8 + 10 * spread - 2.5 * np.sin(2 * angle + 6 * lump)
    signal = mix(signal, t.oedema, 0.8 * edge(distance - halo, 9) * edge(18 - depth, 5))
    signal = mix(signal, t.rim, edge(distance - radius, 4))
    return mix(signal, t.core, edge(distance - radius + 4 + 3 * thick, 4))
