"""DICOM series as volumes and single DICOM pictures as images.

Headers are read for geometry and value scale; nothing of them is stored.
"""

import re
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from mnemos.sharding.errors import DataError, LeftOut
from mnemos.sharding.modalities import DICOM_TYPES, Modality, StoredSize
from mnemos.sharding.sources.bounds import printable, refusing
from mnemos.sharding.sources.dicom_file import read_header, read_pixels
from mnemos.sharding.sources.images import stored_image, stretch
from mnemos.sharding.sources.source import FindOptions, Outcome, Source, image_outcome
from mnemos.sharding.sources.units import (
    MAX_VOXELS,
    RawVolume,
    Unit,
    files_below,
    relative_name,
    root_of,
    suffix,
)
from mnemos.sharding.sources.volumes import oriented, volume_outcome

if TYPE_CHECKING:
    from pydicom import Dataset

ENDINGS = (".dcm", ".dicom", ".ima")
_MAGIC_END = 132  # 128 free bytes, then "DICM"
_STORAGE = "1.2.840.10008.5.1.4.1.1."  # classes of stored objects: PS3.4, B.5
_SECONDARY_CAPTURE = _STORAGE + "7."
_WITH_TEXT = tuple(_STORAGE + end for end in ("3.", "6.", "12."))  # ultrasound; angiography and fluoroscopy
_CODE_WORD = re.compile("[A-Z][A-Z0-9_ ]{0,15}")
_BLOCK = 1 << 20  # pixels scaled at a time
_SPACING_TOLERANCE = 0.1  # of the slice spacing: rounded positions pass, a missing slice does not


def is_dicom(path: Path) -> bool:
    """Tell by the ending, and for files without a usual one by the four letters at byte 128."""
    ending = suffix(path)
    if ending in ENDINGS:
        return True
    if path.name.upper() == "DICOMDIR" or not (ending == "" or ending[1:].isdigit()):
        return (
            False  # a DICOMDIR names files, which may lie anywhere: those in the folder are found without it
        )
    try:
        with path.open("rb") as file:
            return file.read(_MAGIC_END)[-4:] == b"DICM"
    except OSError:
        return True  # so that it is told among the broken ones


def find_series(files: list[Path], root: Path) -> list[Unit]:
    """Return one unit for every series of every folder; an unreadable file is a broken unit of its own."""
    members: dict[tuple[Path, str], list[Path]] = defaultdict(list)
    patients: dict[tuple[Path, str], str] = {}
    units = []
    for path in filter(is_dicom, files):
        try:
            header = read_header(path)
            series = (path.parent, text(header, "SeriesInstanceUID"))
            patients[series] = text(header, "PatientID")
        except DataError as error:
            name = relative_name(path, root)
            units.append(Unit(name=name, reader="dicom_series", files=(path,), broken=error.reason))
            continue
        members[series].append(path)
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
            group = text(read_header(path), "PatientID")
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
        LeftOut: a picture of a screen, or one with text burned in.
    """
    headers = [read_header(path) for path in paths]
    first = headers[0]
    for header in headers:
        check_kind(header, dicom_types)
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
    values = np.empty((len(paths), int(first.Rows), int(first.Columns)), dtype=np.float32)
    for into, place in zip(values, order, strict=True):
        into[:] = _slice(paths[place], invert=invert)
    return oriented(values, affine_lps)


def read_picture(
    path: Path, dicom_types: tuple[str, ...], channels: int, size_YX: tuple[int, int]
) -> np.ndarray:
    """Read a single DICOM picture as a stored sample, uint8 [C, Y, X].

    Grey values go through the header's window where it has one, and are stretched between two percentiles
    where it has none; MONOCHROME1 is inverted, so that bone is bright.

    Raises:
        DataError: not readable, of another DICOM type, or not a single picture.
        LeftOut: a picture of a screen, or one with text burned in.
    """
    check_kind(read_header(path), dicom_types)
    dataset, pixels = read_pixels(path)
    if pixels.ndim == 3 and pixels.dtype == np.uint8:
        return stored_image(Image.fromarray(pixels), channels, size_YX)
    meaning = text(dataset, "PhotometricInterpretation")
    if pixels.ndim != 2 or not meaning.startswith("MONOCHROME"):
        raise DataError(f"its pixels are {meaning}; grey or 8-bit colour is read")
    with refusing("its lookup tables or its window cannot be used", explain=False):
        values_YX, window = _scaled(pixels, dataset, voi="VOILUTSequence" in dataset), None
        if "VOILUTSequence" not in dataset and "WindowCenter" in dataset and "WindowWidth" in dataset:
            centre, width = (
                float(np.atleast_1d(dataset[name].value)[0]) for name in ("WindowCenter", "WindowWidth")
            )
            window = (centre - width / 2, centre + width / 2)
            if not (np.isfinite(window).all() and width > 0):
                raise DataError(f"its window has the centre {centre:g} and the width {width:g}")
    del pixels
    grey_YX = stretch(values_YX, window)
    if meaning == "MONOCHROME1":
        grey_YX = 255 - grey_YX
    return stored_image(Image.fromarray(grey_YX), channels, size_YX)


def check_kind(header: "Dataset", dicom_types: tuple[str, ...]) -> None:
    """Refuse a file of another type, and leave out what shows a screen, because its text may name the patient.

    Args:
        header: as ``read_header`` returns it.
        dicom_types: what the Modality field may say; empty: anything.

    Raises:
        LeftOut: BurnedInAnnotation is YES; a secondary capture; a screen shot; ultrasound or an angiogram whose
            header does not say that nothing is burned in.
        DataError: of another type.
    """
    burned, sop_class = text(header, "BurnedInAnnotation").upper(), text(header, "SOPClassUID") + "."
    if burned == "YES":
        raise LeftOut("text burned into the picture (BurnedInAnnotation is YES)")
    if sop_class.startswith(_SECONDARY_CAPTURE):
        raise LeftOut("secondary capture: a picture of a screen or of paper may show the patient's name")
    if "SCREEN" in text(header, "ImageType").upper():
        raise LeftOut("screen shot (ImageType says so): it may show the patient's name")
    if sop_class.startswith(_WITH_TEXT) and burned != "NO":
        raise LeftOut(
            "ultrasound or angiogram whose BurnedInAnnotation is not NO: it may show the patient's name"
        )
    found = text(header, "Modality")
    if dicom_types and found and found not in dicom_types:
        raise DataError(
            f"it is a DICOM file of type {_shown(found)}; {' or '.join(dicom_types)} is expected here"
        )


def text(header: "Dataset", name: str) -> str:
    """Return a field as text, several values parted by backslashes; "" where there is none."""
    with refusing(f"its header's {name} is not readable", explain=False):
        value = header.get(name)
        return "" if value is None else str(value) if isinstance(value, str) else "\\".join(map(str, value))


def _slice(path: Path, *, invert: bool) -> np.ndarray:
    """Return one slice, float32 [Y, X], with the header's slope and intercept applied."""
    try:
        dataset, pixels = read_pixels(path)
        if pixels.ndim != 2:
            raise DataError("it is in colour; grey values are needed")
        with refusing("its lookup table or its slope cannot be used", explain=False):
            values_YX = _scaled(pixels, dataset)
        meaning = text(dataset, "PhotometricInterpretation")
    except DataError as error:
        raise DataError(f"slice {printable(path.name)}: {error.reason}") from error
    return np.negative(values_YX) if invert and meaning == "MONOCHROME1" else values_YX


