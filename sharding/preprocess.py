"""Volumes: from any spacing and extent to the preset's sub-volumes; and the recipe, told in words.

The steps of the paper (Ye et al., CVPR 2024), with two choices of our own: the cut in plane is
centred on the body, because a scanner's field of view rarely is, and resampling widens its filter where it
shrinks, so that nothing folds over.
"""

from dataclasses import dataclass

import numpy as np

from mnemos.sharding.errors import DataError, LeftOut
from mnemos.sharding.modalities import Modality, StoredSize
from mnemos.sharding.sources.images import PERCENTILES as PICTURE_PERCENTILES
from mnemos.sharding.sources.units import MAX_VOXELS, RawVolume

HOUNSFIELD = (-1024, 1024)  # CT is clipped to this; air outside the field of view is the lower end
HOUNSFIELD_SCALE = 1 / 1024  # model value = HU / 1024
BODY_HOUNSFIELD = -300.0  # above it: fat and denser tissue; below: air, lung, most of the couch's foam
LEAST_HOUNSFIELD = -200.0  # a CT whose lowest value is above this holds no air, so its values are no HU
WIDE_MM = 320.0  # a CT wider than this loses its rim, where the couch and the arms are
WIDE_KEEP = 0.8
MIDDLE_SLICES = 0.8  # share of an MR volume's slices kept: the ends are often empty or distorted
CLIP_PERCENTILES = (0.2, 99.8)
LEVELS = 4095  # an MR scanner delivers 12 bits; more levels would store noise that does not compress
BODY_SHARE = 0.1  # of the clipped range above its lower end: what counts as body in MR
# Share of body voxels below which a sub-volume is dropped: most of its patches would be constant.
LEAST_BODY = 0.1
_TAIL = 0.02  # share of the body cut at each end when its middle is sought: a couch does not move it


@dataclass(frozen=True, kw_only=True)
class SubVolume:
    """One stored sample of a volume: int16 [Z, Y, X]; model value = stored * scale + shift."""

    values_ZYX: np.ndarray
    scale: float
    shift: float


