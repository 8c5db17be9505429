"""MR-like slabs of a head, with the contrast of T1, T2, FLAIR or proton density weighting.

Anatomy in millimetres around the middle of the head (x to the patient's left, y to the back, z to the crown), drawn
as shells of a ball that is squeezed into a head, with ventricles and grey nuclei inside; every tissue then takes the
brightness of the scan's weighting, and the receiving coil shades the whole.

Legend: N samples, Z, Y, X voxels.
"""

import numpy as np
import numpy.typing as npt

from mnemos.sharding.synthetic.drawing import F32, edge, ellipse, mix, smooth_volume, turn, uniform

CLASSES = ("healthy", "tumour")
UNITS = 120  # stored steps of a signal of 1

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

    axes = [
        (np.arange(size, dtype=np.float32) - (size - 1) / 2) * step
        for size, step in zip(shape, spacing_mm, strict=True)
    ]
    zoom = np.exp(scan(0.2, 0.5))
    x, y = turn(axes[2][None, None, None, :], axes[1][None, None, :, None], scan(-0.3, 0.3))
    x, y = x / zoom + scan(-22, 22), y / zoom + scan(-28, 28)
    z = axes[0][None, :, None, None] / zoom + scan(-28, 44) + 0.12 * scan(-1, 1) * x + 0.12 * scan(-1, 1) * y
    warp = smooth_volume(rng, num, shape, (1, 5, 5))
    side = np.abs(x + 1.2 * warp)

    weight = rng.dirichlet(np.full(4, 0.15), num).astype(
        np.float32
    )  # mostly one weighting, sometimes between two
    fat, bone, fluid, grey, white, core, rim, oedema = (
        (weight @ TISSUES * np.exp(rng.normal(0, 0.07, (num, 8)))).astype(np.float32).T[..., None, None, None]
    )

    # Shells: depth in millimetres below the skin.
    q = np.sqrt(
        (x / person(70, 78)) ** 2
        + (y / person(90, 98)) ** 2
        + (z / 92) ** 2 * (z > 0)
        + (z / 120) ** 2 * (z <= 0)
    )
    depth = (1 - q) * 84
    signal = mix(np.full_like(depth, 0.05), fat, edge(-depth, 4))
    signal = mix(signal, bone, edge(person(5, 8) - depth, 4))
    signal = mix(signal, fluid, edge(13 - depth, 4))

    # Brain: folds of the cortex, white matter under it, the fissure between the halves.
    angle = np.arctan2(y, x)
    fold = np.cos(round(person(11, 16)) * angle + 0.06 * z + 2.5 * warp + person(0, 6))
    signal = mix(signal, grey, edge(15 + 3 * fold * fold * (fold > 0) - depth, 4))
    signal = mix(signal, white, edge(22.5 + 3 * fold - depth, 8))
    signal = mix(signal, fluid, edge(side - 1.5, 3) * edge(34 - np.abs(y) - 0.3 * z, 8) * edge(12 - depth, 3))
    signal = mix(
        signal, grey, edge(np.abs(side - 4) - 2, 3) * edge(30 - np.abs(y) - 0.3 * z, 8) * edge(14 - depth, 3)
    )

    # Deep grey nuclei and ventricles.
    deep = edge(np.abs(z + 2) - 16, 8)
    signal = mix(signal, grey, edge(ellipse(side - 11, y - 12, 9, 14), 4) * deep)
    px, py = turn(side - 27, y, -0.35)
    signal = mix(signal, grey, edge(ellipse(px, py, 7, 18), 4) * deep)
    signal = mix(signal, grey, edge(ellipse(side - 14, y + 24, 6, 11), 4) * edge(np.abs(z - 4) - 18, 8))
    large = person(0.7, 1.5)
    horn = ellipse(side - 5 - 0.006 * (y - 2) ** 2, y - 4, 4.5 + 3.5 * large, 26 + 8 * large)
    signal = mix(signal, fluid, edge(horn, 4) * edge(np.abs(z - 10) - 13 - 2 * large, 6))
    signal = mix(signal, fluid, edge(ellipse(side, y - 8, 2 + 1.5 * large, 15), 3) * edge(z - 4, 6))

    # Below: cerebellum with its folia, and the brain stem.
    low = edge(z + 30, 8) * edge(14 - depth, 4)
    cx, cy = x, y - 42
    cerebellum = edge(ellipse(cx, cy, 48, 32), 5) * low
    folia = 0.5 + 0.5 * np.cos(0.5 * np.sqrt(cx * cx + cy * cy) + warp)
    signal = mix(signal, grey + 0.5 * folia * (white - grey), cerebellum)
    signal = mix(signal, white, edge(ellipse(x, y - 8, 15, 13), 4) * low)
    signal = mix(signal, fluid, edge(ellipse(x, y - 24, 8, 5), 3) * low)

    signal = _add_tumours(signal, labels, rng, depth, core, rim, oedema, spacing_mm)
    tilt = scan(0, 2 * np.pi)
    slope = (axes[2][None, None, None, :] * np.cos(tilt) + axes[1][None, None, :, None] * np.sin(tilt)) / 96
    coil = np.exp(scan(0.35, 1.0) * slope + 0.1 * smooth_volume(rng, num, shape, (1, 2, 2)))
    noise = scan(0.0015, 0.004) * rng.standard_normal((2, *signal.shape), np.float32)
    return np.asarray(np.hypot(signal * coil + noise[0], noise[1]), np.float32)


def _add_tumours(
    signal: F32,
    labels: npt.NDArray[np.int_],
    rng: np.random.Generator,
    depth: F32,
    core: F32,
    rim: F32,
    oedema: F32,
    spacing_mm: tuple[float, float, float],
) -> F32:
    """Put one ring-enhancing tumour with oedema into the brain of every labelled sample, well inside the field of view."""
    num, slices, height, width = signal.shape
    z, y, x = (np.arange(n, dtype=np.float32) for n in (slices, height, width))
    for i in range(num):
        place = depth[i] > 26
        place[: slices // 4] = place[-(slices // 4) :] = False
        place[:, : height // 6] = place[:, -(height // 6) :] = False
        place[:, :, : width // 6] = place[:, :, -(width // 6) :] = False
        spots = np.flatnonzero(place)
        pick, size, thick, lump, spread = rng.random(5)
        if labels[i] == 0 or not len(spots):
            continue
        cz, cy, cx = np.unravel_index(spots[int(pick * len(spots))], place.shape)
        dz, dy, dx = (
            ((z - cz) * spacing_mm[0])[:, None, None],
            ((y - cy) * spacing_mm[1])[:, None],
            (x - cx) * spacing_mm[2],
        )
        angle = np.arctan2(dy, dx)
        away = np.sqrt(dz * dz + dy * dy + dx * dx) * (1 + 0.07 * np.sin(3 * angle + 6 * lump))
        radius = 9 + 9 * size
        swollen = edge(away - radius - 8 - 10 * spread + 2.5 * np.sin(2 * angle + 6 * lump), 9) * edge(
            18 - depth[i], 5
        )
        signal[i] = mix(signal[i], oedema[i], 0.8 * swollen)
        signal[i] = mix(signal[i], rim[i], edge(away - radius, 4))
        signal[i] = mix(signal[i], core[i], edge(away - radius + 4 + 3 * thick, 4))
    return signal
