"""CT-like slabs of a trunk in Hounsfield units, from the middle of the chest to the kidneys.

Anatomy is a stack of solids in millimetres around the body's midline (x to the patient's left, y to the back, z to
the head, z = 0 at the top of the diaphragm), sampled through a field of view that is smaller than the body.

Legend: N samples, Z, Y, X voxels.
"""

from collections.abc import Callable
from dataclasses import dataclass

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

CLASSES = ("clear", "lesion")
STEP_HU = 4  # values are multiples of it: below the noise, and it packs better
_AIR, _FAT, _BLOOD = -1000.0, -100.0, 42.0

Draw = Callable[[float, float], float]


@dataclass(frozen=True, kw_only=True)
class _Field:
    """Body coordinates of every voxel [N, Z, Y, X] and what the organs share.

    Attributes:
        x, y, z: millimetres; ``side`` is the distance from the midline.
        cavity: 1 inside ribs and muscle.
        dome: height of the diaphragm.
        flow: a smooth random field that makes organs of patients differ.
        contrast: HU that contrast agent adds to an artery.
    """

    x: F32
    y: F32
    z: F32
    side: F32
    cavity: F32
    dome: F32
    flow: F32
    contrast: float


def draw_bodies(
    labels: npt.NDArray[np.int_],
    rng: np.random.Generator,
    shape: tuple[int, int, int],
    spacing_mm: tuple[float, float, float],
) -> npt.NDArray[np.int16]:
    """Draw slabs of one patient: int16 [N, Z, Y, X] in HU.

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

    # Where the slab lies in the body.
    z_mm, y_mm, x_mm = slab_axes(shape, spacing_mm)
    zoom = np.exp(scan(-0.15, 0.2)) * person(0.92, 1.08)
    x, y = turn(x_mm, y_mm, scan(-0.25, 0.25))
    x, y = x / zoom + scan(-60, 60), y / zoom + scan(-38, 38)
    z = z_mm / zoom + scan(-30, 110) + 0.12 * scan(-1, 1) * x + 0.12 * scan(-1, 1) * y
    side = np.abs(x)

    # Wall: skin, fat, muscle with slanting ribs in it, fat inside.
    deep, fat = person(104, 122), person(8, 24)
    skin = ellipse(x, y, person(155, 180), deep)
    wall = skin + fat
    hu = mix(np.full_like(skin, _AIR), _FAT, edge(skin, 5))
    hu = mix(hu, person(40, 62), edge(wall, 6))
    between = 0.2 - np.cos(2 * np.pi * (z - 0.28 * y) / person(26, 32) + person(0, 6))
    hu = mix(hu, 330, edge(np.abs(wall + 15) - 4, 5) * edge(between, 0.6) * edge(-60 - z - 0.2 * y, 20))
    cavity = edge(wall + 24, 9)
    hu = mix(hu, _FAT + 15, cavity)

    lower = person(4, 20)  # the left dome
    field = _Field(
        x=x,
        y=y,
        z=z,
        side=side,
        cavity=cavity,
        dome=-0.011 * ((side - 72) ** 2 + (y + 8) ** 2) - np.float32(lower) * (x > 0),
        flow=smooth_volume(rng, num, shape, (1, 4, 4)),
        contrast=170 * person(0, 1) ** 2,
    )
    liver_hu = person(50, 68) + 0.35 * field.contrast
    hu, liver = _abdomen(hu, field, liver_hu, person)
    hu, lung = _chest(hu, field, person)
    hu = _back(hu, field, deep - 52, person)
    dice = rng.random(
        (num, 4), np.float32
    )  # drawn for every sample, so that a label changes nothing but the lesion
    for i in np.flatnonzero(labels):
        hu[i] = _add_lesion(hu[i], lung[i], liver[i], liver_hu, dice[i], spacing_mm)

    tilt = scan(0, 2 * np.pi)
    cupping = scan(30, 100) / 100 * (x_mm * np.cos(tilt) + y_mm * np.sin(tilt))
    noise = scan(1.5, 4) * rng.standard_normal(hu.shape, np.float32)
    hu = hu + edge(skin, 5) * (cupping + 8 * smooth_volume(rng, num, shape, (1, 3, 3)) + noise)
    return np.asarray(np.clip(STEP_HU * np.rint(hu / STEP_HU), -1024, 1024), np.int16)


def _abdomen(hu: F32, at: _Field, liver_hu: float, person: Draw) -> tuple[F32, F32]:
    """Paint what lies below the diaphragm; return the slabs and the liver's shape."""
    x, y, z = at.x, at.y, at.z
    below = edge(z - at.dome + 3, 8) * at.cavity
    liver = below * edge(x - 22 + 0.35 * y + 0.25 * z + 6 * at.flow, 8) * edge(-110 - z, 20)
    hu = mix(hu, liver_hu, liver)
    spleen = below * edge(ellipse(x - 96, y - 34, 34, 48 + 0.1 * z), 7)
    hu = mix(hu, person(45, 58) + 0.4 * at.contrast, spleen)
    stomach = below * edge(ellipse(x - 58, y + 32, person(34, 48), person(30, 42)), 7)
    gas, fluid = y < person(-55, -25), person(10, 45)  # the patient lies on the back: gas is in front
    hu = mix(hu, np.where(gas, np.float32(-880), np.float32(fluid)), stomach)
    for sign in (-1, 1):
        pole = np.maximum(np.abs(z + 85 + 8 * sign) - 8, 0)
        kidney = ellipse(x - sign * 56, y - 40, 27, 24) + 0.02 * pole**2
        hu = mix(hu, 35 + 0.9 * at.contrast, below * edge(kidney, 6) * edge(z + 45, 12))
    return hu, liver


