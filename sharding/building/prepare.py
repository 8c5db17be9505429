"""Read units and encode their samples, in several processes where that pays, in the units' order."""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mnemos.sharding.encoding import Encoded, Encoder
from mnemos.sharding.errors import DataError
from mnemos.sharding.in_processes import map_in_processes
from mnemos.sharding.modalities import StoredSize
from mnemos.sharding.sources.samples import read_unit
from mnemos.sharding.sources.units import Unit

_CHUNK = {"text": 256, "image": 16, "volume": 1}  # most units that a process takes at a time
_CHUNK_BYTES = 32 << 20  # of their files: a slide is a chunk of its own, so that no process waits for another
_ALONE = {"text": 4096, "image": 64, "volume": 1}  # so few are done before a second process has started


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

    def each(self, units: list[Unit]) -> list[Prepared]:
        """Read and encode several units."""
        return [self(unit) for unit in units]


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
    chunks = list(_chunks(units, _CHUNK[kind]))
    if workers <= 1 or (len(units) <= _ALONE[kind] and len(chunks) <= _ALONE[kind] // _CHUNK[kind]):
        yield from map(preparation, units)
        return
    done = map_in_processes(preparation.each, chunks, min(workers, len(chunks)))
    yield from itertools.chain.from_iterable(done)


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
