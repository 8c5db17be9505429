"""What a build is made of: units, each read, broken or left out as a whole."""

import csv
import io
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, TextIO

import numpy as np

from mnemos.sharding.errors import DataError, UserError
from mnemos.sharding.sources.bounds import printable
from mnemos.sharding.sources.gunzip import Gunzip

LABELS_FILE = "labels.csv"
MAX_VOXELS = 512 << 20  # a volume is read as float32: 2 GiB
ROW_CHARS = 4 << 20  # of a table: unpacked, a row takes up to fifty times as much
_MOST_COLUMNS = 4_096


@dataclass(frozen=True, kw_only=True)
class Unit:
    """One image, one volume file, one DICOM series or one text.

    Attributes:
        name: path relative to the input folder, with forward slashes; a series is named by its folder, a text
            by its table and row. Shown to the user and hashed, never stored.
        reader: the key of its reader in the source's `readers`.
        files: absolute paths; a series has one per slice, in no order.
        text: the text itself, for texts.
        label, group: "" where unknown.
        broken: why it cannot be read, where that is known before reading.
        left_out: why it gives no sample although it is sound, where that is known before reading; a reason without
            any name in it, because it is counted in the manifest.
        axes: NIfTI: where the voxel axes run, "LPS" or the like, said by the user; "": the header says it.
        facts: what else its reader must know, from tables beside the files (spacing, slices); never stored.
        split: "train" or "val" where the data set's publisher says so; "": ours to choose.
    """

    name: str
    reader: str
    files: tuple[Path, ...]
    text: str = ""
    label: str = ""
    group: str = ""
    broken: str = ""
    left_out: str = ""
    axes: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    split: str = ""


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
    """Return a file's name as users and label files write it; what cannot be printed in one line is escaped."""
    return printable(path.relative_to(root).as_posix())


def files_below(source: Path) -> list[Path]:
    """Return the file itself, or every file below a folder in name order.

    Hidden ones are left alone, and so are pipes and devices, which would never end, and linked folders, which may
    lead in a circle.

    Raises:
        UserError: a folder that cannot be listed: what lies in it would be missing without a word.
    """
    if source.is_file():
        return [source]

    def refuse(error: OSError) -> None:
        raise UserError(
            f"{printable(str(error.filename))} cannot be listed ({error.strerror}); allow it or move it away"
        ) from error

    found = []
    for folder, folders, names in os.walk(source, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths = (Path(folder, name) for name in names if not name.startswith("."))
        found += [path for path in paths if path.is_file()]
    return sorted(found)


def leads_out(path: Path, source: Path) -> bool:
    """Tell whether a file is a link to somewhere else than the input folder: there lie files nobody meant to give."""
    return path.is_symlink() and not path.resolve().is_relative_to(root_of(source).resolve())


def root_of(source: Path) -> Path:
    """Return the folder that names are relative to: the input itself, or the one its single file lies in."""
    return source if source.is_dir() else source.parent


def suffix(path: Path) -> str:
    """Return the lower-case ending that tells the format, ".nii.gz" as one."""
    name = path.name.lower()
    return ".nii.gz" if name.endswith(".nii.gz") else path.suffix.lower()


def describe_files(files: Iterable[Path]) -> str:
    """Say what a folder holds instead, by ending and number: "440 .jpg, 1 .csv"."""
    counts = Counter(suffix(path) or "without an ending" for path in files)
    return ", ".join(f"{number} {ending}" for ending, number in counts.most_common(4))


def read_table(file: Path, delimiter: str = ",") -> Iterator[dict[str, str]]:
    """Yield a table's rows by column; the first row names the columns. A .gz file is inflated row by row.

    Raises:
        UserError: the file is not readable as CSV.
    """
    with _table_lines(file) as lines:
        rows = csv.DictReader(lines, delimiter=delimiter)
        _check_columns(rows.fieldnames or ())
        for row in rows:
            lines.left = ROW_CHARS
            yield {name: value for name, value in row.items() if name is not None and isinstance(value, str)}


def table_columns(file: Path, delimiter: str = ",") -> list[str]:
    """Return a table's column names."""
    with _table_lines(file) as lines:
        return _check_columns(next(csv.reader(lines, delimiter=delimiter), []))


@contextmanager
def _table_lines(file: Path) -> Iterator["_RowLines"]:
    """Open a table, inflating a .gz file as it is read, and say in one sentence what is wrong with it."""
    csv.field_size_limit(ROW_CHARS)
    try:
        with file.open("rb") as stored:
            content = io.BufferedReader(Gunzip(stored)) if suffix(file) == ".gz" else stored
            yield _RowLines(io.TextIOWrapper(content, encoding="utf-8-sig", newline=""))
    except (OSError, DataError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(
            f"{file} cannot be read as CSV ({error}); save it as UTF-8 with one row a line"
        ) from error


class _RowLines:
    """A table's lines, of which a row may take so many characters: quotes let it run over any number of them."""

    def __init__(self, text: TextIO) -> None:
        self._text = text
        self.left = ROW_CHARS

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._text.readline(self.left + 1)  # never more of it in memory, however long it is
        if not line:
            raise StopIteration
        if len(line) > self.left:
            raise csv.Error(f"a row is longer than {ROW_CHARS >> 20} million characters")
        self.left -= len(line)
        return line


def _check_columns(names: Sequence[str]) -> list[str]:
    """Return a table's columns; more than a table has would make every row as wide as the first."""
    if len(names) > _MOST_COLUMNS:
        raise csv.Error(f"it has {len(names)} columns, more than {_MOST_COLUMNS}")
    return list(names)


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
        name = printable(str(PurePosixPath(row["file"].strip().replace("\\", "/"))))
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
