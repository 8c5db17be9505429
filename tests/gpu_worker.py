"""Run by test_gpu_step.py: some fp32 updates of a stage with full rehearsal, watched for waits where there is a GPU."""

import json
import sys
import warnings
from pathlib import Path

import torch
from zero_worker import plan_of

from mnemos.engine import dist
from mnemos.engine.stage_training import StageTraining
from mnemos.kernels._common.launch import launch_counts

STEPS, WARM = 36, 12


def main() -> None:
    request = json.loads(Path(sys.argv[-1]).read_text(encoding="utf-8"))
    dist.adopt_environment()
    dist.meet(120)
    plan = plan_of(request)
    training = StageTraining(plan, plan.stages[-1])
    training.engine.optimizer.set_rate(1e-3)
    losses, waits, watched = [], [], set()
    for number, raw in enumerate(training.batches(0)):
        if number == STEPS:
            break
        watch = number >= WARM and torch.cuda.is_available()
        if watch:
            torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            losses.append(training.train_step(raw))
        if watch:
            torch.cuda.set_sync_debug_mode("default")
            name = training.sets[raw.member].manifest.name
            watched.add(name)
            waits += [
                f"update {number} ({name}): {one.filename}:{one.lineno}"
                for one in caught
                if "synchroniz" in str(one.message)
            ]
    answer = {"losses": [float(loss) for loss in losses], "waits": waits, "watched": sorted(watched)}
    answer["launches"] = dict(launch_counts)
    Path(request["answer"]).write_text(json.dumps(answer), encoding="utf-8")
    dist.leave(0)


if __name__ == "__main__":
    main()
