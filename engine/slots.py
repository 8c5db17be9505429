"""Which samples make up which update: a pure function of sizes, settings and seed, the same on every rank.

A stage's epoch is a shuffled list of slots; a slot is one global batch of one set (the current modality or one
buffer), on all ranks. Source: Ye et al., CVPR 2024, and `max(1, floor(N / B))` slots a set, so that small buffers are
rehearsed too. Here every sample of the current modality comes at most once in an epoch, in the order of
`mnemos.sharding.order`.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mnemos.kernels.stream_key import stream_key
from mnemos.sharding.errors import UserError
from mnemos.sharding.order import batch_samples, epoch_order, num_streams

CURRENT = 0  # the set a stage is about; buffers of earlier stages follow in stage order


@dataclass(frozen=True, kw_only=True)
class Slot:
    """One update.

    Attributes:
        step: counts the stage's updates from 0.
        member: 0 the current modality, m the buffer of the m-th earlier stage.
        samples: int64 [B] sample numbers of that set: the whole global batch.
    """

    step: int
    member: int
    samples: np.ndarray

    def places(self) -> np.ndarray:
        """Return int64 [B], the samples' places in the stage's global order: what randomness is keyed by."""
        return self.step * len(self.samples) + np.arange(len(self.samples), dtype=np.int64)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The updates of one stage.

    Attributes:
        sizes: samples of the current set and of every buffer.
        shards: of the same sets, samples by shard; empty where they are not known (an estimate): one shard each.
        streams: most canonical streams of a set.
        batch: samples of a global batch.
        pretext_steps: updates on the current set.
        least_share: least share of the updates for each buffer; 0 leaves `max(1, floor(N / B))` slots.
        seed, stage: key of the order.
    """

    sizes: tuple[int, ...]
    batch: int
    pretext_steps: int
    least_share: float
    seed: int
    stage: str
    shards: tuple[tuple[int, ...], ...] = ()
    streams: int = 16

    def check(self) -> None:
        """Refuse a least share that leaves nothing for the current modality.

        Raises:
            UserError: the shares of the buffers add up to 1 or more.
        """
        buffers = len(self.sizes) - 1
        if self.least_share * buffers >= 1.0:
            raise UserError(
                f"rehearsal.least_share={self.least_share} for each of {buffers} earlier modalities leaves stage "
                f"{self.stage} no updates of its own; choose less than {1 / buffers:.3f}"
            )

    @cached_property
    def slots_per_epoch(self) -> tuple[int, ...]:
        """Slots of every set in an epoch, the current one first."""
        self.check()
        slots = [max(1, size // self.batch) for size in self.sizes]
        while True:  # more slots for one buffer make every other's share smaller; ends because `check` passed
            least = math.ceil(self.least_share * sum(slots))
            raised = [slots[CURRENT], *(max(number, least) for number in slots[1:])]
            if raised == slots:
                return tuple(slots)
            slots = raised

    @cached_property
    def num_steps(self) -> int:
        """Updates of the whole stage: epochs in full, then as much of the last as the pretext steps need."""
        epochs, rest = divmod(self.pretext_steps, self.slots_per_epoch[CURRENT])
        total = epochs * sum(self.slots_per_epoch)
        if rest:
            current = np.flatnonzero(self._members(epochs) == CURRENT)
            total += int(current[rest - 1]) + 1
        return total

    def steps_of(self, member: int, until: int | None = None) -> int:
        """Return how many of the stage's updates, or of the first `until` of them, go to one set."""
        epochs, rest = divmod(self.num_steps if until is None else until, sum(self.slots_per_epoch))
        return epochs * self.slots_per_epoch[member] + int((self._members(epochs)[:rest] == member).sum())

    def slots(self, start: int = 0) -> Iterator[Slot]:
        """Yield the stage's slots from update `start` on."""
        per_epoch = sum(self.slots_per_epoch)
        for epoch in range(start // per_epoch, math.ceil(self.num_steps / per_epoch)):
            members = self._members(epoch)
            seen = np.zeros(len(self.sizes), dtype=np.int64)
            orders: dict[tuple[int, int], np.ndarray] = {}
            for number, member in enumerate(members):
                step = epoch * per_epoch + number
                if step >= self.num_steps:
                    return
                if step >= start:
                    yield Slot(
                        step=step,
                        member=int(member),
                        samples=self._samples(member, seen[member], epoch, orders),
                    )
                seen[member] += 1

    def _members(self, epoch: int) -> np.ndarray:
        members = np.repeat(np.arange(len(self.sizes)), self.slots_per_epoch)
        return self._generator("slots", epoch).permutation(members)

    def _samples(
        self, member: int, slot: int, epoch: int, orders: dict[tuple[int, int], np.ndarray]
    ) -> np.ndarray:
        """Return the samples of the slot-th slot of a set; a set that is too small goes round again."""
        size = self.sizes[member]
        shards = self.shards[member] if self.shards else (size,)
        streams = num_streams(batch=self.batch, samples=size, shards=len(shards), most=self.streams)
        whole = size - size % streams
        place, stop, parts = slot * self.batch, (slot + 1) * self.batch, []
        while place < stop:
            turn, at = divmod(place, whole)
            key = (int(member), int(turn))
            if key not in orders:
                orders[key] = epoch_order(shards, key=self._key("order", epoch, *key), streams=streams)
            length = min(whole - at, stop - place)
            parts.append(batch_samples(orders[key], at, at + length))
            place += length
        return np.concatenate(parts)

    def _generator(self, *parts: int | str) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64(self._key(*parts) % (1 << 64)))

    def _key(self, *parts: int | str) -> int:
        return stream_key(
            self.seed, self.stage, *(part if isinstance(part, str) else int(part) for part in parts)
        )


def rank_rows(batch: int, rank: int, world: int) -> slice:
    """Return the rows of a global batch that one rank computes."""
    share = batch // world
    return slice(rank * share, (rank + 1) * share)


def learning_rate(step: int, num_steps: int, peak: float, warmup: float) -> float:
    """Return the rate of an update: linear warm-up, then half a cosine to 0 (He et al., 2021, appendix A).

    Args:
        step: from 0.
        num_steps: of the whole stage.
        peak: highest rate.
        warmup: share of the steps with rising rate.
    """
    rising = warmup * num_steps
    if step < rising:
        return peak * (step + 1) / (rising + 1)
    return peak * 0.5 * (1.0 + math.cos(math.pi * (step - rising) / max(1.0, num_steps - rising)))


def micro_batches(samples: int, size: int) -> Sequence[tuple[int, int]]:
    """Return (start, stop) of a rank's micro-batches; `size` divides `samples`."""
    return [(start, start + size) for start in range(0, samples, size)]
