"""What every way of reading from afar shares: its interface, its three kinds of failure, and trying again.

The readers (`objects`, `commands`) try once and say what kind of failure it was; the waiting, the repeating and the
several ranges at a time are here, in one place for all of them.
"""

import contextlib
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event, Lock, Thread
from typing import Protocol, TypeVar

from mnemos.sharding.stores.options import StoreOptions

T = TypeVar("T")

LONGEST_WAIT_S = 30.0  # between two attempts
RANGES_AT_ONCE = 4  # of one shard; one connection seldom fills a line

_jitter = (
    random.SystemRandom()
)  # forked readers must not wait in step, and a run's own random numbers are not ours


class Passing(Exception):
    """It failed and may work next time: a dropped connection, a timeout, a short answer, HTTP 429 or 5xx."""


class Refused(Exception):
    """It failed and will fail again: no permission, a wrong address, a certificate that is not trusted."""


class Gone(Refused):
    """There is no such object."""


class TooBig(Refused):
    """The object has more bytes than were asked for."""


class Unranged(Exception):
    """The server does not give parts of a file; the whole has to be asked for."""


class Reader(Protocol):
    """Copies objects of one root into local files; each call is one attempt.

    Every method raises `Passing` or `Refused` for the far side, and `OSError` for the local file.
    """

    ranged: bool
    """Whether parts of an object can be asked for."""

    def exists(self, name: str) -> bool:
        """Say whether there is such an object."""

    def copy(self, name: str, path: Path, most_bytes: int) -> int:
        """Write a whole object to a file that exists, and return its length.

        Raises:
            TooBig: it has more than `most_bytes`.
        """

    def fetch(self, name: str, start: int, stop: int, path: Path) -> None:
        """Write the object's bytes [start, stop) to the same place of a file that exists.

        Raises:
            Unranged: parts cannot be asked for.
        """


def persist(action: Callable[[], T], options: StoreOptions, stop: Event | None = None) -> T:
    """Return what an action returns, repeating it after `Passing` failures.

    The wait doubles with every attempt and is drawn from its upper half ("exponential backoff and jitter").

    Args:
        action: one attempt.
        options: how often, and how long to wait.
        stop: ends the waiting early; the failure at hand is raised then.

    Raises:
        Passing: every attempt failed so; the message has their number and the last reason.
        Exception: whatever else the action raises, at once.
    """
    stop = stop or Event()
    for attempt in range(options.retries + 1):
        try:
            return action()
        except Passing as failure:
            wait_s = min(LONGEST_WAIT_S, options.backoff_s * 2.0**attempt) * _jitter.uniform(0.5, 1.0)
            if attempt == options.retries or stop.wait(wait_s):
                tried = f"{attempt + 1} attempts, the last one: " if attempt else ""
                raise Passing(f"{tried}{failure}") from failure
    raise AssertionError("range(retries + 1) is never empty")


def fetch_whole(reader: Reader, name: str, size: int, path: Path, options: StoreOptions) -> None:
    """Fill a file with an object of known length, several ranges at a time.

    Args:
        reader: of the root.
        name: the object.
        size: its length, bytes.
        path: a file that exists; its bytes [0, size) are written.
        options: the size of a range; each has its own attempts.

    Raises:
        Passing: it failed after every attempt, or the object has another length.
        Refused: it failed and will again.
        OSError: the local file cannot be written.
    """

    def whole() -> None:
        found = reader.copy(name, path, size)
        if found != size:
            raise Passing(f"it has {found} bytes where {size} are expected")

    if reader.ranged and size > options.range_bytes:
        step = options.range_bytes
        places = [(start, min(start + step, size)) for start in range(0, size, step)]
        with contextlib.suppress(Unranged):
            _side_by_side(
                lambda place, stop: persist(lambda: reader.fetch(name, *place, path), options, stop),
                places,
            )
            return
        reader.ranged = False  # not asked again: each refusal is a request for nothing
    if size:
        persist(whole, options)


def _side_by_side(work: Callable[[tuple[int, int], Event], None], places: list[tuple[int, int]]) -> None:
    """Do the work for every place in a few threads; raise the first failure once all of them have ended.

    Plain daemon threads, because a pool of `concurrent.futures` would hold up the end of the process.
    """
    stop, lock, failures = Event(), Lock(), list[Exception]()
    left: Iterator[tuple[int, int]] = iter(places)

    def run() -> None:
        while not stop.is_set():
            with lock:
                place = next(left, None)
            if place is None:
                return
            try:
                work(place, stop)
            except Exception as failure:  # noqa: BLE001  # raised below, in the asking thread
                failures.append(failure)
                stop.set()

    threads = [Thread(target=run, daemon=True) for _ in range(min(RANGES_AT_ONCE, len(places)))]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        stop.set()
    if failures:
        raise failures[0]
