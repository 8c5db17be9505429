"""DICOM series as volumes and single DICOM pictures as images.

Headers are read for geometry and value scale; nothing of them is stored.
"""

from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from mnemos.sharding.errors import DataError, LeftOut
from mnemos.sharding.sources.dicom_file import read_header, read_pixels
from mnemos.sharding.sources.images import stored_image, stretch
from mnemos.sharding.sources.units import MAX_VOXELS, RawVolume, Unit, relative_name, suffix
from mnemos.sharding.sources.volumes import oriented

if TYPE_CHECKING:
    from pydicom import Dataset

ENDINGS = (".dcm", ".dicom", ".ima")
_MAGIC_END = 132  # 128 free bytes, then "DICM"
_SPACING_TOLERANCE = 0.1  # of the slice spacing: rounded positions pass, a missing slice does not


def is_dicom(path: Path) -> bool:
    """Tell by the ending, and for files without a usual one by the four letters at byte 128."""
    ending = suffix(path)
    if ending in ENDINGS:
        return True
    if path.name.upper() == "DICOMDIR" or not (ending == "" or ending[1:].isdigit()):
        return False
    with path.open("rb") as file:
        return file.read(_MAGIC_END)[-4:] == b"DICM"


def find_series(files: list[Path], root: Path) -> list[Unit]:
    """Return one unit for every series of every folder; an unreadable file is a broken unit of its own."""
    members: dict[tuple[Path, str], list[Path]] = defaultdict(list)
    patients: dict[tuple[Path, str], str] = {}
    units = []
    for path in filter(is_dicom, files):
        try:
            header = read_header(path)
        except DataError as error:
            name = relative_name(path, root)
            units.append(Unit(name=name, reader="dicom_series", files=(path,), broken=error.reason))
            continue
        series = (path.parent, str(header.get("SeriesInstanceUID", "")))
        members[series].append(path)
        patients[series] = str(header.get("PatientID", "") or "")
    in_folder: dict[Path, int] = defaultdict(int)
    for series in sorted(members):
        folder = series[0]
        in_folder[folder] += 1
        name = relative_name(folder, root) if folder != root else folder.name
        if in_folder[folder] > 1:
            name += f"#{in_folder[folder]}"
        units.append(
            Unit(name=name, reader="dicom_series", files=tuple(members[series]), group=patients[series])
        )
    return units


def find_pictures(files: list[Path], root: Path) -> list[Unit]:
    """Return one unit for every DICOM file, with its patient as the group."""
    units = []
    for path in filter(is_dicom, files):
        group, broken = "", ""
        try:
            group = str(read_header(path).get("PatientID", "") or "")
        except DataError as error:
            broken = error.reason
        name = relative_name(path, root)
        units.append(Unit(name=name, reader="dicom_image", files=(path,), group=group, broken=broken))
    return units


def read_series(paths: tuple[Path, ...], dicom_types: tuple[str, ...], *, invert: bool) -> RawVolume:
    """Read a series' slices, sort them by position along their normal and bring the axes into patient order.

    Args:
        paths: one file per slice, in any order.
        dicom_types: what the Modality field may say; empty: anything.
        invert: turn MONOCHROME1 values (low means bright) round. Not for Hounsfield units, which mean what
            they mean however they are displayed.

    Raises:
        DataError: slices of several sizes or directions, two at one position, a missing slice, one that
            cannot be decoded, or more than 2 GiB in all.
    """
    headers = [read_header(path) for path in paths]
    first = headers[0]
    for header in headers:
        _check_type(header, dicom_types)
        if (header.Rows, header.Columns) != (first.Rows, first.Columns):
            raise DataError("its slices have several sizes")
    if len(headers) * int(first.Rows) * int(first.Columns) > MAX_VOXELS:
        raise DataError(f"its {len(headers)} slices of {first.Rows}x{first.Columns} are more than 2 GiB")
    directions = [_numbers(header, "ImageOrientationPatient", 6) for header in headers]
    if not np.allclose(directions, directions[0], atol=1e-3):
        raise DataError("its slices lie in several directions, as a localiser's do")
    along_row, along_column = directions[0][:3], directions[0][3:]
    normal = np.cross(along_row, along_column)
    heights = np.array([_numbers(header, "ImagePositionPatient", 3) @ normal for header in headers])
    order = np.argsort(heights, kind="stable")
    between_mm = _slice_spacing(heights[order], first)
    down_mm, across_mm = _numbers(first, "PixelSpacing", 2)
    affine_lps = np.eye(4)
    affine_lps[:3, :3] = np.stack(
        [normal * between_mm, along_column * down_mm, along_row * across_mm], axis=1
    )
    return oriented(np.stack([_slice(paths[place], invert=invert) for place in order]), affine_lps)


