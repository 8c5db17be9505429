"""Reports as rows of CSV files or as lines of JSONL files."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from mnemos.sharding.errors import LeftOut, UserError
from mnemos.sharding.modalities import Modality, StoredSize
from mnemos.sharding.sample import Sample
from mnemos.sharding.sources.bounds import printable
from mnemos.sharding.sources.source import FindOptions, Outcome, Source
from mnemos.sharding.sources.units import (
    LABELS_FILE,
    ROW_CHARS,
    Unit,
    files_below,
    read_table,
    relative_name,
    root_of,
    suffix,
    table_columns,
)

ENDINGS = (".csv", ".jsonl")
# Half characters, too: JSON can spell one, and nothing can store it.
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u200b\ufeff\ud800-\udfff]+")


def find_texts(source: Path, modality: Modality, options: FindOptions) -> list[Unit]:
    """Return one unit for every row of every table; a ``labels.csv`` is no table of texts.

    The text column must be there, those of label and group are used where they are. Without a group, the column
    ``id`` is the group (rows of one study belong together), and without that the row is its own.

    Raises:
        UserError: a table lacks the text column; the sentence lists the columns found.
    """
    units = []
    text_column = options.text_column
    for path in files_below(source):
        if suffix(path) not in ENDINGS or path.name == LABELS_FILE:
            continue
        rows = _csv_rows(path, text_column) if suffix(path) == ".csv" else _jsonl_rows(path, text_column)
        for number, row, broken in rows:
            units.append(
                Unit(
                    name=f"{relative_name(path, root_of(source))}:{number}",
                    reader="text",
                    files=(path,),
                    text=clean_text(row.get(text_column, "")),
                    label=clean_text(row.get(options.label_column, "")),
                    group=clean_text(row.get(options.group_column, "") or row.get("id", "")),
                    broken=broken,
                )
            )
    return units


def read_unit(unit: Unit, modality: Modality, size: StoredSize) -> Outcome:
    """Take the text a unit brought along."""
    if not unit.text:
        raise LeftOut("empty text")
    sample = Sample(array=unit.text, source=unit.name, group=unit.group or unit.name, label=unit.label)
    return Outcome(samples=(sample,))


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
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(_lines(file, path), start=1):
                if not line.strip():
                    continue
                try:
                    record: Any = json.loads(line)
                except (ValueError, RecursionError):  # no JSON; lists in lists in lists
                    record = None
                if not isinstance(record, dict):
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


def _lines(file: TextIO, path: Path) -> Iterator[str]:
    """Yield a file's lines, never with more of one in memory than a row may have."""
    while line := file.readline(ROW_CHARS + 1):
        if len(line) > ROW_CHARS:
            raise UserError(
                f"{path} cannot be read (a line is longer than {ROW_CHARS >> 20} million characters); "
                "save it with one JSON object a line"
            )
        yield line


def _require(path: Path, column: str, found: list[str]) -> None:
    if column not in found:
        raise UserError(
            f"{path} has no column {column!r}; its columns are {printable(', '.join(found)) or '(none)'}: "
            "name the one that holds the text with --text-column"
        )


SOURCE = Source(
    name="texts",
    about="CSV or JSONL tables with a column of texts",
    kinds=("text",),
    find=find_texts,
    readers={"text": read_unit},
)
