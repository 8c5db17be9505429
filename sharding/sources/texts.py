"""Reports as rows of CSV files or as lines of JSONL files."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mnemos.sharding.errors import UserError
from mnemos.sharding.sources.units import LABELS_FILE, Unit, read_table, relative_name, suffix, table_columns

ENDINGS = (".csv", ".jsonl")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u200b\ufeff]+")


def find_texts(
    files: list[Path], root: Path, *, text_column: str, label_column: str, group_column: str
) -> list[Unit]:
    """Return one unit for every row of every table.

    Args:
        files: candidates; a ``labels.csv`` is no table of texts.
        root: the input folder.
        text_column: must be there.
        label_column, group_column: used where they are there. Without a group, the column ``id`` is the group
            (rows of one study belong together), and without that the row is its own.

    Raises:
        UserError: a table lacks the text column; the sentence lists the columns found.
    """
    units = []
    for path in files:
        if suffix(path) not in ENDINGS or path.name == LABELS_FILE:
            continue
        rows = _csv_rows(path, text_column) if suffix(path) == ".csv" else _jsonl_rows(path, text_column)
        for number, row, broken in rows:
            units.append(
                Unit(
                    name=f"{relative_name(path, root)}:{number}",
                    reader="text",
                    files=(path,),
                    text=clean_text(row.get(text_column, "")),
                    label=row.get(label_column, "").strip(),
                    group=(row.get(group_column, "") or row.get("id", "")).strip(),
                    broken=broken,
                )
            )
    return units


def clean_text(text: str) -> str:
    """Drop control characters and make every run of white space one space."""
    return " ".join(_CONTROL.sub(" ", text).split())


def _csv_rows(path: Path, text_column: str) -> Iterator[tuple[int, dict[str, str], str]]:
    _require(path, text_column, table_columns(path))
    for number, row in enumerate(read_table(path), start=1):
        broken = "" if text_column in row else f"the row has no {text_column!r} field"
        yield number, row, broken


def _jsonl_rows(path: Path, text_column: str) -> Iterator[tuple[int, dict[str, str], str]]:
    checked = False
    try:
        with path.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                try:
                    record: dict[str, Any] = dict(json.loads(line))
                except (ValueError, TypeError):
                    yield number, {}, "the line is not a JSON object"
                    continue
                if not checked:
                    _require(path, text_column, list(record))
                    checked = True
                row = {name: str(value) for name, value in record.items() if isinstance(value, str | int)}
                yield number, row, "" if text_column in row else f"the line has no text under {text_column!r}"
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} cannot be read ({error}); save it as UTF-8, one JSON object a line"
        ) from error


def _require(path: Path, column: str, found: list[str]) -> None:
    if column not in found:
        raise UserError(
            f"{path} has no column {column!r}; its columns are {', '.join(found) or '(none)'}: "
            "name the one that holds the text with --text-column"
        )
