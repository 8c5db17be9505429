"""Volumes: from any spacing and extent to the preset's sub-volumes; and the recipe, told in words.

The steps of the paper (Ye et al., CVPR 2024). Where ours depart from the authors' code, the recipe says so:
- every volume is resampled, MR along its slices too, and a sample is cut out at the preset's spacing. The authors
  resize 24 slices and the whole plane to 16x192x192, so that their voxels have no fixed size.
- resampling is linear with a filter that widens where it shrinks, so that nothing folds over; theirs is cubic.
- what the stride leaves over is left at both ends alike. Theirs adds a sub-volume that ends with the volume, which
  is often the one before moved by a slice or two.
- nearly empty sub-volumes are dropped.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from mnemos.sharding.errors import DataError, LeftOut, UserError
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
BODY_SHARE = 0.1  # of the volume's clipped range above its lower end: what counts as body in MR
# Share of body voxels below which a sub-volume is dropped: most of its patches would be constant.
LEAST_BODY = 0.1
CENTRES = ("volume", "body")
_TAIL = 0.02  # share of the body cut at each end when its middle is sought: a couch does not move it


@dataclass(frozen=True, kw_only=True)
class SubVolume:
    """One stored sample of a volume: int16 [Z, Y, X]; model value = stored * scale + shift."""

    values_ZYX: np.ndarray
    scale: float
    shift: float


def volume_samples(
    raw: RawVolume, modality: Modality, size: StoredSize, centre: str = "volume"
) -> tuple[list[SubVolume], int]:
    """Cut a volume into the preset's sub-volumes.

    Args:
        raw: values in patient order; Hounsfield units for CT.
        modality: its ``values`` decide clipping and scale, its name the stride.
        size: stored size, spacing and strides.
        centre: what the cut in plane is centred on: "volume", as in the paper, or "body", for fields of view that
            the patient does not lie in the middle of.

    Returns:
        The sub-volumes from foot to head, and the number of nearly empty ones that were dropped.

    Raises:
        DataError: values that are no Hounsfield units, all the same, or too many after resampling.
        LeftOut: fewer slices than half a sub-volume, or nothing but nearly empty ones.
    """
    if centre not in CENTRES:
        raise UserError(f"centre {centre!r} is unknown; choose one of {', '.join(CENTRES)}")
    # What is not kept is not resampled, which may make a hundred times as many voxels of it.
    values_ZYX = raw.values_ZYX
    depth, height, width = size.volume
    keep = (None, height, width) if centre == "volume" else (None, None, None)
    if modality.values == "hounsfield":
        lowest = float(values_ZYX.min())
        if lowest > LEAST_HOUNSFIELD:
            raise DataError(f"its lowest value is {lowest:g}: without air its values are no Hounsfield units")
        if max(values_ZYX.shape[axis] * raw.spacing_mm[axis] for axis in (1, 2)) > WIDE_MM:
            values_ZYX = _middle(_middle(values_ZYX, 1, WIDE_KEEP), 2, WIDE_KEEP)
        values_ZYX = resample(np.clip(values_ZYX, *HOUNSFIELD), raw.spacing_mm, size.spacing_mm, keep)
        least, body = float(HOUNSFIELD[0]), BODY_HOUNSFIELD
    else:
        values_ZYX = _middle(values_ZYX, 0, MIDDLE_SLICES)
        least, highest = (float(value) for value in np.percentile(values_ZYX, CLIP_PERCENTILES))
        if not highest > least:
            raise DataError("all its voxels have one value")
        body = least + BODY_SHARE * (highest - least)
        values_ZYX = resample(values_ZYX, raw.spacing_mm, size.spacing_mm, keep)
    kept, windows = [], _windows(values_ZYX, depth, _stride(modality, size), least)
    for window_ZYX in windows:
        body_ZYX = window_ZYX > body if centre == "body" else None
        cut_ZYX = _cut(_cut(window_ZYX, 1, height, body_ZYX, least), 2, width, body_ZYX, least)
        part = _stored(cut_ZYX, modality) if (cut_ZYX > body).mean() >= LEAST_BODY else None
        if part is not None:
            kept.append(part)
    if not kept:
        raise LeftOut(f"nearly empty volume (no sub-volume has {LEAST_BODY:.0%} of body in it)")
    return kept, len(windows) - len(kept)


def resample(
    values_ZYX: np.ndarray,
    from_mm: tuple[float, ...],
    to_mm: tuple[float, ...],
    keep: tuple[int | None, ...] = (None, None, None),
) -> np.ndarray:
    """Resample to another spacing; both grids share their centre and the spacing is met exactly.

    Linear between voxels; where an axis shrinks the triangle is as wide as the new voxel, which is the
    antialiased linear filter of image libraries. One rule, where a choice between interpolating and averaging
    would jump at some ratio.

    Args:
        values_ZYX: float32.
        from_mm, to_mm: (Z, Y, X) millimetres a voxel.
        keep: most voxels of the result along each axis, those in its middle; None: all.

    Returns:
        float32, round(extent / to_mm) voxels (at least one) along each axis, or those kept of them: the same as if
        all had been made and the rest cut off.
    """
    sizes = [max(1, round(n * a / b)) for n, a, b in zip(values_ZYX.shape, from_mm, to_mm, strict=True)]
    kept = [size if most is None else min(size, most) for size, most in zip(sizes, keep, strict=True)]
    if math.prod(kept) > MAX_VOXELS:
        raise DataError(f"it would have {'x'.join(map(str, kept))} voxels at {to_mm} mm, more than 2 GiB")
    steps = [b / a for a, b in zip(from_mm, to_mm, strict=True)]
    for axis in np.argsort(steps)[::-1]:  # shrink first: later axes then have less to do
        if steps[axis] != 1 or kept[axis] < sizes[axis]:
            values_ZYX = _resample_axis(values_ZYX, int(axis), steps[axis], sizes[axis], kept[axis])
    return values_ZYX


def recipe(modality: Modality, size: StoredSize, centre: str = "volume") -> dict[str, str]:
    """Tell in words how a source file becomes a stored sample, for the manifest; ``centre`` as a volume's cut."""
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
    steps = {"orientation": "axes permuted and flipped to foot-head, front-back, right-left"}
    if modality.values == "hounsfield":
        low, high = HOUNSFIELD
        steps["values"] = f"Hounsfield units clipped to {low}..{high}; model value = HU / {high}"
        steps["rim"] = f"a plane wider than {WIDE_MM:g} mm keeps its centre {WIDE_KEEP:.0%} along both axes"
    else:
        low, high = CLIP_PERCENTILES
        steps["slices"] = f"middle {MIDDLE_SLICES:.0%} kept"
        steps["values"] = f"clipped to the sample's {low} and {high} percentiles, then z-score of the sample"
    steps["resampling"] = f"linear, filter widened where it shrinks, to {size.spacing_mm} mm (Z, Y, X)"
    depth, height, width = size.volume
    span = _span(depth, stride := _stride(modality, size))
    stored = f", of which the middle {depth} are stored" if span > depth else ""
    steps["sub-volumes"] = (
        f"{span} slices every {stride}{stored}; what the stride leaves over is left at both ends alike; a volume of "
        f"{depth} to {span} gives its middle, one of at least {depth - depth // 2} is padded to {depth}; under "
        f"{LEAST_BODY:.0%} of body dropped"
    )
    around = {"volume": "the middle of the plane", "body": "the body in each sub-volume"}[centre]
    steps["cut"] = (
        f"{height}x{width} around {around} cut out at that spacing, nothing resized; padded with the lowest value"
    )
    steps["centre"] = centre
    return steps


