"""From a plan of batches to batches of raw samples: a `webdataset.DataPipeline` driven by the shards' indexes.

The plan says which samples make up which batch. A batch of images or volumes is cut into parts, which the reading
processes take in turn and decode straight into a preallocated batch (`mnemos.sharding.batch_ring`); a batch of texts is
one part. So the order is the plan's, whatever the number of processes. Values stay as stored (uint8, int16, token ids):
everything else happens on the device.

Shape suffixes: B samples, C channels, L token positions.
"""

import itertools
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import FrameType
from typing import Any

import numpy as np
import torch
import webdataset
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

from mnemos.sharding.batch_ring import BatchRing, CopiesUnderWay, RingClosed
from mnemos.sharding.errors import DataError, StoreError, UserError
from mnemos.sharding.reader import ShardSet, Skipped
from mnemos.sharding.tokenizer import PAD

LEAST_ROWS = 16  # of a part: fewer would cost more in messages than in decoding
SLOTS = 4  # batches of the ring
AHEAD = 64  # parts whose shards are fetched from an object store before they are read

_SIGNALS = {signal.SIGTERM, signal.SIGINT}
OnSkip = Callable[[ShardSet, Skipped], None]
_copies = CopiesUnderWay()


@dataclass(frozen=True, kw_only=True)
class Request:
    """One batch to read: `samples` of the set number `member`; `step` and `places` travel along."""

    step: int
    member: int
    samples: np.ndarray
    places: np.ndarray


@dataclass(frozen=True, kw_only=True)
class RawBatch:
    """One batch as stored.

    Attributes:
        data: images uint8 [B, C, Y, X] (in memory [B, Y, X, C] until `to`), volumes int16 [B, 1, Z, Y, X], or token ids
            int64 [B, L] padded with PAD to the longest of the batch.
        scale_B, shift_B: fp32; model value = stored * scale + shift.
        place_B: int64 places in the global order.
    """

    step: int
    member: int
    data: Tensor
    scale_B: Tensor
    shift_B: Tensor
    place_B: Tensor

    def to(self, device: torch.device) -> "RawBatch":
        """Return the batch on a device, copied without waiting, [B, C, Y, X] in memory, too."""
        moved = {
            name: getattr(self, name).to(device, non_blocking=True)
            for name in ("data", "scale_B", "shift_B", "place_B")
        }
        if device.type == "cuda":
            _copies.add(self.data)
        moved["data"] = moved["data"].contiguous()
        return RawBatch(step=self.step, member=self.member, **moved)


def read_batch(sets: Sequence[ShardSet], request: Request, on_skip: OnSkip | None = None) -> RawBatch:
    """Read one batch into memory of its own.

    Args:
        sets: what `request.member` counts into.
        request: the batch.
        on_skip: told of every broken sample, in whose place its follower is read; None refuses broken ones.

    Raises:
        DataError: a sample is broken; it names shard and key.
        StoreError: a shard cannot be had.
    """
    shards = sets[request.member]
    if shards.manifest.kind == "text":
        rows: Any = []
    else:
        rows = np.empty((len(request.samples), *shards.stored_shape), shards.dtype)
    taken, skipped = shards.read_into(request.samples, rows)
    _tell(shards, skipped, on_skip)
    data = _padded(rows) if shards.manifest.kind == "text" else torch.from_numpy(rows)
    return _raw_batch(shards, request, data, taken)


def _tell(shards: ShardSet, skipped: list[Skipped], on_skip: OnSkip | None) -> None:
    for one in skipped:
        if on_skip is None:
            raise DataError(one.reason)
        on_skip(shards, one)


def _padded(texts: list[np.ndarray]) -> Tensor:
    ids_BL = np.full((len(texts), max(1, *(len(ids) for ids in texts))), PAD, dtype=np.int64)
    for row, ids in zip(ids_BL, texts, strict=True):
        row[: len(ids)] = ids
    return torch.from_numpy(ids_BL)


