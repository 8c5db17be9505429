"""What a build is made of: units, each read, broken or left out as a whole."""

import csv
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Literal

import numpy as np

from mnemos.sharding.errors import UserError

LABELS_FILE = "labels.csv"
MAX_VOXELS = 512 << 20  # a volume is read as float32: 2 GiB
CSV_FIELD_BYTES = 1 << 24


@dataclass(frozen=True, kw_only=True)
class Unit:
    """One image, one volume file, one DICOM series or one text.

    Attributes:
        name: path relative to the input folder, with forward slashes; a series is named by its folder, a text
            by its table and row. Shown to the user and hashed, never stored.
        reader: which source reads it.
        files: absolute paths; a series has one per slice, in no order.
        text: the text itself, for texts.
        label, group: "" where unknown.
        broken: why it cannot be read, where that is known before reading.
        axes: NIfTI: where the voxel axes run, "LPS" or the like, said by the user; "": the header says it.
    """

    name: str
    reader: Literal["image", "dicom_image", "nifti", "dicom_series", "text"]
    files: tuple[Path, ...]
    text: str = ""
    label: str = ""
    group: str = ""
    broken: str = ""
    axes: str = ""


@dataclass(frozen=True, kw_only=True)
class RawVolume:
    """A volume as it came, its axes in patient order.

    Attributes:
        values_ZYX: float32, Z from foot to head, Y from front to back, X from the patient's right to the
            left.
        spacing_mm: (Z, Y, X) millimetres a voxel.
        doubtful: the header looks made up, so that the orientation may be wrong.
    """

    values_ZYX: np.ndarray
    spacing_mm: tuple[float, float, float]
    doubtful: bool = False


def patient_axes(values: np.ndarray, affine_lps: np.ndarray) -> np.ndarray:
    """Permute and flip a volume's axes to the nearest patient axes; nothing is rotated or resampled.

    Args:
        values: any three axes.
        affine_lps: [4, 4] from voxel indices to millimetres towards the patient's left, back and head.

    Returns:
        [Z, Y, X] as in ``RawVolume``.
    """
    from nibabel.orientations import apply_orientation, io_orientation

    return np.ascontiguousarray(apply_orientation(values, io_orientation(affine_lps)).transpose(2, 1, 0))


def relative_name(path: Path, root: Path) -> str:
    """Return a file's name as users and label files write it."""
    return path.relative_to(root).as_posix()


def files_below(source: Path) -> list[Path]:
    """Return the file itself, or every file below a folder in name order; hidden ones are left alone."""
    if source.is_file():
        return [source]
    found = (path for path in source.rglob("*") if path.is_file())
    return sorted(
        path for path in found if not any(part.startswith(".") for part in path.relative_to(source).parts)
    )


def suffix(path: Path) -> str:
    """Return the lower-case ending that tells the format, ".nii.gz" as one."""
    name = path.name.lower()
    return ".nii.gz" if name.endswith(".nii.gz") else path.suffix.lower()


def describe_files(files: Iterable[Path]) -> str:
    """Say what a folder holds instead, by ending and number: "440 .jpg, 1 .csv"."""
    counts = Counter(suffix(path) or "without an ending" for path in files)
    return ", ".join(f"{number} {ending}" for ending, number in counts.most_common(4))


def read_table(file: Path) -> Iterator[dict[str, str]]:
    """Yield a CSV file's rows by column; the first row names the columns.

    Raises:
        UserError: the file is not readable as CSV.
    """
    csv.field_size_limit(CSV_FIELD_BYTES)
    try:
        with file.open(newline="", encoding="utf-8-sig") as lines:
            reader = csv.DictReader(lines)
            for row in reader:
                yield {
                    name: value for name, value in row.items() if name is not None and isinstance(value, str)
                }
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(
            f"{file} cannot be read as CSV ({error}); save it as UTF-8 with one row a line"
        ) from error


def table_columns(file: Path) -> list[str]:
    """Return a CSV file's column names."""
    try:
        with file.open(newline="", encoding="utf-8-sig") as lines:
            return next(csv.reader(lines), [])
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(
            f"{file} cannot be read as CSV ({error}); save it as UTF-8 with one row a line"
        ) from error


def attach_labels(units: list[Unit], file: Path, root: Path) -> list[Unit]:
    """Give units the labels and groups of a label file.

    Args:
        units: as found; a series may be named by its folder or by any of its files.
        file: CSV with the column ``file`` (relative to the input folder) and any of ``label`` and ``group``.
        root: the input folder.

    Raises:
        UserError: the column is missing, or a row names a file that is not there.
    """
    columns = table_columns(file)
    if "file" not in columns:
        raise UserError(
            f"{file} has the columns {', '.join(columns) or '(none)'}; "
            "a label file needs the column file, and label or group or both"
        )
    places: dict[str, int] = {}
    for number, unit in enumerate(units):
        if unit.reader != "text":
            places.update({relative_name(path, root): number for path in unit.files})
        places[unit.name] = number
    labelled, unknown = list(units), []
    for row in read_table(file):
        name = str(PurePosixPath(row["file"].strip().replace("\\", "/")))
        if name not in places:
            unknown.append(name)
            continue
        number = places[name]
        unit = labelled[number]
        label, group = (row.get(column, "").strip() for column in ("label", "group"))
        labelled[number] = replace(unit, label=label or unit.label, group=group or unit.group)
    if unknown:
        rows = "a file" if len(unknown) == 1 else f"{len(unknown)} files"
        raise UserError(
            f"{file} names {rows} not found in {root} (first: {unknown[0]}); "
            "names are relative to the input folder: correct the rows or remove them"
        )
    return labelled
