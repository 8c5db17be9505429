"""From a plan of batches to batches of raw samples: a `webdataset.DataPipeline` driven by the shards' indexes.

The plan says which samples make up which batch; workers take turns (worker w of W makes batches w, w + W, ...), so
that the order is the plan's, whatever their number. Values stay as stored (uint8, int16, token ids): everything else
happens on the device.

Shape suffixes: B samples, C channels, L token positions.
"""

import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import webdataset
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

from mnemos.sharding.errors import DataError
from mnemos.sharding.reader import ShardSet
from mnemos.sharding.tokenizer import PAD


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
        data: images uint8 [B, C, Y, X], volumes int16 [B, 1, Z, Y, X], or token ids int64 [B, L] padded with PAD to the
            longest of the batch.
        scale_B, shift_B: fp32; model value = stored * scale + shift.
        place_B: int64 places in the global order.
    """

    step: int
    member: int
    data: Tensor
    scale_B: Tensor
    shift_B: Tensor
    place_B: Tensor

    def pin_memory(self) -> "RawBatch":
        """Return the batch in page-locked memory (called by the loader)."""
        return self._each(lambda tensor: tensor.pin_memory())

    def to(self, device: torch.device) -> "RawBatch":
        """Return the batch on a device, copied without waiting."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def _each(self, change: Callable[[Tensor], Tensor]) -> "RawBatch":
        tensors = {name: change(getattr(self, name)) for name in ("data", "scale_B", "shift_B", "place_B")}
        return RawBatch(step=self.step, member=self.member, **tensors)


def read_batch(sets: Sequence[ShardSet], request: Request) -> RawBatch:
    """Read one batch.

    Raises:
        DataError: a sample is broken; it names shard and key.
    """
    shard_set = sets[request.member]
    samples = [shard_set.read(int(number)) for number in request.samples]
    if shard_set.manifest.kind == "text":
        longest = max(1, *(len(ids) for ids in samples))
        data = np.full((len(samples), longest), PAD, dtype=np.int64)
        for row, ids in zip(data, samples, strict=True):
            row[: len(ids)] = ids
    else:
        data = np.stack(samples)
        if shard_set.manifest.kind == "volume":
            data = data[:, None]
    return RawBatch(
        step=request.step,
        member=request.member,
        data=torch.from_numpy(data),
        scale_B=torch.from_numpy(shard_set.index["scale"][request.samples]),
        shift_B=torch.from_numpy(shard_set.index["shift"][request.samples]),
        place_B=torch.from_numpy(request.places),
    )


class _Planned:
    """Pipeline source: the plan's requests, dealt to the workers in turn."""

    def __init__(self, plan: Callable[[], Iterable[Request]]) -> None:
        self.plan = plan

    def __call__(self) -> Iterator[Request]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        for turn, request in enumerate(self.plan()):
            if turn % workers == number:
                yield request


class _Read:
    """Pipeline stage: requests to batches. A broken sample is handed on, so that it arrives as one sentence."""

    def __init__(self, sets: Sequence[ShardSet], ready: Callable[[RawBatch], Any] | None) -> None:
        self.sets = sets
        self.ready = ready

    def __call__(self, requests: Iterable[Request]) -> Iterator[Any]:
        for request in requests:
            try:
                raw = read_batch(self.sets, request)
                yield raw if self.ready is None else self.ready(raw)
            except DataError as error:
                yield error
                return


def stream(
    sets: Sequence[ShardSet],
    plan: Callable[[], Iterable[Request]],
    *,
    ready: Callable[[RawBatch], Any] | None = None,
    workers: int,
    pin: bool,
) -> Iterator[Any]:
    """Yield the batches of a plan, in its order.

    Args:
        sets: what `Request.member` counts into.
        plan: makes the requests; called once in every worker, so it must be picklable and pure.
        ready: what a worker makes of a raw batch before it hands it over, picklable; its result has `pin_memory` where
            `pin` is asked for. None hands over the raw batch.
        workers: reading processes; 0 reads in this one.
        pin: deliver in page-locked memory, for asynchronous copies to a GPU.

    Raises:
        DataError: a sample is broken; it names shard and key.
    """
    pipeline: Any = webdataset.DataPipeline(_Planned(plan), _Read(sets, ready))
    options: dict[str, Any] = {}
    if workers:
        options = {"prefetch_factor": 4, "worker_init_fn": _outlive_the_signal}
    loader = DataLoader(pipeline, batch_size=None, num_workers=workers, pin_memory=pin, **options)
    for batch in loader:
        if isinstance(batch, DataError):
            raise batch
        yield batch


def _outlive_the_signal(worker: int) -> None:
    """Leave SIGTERM and Ctrl-C to the rank: launchers signal the readers first, and it needs them until it has saved."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
