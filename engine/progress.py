"""What a person sees of a stage: a bar on a terminal, a line now and then in a log file."""

import sys
import time
from types import TracebackType
from typing import Self

from tqdm import tqdm

_LOG_EVERY_S = 15.0


def say(sentence: str) -> None:
    """Print a sentence beside whatever bar there is."""
    tqdm.write(sentence)


class Progress:
    """Progress of `total` steps from `done` on, each a `unit`; silent unless `shown`."""

    def __init__(
        self, title: str, total: int, *, done: int = 0, shown: bool = True, unit: str = "step"
    ) -> None:
        self.title, self.total, self.done, self.shown, self.unit = title, total, done, shown, unit
        self._begun = self._told = time.monotonic()
        self._first = done
        live = shown and sys.stderr.isatty()
        self._bar = (
            tqdm(total=total, initial=done, desc=title, unit=unit, dynamic_ncols=True) if live else None
        )

    def advance(self, steps: int, **facts: str) -> None:
        """Count steps and show the facts (name=value)."""
        self.done += steps
        if self._bar is not None:
            self._bar.set_postfix(facts, refresh=False)
            self._bar.update(steps)
        elif self.shown and time.monotonic() - self._told > _LOG_EVERY_S:
            self._told = time.monotonic()
            left = (self.total - self.done) * (self._told - self._begun) / max(1, self.done - self._first)
            told = [
                f"{self.done}/{self.total} {self.unit}s",
                *(f"{name} {value}" for name, value in facts.items()),
            ]
            print(f"{self.title}: {', '.join(told)}, {left:.0f} s left", flush=True)

    def __enter__(self) -> Self:
        """Return the bar itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.close()
