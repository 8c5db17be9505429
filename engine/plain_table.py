"""Aligned plain-text tables: the plan before a run and the stages after it."""

from collections.abc import Mapping, Sequence


def format_table(rows: Sequence[Mapping[str, object]], columns: Mapping[str, str] | Sequence[str]) -> str:
    """Return the rows as lines under a ruled heading; numbers to the right, words to the left.

    Args:
        rows: values by column name. None and missing values print as "-"; floats with four significant digits
            (pass a string for any other format); whole numbers with thousands separated.
        columns: names in order, or names and their headings.

    Returns:
        Text without a trailing newline or trailing spaces.
    """
    headings = dict(columns) if isinstance(columns, Mapping) else {name: name for name in columns}
    table = [list(headings.values()), *([_cell(row.get(name)) for name in headings] for row in rows)]
    widths = [max(len(line[index]) for line in table) for index in range(len(headings))]
    right = [_numbers([row.get(name) for row in rows]) for name in headings]
    lines = [
        "  ".join(
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(line, widths, right, strict=True)
        ).rstrip()
        for line in table
    ]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def _numbers(column: Sequence[object]) -> bool:
    given = [value for value in column if value is not None]
    return bool(given) and all(
        isinstance(value, int | float) and not isinstance(value, bool) for value in given
    )


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
