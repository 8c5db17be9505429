"""Fetch in the background what will be asked for next."""

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Hashable, Iterable
from typing import Generic, TypeVar

THREADS = 2  # shards at a time, each in several ranges

T = TypeVar("T", bound=Hashable)


class Ahead(Generic[T]):
    """A few threads of one process that end when nothing is left to fetch.

    Args:
        fetch: fetches one thing; its failures are dropped, whoever needs the thing meets them again.
    """

    def __init__(self, fetch: Callable[[T], object]) -> None:
        self.fetch = fetch
        self.lock = threading.Lock()
        self.waiting: deque[T] = deque()
        self.known: set[T] = set()
        self.running = 0

    def add(self, things: Iterable[T]) -> None:
        """Fetch these, in this order, behind what waits already; one that waits or is under way is not added."""
        with self.lock:
            for thing in things:
                if thing not in self.known:
                    self.known.add(thing)
                    self.waiting.append(thing)
            while self.running < min(THREADS, len(self.waiting)):
                self.running += 1
                # a daemon: the end of the process does not wait for what nobody will read
                threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            with self.lock:
                if not self.waiting:
                    self.running -= 1
                    return
                thing = self.waiting.popleft()
            with contextlib.suppress(Exception):
                self.fetch(thing)
            with self.lock:
                self.known.discard(thing)
