"""Run by test_zero.py on one or two ranks: train the last stage of a tiny run several times from the same start.

Reads a request (JSON file, last argument) and writes an answer: for each variant, named as asked, the losses of every
update ("losses", exact hex), what was trained ("phases"), and every parameter or moment of an idle part that changed
("moved").
"""

import json
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from fake_recorder import FakeRecorder

from mnemos.engine import dist, training_step
from mnemos.engine.arguments import Arguments
from mnemos.engine.curriculum import Plan, make_plan
from mnemos.engine.optimizer import active_parts, part_of
from mnemos.engine.settings import Settings, as_flat, parse_assignment, resolve
from mnemos.engine.slots import CURRENT
from mnemos.engine.stage_training import StageTraining

Weights = dict[str, torch.Tensor]
STAND_IN = "graphs by a stand-in"  # variant: CUDA graphs, made by something that needs no GPU


def main() -> None:
    request = json.loads(Path(sys.argv[-1]).read_text(encoding="utf-8"))
    dist.adopt_environment()
    dist.meet(120)
    torch.set_num_threads(1)
    plan = plan_of(request)
    answers = {
        name: train(plan, overrides, request["steps"], set(request["watched"]))
        for name, overrides in request["variants"].items()
    }
    if dist.is_main():
        Path(request["answer"]).write_text(json.dumps(answers), encoding="utf-8")
    dist.barrier()
    dist.leave(0)


def plan_of(request: dict[str, Any]) -> Plan:
    """Return the plan to train the last stage of the request's run."""
    arguments = Arguments(
        stage=request["stage"],
        only=True,
        dry_run=False,
        fresh=False,
        run=Path(request["run"]),
        data=Path(request["data"]),
        preset="sample",
        overrides=dict(parse_assignment(text) for text in request["assignments"]),
        deepspeed_config=None,
    )
    return make_plan(arguments, dist.world_size())


def train(plan: Plan, overrides: dict[str, Any], steps: int, watched: set[int]) -> dict[str, list[str]]:
    overrides = dict(overrides)
    stand_in = overrides.pop(STAND_IN, False)
    settings = resolve("sample", {**as_flat(plan.settings), **overrides})
    with ExitStack() as stack:
        if stand_in:  # graphs without CUDA
            stack.enter_context(mock.patch.object(training_step, "CudaRecorder", lambda _: FakeRecorder()))
            stack.enter_context(mock.patch.object(training_step, "refusal", lambda **_: None))
        return updates(plan, settings, steps, watched)


def updates(plan: Plan, settings: Settings, steps: int, watched: set[int]) -> dict[str, list[str]]:
    training = StageTraining(replace(plan, settings=settings), plan.stages[-1])
    training.engine.optimizer.set_rate(1e-3)
    answer: dict[str, list[str]] = {"losses": [], "phases": [], "moved": []}
    for number, raw in enumerate(training.batches(0)):
        if number == steps:
            break
        before = snapshot(training) if number in watched else {}
        loss = dist.total(training.train_step(raw).clone())
        answer["losses"].append(float(loss).hex())
        manifest = training.sets[raw.member].manifest
        phase = "pretext" if raw.member == CURRENT else "rehearsal"
        answer["phases"].append(f"{manifest.name} {phase}")
        if before:
            after = snapshot(training)
            idle = [name for name in before if part(name) not in active_parts(manifest.kind, phase)]
            answer["moved"] += [
                f"update {number}: {name}" for name in idle if not torch.equal(before[name], after[name])
            ]
            assert idle and not all(torch.equal(before[name], after[name]) for name in before)
    answer["replays"] = [f"{graph.name} {graph.replays}" for graph in training.step.graphs.values()]
    training.step.release()
    training.engine.release()
    return answer


def snapshot(training: StageTraining) -> Weights:
    """Return every fp32 weight by name, and this rank's optimiser state as "moments/<part>/..."."""
    found = training.engine.full_weights()
    optimizer, wrapped = training.engine.optimizer, training.engine.engine.optimizer
    for number, group in enumerate(optimizer.param_groups):
        flat = group["params"]
        if training.engine.stage == 3:  # its groups are filled only while they step
            owner = wrapped.sub_group_to_group_id
            flat = [
                one for sub, one in enumerate(wrapped.fp32_partitioned_groups_flat) if owner[sub] == number
            ]
        for place, parameter in enumerate(flat):
            for name, value in optimizer.state[parameter].items():
                found[f"moments/{group['part']}/{number}/{place}/{name}"] = value.clone()
    return found


def part(name: str) -> str:
    return name.split("/")[1] if name.startswith("moments/") else part_of(name)


if __name__ == "__main__":
    main()