def _raw_batch(shards: ShardSet, request: Request, data: Tensor, taken: np.ndarray) -> RawBatch:
    if shards.manifest.kind == "volume" or shards.manifest.channels == 1:
        data = data.reshape(len(data), 1, *shards.manifest.shape)
    elif shards.manifest.kind == "image":
        data = data.permute(0, 3, 1, 2)
    return RawBatch(
        step=request.step,
        member=request.member,
        data=data,
        scale_B=torch.from_numpy(shards.index["scale"][taken]),
        shift_B=torch.from_numpy(shards.index["shift"][taken]),
        place_B=torch.from_numpy(request.places),
    )


@dataclass(frozen=True, kw_only=True)
class _Part:
    """Rows `start` to `stop` of a batch: number `number` in the ring, which texts pass by; and what was read."""

    number: int
    start: int
    stop: int
    request: Request
    taken: np.ndarray | None = None
    skipped: Sequence[Skipped] = ()
    texts: Any = None

    def pin_memory(self) -> "_Part":
        """Return the part with its texts in page-locked memory (called by the loader); the ring is locked as a whole."""
        return self if self.texts is None else replace(self, texts=self.texts.pin_memory())


class _Parts:
    """Pipeline source: the plan's batches cut into parts, dealt to the reading processes in turn."""

    def __init__(self, sets: Sequence[ShardSet], plan: Callable[[], Iterable[Request]]) -> None:
        self.sets, self.plan = sets, plan

    def __call__(self) -> Iterator[_Part]:
        worker = get_worker_info()
        mine, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        turn = number = 0
        for request in self.plan():
            rows = len(request.samples)
            text = self.sets[request.member].manifest.kind == "text"
            parts = 1 if text else max(1, min(workers, rows // LEAST_ROWS))
            for start, stop in itertools.pairwise(round(rows * part / parts) for part in range(parts + 1)):
                if turn % workers == mine:
                    yield _Part(number=number, start=start, stop=stop, request=request)
                turn += 1
            number += not text


class _Ahead:
    """Pipeline stage: begin to fetch the shards of parts that will be read soon."""

    def __init__(self, sets: Sequence[ShardSet]) -> None:
        self.sets = sets

    def __call__(self, parts: Iterable[_Part]) -> Iterator[_Part]:
        if all(shards.store.local is not None for shards in self.sets):
            yield from parts
            return
        waiting: deque[_Part] = deque()
        for part in parts:
            self.sets[part.request.member].fetch(part.request.samples[part.start : part.stop])
            waiting.append(part)
            if len(waiting) > AHEAD:
                yield waiting.popleft()
        yield from waiting


class _Read:
    """Pipeline stage: read parts into the ring. What goes wrong is handed on, so that it arrives as one sentence."""

    def __init__(
        self, sets: Sequence[ShardSet], ring: BatchRing, ready: Callable[[RawBatch], Any] | None
    ) -> None:
        self.sets, self.ring, self.ready = sets, ring, ready

    def __call__(self, parts: Iterable[_Part]) -> Iterator[_Part | DataError | StoreError | UserError]:
        for part in parts:
            try:
                yield self._read(part)
            except (DataError, StoreError, UserError) as error:
                yield error
                return
            except RingClosed:
                return

    def _read(self, part: _Part) -> _Part:
        request = part.request
        shards, samples = self.sets[request.member], request.samples[part.start : part.stop]
        texts: Any = None
        if shards.manifest.kind == "text":
            rows: Any = []
            taken, skipped = shards.read_into(samples, rows)
            texts = _raw_batch(shards, request, _padded(rows), taken)
            texts = texts if self.ready is None else self.ready(texts)
        else:
            shape = (len(request.samples), *shards.stored_shape)
            rows = self.ring.rows(part.number, shape, shards.dtype)[part.start : part.stop]
            taken, skipped = shards.read_into(samples, rows)
        return replace(part, taken=taken, skipped=skipped, texts=texts)


def stream(
    sets: Sequence[ShardSet],
    plan: Callable[[], Iterable[Request]],
    *,
    ready: Callable[[RawBatch], Any] | None = None,
    on_skip: OnSkip | None = None,
    workers: int,
    pin: bool,
) -> Iterator[Any]:
    """Yield the batches of a plan, in its order.

    A batch of images or volumes lies in memory that is used again when the batch and everything over it is gone: at most
    `SLOTS - 1` can be held at a time.

    Args:
        sets: what `Request.member` counts into.
        plan: makes the requests; called once in every reading process and here, so it must be pure.
        ready: what a reading process makes of a batch of texts before it hands it over; its result has `pin_memory` where
            `pin` is asked for. None hands over the raw batch.
        on_skip: told of every broken sample, in whose place its follower in the set is read; None refuses broken ones.
        workers: reading processes; 0 reads in this one.
        pin: deliver in page-locked memory, for asynchronous copies to a GPU.

    Raises:
        DataError: a sample is broken and there is no `on_skip`, or a hundred in a row are; it names shard and key.
        StoreError: a shard cannot be had, after all retries; it names the shard.
        RuntimeError: more batches are held than the ring has.
    """
    ring = BatchRing(SLOTS, _largest_batch(sets, plan), pin=pin)
    pipeline: Any = webdataset.DataPipeline(_Parts(sets, plan), _Ahead(sets), _Read(sets, ring, ready))
    options: dict[str, Any] = {}
    if workers:
        options = {
            "prefetch_factor": 4,
            "worker_init_fn": partial(_outlive_signals, ring),
            "multiprocessing_context": "fork",  # the ring is inherited
        }
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # until a reader knows what to do with one
    try:
        loader = iter(DataLoader(pipeline, batch_size=None, num_workers=workers, pin_memory=pin, **options))
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    try:
        yield from _assemble(sets, loader, ring, on_skip)
    finally:
        ring.close()
        # Now: an exception's traceback would keep the readers until some later collection of garbage.
        getattr(loader, "_shutdown_workers", lambda: None)()


def _assemble(
    sets: Sequence[ShardSet], parts: Iterator[Any], ring: BatchRing, on_skip: OnSkip | None
) -> Iterator[Any]:
    """Put parts together to batches."""
    taken: list[np.ndarray] = []
    while True:
        _copies.let_go(most=SLOTS // 2)
        ring.check_free()
        part = next(parts, None)
        if part is None:
            return
        if isinstance(part, DataError | StoreError | UserError):
            raise part
        request, shards = part.request, sets[part.request.member]
        _tell(shards, part.skipped, on_skip)
        taken.append(part.taken)
        if part.stop < len(request.samples):
            continue
        if shards.manifest.kind == "text":
            batch = part.texts
        else:
            data = ring.take(part.number, (len(request.samples), *shards.stored_shape), shards.dtype)
            batch = _raw_batch(shards, request, data, np.concatenate(taken))
            del data
        taken.clear()
        yield batch
        del batch


def _largest_batch(sets: Sequence[ShardSet], plan: Callable[[], Iterable[Request]]) -> int:
    """Return the bytes of the largest batch of images or volumes; all batches of a plan have as many rows."""
    first = next(iter(plan()), None)
    rows = 0 if first is None else len(first.samples)
    return max(
        (
            rows * int(np.prod(shards.stored_shape)) * shards.dtype.itemsize
            for shards in sets
            if shards.manifest.kind != "text"
        ),
        default=0,
    )


def _outlive_signals(ring: BatchRing, worker: int) -> None:
    """Leave SIGTERM and Ctrl-C to the rank: launchers signal the readers first, and it needs them until it has saved."""

    def end(number: int, frame: FrameType | None) -> None:
        if ring.closed:  # the rank is done with us
            os._exit(0)

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
