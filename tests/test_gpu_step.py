"""On a GPU: a training step never waits for the device, and gives the CPU's losses."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_data import TINY

from mnemos.sharding.modalities import DEFAULT_ORDER

pytestmark = pytest.mark.gpu
WORKER = Path(__file__).with_name("gpu_worker.py")
TRAIN = Path(__file__).resolve().parents[1] / "engine" / "train.py"


@pytest.fixture(scope="module")
def answer(tiny_sets: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("gpu")
    assignments = [text for text in TINY if not text.startswith("training.steps")] + ["training.steps=20"]
    flags = [part for text in assignments for part in ("--set", text)]
    command = [
        sys.executable,
        TRAIN,
        "--stage",
        DEFAULT_ORDER[-2],
        "--run",
        folder / "run",
        "--data",
        tiny_sets,
    ]
    done = subprocess.run([*command, *flags], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {}
    for name, visible, graphs in (("gpu", "0", "never"), ("graphs", "0", "always"), ("cpu", "", "never")):
        request = {
            "run": str(folder / "run"),
            "data": str(tiny_sets),
            "stage": DEFAULT_ORDER[-1],
            "assignments": [*assignments, f"training.graphs={graphs}"],
            "answer": str(folder / f"{name}.json"),
        }
        file = folder / f"{name}-request.json"
        file.write_text(json.dumps(request), encoding="utf-8")
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": visible}
        done = subprocess.run(
            [sys.executable, WORKER, file], env=environment, check=False, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        found[name] = json.loads(Path(request["answer"]).read_text(encoding="utf-8"))
    return found


def test_a_step_never_waits_for_the_device(answer: dict[str, Any]) -> None:
    assert len(answer["gpu"]["watched"]) >= 5, "every kind and phase was watched"
    assert answer["gpu"]["waits"] == []


def test_a_gpu_runs_every_kernel_and_a_cpu_none(answer: dict[str, Any]) -> None:
    kernels = Path(TRAIN).parents[1] / "kernels"
    found = [re.findall(r"launch_counts\[\"(\w+)\"\]", file.read_text()) for file in kernels.rglob("*.py")]
    names = {name for part in found for name in part}
    names -= {"nearest_centre", "cluster_sums"}  # k-means', between the stages
    assert len(names) >= 11, names
    # a step's upstream gradient is 1, and its launch is counted all the same
    assert set(answer["gpu"]["launches"]) == names
    assert answer["cpu"]["launches"] == {}


@pytest.mark.parametrize("how", ["gpu", "graphs"])
def test_the_losses_are_those_of_a_cpu(answer: dict[str, Any], how: str) -> None:
    assert len(answer["cpu"]["losses"]) == len(answer[how]["losses"]) >= 10
    for ours, theirs in zip(answer[how]["losses"], answer["cpu"]["losses"], strict=True):
        assert abs(ours - theirs) <= 2e-3 * abs(theirs)  # one grey level of a crop may differ
