"""Where a stained section lies on a slide, told from an overview picture."""

import numpy as np

WHITE = 220  # a pixel with no darker channel is glass
BLACK = 50  # a pixel with no brighter channel is a pen's, or outside the scan
SATURATION = (0.04, 0.08)  # where the threshold between glass and section may lie
_GREEN = 15  # a stained section is never this much greener than red; green and blue ink are
_BLUE, _RED = 2, 3  # how many times the one channel may be the other: more is ink


def tissue_mask(image_YXC: np.ndarray) -> np.ndarray:
    """Return where an overview shows stained tissue.

    A pixel is tissue where its saturation is above Otsu's threshold (Otsu, IEEE Trans. SMC 1979), held within bounds
    so that a slide full of tissue or empty is not cut in half, and it is not glass, black or of a pen's colour.

    Args:
        image_YXC: uint8, RGB.

    Returns:
        bool [Y, X].
    """
    red, green, blue = (image_YXC[..., channel].astype(np.int16) for channel in range(3))
    brightest, darkest = image_YXC.max(axis=2), image_YXC.min(axis=2)
    saturation = (brightest - darkest) / np.maximum(brightest, 1).astype(np.float32)
    ink = (green > red + _GREEN) | (blue > _BLUE * red) | (red > _RED * np.maximum(green, blue))
    lit = brightest > BLACK
    if not lit.any():
        return np.zeros(lit.shape, dtype=bool)
    threshold = np.clip(_otsu(saturation[lit & ~ink]), *SATURATION)
    tissue_YX: np.ndarray = lit & ~ink & (darkest < WHITE) & (saturation > threshold)
    return tissue_YX


def tissue_share(mask_YX: np.ndarray, edges_Y: np.ndarray, edges_X: np.ndarray) -> np.ndarray:
    """Return the share of tissue in every cell of a grid.

    Args:
        mask_YX: bool.
        edges_Y, edges_X: [rows + 1] and [columns + 1] borders of the cells in pixels of the mask, ascending.

    Returns:
        float64 [rows, columns]; a cell takes in every pixel it touches.
    """
    sums = np.pad(mask_YX.astype(np.int64), ((1, 0), (1, 0))).cumsum(axis=0).cumsum(axis=1)
    (first_Y, last_Y), (first_X, last_X) = (
        (
            np.clip(np.floor(edges[:-1]), 0, size - 1).astype(int),
            np.clip(np.ceil(edges[1:]), 1, size).astype(int),
        )
        for edges, size in zip((edges_Y, edges_X), mask_YX.shape, strict=True)
    )
    tissue = (
        sums[np.ix_(last_Y, last_X)]
        - sums[np.ix_(first_Y, last_X)]
        - sums[np.ix_(last_Y, first_X)]
        + sums[np.ix_(first_Y, first_X)]
    )
    share: np.ndarray = tissue / np.outer(last_Y - first_Y, last_X - first_X)
    return share


def _otsu(values: np.ndarray) -> float:
    """Return the threshold between two classes of values in 0..1 with the largest variance between them."""
    counts, edges = np.histogram(values, bins=256, range=(0, 1))
    below = counts.cumsum()
    centres = (edges[:-1] + edges[1:]) / 2
    sums = (counts * centres).cumsum()
    above = below[-1] - below
    with np.errstate(divide="ignore", invalid="ignore"):
        between = below * above * (sums / below - (sums[-1] - sums) / above) ** 2
    return float(edges[1:][np.nanargmax(between)]) if np.isfinite(between).any() else 0.0
