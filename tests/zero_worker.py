"""Run by the ZeRO tests on one or two ranks: train the last stage of a tiny run under several ZeRO stages.

Prints one JSON line (rank 0): {"losses": {zero: [hex, ...]}, "phases": [...], "moved": {zero: [parameter names that
changed although their part was idle]}, "still": {zero: [active parameters that did not change]}}.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch

from mnemos.engine import dist
from mnemos.engine.arguments import Arguments
from mnemos.engine.curriculum import Plan, make_plan
from mnemos.engine.optimizer import active_parts, part_of
from mnemos.engine.settings import parse_assignment, resolve
from mnemos.engine.settings import as_flat
from mnemos.engine.slots import CURRENT
from mnemos.engine.stage_training import StageTraining


def plan_for(run: Path, data: Path, stage: str, assignments: list[str]) -> Plan:
    arguments = Arguments(
        stage=stage,
        only=False,
        dry_run=False,
        fresh=False,
        run=run,
        data=data,
        preset="sample",
        overrides=dict(parse_assignment(text) for text in assignments),
        deepspeed_config=None,
    )
    return make_plan(arguments, 1)


def main() -> None:
    request = json.loads(Path(sys.argv[-1]).read_text(encoding="utf-8"))
    dist.adopt_environment()
    dist.meet(120)
    torch.set_num_threads(1)
    plan = plan_for(Path(request["run"]), Path(request["data"]), request["stage"], request["assignments"])
    answer: dict[str, dict[str, list[str]]] = {"losses": {}, "moved": {}, "still": {}, "phases": {}}
    for zero in request["zero"]:
        settings = resolve("sample", {**as_flat(plan.settings), "parallel.zero": zero})
        training = StageTraining(replace(plan, settings=settings), plan.stages[-1])
        losses, moved, still, phases = [], [], set(), []
        steps = request["steps"]
        check = set(request["check"])
        before = training.engine.full_weights() if check else {}
        states = _moments(training)
        active_ever: set[str] = set()
        peak = settings.training.base_lr * settings.training.batch / 256
        for number, raw in enumerate(training._batches(0)):
            if number == steps:
                break
            training.engine.optimizer.set_rate(peak)
            loss = dist.total(training.train_step(raw).clone())
            losses.append(float(loss).hex())
            kept = training.sets[raw.member].manifest
            phase = "pretext" if raw.member == CURRENT else "rehearsal"
            phases.append(f"{kept.name}:{phase}")
            active = active_parts(kept.kind, phase)
            active_ever |= active
            if number in check:
                after = training.engine.full_weights()
                for name, value in after.items():
                    same = torch.equal(value, before[name])
                    if part_of(name) not in active and not same:
                        moved.append(f"{number} {phases[-1]} {name}")
                before = after
                now = _moments(training)
                for part, values in now.items():
                    if part not in active and any(not torch.equal(a, b) for a, b in zip(values, states[part], strict=True)):
                        moved.append(f"{number} {phases[-1]} moments of {part}")
                    if part in active and not any(not torch.equal(a, b) for a, b in zip(values, states[part], strict=True)):
                        still.add(f"{number} {phases[-1]} moments of {part}")
                states = now
            else:
                before = training.engine.full_weights() if check and number + 1 in check else before
                states = _moments(training) if check and number + 1 in check else states
        answer["losses"][str(zero)] = losses
        answer["phases"][str(zero)] = phases
        answer["moved"][str(zero)] = moved
        answer["still"][str(zero)] = sorted(still)
        training.engine.release()
    if dist.is_main():
        Path(request["answer"]).write_text(json.dumps(answer), encoding="utf-8")
    dist.barrier()
    dist.leave(0)


def _moments(training: StageTraining) -> dict[str, list[torch.Tensor]]:
    """Return this rank's optimiser state by part: every tensor, cloned."""
    optimizer = training.engine.optimizer
    wrapped = training.engine.engine.optimizer
    found: dict[str, list[torch.Tensor]] = {}
    for number, group in enumerate(optimizer.param_groups):
        parameters = group["params"]
        if training.engine.stage == 3:
            parameters = [
                flat
                for sub, flat in enumerate(wrapped.fp32_partitioned_groups_flat)
                if wrapped.sub_group_to_group_id[sub] == number
            ]
        for parameter in parameters:
            for value in optimizer.state[parameter].values():  # ZeRO 3 has none before its first step
                found.setdefault(group["part"], []).append(value.clone())
    return found


if __name__ == "__main__":
    main()
