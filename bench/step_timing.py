"""Windows of the step bench: sides take turns, window by window, forwards and backwards."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from mnemos.bench.step_rates import quartiles, wait
from mnemos.bench.step_sides import REFERENCE, Side
from mnemos.engine.plain_table import format_table

MB = 1e6
COLUMNS = {
    "kind": "kind",
    "phase": "phase",
    "vocab": "words",
    "precision": "in",
    "side": "side",
    "data": "data from",
    "samples_per_s": "samples/s",
    "spread": "quartiles",
    "ratio": "ratio",
    "mfu": "MFU %",
    "host_ms": "host ms",
    "peak_mb": "peak MB",
}


def turns(sides: Sequence[Side], rounds: int) -> list[Side]:
    """Return whose turn it is: A B C D, D C B A, and so on, so that a drift of the machine meets all alike."""
    return [side for number in range(rounds) for side in (sides if number % 2 == 0 else reversed(sides))]


def warm_up(side: Side, device: torch.device, times: int = 1) -> None:
    """Let a side allocate, and compile where it does."""
    with side.context():
        for _ in range(times):
            side.run()
    wait(device)


def window(side: Side, device: torch.device) -> None:
    """Time one pass of a side over its batches, and write down seconds, CPU seconds of issuing, and the peak."""
    on_gpu = device.type == "cuda"
    with side.context():
        wait(device)
        before = torch.cuda.memory_allocated(device) if on_gpu else 0
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(device)
        busy, start = time.process_time(), time.perf_counter()
        side.run()
        busy = time.process_time() - busy
        wait(device)
        side.seconds.append(time.perf_counter() - start)
        side.host_seconds.append(busy)
        if on_gpu:
            rise = torch.cuda.max_memory_allocated(device) - before
            side.peak_bytes.append(side.resident_bytes + rise)


def measure(
    sides: Sequence[Side], device: torch.device, rounds: int, advance: Callable[[], Any] = lambda: None
) -> None:
    """Time `rounds` windows of every side, interleaved."""
    for side in turns(sides, rounds):
        window(side, device)
        advance()


def summary(
    side: Side, sides: Sequence[Side], *, steps: int, flops: float, peak: float | None
) -> dict[str, Any]:
    """Return a side's row of the table.

    Args:
        side: measured.
        sides: of the same row; the ratio is to the reference among them, the median of the rounds' own.
        steps: of a window.
        flops: useful ones of a window.
        peak: FLOP/s that MFU is a share of.
    """
    rates = [side.samples / seconds for seconds in side.seconds]
    low, middle, high = quartiles(rates)
    reference = next((one for one in sides if one.name == REFERENCE), None)
    ratio = None
    if reference is not None:
        theirs = [reference.samples / seconds for seconds in reference.seconds]
        ratio = quartiles([own / other for own, other in zip(rates, theirs, strict=True)])[1]
    on_gpu = bool(side.peak_bytes)
    return {
        "side": side.name,
        "data": side.mode,
        "samples_per_s": middle,
        "low": low,
        "high": high,
        "ratio": ratio,
        "mfu": None if peak is None else flops / side.samples * middle / peak,
        "host_ms": 1e3 * quartiles(side.host_seconds)[1] / steps if on_gpu else None,
        "peak_mb": max(side.peak_bytes) / MB if on_gpu else None,
    }


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Print the table."""
    shown = [
        {
            **row,
            "spread": f"{row['low']:.4g} to {row['high']:.4g}",
            "ratio": None if row["ratio"] is None else f"{row['ratio']:.2f}",
            "mfu": None if row["mfu"] is None else f"{100 * row['mfu']:.1f}",
        }
        for row in rows
    ]
    print(format_table(shown, COLUMNS))