def _chest(hu: F32, at: _Field, person: Draw) -> tuple[F32, F32]:
    """Paint lungs, heart, great vessels and airways; return the slabs and the lungs' shape."""
    x, y, z, side = at.x, at.y, at.z, at.side
    q = np.sqrt(((x - 24) / 58) ** 2 + ((y + 30) / 46) ** 2 + ((z - 30) / 52) ** 2)
    heart = q * (50 / person(0.8, 1.1)) - 50
    middle = np.minimum(side - 26 - 0.1 * np.abs(y), heart - 4)
    lung = at.cavity * edge(at.dome - z, 12) * edge(-middle, 10)
    # Vessels fan out of the hilum; the lung is denser at the back, where it rests.
    hilum = np.sqrt((side - 34) ** 2 + (y - 5) ** 2 + 0.5 * (z - 60) ** 2)
    fan = np.cos(7 * np.arctan2(y - 5, side - 34) + 0.05 * z + 1.5 * at.flow + person(0, 6))
    air = person(-880, -790) + person(0.8, 1.8) * (y - 10) + 25 * at.flow
    hu = mix(hu, air + 200 * edge(0.55 - fan, 0.9) * np.exp(-hilum / 60), lung)
    hu = mix(hu, _BLOOD + 0.75 * at.contrast, edge(heart, 7) * edge(-3 - z + 0.25 * at.dome, 10))

    high = edge(62 - z, 15)
    hu = mix(hu, _BLOOD + at.contrast, edge(ellipse(x + 14, y + 22, 15, 15), 5) * high)
    hu = mix(hu, _BLOOD + 0.8 * at.contrast, edge(ellipse(x - 14, y + 14, 22, 12), 5) * high)
    fork = side - 0.35 * np.clip(90 - z, 0, 60)  # one trachea above, two bronchi below
    return mix(hu, -960, edge(ellipse(fork, y - 14, 8, 8), 4) * edge(50 - z, 10)), lung


def _back(hu: F32, at: _Field, spine_y: float, person: Draw) -> F32:
    """Paint aorta, vena cava and the spine, whose vertebrae are centred on ``spine_y``."""
    x, y, z, side = at.x, at.y - spine_y, at.z, at.side
    hu = mix(hu, _BLOOD + at.contrast, edge(ellipse(x - person(14, 24), y + 26, 12.5, 12.5), 5))
    hu = mix(hu, _BLOOD + 0.7 * at.contrast, edge(ellipse(x + 20, y + 34, 12, 10), 5) * edge(z - 20, 10))
    disc = edge(0.75 - np.cos(2 * np.pi * z / 27 + person(0, 6)), 0.3)
    marrow = person(130, 260)
    vertebra = ellipse(x, y, 21, 17)
    hu = mix(hu, marrow * (1 - 0.6 * disc), edge(vertebra, 4))
    hu = mix(hu, 1.9 * marrow * (1 - 0.8 * disc), edge(np.abs(vertebra + 2.5) - 1.5, 3))
    hu = mix(hu, 2.0 * marrow, edge(ellipse(side - 12, y - 23, 7, 12), 4))
    hu = mix(hu, 1.8 * marrow, edge(ellipse(side - 22, y - 28, 17, 5), 4) * edge(disc - 0.5, 1))
    hu = mix(hu, 1.8 * marrow, edge(ellipse(x, y - 42, 4.5, 17), 4))
    return mix(hu, 25, edge(ellipse(x, y - 24, 10, 8.5), 3))


def _add_lesion(
    hu: F32,
    lung: F32,
    liver: F32,
    liver_hu: float,
    dice: F32,
    spacing_mm: tuple[float, float, float],
) -> F32:
    """Return one slab [Z, Y, X] with a tumour in lung or liver (in any soft part where neither is in view)."""
    share, size, level, lump = dice
    voxel = pick_voxel(lung + liver > 0.9, share) or pick_voxel(hu > _FAT, share)
    assert voxel is not None, "a slab through a trunk holds soft tissue"
    distance, angle = around(voxel, hu.shape, spacing_mm)
    radius = (9 + 8 * size) * (1 + 0.06 * np.sin(3 * angle + 6 * lump))
    tumour = 30 + 40 * level if lung[voxel] > 0.5 else liver_hu - 35 - 30 * level
    return mix(hu, float(tumour), edge(distance - radius, 5))
