"""How a stage ends before its end: a signal, or numbers that went bad."""

import signal
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Self

from mnemos.engine import dist
from mnemos.sharding.command import INTERRUPTED

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Stopped(Exception):
    """A signal asked the run to stop; everything is saved."""


class BadNumbers(Exception):
    """A loss is not finite; the message says where."""


@dataclass
class StopFlag:
    """Set by SIGTERM, SIGINT or SIGUSR1; the ranks agree on it when the losses are read. A second SIGINT ends at once."""

    raised: bool = False
    _before: dict[int, Any] = field(default_factory=dict)

    def __enter__(self) -> Self:
        """Take the signals over."""
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._raise)
        return self

    def __exit__(self, *_: object) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _raise(self, number: int, frame: FrameType | None) -> None:
        if self.raised and number == signal.SIGINT:
            dist.leave(INTERRUPTED)
        self.raised = True
