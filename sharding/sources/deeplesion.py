"""DeepLesion: CT neighbourhoods of lesions, one 16-bit PNG a slice, spacing from the data set's table.

Layout as published (Yan et al., J. Med. Imaging 2018): ``Images_png/000001_01_01/103.png`` in a folder a series
(patient, study, series), the slice's index as its name, Hounsfield units = value - 32768; ``DL_info.csv`` beside.
A folder holds the slices around one or several bookmarked ones, so the indices have gaps: every run of consecutive
ones is a volume of its own. Indices count from head to foot, rows from front to back, columns towards the patient's
left: so says the affine of the authors' DL_save_nifti.py.
"""

import os
import re
import warnings
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mnemos.sharding.errors import DataError, UserError
from mnemos.sharding.modalities import Modality, StoredSize
from mnemos.sharding.sources.picture_file import check_picture
from mnemos.sharding.sources.source import FindOptions, Outcome, Source
from mnemos.sharding.sources.units import (
    MAX_VOXELS,
    RawVolume,
    Unit,
    read_table,
    table_columns,
)
from mnemos.sharding.sources.volumes import oriented, volume_outcome

TABLE = "DL_info.csv"
_FILE, _SPACING, _RANGE = "File_name", "Spacing_mm_px_", "Slice_range"
_SERIES = re.compile(r"(\d{6})_\d{2}_\d{2}")
_SLICE = re.compile(r"\d+\.png", re.IGNORECASE)
_ZERO = 32768  # stored value of 0 HU
_MOST_PIXELS = 16 << 20  # of a slice; published ones have 512x512 to 1024x1024
_DEEP_MODES = ("I;16", "I;16B", "I;16L", "I;16N")
_Spacings = dict[str, list[tuple[range, str]]]  # of a series: slices that a row speaks of, and its spacing


def find_units(source: Path, modality: Modality, options: FindOptions) -> list[Unit]:
    """Return one unit for every run of consecutive slices of every series.

    Args:
        source: the folder with ``Images_png`` and the table, or ``Images_png`` itself with the table beside it.
        modality: any that the source fits.
        options: of no concern here.

    Raises:
        UserError: no series folder below the input, or no readable table.
    """
    series, tables = _walk(source)
    if not series:
        raise UserError(
            f"input {source} holds no folder named like 000001_01_01 (patient, study, series); "
            f"give the folder that holds Images_png and {TABLE}, with the archives unpacked"
        )
    tables += [file] if (file := source.parent / TABLE).is_file() else []
    if not tables:
        raise UserError(
            f"{TABLE} is neither in {source} nor beside it; it holds the voxel spacing: download it from where the "
            "slices come from and put it into the input folder"
        )
    spacings = _read_spacings(tables[0])
    return [unit for name in sorted(series) for unit in _runs(name, series[name], spacings.get(name, []))]


def read_slices(unit: Unit, modality: Modality, size: StoredSize) -> Outcome:
    """Read a unit that is a run of slices, in the order of their indices."""
    return volume_outcome(unit, read_run(unit.files, unit.facts["spacing"]), modality, size)