def recipe_centre(steps: Mapping[str, str]) -> str:
    """Return what the cut of a shard set's volumes was centred on, from its recipe."""
    return steps.get("centre", "body")  # before there was a choice, it was the body


def _stride(modality: Modality, size: StoredSize) -> int:
    return size.stride.get(modality.name, max(1, size.volume[0] // 2))


def _span(depth: int, stride: int) -> int:
    """Return the slices of a sub-volume before its middle is stored: neighbours share half of them."""
    return max(depth, 2 * stride)


def _resample_axis(values: np.ndarray, axis: int, step: float, size: int, kept: int) -> np.ndarray:
    """Resample one axis to ``size`` voxels of ``step`` old ones each, and return the ``kept`` in the middle."""
    old, first = values.shape[axis], (size - kept) // 2
    # Centres of the new voxels in old voxel numbers, both grids around one centre.
    centres = (np.arange(first, first + kept) - (size - 1) / 2) * step + (old - 1) / 2
    reach = max(1.0, step)
    taps = np.arange(int(np.ceil(2 * reach)) + 1)
    places = np.floor(centres - reach).astype(np.int64)[:, None] + taps
    weights = np.maximum(0.0, 1.0 - np.abs(places - centres[:, None]) / reach)
    weights = (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
    places = np.clip(places, 0, old - 1)
    along = [1] * values.ndim
    along[axis] = kept
    result = np.zeros([*values.shape[:axis], kept, *values.shape[axis + 1 :]], dtype=np.float32)
    for tap in taps:
        if weights[:, tap].any():
            result += weights[:, tap].reshape(along) * np.take(values, places[:, tap], axis=axis)
    return result


def _stored(cut_ZYX: np.ndarray, modality: Modality) -> SubVolume | None:
    """Bring a sub-volume to int16; None where all its voxels have one value.

    Hounsfield units are stored as they are. Others are clipped to the sub-volume's own percentiles and stored as
    levels 0..4095, with the scale and shift that make z-scores of them.
    """
    if modality.values == "hounsfield":
        return SubVolume(values_ZYX=np.round(cut_ZYX).astype(np.int16), scale=HOUNSFIELD_SCALE, shift=0.0)
    lower, upper = (float(value) for value in np.percentile(cut_ZYX, CLIP_PERCENTILES))
    clipped_ZYX = np.clip(cut_ZYX, lower, upper)
    mean, deviation = float(clipped_ZYX.mean(dtype=np.float64)), float(clipped_ZYX.std(dtype=np.float64))
    if not upper > lower or not deviation > 0:
        return None
    stored_ZYX = np.round((clipped_ZYX - lower) * (LEVELS / (upper - lower))).astype(np.int16)
    return SubVolume(
        values_ZYX=stored_ZYX,
        scale=(upper - lower) / LEVELS / deviation,
        shift=(lower - mean) / deviation,
    )


def _middle(values: np.ndarray, axis: int, share: float) -> np.ndarray:
    """Keep the middle share of an axis, at least one."""
    size = values.shape[axis]
    kept = max(1, round(size * share))
    start = (size - kept) // 2
    return values.take(range(start, start + kept), axis=axis)


def _windows(values_ZYX: np.ndarray, depth: int, stride: int, least: float) -> list[np.ndarray]:
    """Cut along Z into sub-volumes, and of each the ``depth`` slices in its middle."""
    slices, span = values_ZYX.shape[0], _span(depth, stride)
    if slices < depth:
        if slices < depth - depth // 2:
            raise LeftOut(f"volume of fewer than {depth - depth // 2} slices at the preset's spacing")
        before = (depth - slices) // 2
        padding = ((before, depth - slices - before), (0, 0), (0, 0))
        return [np.pad(values_ZYX, padding, constant_values=least)]
    span = min(span, slices)
    first, margin = (slices - span) % stride // 2, (span - depth) // 2
    starts = range(first + margin, slices - span + margin + 1, stride)
    return [values_ZYX[start : start + depth] for start in starts]


def _cut(values: np.ndarray, axis: int, size: int, body: np.ndarray | None, least: float) -> np.ndarray:
    """Cut ``size`` voxels of an axis around its middle, or the body's, inside the volume where it is wide enough."""
    have = values.shape[axis]
    if have <= size:
        padding = [(0, 0)] * values.ndim
        padding[axis] = ((size - have) // 2, size - have - (size - have) // 2)
        return np.pad(values, padding, constant_values=least)
    start = (have - size) // 2
    if body is not None and body.any():
        others = tuple(other for other in range(values.ndim) if other != axis)
        profile = np.cumsum(body.sum(axis=others))
        low, high = np.searchsorted(profile, [_TAIL * profile[-1], (1 - _TAIL) * profile[-1]])
        start = int(np.clip(round((low + high + 1 - size) / 2), 0, have - size))
    return values.take(range(start, start + size), axis=axis)
