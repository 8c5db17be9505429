"""The scaling table as a picture: the milliseconds of a step, stacked, and the efficiency above each bar."""

from collections.abc import Sequence
from pathlib import Path

from mnemos.bench.scaling_model import Step
from mnemos.engine.rehearsal.canvas import (
    BLUE,
    GRID,
    PALE_BLUE,
    SMALL_SIZE,
    SOFT,
    TITLE_SIZE,
    VERMILION,
    Canvas,
    Colour,
    round_step,
    ticks,
)

SHARES: dict[str, Colour] = {"compute": BLUE, "network": VERMILION, "loader": PALE_BLUE}
LEFT, TOP, TALL, BAR, GAP = 70, 74, 260, 44, 30


def draw(path: Path, steps: Sequence[Step], title: str) -> None:
    """Write the PNG.

    Args:
        path: the file; replaced whole or not at all.
        steps: from left to right.
        title: what was modelled.
    """
    width = max(560, LEFT + len(steps) * (BAR + GAP) + GAP)
    canvas = Canvas(width, TOP + TALL + 78)
    canvas.text(LEFT, 28, f"A step on N ranks (model): {title}", size=TITLE_SIZE)
    highest = max(_height(step) for step in steps)
    unit = TALL / highest
    for value in ticks(0, highest, round_step(highest, 6)):
        y = TOP + TALL - value * unit
        canvas.line(LEFT, y, width - GAP, y, GRID)
        canvas.text(LEFT - 8, y + 4, f"{value:g}", size=SMALL_SIZE, colour=SOFT, anchor="rs")
    canvas.upright_text(20, TOP + TALL / 2, "milliseconds")
    for number, step in enumerate(steps):
        x, y = LEFT + GAP + number * (BAR + GAP) + BAR / 2, float(TOP + TALL)
        for name, height in _bars(step):
            canvas.line(x, y, x, y - height * unit, SHARES[name], width=BAR)
            y -= height * unit
        canvas.text(x, y - 8, f"{step.efficiency:.0%}", size=SMALL_SIZE, anchor="ms")
        canvas.text(x, TOP + TALL + 18, f"{step.ranks}", size=SMALL_SIZE, anchor="ms")
        rate = f"{step.samples_per_s:,.0f}/s"
        canvas.text(x, TOP + TALL + 34, rate, size=SMALL_SIZE, colour=SOFT, anchor="ms")
    left = float(LEFT)
    for name, colour in SHARES.items():
        canvas.line(left, TOP + TALL + 60, left + 14, TOP + TALL + 60, colour, width=12)
        canvas.text(left + 20, TOP + TALL + 64, name, size=SMALL_SIZE, colour=SOFT)
        left += 110
    canvas.text(left, TOP + TALL + 64, "above a bar: efficiency", size=SMALL_SIZE, colour=SOFT)
    canvas.save(path, {"Title": title, "Description": "Model of a step on N ranks, milliseconds by share"})


def _bars(step: Step) -> list[tuple[str, float]]:
    """Return the stacked milliseconds; of reading beside the step, only what the step waits for."""
    waits_s = max(0.0, step.step_s - step.compute_s - step.network_s)
    shares = {"compute": step.compute_s, "network": step.network_s, "loader": waits_s}
    return [(name, 1e3 * seconds) for name, seconds in shares.items()]


def _height(step: Step) -> float:
    return sum(height for _, height in _bars(step))