def read_picture(
    path: Path, dicom_types: tuple[str, ...], channels: int, size_YX: tuple[int, int]
) -> np.ndarray:
    """Read a single DICOM picture as a stored sample, uint8 [C, Y, X].

    Grey values go through the header's window where it has one, and are stretched between two percentiles
    where it has none; MONOCHROME1 is inverted, so that bone is bright.

    Raises:
        DataError: not readable, of another DICOM type, or not a single picture.
        LeftOut: the header says that text is burned into the pixels: it may name the patient.
    """
    from pydicom.pixels.processing import apply_modality_lut, apply_voi

    dataset, pixels = read_pixels(path)
    _check_type(dataset, dicom_types)
    if str(dataset.get("BurnedInAnnotation", "")).upper() == "YES":
        raise LeftOut("text burned into the picture (BurnedInAnnotation is YES)")
    if pixels.ndim == 3 and pixels.dtype == np.uint8:
        return stored_image(Image.fromarray(pixels), channels, size_YX)
    if pixels.ndim != 2 or dataset.PhotometricInterpretation not in ("MONOCHROME1", "MONOCHROME2"):
        raise DataError(f"its pixels are {dataset.PhotometricInterpretation}; grey or 8-bit colour is read")
    values_YX, window = apply_modality_lut(pixels, dataset), None
    if "VOILUTSequence" in dataset:
        values_YX = apply_voi(values_YX, dataset)
    elif "WindowCenter" in dataset and "WindowWidth" in dataset:
        centre, width = (
            float(np.atleast_1d(dataset[name].value)[0]) for name in ("WindowCenter", "WindowWidth")
        )
        window = (centre - width / 2, centre + width / 2)
    grey_YX = stretch(values_YX, window)
    if dataset.PhotometricInterpretation == "MONOCHROME1":
        grey_YX = 255 - grey_YX
    return stored_image(Image.fromarray(grey_YX), channels, size_YX)


def _slice(path: Path, *, invert: bool) -> np.ndarray:
    """Return one slice, float32 [Y, X], with the header's slope and intercept applied."""
    from pydicom.pixels.processing import apply_modality_lut

    try:
        dataset, pixels = read_pixels(path)
    except DataError as error:
        raise DataError(f"slice {path.name}: {error.reason}") from error
    if pixels.ndim != 2:
        raise DataError(f"slice {path.name} is in colour; grey values are needed")
    values_YX = np.asarray(apply_modality_lut(pixels, dataset), dtype=np.float32)
    return -values_YX if invert and dataset.PhotometricInterpretation == "MONOCHROME1" else values_YX


def _slice_spacing(heights: np.ndarray, header: "Dataset") -> float:
    """Return the millimetres between slices from their sorted positions; a single slice has its thickness."""
    if len(heights) == 1:
        return float(header.get("SliceThickness", 0) or 1)
    steps = np.diff(heights)
    middle = float(np.median(steps))
    if steps.min() < 1e-3:
        raise DataError(
            "two of its slices lie at one position, as several echoes or time points do; split the series"
        )
    if np.abs(steps - middle).max() > _SPACING_TOLERANCE * middle:
        raise DataError(
            f"slices are missing or uneven: {steps.min():g} to {steps.max():g} mm lie between them"
        )
    return float(steps.mean())


def _check_type(header: "Dataset", dicom_types: tuple[str, ...]) -> None:
    found = str(header.get("Modality", "") or "")
    if dicom_types and found and found not in dicom_types:
        raise DataError(f"it is a DICOM file of type {found}; {' or '.join(dicom_types)} is expected here")


def _numbers(header: "Dataset", name: str, count: int) -> np.ndarray:
    """Return a header field of ``count`` numbers as float64."""
    value = header.get(name)
    if value is None or len(value) != count:
        raise DataError(f"its header has no {name}; a slice without a place in the patient cannot be stacked")
    return np.array([float(number) for number in value])
