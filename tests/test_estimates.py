"""Estimates before a run: arithmetic that must agree with the published table, and a micro-batch that fits."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_data import shape_of, tiny_settings

from mnemos.engine.arguments import Arguments
from mnemos.engine.curriculum import Plan, make_plan
from mnemos.engine.deepspeed_config import deepspeed_config, zero_stage
from mnemos.engine.encoder import Encoder
from mnemos.engine.estimates import (
    Sizes,
    choose_micro_batch,
    parameters_by_part,
    sample_bytes,
    sizes,
    state_bytes,
    step_flops,
)
from mnemos.engine.objectives import Pretrainer
from mnemos.engine.settings import resolve

IMAGE = Sizes(encoder=1 + 49, decoder=1 + 196, predicted=147, values=768)
VOLUME = Sizes(encoder=1 + 36, decoder=1 + 144, predicted=108, values=4096)


@pytest.mark.parametrize(
    ("size", "phase", "gflop"),
    [
        (IMAGE, "pretext", 58.5),
        (IMAGE, "rehearsal", 35.0),
        (VOLUME, "pretext", 45.7),
        (VOLUME, "rehearsal", 28.1),
    ],
)
def test_flops_agree_with_the_papers_model(size: Sizes, phase: str, gflop: float) -> None:
    # the published code also embeds and predicts patches that are thrown away
    assert step_flops(size, resolve("base", {}), phase) / 1e9 == pytest.approx(gflop, rel=0.1)


@pytest.fixture
def plan(tiny_sets: Path, tmp_path: Path) -> Plan:
    overrides = {"training.batch": 64, "rehearsal.mix_group": 8}
    return make_plan(
        Arguments(
            stage="ct",
            only=False,
            dry_run=True,
            fresh=False,
            run=tmp_path / "run",
            data=tiny_sets,
            preset="sample",
            overrides=overrides,
            deepspeed_config=None,
        ),
        1,
    )


def changed(plan: Plan, **overrides: Any) -> Plan:
    flat = {"training.batch": 64, "rehearsal.mix_group": 8}
    flat |= {key.replace("__", "."): value for key, value in overrides.items()}
    return replace(plan, settings=resolve("sample", flat))


def chosen(plan: Plan, stage: int, room: float, **more: Any) -> int:
    """Return the choice where `room` samples of the largest kind fit beside the state."""
    shape = shape_of(plan.settings, plan.data)
    members = (plan.stages[stage], *plan.rehearsed(plan.stages[stage]))
    each = max(
        sample_bytes(sizes(member, shape, plan.settings), plan.settings, bf16=True) for member in members
    )
    world = more.get("world", 1)
    state = state_bytes(10**6, bf16=True, zero=min(1, world - 1), world=world)
    free = int((state + room * each) / 0.7) + 1
    options = {"parameters": 10**6, "bf16": True, "world": 1, "free_bytes": free, **more}
    return choose_micro_batch(plan, plan.stages[stage], shape, **options)


@pytest.mark.parametrize(
    ("room", "expected"), [(1000, 64), (64, 64), (63.5, 32), (20, 16), (9, 8), (1, 1), (0.1, 1)]
)
def test_the_micro_batch_is_the_largest_divisor_that_fits(plan: Plan, room: float, expected: int) -> None:
    assert chosen(plan, 0, room) == expected


@pytest.mark.parametrize(("room", "expected"), [(1000, 64), (20, 16), (9, 8), (1, 8)])
def test_mixed_samples_are_not_cut_apart(plan: Plan, room: float, expected: int) -> None:
    assert chosen(plan, 2, room) == expected
    assert chosen(changed(plan, rehearsal__mixup=False), 2, 1) == 1
    assert chosen(changed(plan, training__shuffle_visible=True), 0, 1) == 8


def test_a_set_micro_batch_is_taken(plan: Plan) -> None:
    assert chosen(changed(plan, training__micro_batch=16), 2, 1000) == 16


def test_ranks_share_the_batch(plan: Plan) -> None:
    assert chosen(plan, 0, 1000, world=4) == 16


def test_recomputation_makes_room(plan: Plan) -> None:
    shape = shape_of(plan.settings, plan.data)
    size = sizes(plan.stages[1], shape, plan.settings)
    lean = changed(plan, training__recompute=True).settings
    assert sample_bytes(size, lean, bf16=True) < sample_bytes(size, plan.settings, bf16=True)
    assert sample_bytes(size, plan.settings, bf16=True) < sample_bytes(size, plan.settings, bf16=False)


def test_tokens_of_a_sample(plan: Plan) -> None:
    shape = shape_of(plan.settings, plan.data)
    report, xray, ct = (sizes(stage, shape, plan.settings) for stage in plan.stages)
    assert (report.encoder, report.decoder, report.values) == (64, 0, shape.vocab)
    assert xray == Sizes(encoder=17, decoder=65, predicted=48, values=192)
    assert ct == Sizes(encoder=17, decoder=65, predicted=48, values=512)


def test_zero_divides_the_state() -> None:
    found = [state_bytes(1000, bf16=True, zero=zero, world=4) for zero in (0, 1, 2, 3)]
    assert found == [18000, 4000 + 3000, 2000 + 500 + 3000, 4000]  # ZeRO 0: fp32 masters and their bf16 copy
    assert state_bytes(1000, bf16=False, zero=0, world=4) == 16000


def test_parameters_are_counted_once(tiny_sets: Path) -> None:
    settings = tiny_settings()
    with torch.device("meta"):
        model = Pretrainer(Encoder(shape_of(settings, tiny_sets)), settings)
    parts = parameters_by_part(model)
    assert sum(parts.values()) == sum(parameter.numel() for parameter in model.parameters())
    assert parts["stem"] == 3 * 32 and parts["head.image"] == 33 * 192


@pytest.mark.parametrize(
    ("zero", "user", "world", "stage"),
    [
        (1, None, 1, 0),
        (2, {"steps_per_print": 5}, 1, 0),
        (3, None, 1, 3),
        (1, None, 2, 1),
        (0, None, 2, 0),
        (1, {"zero_optimization": {"stage": 2}}, 1, 2),
        (1, {"zero_optimization": {"overlap_comm": True}}, 1, 1),
        (2, {"zero_optimization": {"stage": 0}}, 2, 0),
    ],
)
def test_one_rank_divides_nothing_unless_it_is_told_to(
    zero: int, user: dict[str, Any] | None, world: int, stage: int
) -> None:
    settings = resolve("sample", {"parallel.zero": zero, "training.batch": 8})
    assert zero_stage(settings, user, world) == stage
    config = deepspeed_config(settings, bf16=True, micro_batch=8 // world, accumulate=1, user=user)
    assert config.get("zero_optimization", {"stage": 0}).get("stage") == stage
    assert ("bf16" in config) == (stage > 0), "without ZeRO the model holds fp32 masters"
    assert (config.get("communication_data_type") == "bf16") == (stage == 0), "and still sends bf16"
