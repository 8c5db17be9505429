"""CT-like slabs of a trunk in Hounsfield units, from the middle of the chest to the kidneys.

Anatomy is a stack of solids in millimetres around the spine's midline (x to the patient's left, y to the back, z to
the head, z = 0 at the top of the diaphragm), sampled through a field of view that is smaller than the body.

Legend: N samples, Z, Y, X voxels.
"""

import numpy as np
import numpy.typing as npt

from mnemos.sharding.synthetic.drawing import F32, edge, ellipse, mix, smooth_volume, turn, uniform

CLASSES = ("clear", "lesion")
AIR, LUNG, FAT, MUSCLE = -1000.0, -850.0, -100.0, 50.0


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
    axes = [
        (np.arange(size, dtype=np.float32) - (size - 1) / 2) * step
        for size, step in zip(shape, spacing_mm, strict=True)
    ]
    zoom = np.exp(scan(-0.15, 0.2)) * person(0.92, 1.08)
    x, y = turn(axes[2][None, None, None, :], axes[1][None, None, :, None], scan(-0.25, 0.25))
    x, y = x / zoom + scan(-60, 60), y / zoom + scan(-38, 38)
    z = axes[0][None, :, None, None] / zoom + scan(-65, 105) + 0.12 * scan(-1, 1) * x + 0.12 * scan(-1, 1) * y
    side = np.abs(x)

    # Wall: skin, fat, muscle with ribs in it.
    wide, deep, fat = person(155, 180), person(104, 122), person(8, 24)
    contrast = person(0, 1) ** 2 * 170
    skin = ellipse(x, y, wide, deep)
    shell = skin + fat
    hu = mix(np.full_like(skin, AIR), FAT, edge(skin, 5))
    hu = mix(hu, person(40, 62), edge(shell, 6))
    rib = np.cos(2 * np.pi * (z - 0.28 * y) / person(26, 32) + person(0, 6))
    hu = mix(hu, 330, edge(np.abs(shell + 15) - 4, 5) * edge(0.2 - rib, 0.6) * edge(-60 - z - 0.2 * y, 20))
    cavity = edge(shell + 24, 6)
    hu = mix(hu, FAT + 15, cavity)

    # Below the diaphragm: liver, stomach, spleen, kidneys in fat.
    spine_y = deep - 52
    dome = -0.011 * ((side - 72) ** 2 + (y + 8) ** 2) - np.where(x > 0, person(4, 20), 0)
    below = edge(z - dome + 3, 8) * cavity
    liver_hu, spleen_hu = person(50, 68) + 0.35 * contrast, person(45, 58) + 0.4 * contrast
    flow = smooth_volume(rng, num, shape, (1, 4, 4))
    liver = below * edge(x - 22 + 0.35 * y + 0.25 * z + 6 * flow, 8) * edge(-110 - z, 20)
    hu = mix(hu, liver_hu, liver)
    spleen = below * edge(ellipse(x - 96, y - 34, 34, 48 + 0.1 * z), 7)
    hu = mix(hu, spleen_hu, spleen)
    stomach = below * edge(ellipse(x - 58, y + 32, person(34, 48), person(30, 42)), 7)
    level = person(-55, -25)
    hu = mix(hu, np.where(y < level, -880.0, person(10, 45)).astype(np.float32), stomach)
    for sign in (-1, 1):
        kidney = ellipse(x - sign * 56, y - 40, 27, 24) + 0.02 * (z + 85 + 8 * sign) ** 2 * (
            np.abs(z + 85) > 8
        )
        hu = mix(hu, 35 + 0.9 * contrast, below * edge(kidney, 6) * edge(z + 45, 12))

    # Above it: lungs around the heart and great vessels.
    beat = person(0.9, 1.15)
    heart = np.sqrt(((x - 24) / 58) ** 2 + ((y + 30) / 46) ** 2 + ((z - 30) / 52) ** 2) * 50 / beat - 50
    middle = np.minimum(side - 26 - 0.1 * np.abs(y), heart - 4)
    lung = cavity * edge(dome - z, 8) * edge(-middle, 6)
    hilum = np.sqrt((side - 34) ** 2 + (y - 5) ** 2 + 0.5 * (z - 60) ** 2) + 1
    fan = np.cos(7 * np.arctan2(y - 5, side - 34) + 0.05 * z + 1.5 * flow + person(0, 6))
    tree = 200 * edge(0.55 - fan, 0.9) * np.exp(-hilum / 60)
    air = LUNG + person(-30, 60) + person(0.6, 1.5) * (y - 10) + 25 * flow + tree
    hu = mix(hu, air, lung)
    hu = mix(hu, 42 + 0.75 * contrast, edge(heart, 7) * edge(-3 - z + 0.25 * dome, 10))

    # Along the back: aorta, vena cava, airways, spine.
    hu = mix(hu, 42 + contrast, edge(ellipse(x - person(14, 24), y - spine_y + 26, 12.5, 12.5), 5))
    hu = mix(hu, 42 + 0.7 * contrast, edge(ellipse(x + 20, y - spine_y + 34, 12, 10), 5) * edge(z - 20, 10))
    high = edge(62 - z, 15)
    hu = mix(hu, 42 + contrast, edge(ellipse(x + 14, y + 22, 15, 15), 5) * high)
    hu = mix(hu, 42 + 0.8 * contrast, edge(ellipse(x - 14, y + 14, 22, 12), 5) * high)
    hu = mix(
        hu, -960, edge(ellipse(side - 0.35 * np.clip(90 - z, 0, 60), y - 14, 8, 8), 4) * edge(50 - z, 10)
    )
    joint = edge(0.75 - np.cos(2 * np.pi * z / 27 + person(0, 6)), 0.3)
    bone = person(130, 260)
    body = ellipse(x, y - spine_y, 21, 17)
    hu = mix(hu, bone * (1 - 0.6 * joint), edge(body, 4))
    hu = mix(hu, 1.9 * bone * (1 - 0.8 * joint), edge(np.abs(body + 2.5) - 1.5, 3))
    hu = mix(hu, 2.0 * bone, edge(ellipse(side - 12, y - spine_y - 23, 7, 12), 4))
    hu = mix(hu, 1.8 * bone, edge(ellipse(side - 22, y - spine_y - 28, 17, 5), 4) * edge(joint - 0.5, 1))
    hu = mix(hu, 1.8 * bone, edge(ellipse(x, y - spine_y - 42, 4.5, 17), 4))
    hu = mix(hu, 25, edge(ellipse(x, y - spine_y - 24, 10, 8.5), 3))

    hu = _add_lesions(hu, labels, rng, lung, liver, liver_hu, spacing_mm)
    tilt = scan(0, 2 * np.pi)
    shade = (axes[2][None, None, None, :] * np.cos(tilt) + axes[1][None, None, :, None] * np.sin(tilt)) / 100
    inside = edge(skin, 5)
    hu = hu + inside * (scan(15, 60) * shade + 8 * smooth_volume(rng, num, shape, (1, 3, 3)))
    hu = hu + scan(1.5, 4) * rng.standard_normal(hu.shape, np.float32)
    return np.clip(4 * np.rint(hu / 4), -1024, 1024).astype(np.int16)


