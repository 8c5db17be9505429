"""Tissue tiles: H&E-like images of nuclei, cytoplasm, stroma and white gaps, told apart by arrangement alone.

A tile is two stain densities, haematoxylin and eosin, turned into light by Beer-Lambert's law with the stain vectors
of its group (one scanner, one batch of stain). Every class gets the same number and sizes of nuclei, the same share
of white and, by rank, the same distribution of both densities; the classes differ in where things lie.

Legend: N samples, K nuclei, Y, X pixels.
"""

import numpy as np
import numpy.typing as npt

from mnemos.sharding.synthetic.drawing import F32, by_rank, edge, mix, smooth_field, turn, uniform

CLASSES = ("glandular", "nested", "diffuse")
NUCLEI = 20  # most in a tile
WINDOW = 23  # pixels a side in which a nucleus is drawn

# Optical density of the pure stains in red, green, blue (Ruifrok and Johnston, 2001).
HAEMATOXYLIN = np.array([0.65, 0.70, 0.29], np.float32)
EOSIN = np.array([0.16, 0.90, 0.42], np.float32)


def draw_tiles(
    labels: npt.NDArray[np.int_], groups: npt.NDArray[np.int_], rng: np.random.Generator, size: int = 64
) -> npt.NDArray[np.uint8]:
    """Draw one tile of each label: uint8 [N, 3, size, size].

    Args:
        labels: indices into CLASSES, [N].
        groups: number of the tile's group, [N]; tiles of a group share stain and tissue.
        rng: source of all randomness.
        size: pixels a side.
    """
    num = len(labels)
    of_N = np.unique(groups, return_inverse=True)[1]

    def tissue(low: float, high: float) -> F32:
        return uniform(rng, low, high, int(of_N.max()) + 1)[of_N]

    def tile(low: float, high: float) -> F32:
        return uniform(rng, low, high, num)

    axis = ((np.arange(size) + 0.5) / size * 2 - 1).astype(np.float32)
    zoom, angle = np.exp(tile(-0.45, 0.1)), tile(0, np.pi)
    x, y = turn(axis * zoom, axis[:, None] * zoom, angle)
    x, y = (part + 0.12 * smooth_field(rng, num, size, 3) for part in (x, y))

    # Architecture: ``inside`` falls from 1 in the middle of a gland or nest to below 0 in the stroma between them.
    # White is the lumen of a gland, a cleft around a nest, or a vessel anywhere; cells are gathered accordingly.
    kind = labels[:, None, None]
    inside = _islands(x, y, tissue(0.75, 1.1), tile(0, 1), tile(0, 1))
    loose, patchy = smooth_field(rng, num, size, 3), smooth_field(rng, num, size, 3)
    epithelium = _top_share(np.where(kind == 2, patchy, inside), tile(0.25, 0.5), 0.3)
    cleft = 0.15 * loose - np.abs(inside - 0.2)
    white = _top_share(np.select([kind == 0, kind == 1], [inside, cleft], loose), tile(0.12, 0.31), 0.12)
    ring = np.exp(-(((inside - 0.42) / 0.11) ** 2)) + 0.02
    solid = edge(0.3 - inside, 0.15) + 0.02
    weight = np.select([kind == 0, kind == 1], [ring, solid], 0.4 + epithelium) * (1 - white) + 1e-4
    nuclei, chromatin = _nuclei(
        weight, rng, tissue(3.2, 4.4) / zoom, tissue(10, 16) * zoom**2, angle, tissue(0.1, 0.5)
    )
    white = white * (1 - nuclei)

    # Stains: fibres and clouds of eosin, haematoxylin in the cells and most of all in their nuclei.
    cloud = smooth_field(rng, num, size, 2)
    fibre = np.cos(2 * np.pi * (tissue(1.2, 2.0) * y + 0.4 * smooth_field(rng, num, size, 4)))
    eosin = 0.15 * fibre * (1 - 0.8 * epithelium) - 0.25 * epithelium + 0.3 * cloud
    p = np.linspace(0, 1, size * size, dtype=np.float32)
    eosin = by_rank(eosin, 0.3 + 0.7 * p ** np.exp(uniform(rng, -0.4, 0.4, num, 1)))
    haema = tissue(0.02, 0.65) + 0.22 * epithelium + 0.04 * cloud
    haema = mix(haema, tile(0.6, 0.9) + 0.25 * chromatin, nuclei)
    eosin = mix(eosin, 0.35, nuclei)

    # Light: the section is thicker on one side; white is glass, up to a trace of stain.
    tilt = tile(0, 2 * np.pi)
    wedge = tile(0.3, 0.75) * (axis * np.cos(tilt) + axis[:, None] * np.sin(tilt))
    thickness = np.exp(wedge + 0.1 * cloud) * (1 - 0.97 * white)
    density = (thickness * tissue(1.0, 1.9) * haema)[:, None] * _stain(HAEMATOXYLIN, rng, of_N)
    density = density + (thickness * tissue(0.2, 1.2) * eosin)[:, None] * _stain(EOSIN, rng, of_N)
    lamp = tile(235, 252)[:, None] * np.exp(0.015 * rng.standard_normal((num, 3, 1, 1), np.float32))
    noise = tile(0.3, 1.0)[:, None] * rng.standard_normal((num, 3, size, size), np.float32)
    return np.asarray(np.rint(np.clip(lamp * np.exp(-density) + noise, 0, 255)), np.uint8)


