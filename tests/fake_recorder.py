"""A stand-in for CUDA's graphs that needs no GPU: it does the captured work again, on the same tensors."""

from collections.abc import Callable

Work = Callable[[], None]


class FakeRecorder:
    """Keeps the function where CUDA keeps its launches.

    Attributes:
        captures: made so far.
        replays: of all of them.
    """

    def __init__(self) -> None:
        self.captures = self.replays = 0

    def aside(self, work: Work, *, may_wait: bool) -> None:
        work()

    def capture(self, work: Work) -> Work:
        self.captures += 1

        def replay() -> None:
            self.replays += 1
            work()

        return replay
