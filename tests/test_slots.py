"""Which samples make up which update: a pure function, the same for every rank and after every restart."""

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from mnemos.engine.slots import CURRENT, Schedule, learning_rate, micro_batches, rank_rows
from mnemos.sharding.errors import UserError

SCHEDULE = Schedule(sizes=(103, 25, 5), batch=10, pretext_steps=30, least_share=0.0, seed=3, stage="ct")
SAMPLE_PRESET = Schedule(  # 1,000 samples, buffers of 100, 13 epochs
    sizes=(1000, 100, 100, 100, 100),
    batch=16,
    pretext_steps=13 * 62,
    least_share=0.1,
    seed=0,
    stage="pathology",
)


def taken(schedule: Schedule, start: int = 0) -> list[tuple[int, int, tuple[int, ...]]]:
    return [(slot.step, slot.member, tuple(slot.samples.tolist())) for slot in schedule.slots(start)]


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [((103, 25, 5), (10, 2, 1)), ((5,), (1,)), ((10, 9, 10, 19, 20), (1, 1, 1, 1, 2))],
)
def test_a_set_has_as_many_slots_as_whole_batches_and_at_least_one(
    sizes: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    assert replace(SCHEDULE, sizes=sizes).slots_per_epoch == expected


@pytest.mark.parametrize("schedule", [SCHEDULE, SAMPLE_PRESET], ids=["small", "sample"])
def test_an_epoch_holds_each_sets_slots_and_no_sample_twice(schedule: Schedule) -> None:
    per_epoch = sum(schedule.slots_per_epoch)
    slots = taken(schedule)
    assert [step for step, _, _ in slots] == list(range(schedule.num_steps))
    assert all(len(samples) == schedule.batch for _, _, samples in slots)
    orders = []
    for start in range(0, len(slots) - per_epoch + 1, per_epoch):
        epoch = slots[start : start + per_epoch]
        members = Counter(member for _, member, _ in epoch)
        assert tuple(members[member] for member in range(len(schedule.sizes))) == schedule.slots_per_epoch
        own = [sample for _, member, samples in epoch if member == CURRENT for sample in samples]
        assert len(own) == len(set(own)), "a sample of the current modality came twice"
        assert set(own) <= set(range(schedule.sizes[CURRENT]))
        orders.append((own, [member for _, member, _ in epoch]))
    assert len(orders) >= 3
    assert all(one[0] != two[0] and one[1] != two[1] for one, two in pairwise(orders)), "shuffled anew"


def test_a_small_set_goes_round_again() -> None:
    # 5 samples in a batch of 10: each twice; 25 samples in 2 slots: 20 different ones
    for _, member, samples in taken(SCHEDULE):
        counts = Counter(samples)
        if member == 2:
            assert counts == dict.fromkeys(range(5), 2)
        elif member == 1:
            assert len(counts) == 10 and max(counts) < 25
    lifted = replace(SCHEDULE, sizes=(103, 5), least_share=0.2)
    rehearsed = [samples for step, member, samples in taken(lifted) if member == 1 and step < 13]
    assert len(rehearsed) == lifted.slots_per_epoch[1] == 3
    assert Counter(np.concatenate(rehearsed).tolist()) == dict.fromkeys(range(5), 6), "evenly over an epoch"


def test_pretext_steps_are_met_exactly() -> None:
    for pretext in (1, 2, 9, 10, 11, 25, 30):
        schedule = replace(SCHEDULE, pretext_steps=pretext)
        slots = taken(schedule)
        assert sum(member == CURRENT for _, member, _ in slots) == pretext == schedule.steps_of(CURRENT)
        assert slots[-1][1] == CURRENT or pretext % 10 == 0, "nothing is rehearsed after the last update"
        assert sum(schedule.steps_of(member) for member in range(3)) == schedule.num_steps == len(slots)


def test_every_buffer_gets_its_least_share() -> None:
    # the sizes of the sample preset: without the least share a buffer of 100 would get 6 of 86 slots
    for buffers in range(1, 5):
        schedule = replace(SAMPLE_PRESET, sizes=SAMPLE_PRESET.sizes[: 1 + buffers])
        for member in range(1, 1 + buffers):
            assert schedule.steps_of(member) >= 0.1 * schedule.num_steps
    assert SAMPLE_PRESET.slots_per_epoch == (62, 11, 11, 11, 11), "and not a slot more than that"
    assert replace(SAMPLE_PRESET, least_share=0.0).slots_per_epoch == (62, 6, 6, 6, 6)


@pytest.mark.parametrize("share", [0.05, 0.1, 0.19])
def test_a_large_buffer_does_not_push_a_small_one_below_its_share(share: float) -> None:
    schedule = replace(SAMPLE_PRESET, sizes=(1000, 3000, 20, 20, 20), least_share=share)
    slots = schedule.slots_per_epoch
    assert slots[:2] == (62, max(187, slots[2]))
    assert min(slots[1:]) >= share * sum(slots)


def test_shares_that_leave_nothing_are_refused() -> None:
    greedy = replace(SAMPLE_PRESET, sizes=(1000, *(100,) * 5), least_share=0.2)
    with pytest.raises(UserError, match=r"least_share=0\.2 .* less than 0\.200"):
        greedy.check()
    replace(greedy, least_share=0.19).check()
    replace(greedy, sizes=(1000,), least_share=0.2).check()


@pytest.mark.parametrize(
    "schedule", [SCHEDULE, replace(SCHEDULE, pretext_steps=13, least_share=0.15)], ids=["a", "b"]
)
def test_a_resume_from_any_update_has_the_identical_rest(schedule: Schedule) -> None:
    whole = taken(schedule)
    for start in range(len(whole) + 1):
        assert taken(replace(schedule), start) == whole[start:]  # a fresh object: nothing is remembered


def test_seed_and_stage_change_the_order() -> None:
    whole = taken(SCHEDULE)
    assert taken(replace(SCHEDULE, seed=4)) != whole
    assert taken(replace(SCHEDULE, stage="mri")) != whole


def test_places_number_the_samples_of_the_whole_stage() -> None:
    places = np.concatenate([slot.places() for slot in SCHEDULE.slots()])
    assert places.tolist() == list(range(10 * SCHEDULE.num_steps))
    (later, *_) = SCHEDULE.slots(17)
    assert later.places().tolist() == list(range(170, 180))


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_ranks_and_micro_batches_partition_a_batch(world: int) -> None:
    rows = np.arange(64)
    parts = [rows[rank_rows(64, rank, world)] for rank in range(world)]
    assert np.array_equal(np.concatenate(parts), rows) and len({len(part) for part in parts}) == 1
    cut = [rows[start:stop] for start, stop in micro_batches(64, 64 // world)]
    assert np.array_equal(np.concatenate(cut), rows) and len(cut) == world


def test_the_learning_rate_rises_linearly_then_falls_as_half_a_cosine() -> None:
    rates = [learning_rate(step, 1000, 2.0, 0.1) for step in range(1000)]
    rising, falling = rates[:101], rates[100:]
    assert rising[0] == pytest.approx(2.0 / 101) and max(rates) == rates[100] == 2.0
    assert np.allclose(np.diff(rising), 2.0 / 101)
    assert all(before > after for before, after in pairwise(falling))
    assert learning_rate(550, 1000, 2.0, 0.1) == pytest.approx(1.0), "half way down"
    assert 0 < rates[-1] < 1e-5
    assert learning_rate(1000, 1000, 2.0, 0.1) == pytest.approx(0.0)


@pytest.mark.parametrize("warmup", [0.0, 0.5, 0.999])
@pytest.mark.parametrize("num_steps", [1, 2, 3])
def test_the_learning_rate_of_a_short_stage_is_positive(num_steps: int, warmup: float) -> None:
    rates = [learning_rate(step, num_steps, 1.0, warmup) for step in range(num_steps)]
    assert all(0 < rate <= 1.0 for rate in rates)
