"""Run by step_against.py in each of two trees: make the stages ready once, then time windows of updates when asked.

The only argument is the descriptor of a socket. Lines of JSON come and go through it: first the request, answered with
what there is to time, then one window after the other. Uses only what any revision with `StageTraining` has.
"""

import json
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch

from mnemos.engine import dist
from mnemos.engine.arguments import parse
from mnemos.engine.curriculum import make_plan
from mnemos.engine.settings import as_flat, resolve
from mnemos.engine.slots import CURRENT
from mnemos.engine.stage_training import StageTraining

LEARNING_RATE = 1e-4
MANY_UPDATES = 400  # of a schedule: enough that every rehearsed set has its turns


@dataclass(frozen=True)
class OneSet:
    """The first slots of one set in a schedule, in the schedule's place: `StageTraining.batches` reads no others."""

    schedule: Any
    member: int
    steps: int

    @property
    def batch(self) -> int:
        return int(self.schedule.batch)

    def slots(self, step: int) -> Iterator[Any]:
        """Yield the slots from update `step` of the schedule on."""
        return islice((slot for slot in self.schedule.slots(step) if slot.member == self.member), self.steps)


@dataclass(frozen=True)
class Window:
    """Some updates of one stage on one of its sets, always the same ones."""

    training: StageTraining
    slots: OneSet

    def seconds(self) -> float:
        """Return the seconds of one update, reading included; one more goes before, untimed."""
        self.training.schedule = self.slots  # type: ignore[assignment]
        batches = self.training.batches(0)
        self.training.train_step(next(batches))
        wait()
        start = time.perf_counter()
        updates = sum(self.training.train_step(raw) is not None for raw in batches)
        wait()
        return (time.perf_counter() - start) / updates


def main() -> None:
    """Answer until the other side closes."""
    with socket.socket(fileno=int(sys.argv[1])) as connection, connection.makefile("rw") as lines:
        request = json.loads(lines.readline())
        try:
            windows = make_ready(request)
        except (ImportError, AttributeError, TypeError, OSError, ValueError) as error:
            windows = {}
            answer: dict[str, Any] = {"failed": f"{type(error).__name__}: {error}"}
        else:
            answer = {"windows": list(windows), "device": str(dist.device())}
        print(json.dumps(answer), file=lines, flush=True)
        for line in lines:
            print(json.dumps(windows[json.loads(line)].seconds()), file=lines, flush=True)


def make_ready(request: dict[str, Any]) -> dict[str, Window]:
    """Return the windows by "kind phase": the pretext task of each asked stage, and what the last stage rehearses."""
    dist.adopt_environment()
    dist.meet(1800)
    plan = make_plan(parse(request["flags"]), 1)
    settings = resolve("sample", {**as_flat(plan.settings), "training.steps": MANY_UPDATES})
    plan = replace(plan, settings=settings)
    windows: dict[str, Window] = {}
    for stage in plan.stages:
        last = stage is plan.stages[-1]
        if not last and stage.name not in request["pretext"]:
            continue
        training = StageTraining(plan, stage)
        training.engine.optimizer.set_rate(LEARNING_RATE)
        schedule = training.schedule
        for member, kept in enumerate(training.sets if last else training.sets[: CURRENT + 1]):
            name = f"{kept.manifest.kind} {'pretext' if member == CURRENT else 'rehearsal'}"
            if kept.manifest.kind in request["kinds"]:
                windows[name] = Window(training, OneSet(schedule, member, 1 + request["steps"]))
    for window in windows.values():
        window.seconds()  # the first one allocates
    return windows


def wait() -> None:
    """Wait for the device where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
    dist.leave(0)