def _scaled(pixels_YX: np.ndarray, dataset: "Dataset", *, voi: bool = False) -> np.ndarray:
    """Apply the header's slope or table, and its window table where asked; float32, some rows at a time.

    pydicom makes float64 of its copies: of a whole picture of 64 million pixels that would be a gigabyte.
    """
    from pydicom.pixels.processing import apply_modality_lut, apply_voi

    values_YX = np.empty(pixels_YX.shape, dtype=np.float32)
    rows = max(1, _BLOCK // pixels_YX.shape[1])
    for first in range(0, len(pixels_YX), rows):
        block = apply_modality_lut(pixels_YX[first : first + rows], dataset)
        values_YX[first : first + rows] = apply_voi(block, dataset) if voi else block
    return values_YX


def _shown(word: str) -> str:
    """Return a code word of a header as far as it looks like one: anything else may name the patient."""
    return word if _CODE_WORD.fullmatch(word) else "unknown"


def _slice_spacing(heights: np.ndarray, header: "Dataset") -> float:
    """Return the millimetres between slices from their sorted positions; a single slice has its thickness."""
    if len(heights) == 1:
        with refusing("its header's SliceThickness is no number", explain=False):
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


def _numbers(header: "Dataset", name: str, count: int) -> np.ndarray:
    """Return a header field of ``count`` numbers as float64."""
    with refusing(f"its header's {name} are no numbers", explain=False):
        value = header.get(name)
        values = [] if value is None else [float(number) for number in value]
    if len(values) != count or not np.isfinite(values).all():
        raise DataError(f"its header has no {name}; a slice without a place in the patient cannot be stacked")
    return np.array(values)


def find_units(source: Path, modality: Modality, options: FindOptions) -> list[Unit]:
    """Return the series of a modality of volumes, the single files of one of images."""
    find = find_series if modality.kind == "volume" else find_pictures
    return find(files_below(source), root_of(source))


def read_series_unit(unit: Unit, modality: Modality, size: StoredSize) -> Outcome:
    """Read a unit that is a series of slices."""
    types = DICOM_TYPES.get(modality.name, ())
    raw = read_series(unit.files, types, invert=modality.values != "hounsfield")
    return volume_outcome(unit, raw, modality, size)


def read_picture_unit(unit: Unit, modality: Modality, size: StoredSize) -> Outcome:
    """Read a unit that is one picture."""
    types = DICOM_TYPES.get(modality.name, ())
    return image_outcome(unit, read_picture(unit.files[0], types, modality.channels, size.image))


SOURCE = Source(
    name="dicom",
    about="DICOM series (volumes) or single DICOM pictures (images) in any folders",
    kinds=("image", "volume"),
    find=find_units,
    readers={"dicom_series": read_series_unit, "dicom_image": read_picture_unit},
)