def volume_samples(raw: RawVolume, modality: Modality, size: StoredSize) -> tuple[list[SubVolume], int]:
    """Cut a volume into the preset's sub-volumes.

    Args:
        raw: values in patient order; Hounsfield units for CT.
        modality: its ``values`` decide clipping and scale, its name the stride.
        size: stored size, spacing and strides.

    Returns:
        The sub-volumes from foot to head, and the number of nearly empty ones that were dropped.

    Raises:
        DataError: values that are no Hounsfield units, all the same, or too many after resampling.
        LeftOut: fewer slices than half a sub-volume, or nothing but nearly empty ones.
    """
    # Cut what is not kept before resampling, which may make fifty times as many voxels of it.
    values_ZYX = raw.values_ZYX
    if modality.values == "hounsfield":
        lowest = float(values_ZYX.min())
        if lowest > LEAST_HOUNSFIELD:
            raise DataError(f"its lowest value is {lowest:g}: without air its values are no Hounsfield units")
        for axis in (1, 2):
            if values_ZYX.shape[axis] * raw.spacing_mm[axis] > WIDE_MM:
                values_ZYX = _middle(values_ZYX, axis, WIDE_KEEP)
        values_ZYX = resample(np.clip(values_ZYX, *HOUNSFIELD), raw.spacing_mm, size.spacing_mm)
        stored_ZYX, scale, shift = np.round(values_ZYX).astype(np.int16), HOUNSFIELD_SCALE, 0.0
        least, body = HOUNSFIELD[0], BODY_HOUNSFIELD
    else:
        values_ZYX = resample(_middle(values_ZYX, 0, MIDDLE_SLICES), raw.spacing_mm, size.spacing_mm)
        stored_ZYX, scale, shift = _z_scored(values_ZYX)
        least, body = 0, BODY_SHARE * LEVELS
    depth, height, width = size.volume
    stride = size.stride.get(modality.name, max(1, depth // 2))
    kept, windows = [], _windows(stored_ZYX, depth, stride, least)
    for window_ZYX in windows:
        body_ZYX = window_ZYX > body
        cut_ZYX = _cut(_cut(window_ZYX, 1, height, body_ZYX, least), 2, width, body_ZYX, least)
        if (cut_ZYX > body).mean() >= LEAST_BODY:
            kept.append(SubVolume(values_ZYX=np.ascontiguousarray(cut_ZYX), scale=scale, shift=shift))
    if not kept:
        raise LeftOut(f"nearly empty volume (no sub-volume has {LEAST_BODY:.0%} of body in it)")
    return kept, len(windows) - len(kept)


def resample(values_ZYX: np.ndarray, from_mm: tuple[float, ...], to_mm: tuple[float, ...]) -> np.ndarray:
    """Resample to another spacing; both grids share their centre and the spacing is met exactly.

    Linear between voxels; where an axis shrinks the triangle is as wide as the new voxel, which is the
    antialiased linear filter of image libraries. One rule, where a choice between interpolating and averaging
    would jump at some ratio.

    Args:
        values_ZYX: float32.
        from_mm, to_mm: (Z, Y, X) millimetres a voxel.

    Returns:
        float32, round(extent / to_mm) voxels (at least one) along each axis.
    """
    sizes = [max(1, round(n * a / b)) for n, a, b in zip(values_ZYX.shape, from_mm, to_mm, strict=True)]
    if int(np.prod(sizes, dtype=object)) > MAX_VOXELS:
        raise DataError(f"it would have {'x'.join(map(str, sizes))} voxels at {to_mm} mm, more than 2 GiB")
    steps = [b / a for a, b in zip(from_mm, to_mm, strict=True)]
    for axis in np.argsort(steps)[::-1]:  # shrink first: later axes then have less to do
        if steps[axis] != 1:
            values_ZYX = _resample_axis(values_ZYX, int(axis), steps[axis], sizes[axis])
    return values_ZYX


def recipe(modality: Modality, size: StoredSize) -> dict[str, str]:
    """Tell in words how a source file becomes a stored sample, for the manifest."""
    if modality.kind == "text":
        return {
            "cleaning": "control characters dropped, every run of white space made one space",
            "tokens": f"lower-cased byte-level BPE of at most {size.vocab} entries, trained on the training "
            f"split; the first {size.text} ids are kept",
        }
    if modality.kind == "image":
        colour = "luminance" if modality.channels == 1 else "RGB"
        low, high = PICTURE_PERCENTILES
        return {
            "orientation": "EXIF rotation applied, then dropped",
            "values": f"8-bit {colour}; deeper files through the DICOM window, else stretched between their "
            f"{low} and {high} percentiles; MONOCHROME1 inverted",
            "size": f"shortest side resized (bicubic, antialiased), centre {size.image} cut out",
        }
    steps = {
        "orientation": "axes permuted and flipped to foot-head, front-back, right-left",
        "resampling": f"linear, filter widened where it shrinks, to {size.spacing_mm} mm (Z, Y, X)",
    }
    if modality.values == "hounsfield":
        low, high = HOUNSFIELD
        steps["values"] = f"Hounsfield units clipped to {low}..{high}; model value = HU / {high}"
        steps["rim"] = f"an axis in plane of more than {WIDE_MM:g} mm keeps its centre {WIDE_KEEP:.0%}"
    else:
        low, high = CLIP_PERCENTILES
        steps["slices"] = f"middle {MIDDLE_SLICES:.0%} kept"
        steps["values"] = f"clipped to the volume's {low} and {high} percentiles, then z-score of the volume"
    depth, height, width = size.volume
    stride = size.stride.get(modality.name, max(1, depth // 2))
    steps["cut"] = f"{height}x{width} centred on the body in each sub-volume, padded with the lowest value"
    steps["sub-volumes"] = (
        f"{depth} slices every {stride}, in the middle of the volume; a volume of at least "
        f"{depth - depth // 2} is padded to {depth}; under {LEAST_BODY:.0%} of body dropped"
    )
    return steps


def _resample_axis(values: np.ndarray, axis: int, step: float, size: int) -> np.ndarray:
    """Resample one axis; ``step`` old voxels a new voxel."""
    old = values.shape[axis]
    # Centres of the new voxels in old voxel numbers, both grids around one centre.
    centres = (np.arange(size) - (size - 1) / 2) * step + (old - 1) / 2
    reach = max(1.0, step)
    taps = np.arange(int(np.ceil(2 * reach)) + 1)
    places = np.floor(centres - reach).astype(np.int64)[:, None] + taps
    weights = np.maximum(0.0, 1.0 - np.abs(places - centres[:, None]) / reach)
    weights = (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
    places = np.clip(places, 0, old - 1)
    along = [1] * values.ndim
    along[axis] = size
    result = np.zeros([*values.shape[:axis], size, *values.shape[axis + 1 :]], dtype=np.float32)
    for tap in taps:
        if weights[:, tap].any():
            result += weights[:, tap].reshape(along) * np.take(values, places[:, tap], axis=axis)
    return result


def _z_scored(values_ZYX: np.ndarray) -> tuple[np.ndarray, float, float]:
    """Clip, and return int16 levels 0..4095 with the scale and shift that make z-scores of them."""
    lower, upper = (float(value) for value in np.percentile(values_ZYX, CLIP_PERCENTILES))
    clipped_ZYX = np.clip(values_ZYX, lower, upper)
    mean, deviation = float(clipped_ZYX.mean(dtype=np.float64)), float(clipped_ZYX.std(dtype=np.float64))
    if not upper > lower or not deviation > 0:
        raise DataError("all its voxels have one value")
    stored_ZYX = np.round((clipped_ZYX - lower) * (LEVELS / (upper - lower))).astype(np.int16)
    return stored_ZYX, (upper - lower) / LEVELS / deviation, (lower - mean) / deviation


def _middle(values: np.ndarray, axis: int, share: float) -> np.ndarray:
    """Keep the middle share of an axis, at least one."""
    size = values.shape[axis]
    kept = max(1, round(size * share))
    start = (size - kept) // 2
    return values.take(range(start, start + kept), axis=axis)


def _windows(values_ZYX: np.ndarray, depth: int, stride: int, least: int) -> list[np.ndarray]:
    """Cut sub-volumes along Z; what the stride leaves over is left at both ends alike.

    With a depth of 16 and a stride of 12 these are the centres of the paper's 24 slices every 12.
    """
    slices = values_ZYX.shape[0]
    if slices < depth:
        if slices < depth - depth // 2:
            raise LeftOut(f"volume of fewer than {depth - depth // 2} slices at the preset's spacing")
        before = (depth - slices) // 2
        padding = ((before, depth - slices - before), (0, 0), (0, 0))
        return [np.pad(values_ZYX, padding, constant_values=least)]
    first = (slices - depth) % stride // 2
    return [values_ZYX[start : start + depth] for start in range(first, slices - depth + 1, stride)]


def _cut(values: np.ndarray, axis: int, size: int, body: np.ndarray, least: int) -> np.ndarray:
    """Cut ``size`` voxels of an axis around the body's middle, inside the volume where it is wide enough."""
    have = values.shape[axis]
    if have <= size:
        padding = [(0, 0)] * values.ndim
        padding[axis] = ((size - have) // 2, size - have - (size - have) // 2)
        return np.pad(values, padding, constant_values=least)
    profile = np.cumsum(body.sum(axis=tuple(other for other in range(values.ndim) if other != axis)))
    middle = have / 2
    if profile[-1] > 0:
        low, high = np.searchsorted(profile, [_TAIL * profile[-1], (1 - _TAIL) * profile[-1]])
        middle = (low + high + 1) / 2
    start = int(np.clip(round(middle - size / 2), 0, have - size))
    return values.take(range(start, start + size), axis=axis)
