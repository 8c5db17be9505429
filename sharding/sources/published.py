"""What the published data sets share: their folder is recognised by a landmark, their tables by name."""

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

from mnemos.sharding.errors import UserError
from mnemos.sharding.sources.units import read_table, table_columns

_LEVELS = 2  # how far above and below the folder given the right one is looked for
_MOST_FOLDERS = 200  # of a level, when looking below


def check_root(source: Path, landmarks: Iterable[str], name: str, expected: str) -> None:
    """Refuse a folder that is not the top of a data set, and name the right one where it lies near.

    Names are relative to this folder and hashed into the keys, so that one level is right and no other.

    Args:
        source: what the user gave.
        landmarks: patterns of paths below the right folder; one that matches is enough.
        name: of the source.
        expected: what lies in the right folder, in words.

    Raises:
        UserError: saying what was found, what is expected and where it seems to be.
    """
    landmarks = tuple(landmarks)
    if _matches(source, landmarks):
        return
    above = list(source.resolve().parents)[:_LEVELS]
    near = [folder for folder in (*above, *_below(source)) if _matches(folder, landmarks)]
    advice = f"give {near[0]}" if near else "give the folder it was unpacked into"
    raise UserError(f"{source} holds {_listed(source)}; {name} needs a folder with {expected}: {advice}")


def table(root: Path, stem: str, columns: Iterable[str], *, why: str) -> Path:
    """Return the table ``stem``.csv or ``stem``.csv.gz of a folder; ``stem`` may hold wildcards.

    Raises:
        UserError: it is missing (the sentence says what it is needed for), or lacks one of the columns.
    """
    found = optional_table(root, stem, columns)
    if found is None:
        raise UserError(
            f"{root} holds no {stem}.csv or {stem}.csv.gz, which {why}; it comes with the data set: put it there"
        )
    return found


def optional_table(root: Path, stem: str, columns: Iterable[str]) -> Path | None:
    """Return a table as ``table`` does, or None where there is none."""
    files = sorted([*root.glob(f"{stem}.csv"), *root.glob(f"{stem}.csv.gz")])
    if not files:
        return None
    present = table_columns(files[0])
    missing = [column for column in columns if column not in present]
    if missing:
        raise UserError(
            f"{files[0]} has the columns {', '.join(present) or '(none)'} but not {', '.join(missing)}; "
            "use the table as it was published"
        )
    return files[0]


def rows(file: Path, columns: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """Yield the values of these columns row by row, "" where a row is too short."""
    for row in read_table(file):
        yield tuple(row.get(column, "").strip() for column in columns)


def _matches(folder: Path, landmarks: tuple[str, ...]) -> bool:
    return folder.is_dir() and any(next(folder.glob(mark), None) for mark in landmarks)


def _below(source: Path) -> list[Path]:
    level, found = [source], []
    for _ in range(_LEVELS):
        inside = (
            path for folder in level if folder.is_dir() for path in sorted(islice(folder.iterdir(), 2000))
        )
        level = list(islice((path for path in inside if path.is_dir()), _MOST_FOLDERS))
        found += level
    return found


def _listed(source: Path) -> str:
    """Name the first few entries of a folder."""
    if not source.is_dir():
        return "one file"
    entries = sorted(path.name + "/" * path.is_dir() for path in islice(source.iterdir(), 2000))
    more = f" and {len(entries) - 4} more" if len(entries) > 4 else ""
    return ", ".join(entries[:4]) + more
