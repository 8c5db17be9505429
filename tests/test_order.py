"""The order of the data is a pure function of the manifest, the seed and the epoch: not of ranks, workers or restarts."""

from collections import Counter
from functools import partial
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from numbered_sets import BATCH, SIZE, schedule_of, write_numbered

from mnemos.engine.slots import CURRENT, Schedule
from mnemos.engine.stage_training import _requests
from mnemos.sharding.order import batch_samples, epoch_order, num_streams
from mnemos.sharding.reader import ShardSet
from mnemos.sharding.stream import stream

SHARDS = (40, 13, 1, 77, 52, 0, 9)


@pytest.mark.parametrize("streams", [1, 2, 3, 8])
def test_an_epoch_takes_every_sample_at_most_once(streams: int) -> None:
    order_ST = epoch_order(SHARDS, key=5, streams=streams)
    assert order_ST.shape == (streams, sum(SHARDS) // streams)
    assert len(set(order_ST.reshape(-1).tolist())) == order_ST.size
    assert set(order_ST.reshape(-1).tolist()) <= set(range(sum(SHARDS)))


def test_a_key_gives_one_order_and_another_key_another() -> None:
    orders = [epoch_order(SHARDS, key=key, streams=2).tolist() for key in (1, 1, 2, -1)]
    assert orders[0] == orders[1] and orders[0] != orders[2] != orders[3]
    left_out = [
        set(range(sum(SHARDS))) - set(epoch_order(SHARDS, key=key, streams=7).flat) for key in range(9)
    ]
    assert all(len(rest) == sum(SHARDS) % 7 for rest in left_out) and len(set(map(frozenset, left_out))) > 1


def test_a_stream_reads_shard_after_shard() -> None:
    sizes = (60,) * 20
    shard = np.repeat(np.arange(20), sizes)
    order_ST = epoch_order(sizes, key=3, streams=4)
    for stream_T in order_ST:
        visited = [one for one, two in pairwise([-1, *shard[stream_T].tolist(), -1]) if one != two][1:]
        assert len(visited) == len(set(visited)) == 5, "five shards, each read once and left"
        assert np.any(np.diff(stream_T) < 0), "shuffled within a shard"
    assert shard[order_ST[:, 0]].tolist() != sorted(shard[order_ST[:, 0]].tolist())


def test_one_shard_is_shuffled_as_a_whole() -> None:
    order = epoch_order((100,), key=11)[0]
    assert np.array_equal(order, np.random.Generator(np.random.PCG64(11)).permutation(100))


def test_a_batch_takes_as_many_samples_from_every_stream() -> None:
    order_ST = epoch_order(SHARDS, key=5, streams=4)
    batches = [batch_samples(order_ST, start, start + 16) for start in range(0, 192, 16)]
    assert len(set(np.concatenate(batches).tolist())) == 192
    of_stream = {int(sample): number for number, row in enumerate(order_ST) for sample in row}
    for batch in batches:
        assert [of_stream[int(sample)] for sample in batch] == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4


@pytest.mark.parametrize(
    ("batch", "samples", "shards", "most", "expected"),
    [
        (512, 1_000_000, 900, 16, 16),
        (512, 1_000_000, 900, 24, 16),  # divides the batch
        (12, 1000, 50, 16, 12),
        (16, 1000, 1, 16, 1),  # one shard
        (16, 1000, 5, 16, 4),
        (16, 24, 24, 16, 4),  # at most a quarter of the samples: 6, of which 4 divides
        (16, 15, 15, 16, 1),  # smaller than a batch
        (7, 1000, 100, 6, 1),
    ],
)
def test_the_number_of_streams(batch: int, samples: int, shards: int, most: int, expected: int) -> None:
    assert num_streams(batch=batch, samples=samples, shards=shards, most=most) == expected


@pytest.fixture(scope="module")
def many_shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    shards = ShardSet(write_numbered(tmp_path_factory.mktemp("order") / "set"), "train")
    assert len(shards.manifest.splits["train"].shards) > 10
    return shards


def delivered(shards: ShardSet, ranks: int, workers: int, start: int, stop: int) -> list[list[int]]:
    """Return the samples of updates `start` to `stop` as `ranks` loaders deliver them, by global batch."""
    parts: list[list[list[int]]] = []
    for rank in range(ranks):
        plan = partial(_requests, schedule_of(shards), start, rank, ranks)
        batches = stream([shards], plan, workers=workers, pin=False)
        taken = []
        for step, batch in zip(range(start, stop), batches, strict=False):
            assert batch.step == step and len(batch.data) == BATCH // ranks
            assert (batch.data == batch.data[:, :, :1, :1]).all(), "a whole sample, not parts of two"
            taken.append(batch.data[:, 0, 0, 0].tolist())
        parts.append(taken)
    return [[sample for part in of_step for sample in part] for of_step in zip(*parts, strict=True)]


@pytest.fixture(scope="module")
def uninterrupted(many_shards: ShardSet) -> list[list[int]]:
    return [slot.samples.tolist() for slot in schedule_of(many_shards).slots()]


def test_three_epochs_without_reading(uninterrupted: list[list[int]]) -> None:
    assert len(uninterrupted) == 12
    epochs = [list(chain(*uninterrupted[start : start + 4])) for start in (0, 4, 8)]
    assert all(len(set(epoch)) == len(epoch) == 48 for epoch in epochs), "at most once per epoch"
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert max(Counter(chain(*epochs)).values()) == 3


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize(
    ("ranks", "workers"), [(1, 0), (1, 1), (1, 4), (2, 2), (4, 1), (1, 3), (3, 1)], ids=lambda n: str(n)
)
def test_ranks_and_workers_do_not_matter(
    many_shards: ShardSet, uninterrupted: list[list[int]], ranks: int, workers: int
) -> None:
    assert delivered(many_shards, ranks, workers, 0, 12) == uninterrupted


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize(
    "stop", np.random.default_rng(2026).choice(np.arange(1, 12), 3, replace=False).tolist()
)
def test_a_stop_under_2x2_continued_under_1x3_gives_the_uninterrupted_order(
    many_shards: ShardSet, uninterrupted: list[list[int]], stop: int
) -> None:
    before = delivered(many_shards, 2, 2, 0, stop)
    after = delivered(many_shards, 1, 3, stop, 12)
    assert before + after == uninterrupted


def test_the_state_is_one_number_for_each_set(many_shards: ShardSet, uninterrupted: list[list[int]]) -> None:
    schedule = Schedule(
        sizes=(SIZE, 20), batch=BATCH, pretext_steps=9, least_share=0.2, seed=7, stage="order", streams=4
    )
    seen = Counter[int]()
    for slot in schedule.slots():
        for member in (CURRENT, 1):
            assert schedule.steps_of(member, slot.step) * BATCH == seen[member]
        seen[slot.member] += BATCH


def test_a_held_batch_is_not_written_over(many_shards: ShardSet) -> None:
    plan = partial(_requests, schedule_of(many_shards), 0, 0, 1)
    held, copies = [], []
    with pytest.raises(RuntimeError, match="clone what is kept"):
        for batch in stream([many_shards], plan, workers=2, pin=False):
            held.append(batch.data)
            copies.append(batch.data.clone())
    assert len(held) == 4
    assert all(torch.equal(one, two) for one, two in zip(held, copies, strict=True))


def test_no_file_is_made_for_shared_memory(many_shards: ShardSet) -> None:
    before = set(Path("/dev/shm").iterdir())
    batches = stream(
        [many_shards], partial(_requests, schedule_of(many_shards), 0, 0, 1), workers=1, pin=False
    )
    first = next(batches)
    new = {path for path in Path("/dev/shm").iterdir() if path not in before}
    assert not [path for path in new if path.stat().st_size > 1 << 20] and len(first.data) == BATCH
