"""Tissue tiles: H&E-like images of nuclei, cytoplasm, stroma and white gaps, told apart by arrangement alone.

A tile is two stain densities, haematoxylin and eosin, turned into light by Beer-Lambert's law with the stain vectors
of its group (one scanner, one batch of stain). Every class gets the same number and sizes of nuclei, the same share
of white and, by rank, the same distribution of both densities; the classes differ in where things lie.

Legend: N samples, K nuclei, Y, X pixels.
"""

import numpy as np
import numpy.typing as npt

from mnemos.sharding.synthetic.drawing import F32, edge, smooth_field, turn, uniform

CLASSES = ("glandular", "nested", "diffuse")
NUCLEI = 44
WINDOW = 15  # pixels a side in which a nucleus is drawn

# Optical density of the pure stains in red, green, blue (Ruifrok and Johnston, 2001).
HAEMATOXYLIN = np.array([0.65, 0.70, 0.29], np.float32)
EOSIN = np.array([0.07, 0.99, 0.11], np.float32)


def draw_tiles(labels: npt.NDArray[np.int_], groups: npt.NDArray[np.int_], rng: np.random.Generator, size: int = 64) -> npt.NDArray[np.uint8]:
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
    zoom = np.exp(tile(-0.35, 0.25))
    angle = tile(0, np.pi)
    x, y = turn(axis[None, None, :] * zoom, axis[None, :, None] * zoom, angle)
    warp_x, warp_y = (0.12 * smooth_field(rng, num, size, 3) for _ in range(2))
    u, v = x + warp_x, y + warp_y

    # Architecture: ``inside`` falls from 1 in the middle of a gland or nest to below 0 in the stroma between them.
    spacing = tissue(0.85, 1.15)
    inside = _islands(u, v, spacing, tile(0, 1), tile(0, 1))
    loose = smooth_field(rng, num, size, 5)
    kind = labels[:, None, None]
    epithelium = np.where(kind == 2, 0.5 + 0.25 * smooth_field(rng, num, size, 3), edge(0.28 - inside, 0.2)).astype(np.float32)
    gaps = np.where(kind == 0, inside, np.where(kind == 1, 1 - np.abs(inside - 0.2) + 0.15 * loose, loose)).astype(np.float32)
    white = _top_share(gaps, tile(0.03, 0.16), 0.08)

    # Where a nucleus may lie, as a weight for every pixel.
    ring = np.exp(-(((inside - 0.5) / 0.1) ** 2))
    solid = edge(0.35 - inside, 0.15)
    weight = np.where(kind == 0, ring + 0.06 * (inside < 0.25), np.where(kind == 1, solid + 0.04, 1.0)) * (1 - white) + 1e-4
    nuclei, chromatin = _nuclei(weight.astype(np.float32), rng, tissue(2.6, 3.6) / zoom, angle, tissue(0.1, 0.5))

    fibre = np.cos(2 * np.pi * (tissue(2.2, 3.6) * v + 0.6 * smooth_field(rng, num, size, 3)))
    cloud = smooth_field(rng, num, size, 4)
    eosin = 0.55 + 0.25 * fibre * (1 - 0.7 * epithelium) - 0.1 * epithelium + 0.12 * cloud
    eosin = eosin * (1 - 0.5 * nuclei)
    haema = 0.12 + 0.14 * epithelium + 0.05 * cloud + nuclei * (0.75 + 0.25 * chromatin)
    eosin, haema = _match(eosin, rng, 1.0), _match(haema, rng, 3.0)
    eosin, haema = eosin * (1 - white), haema * (1 - white)

    stain_h, stain_e = (_stain(vector, rng, int(of_N.max()) + 1)[of_N] for vector in (HAEMATOXYLIN, EOSIN))
    density = (
        tissue(0.9, 1.4)[:, None] * haema[:, None] * stain_h[:, :, None, None]
        + tissue(0.35, 0.75)[:, None] * eosin[:, None] * stain_e[:, :, None, None]
    )
    light = (250 - 12 * tile(0, 1)[:, None]) * np.exp(-density) + tile(0.5, 2.0)[:, None] * rng.standard_normal((num, 3, size, size), np.float32)
    return np.rint(np.clip(light, 0, 255)).astype(np.uint8)