def _add_lesions(
    hu: F32,
    labels: npt.NDArray[np.int_],
    rng: np.random.Generator,
    lung: F32,
    liver: F32,
    liver_hu: float,
    spacing_mm: tuple[float, float, float],
) -> F32:
    """Put one ball of tumour into lung or liver of every labelled sample, well inside the field of view."""
    num, depth, height, width = hu.shape
    z, y, x = (np.arange(n, dtype=np.float32) for n in (depth, height, width))
    for i in range(num):
        place = (lung[i] + liver[i]) > 0.9
        place[: depth // 4] = place[-(depth // 4) :] = False
        place[:, : height // 6] = place[:, -(height // 6) :] = False
        place[:, :, : width // 6] = place[:, :, -(width // 6) :] = False
        spots = np.flatnonzero(place)
        pick, size, level, lump = rng.random(4)
        if labels[i] == 0 or not len(spots):
            if labels[i]:
                print("no place")
            continue
        cz, cy, cx = np.unravel_index(spots[int(pick * len(spots))], place.shape)
        dz, dy, dx = (
            ((z - cz) * spacing_mm[0])[:, None, None],
            ((y - cy) * spacing_mm[1])[:, None],
            (x - cx) * spacing_mm[2],
        )
        angle = np.arctan2(dy, dx)
        radius = (9 + 8 * size) * (1 + 0.06 * np.sin(3 * angle + 6 * lump))
        ball = edge(np.sqrt(dz * dz + dy * dy + dx * dx) - radius, 5)
        target = 30 + 40 * level if lung[i, cz, cy, cx] > 0.5 else liver_hu - 35 - 30 * level
        hu[i] = mix(hu[i], np.float32(target), ball)
    return hu
