"""The bars of bench/step_profile.py: what every role takes, and beside it what it could take."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mnemos.engine.rehearsal.canvas import (
    BLUE,
    GRID,
    INK,
    SMALL_SIZE,
    SOFT,
    TITLE_SIZE,
    VERMILION,
    Canvas,
    round_step,
    ticks,
)

LEFT, RIGHT, TOP, WIDTH = 180, 130, 76, 900  # points
LINE, BAR, LEAST_BAR = 24, 12, 4


def draw(path: Path, about: dict[str, Any], rows: Sequence[dict[str, Any]]) -> None:
    """Write a PNG with a bar for every role, the widest first, and a thin one below it for what it could be.

    Args:
        path: of the PNG, replaced whole or not at all.
        about: what is true of all rows: kind, phase, preset, batch, precision, device, profiled_ms.
        rows: of `step_profile.table`, the sum last.
    """
    bars = sorted(rows[:-1], key=lambda row: -row["ms"])
    longest = max([*(row["ms"] for row in bars), *(row["could_ms"] or 0 for row in bars)])
    sheet = Canvas(WIDTH, TOP + LINE * len(bars) + 36)
    scale, bottom = (WIDTH - LEFT - RIGHT) / longest, TOP + LINE * len(bars)
    title = f"{about['kind']} {about['phase']}: where {about['profiled_ms']:.2f} ms of a step go"
    sheet.text(16, 28, title, size=TITLE_SIZE)
    words = f"{about['preset']}, batch {about['batch']}, {about['precision']}, {about['device']}"
    sheet.text(16, 48, words, size=SMALL_SIZE, colour=SOFT)
    sheet.line(LEFT, 62, LEFT + 24, 62, BLUE, width=BAR)
    sheet.text(LEFT + 30, 66, "takes", size=SMALL_SIZE)
    sheet.line(LEFT + 84, 62, LEFT + 108, 62, VERMILION, width=LEAST_BAR)
    sheet.text(LEFT + 114, 66, "could take, by its least work and the machine's rates", size=SMALL_SIZE)
    for at in ticks(0, longest, round_step(longest, 8)):
        sheet.line(LEFT + at * scale, TOP, LEFT + at * scale, bottom, GRID)
        sheet.text(LEFT + at * scale, bottom + 16, f"{at:g} ms", size=SMALL_SIZE, colour=SOFT, anchor="ms")
    for number, row in enumerate(bars):
        y = TOP + LINE * (number + 0.5)
        sheet.text(LEFT - 10, y + 3, row["role"], colour=INK, anchor="rs")
        sheet.line(LEFT, y - 2, LEFT + row["ms"] * scale, y - 2, BLUE, width=BAR)
        if row["could_ms"]:
            sheet.line(LEFT, y + 6, LEFT + row["could_ms"] * scale, y + 6, VERMILION, width=LEAST_BAR)
        end = LEFT + scale * max(row["ms"], row["could_ms"] or 0)
        sheet.text(
            end + 8, y + 3, f"{row['ms']:.2f} ms, {100 * row['share']:.1f} %", size=SMALL_SIZE, colour=SOFT
        )
    sheet.save(path, {"Title": title, "Description": words})