def _islands(u: F32, v: F32, spacing: F32, shift_u: F32, shift_v: F32) -> F32:
    """Return a hexagonal field of islands: 1 at a centre, about -0.4 between three of them."""
    phase_u, phase_v = 2 * np.pi * (u / spacing + shift_u), 2 * np.pi * (v / spacing + shift_v)
    waves = sum(np.cos(0.5 * (np.cos(a) * phase_u + np.sin(a) * phase_v) * 2 / np.sqrt(3)) for a in (0.0, np.pi / 3, 2 * np.pi / 3))
    return np.asarray(waves / 3, np.float32)


def _top_share(field: F32, share: F32, softness: float) -> F32:
    """Return 1 on the ``share`` of pixels with the highest values, 0 elsewhere, with a soft boundary."""
    flat = np.sort(field.reshape(len(field), -1), axis=1)
    place = ((1 - share.reshape(-1)) * (flat.shape[1] - 1)).astype(int)
    level = flat[np.arange(len(flat)), place][:, None, None]
    return edge(level - field, softness)


def _nuclei(weight: F32, rng: np.random.Generator, radius: F32, angle: F32, stretch: F32) -> tuple[F32, F32]:
    """Place NUCLEI ellipses where ``weight`` is high: coverage and chromatin texture, each [N, Y, X]."""
    num, height, width = weight.shape
    total = np.cumsum(weight.reshape(num, -1), axis=1)
    shots = rng.random((num, NUCLEI), np.float32) * total[:, -1:]
    spots = np.stack([np.searchsorted(total[i], shots[i]) for i in range(num)]).clip(0, height * width - 1)
    row, col = spots // width, spots % width
    offset = np.arange(WINDOW) - WINDOW // 2
    dy = offset[None, None, :, None] + rng.uniform(-0.5, 0.5, (num, NUCLEI, 1, 1)).astype(np.float32)
    dx = offset[None, None, None, :] + rng.uniform(-0.5, 0.5, (num, NUCLEI, 1, 1)).astype(np.float32)
    tilt = angle[..., None] + rng.normal(0, 0.4, (num, NUCLEI, 1, 1)).astype(np.float32)
    r = radius[..., None] * rng.uniform(0.8, 1.25, (num, NUCLEI, 1, 1)).astype(np.float32)
    p, q = turn(dx, dy, tilt)
    long = 1 + stretch[..., None]
    distance = np.sqrt((p / long) ** 2 + (q * np.sqrt(long)) ** 2) - r
    cover = edge(distance, 1.4)
    grain = cover * (0.5 + 0.5 * np.clip(distance / r + 1, 0, 1))
    canvas = np.zeros((2, num, height + 2 * WINDOW, width + 2 * WINDOW), np.float32)
    at = (np.arange(num)[:, None, None, None], (row[..., None, None] + offset[:, None] + WINDOW), (col[..., None, None] + offset[None, :] + WINDOW))
    np.maximum.at(canvas[0], at, cover)
    np.maximum.at(canvas[1], at, grain)
    inner = (slice(None), slice(None), slice(WINDOW, -WINDOW), slice(WINDOW, -WINDOW))
    nuclei, chromatin = canvas[inner]
    return nuclei, chromatin


def _match(field: F32, rng: np.random.Generator, power: float) -> F32:
    """Give every field, by rank, the values p ** (power * random) of a uniform p in (0, 1)."""
    num = len(field)
    flat = field.reshape(num, -1)
    p = (np.arange(flat.shape[1], dtype=np.float32) + 0.5) / flat.shape[1]
    curve = p ** (power * np.exp(uniform(rng, -0.2, 0.2, num, 1)))
    matched = np.empty_like(flat)
    np.put_along_axis(matched, np.argsort(flat, axis=1, kind="stable"), curve.astype(np.float32), axis=1)
    return matched.reshape(field.shape)


def _stain(vector: F32, rng: np.random.Generator, num: int) -> F32:
    """Draw ``num`` variants of a stain's optical density vector, [num, 3]."""
    varied = vector * np.exp(rng.normal(0, 0.18, (num, 3))) + 0.03
    return np.asarray(varied / np.linalg.norm(varied, axis=1, keepdims=True), np.float32)
