"""Read units and encode their samples, in several processes where that pays, in the units' order."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path

from mnemos.sharding.encoding import Encoded, Encoder
from mnemos.sharding.errors import DataError
from mnemos.sharding.modalities import StoredSize
from mnemos.sharding.sources.samples import read_unit
from mnemos.sharding.sources.units import Unit

_CHUNK = {"text": 256, "image": 16, "volume": 1}  # most units that a process takes at a time
_CHUNK_BYTES = 32 << 20  # of their files: a slide is a chunk of its own, so that no process waits for another
_ALONE = {"text": 4096, "image": 64, "volume": 1}  # so few are done before a second process has started
_AHEAD = 3  # chunks a process may be ahead of the writer: enough to keep it busy, few enough for memory


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What became of one unit: as ``Outcome``, with its samples encoded."""

    samples: tuple[Encoded, ...] = ()
    dropped: int = 0
    doubtful: bool = False
    broken: str = ""
    left_out: str = ""
    skipped: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """How units become stored samples; travels to other processes.

    Attributes:
        encoder: of the set that is written.
        size: of its preset.
    """

    encoder: Encoder
    size: StoredSize

    def __call__(self, unit: Unit) -> Prepared:
        """Read and encode one unit; never raises for what it holds."""
        outcome = read_unit(unit, self.encoder.modality, self.size)
        try:
            samples = tuple(self.encoder.encode(sample) for sample in outcome.samples)
        except DataError as error:
            return Prepared(broken=error.reason)
        return Prepared(
            samples=samples,
            dropped=outcome.dropped,
            doubtful=outcome.doubtful,
            broken=outcome.broken,
            left_out=outcome.left_out,
            skipped=dict(outcome.skipped),
        )


def prepare_units(units: list[Unit], preparation: Preparation, workers: int) -> Iterator[Prepared]:
    """Read and encode units, and yield what became of them in their order.

    Args:
        units: in the order of the set.
        preparation: what to do with each.
        workers: processes beside this one; with 1, or few units, all is done in this one.

    Raises:
        OSError: a process was killed.
    """
    kind = preparation.encoder.modality.kind
    chunks = deque(_chunks(units, _CHUNK[kind]))
    if workers <= 1 or (len(units) <= _ALONE[kind] and len(chunks) <= _ALONE[kind] // _CHUNK[kind]):
        yield from map(preparation, units)
        return
    # Spawned, not forked: a fork copies locks that library threads may hold.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(chunks)), context, _begin, (preparation,)) as pool:
        waiting: deque[Future[list[Prepared]]] = deque()
        try:
            while chunks or waiting:
                while chunks and len(waiting) < _AHEAD * workers:
                    waiting.append(pool.submit(_prepare, chunks.popleft()))
                yield from waiting.popleft().result()
        except BrokenProcessPool as error:
            raise OSError(
                "a reading process was killed (out of memory?); --workers 1 needs the least"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _chunks(units: list[Unit], most: int) -> Iterator[list[Unit]]:
    """Yield runs of units, each of at most so many and of few enough bytes."""
    chunk: list[Unit] = []
    size = 0
    for unit in units:
        added = 0 if unit.text else sum(_bytes(path) for path in unit.files)
        if chunk and (len(chunk) == most or size + added > _CHUNK_BYTES):
            yield chunk
            chunk, size = [], 0
        chunk.append(unit)
        size += added
    if chunk:
        yield chunk


def _bytes(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # reading it will say what is wrong
        return 0


_preparation: Preparation | None = None  # of this worker process


def _begin(preparation: Preparation) -> None:
    """Start a worker: Ctrl-C is for the build alone, and a build that was killed takes its workers along."""
    global _preparation
    _preparation = preparation
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _prepare(units: list[Unit]) -> list[Prepared]:
    assert _preparation is not None, "a worker begins before it works"
    return [_preparation(unit) for unit in units]