def read_run(paths: tuple[Path, ...], spacing: str) -> RawVolume:
    """Read consecutive slices as Hounsfield units in patient order.

    Args:
        paths: 16-bit PNG files, from head to foot.
        spacing: millimetres across, down and between slices, as the table writes them: "0.488281, 0.488281, 5".

    Raises:
        DataError: spacing that is no three numbers, a slice that cannot be decoded, of another size than the first or
            not of 16 bits, or more than 2 GiB in all.
    """
    try:
        across_mm, down_mm, between_mm = (abs(float(number)) for number in spacing.split(","))
    except ValueError as error:
        raise DataError(f"its spacing is said to be {spacing!r}; three numbers are needed") from error
    values: np.ndarray | None = None
    for number, path in enumerate(paths):
        shape_YX, slice_YX = read_slice(path, most_pixels=min(_MOST_PIXELS, MAX_VOXELS // len(paths)))
        if values is None:
            values = np.empty((len(paths), *shape_YX), dtype=np.float32)
        if shape_YX != values.shape[1:]:
            raise DataError(f"slice {path.name} is {shape_YX}, the first one {values.shape[1:]}")
        np.subtract(slice_YX, _ZERO, out=values[number], dtype=np.float32)
    assert values is not None, "a run has at least one slice"
    towards_foot, towards_back, towards_left = (0, 0, -between_mm), (0, down_mm, 0), (across_mm, 0, 0)
    affine_lps = np.eye(4)
    affine_lps[:3, :3] = np.array([towards_foot, towards_back, towards_left]).T
    return oriented(values, affine_lps)


def read_slice(path: Path, *, most_pixels: int) -> tuple[tuple[int, int], np.ndarray]:
    """Return a slice's size (Y, X) and its stored values, uint16 [Y, X]; decoded only where it is small enough."""
    from PIL import Image

    try:
        check_picture(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # our limit is the one that counts
            with Image.open(path, formats=["PNG"]) as picture:
                if picture.width * picture.height > most_pixels:
                    raise DataError(f"it declares {picture.width}x{picture.height} pixels, more than allowed")
                if picture.mode not in _DEEP_MODES:
                    raise DataError(f"its mode is {picture.mode}; 16-bit grey is needed, as published")
                return (picture.height, picture.width), np.asarray(picture, dtype=np.uint16)
    except DataError as error:
        raise DataError(f"slice {path.name}: {error.reason}") from error
    except Exception as error:  # Pillow lets struct, zlib and its own errors through
        raise DataError(f"slice {path.name} is no readable PNG file ({type(error).__name__})") from error


def _runs(series: str, folders: list[Path], rows: list[tuple[range, str]]) -> Iterator[Unit]:
    """Yield a unit for every run of consecutive slices of a series, which two archives may each hold a part of."""
    by_index = {
        int(path.stem): path for folder in folders for path in folder.iterdir() if _SLICE.fullmatch(path.name)
    }
    patient = series.partition("_")[0]
    starts = sorted(index for index in by_index if index - 1 not in by_index)
    ends = sorted(index for index in by_index if index + 1 not in by_index)
    for first, last in zip(starts, ends, strict=True):
        run = range(first, last + 1)
        about = [spacing for slices, spacing in rows if slices.start < run.stop and run.start < slices.stop]
        spacing = next(iter(about or [spacing for _, spacing in rows]), "")
        yield Unit(
            name=f"{series}/{first:03d}-{last:03d}",
            reader="slices",
            files=tuple(by_index[index] for index in run),
            group=patient,
            broken="" if spacing else f"{TABLE} has no row for its series, so that its spacing is unknown",
            facts={"spacing": spacing},
        )
    if not by_index:
        yield Unit(name=series, reader="slices", files=(), group=patient, broken="its folder holds no slice")


def _walk(source: Path) -> tuple[dict[str, list[Path]], list[Path]]:
    """Return the folders of every series and the tables below a folder, without a look at its million slices."""
    series, tables = defaultdict(list), []
    for folder, names, files in os.walk(source):
        for name in filter(_SERIES.fullmatch, names):
            series[name].append(Path(folder, name))
        tables += [Path(folder, TABLE)] if TABLE in files else []
        names[:] = sorted(name for name in names if not (_SERIES.fullmatch(name) or name.startswith(".")))
    return series, tables


def _read_spacings(file: Path) -> _Spacings:
    columns = table_columns(file)
    if missing := [column for column in (_FILE, _SPACING) if column not in columns]:
        raise UserError(
            f"{file} has the columns {', '.join(columns) or '(none)'} but not {' and '.join(missing)}; "
            "give the table as published"
        )
    spacings: _Spacings = {}
    for row in read_table(file):
        series, _, index = row.get(_FILE, "").strip().removesuffix(".png").rpartition("_")
        ends = re.findall(r"\d+", row.get(_RANGE, "") or index)
        slices = range(int(ends[0]), int(ends[-1]) + 1) if ends else range(0)
        spacings.setdefault(series, []).append((slices, row.get(_SPACING, "").strip()))
    return spacings


def _fits(modality: Modality) -> bool:
    return modality.values == "hounsfield"


SOURCE = Source(
    name="deeplesion",
    about="DeepLesion as published: Images_png with a folder a series, and DL_info.csv",
    kinds=("volume",),
    find=find_units,
    readers={"slices": read_slices},
    fits=_fits,
)