def _islands(x: F32, y: F32, spacing: F32, shift_x: F32, shift_y: F32) -> F32:
    """Return a field with islands on a triangular lattice: 1 at a centre, about -0.4 between three of them."""
    px, py = 2 * np.pi * (x / spacing + shift_x), 2 * np.pi * (y / spacing + shift_y)
    waves = [np.cos((np.cos(a) * px + np.sin(a) * py) / np.sqrt(3)) for a in (0.0, np.pi / 3, 2 * np.pi / 3)]
    return np.asarray((waves[0] + waves[1] + waves[2]) / 3, np.float32)


def _top_share(field: F32, share: F32, ramp: float) -> F32:
    """Return 1 on the ``share`` of pixels with the highest values, 0 elsewhere; the ramp between takes the share ``ramp``."""
    rank = by_rank(field, np.linspace(0, 1, field[0].size, dtype=np.float32))
    return edge(1 - share - rank, ramp)


def _place(
    weight: F32, rng: np.random.Generator, reach: F32
) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Choose NUCLEI places per tile, most likely where ``weight`` is high, at least ``reach`` pixels apart: rows, columns.

    Gumbel noise on the log weight makes the largest score a draw by weight; a disc around each place taken is closed.
    """
    num, height, width = weight.shape
    score = np.log(weight) - np.log(-np.log(rng.random(weight.shape, np.float32) * 0.999 + 5e-4))
    axis = np.arange(height, dtype=np.float32)
    rows, columns = np.empty((2, num, NUCLEI), np.intp)
    for k in range(NUCLEI):
        rows[:, k], columns[:, k] = np.divmod(score.reshape(num, -1).argmax(axis=1), width)
        far_y = (axis - rows[:, k, None]) ** 2
        far_x = (axis - columns[:, k, None]) ** 2
        score[far_y[:, :, None] + far_x[:, None, :] < reach * reach] = -np.inf
    return rows, columns


def _nuclei(
    weight: F32, rng: np.random.Generator, radius: F32, count: F32, angle: F32, stretch: F32
) -> tuple[F32, F32]:
    """Place ``count`` elliptic nuclei where ``weight`` is high: coverage and chromatin texture, each [N, Y, X]."""
    num, height, width = weight.shape
    rows, columns = _place(weight[:, ::2, ::2], rng, radius * 0.85)
    offset = np.arange(WINDOW, dtype=np.float32) - WINDOW // 2
    shape = (num, NUCLEI, 1, 1)
    dy = offset[:, None] + rng.uniform(-1, 1, shape).astype(np.float32)
    dx = offset[None, :] + rng.uniform(-1, 1, shape).astype(np.float32)
    r = radius[..., None] * rng.uniform(0.85, 1.2, shape).astype(np.float32)
    p, q = turn(dx, dy, angle[..., None] + rng.normal(0, 0.4, shape).astype(np.float32))
    long = 1 + stretch[..., None]
    distance = np.sqrt((p / long) ** 2 + (q * np.sqrt(long)) ** 2) - r
    cover = edge(distance, 1.6) * (np.arange(NUCLEI)[:, None, None] < count[..., None])
    texture = cover * np.clip(distance / r + rng.uniform(0.6, 1.3, shape), 0, 1)
    canvas = np.zeros((2, num, height + 2 * WINDOW, width + 2 * WINDOW), np.float32)
    step = np.arange(WINDOW) + WINDOW - WINDOW // 2
    at = (
        np.arange(num)[:, None, None, None],
        2 * rows[..., None, None] + step[:, None],
        2 * columns[..., None, None] + step,
    )
    np.maximum.at(canvas[0], at, cover.astype(np.float32))
    np.maximum.at(canvas[1], at, texture.astype(np.float32))
    nuclei, chromatin = canvas[:, :, WINDOW:-WINDOW, WINDOW:-WINDOW]
    return nuclei, chromatin


def _stain(vector: F32, rng: np.random.Generator, of_N: npt.NDArray[np.intp]) -> F32:
    """Draw a variant of a stain's optical density vector for each group, [N, 3, 1, 1]."""
    varied = vector * np.exp(rng.normal(0, 0.18, (int(of_N.max()) + 1, 3)))
    unit = varied / np.linalg.norm(varied, axis=1, keepdims=True)
    return np.asarray(unit[of_N][:, :, None, None], np.float32)
