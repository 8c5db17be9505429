"""A stage with rehearsal of all earlier modalities: the same on one and two ranks and under ZeRO 0 to 3.

Bounds. fp32 sums in another order differ by some rounding steps, 6e-8 each, which training carries on; over 20 updates
at most 2.9e-6 was measured (`pytest -rP tests/test_zero.py`). 1e-5 leaves room for other machines and is far below any
real difference: a mask, partner or DropPath drawn otherwise moves the first losses by more than 1e-2.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from launching import deepspeed_command
from tiny_data import TINY

from mnemos.sharding.modalities import DEFAULT_ORDER

REPOSITORY = Path(__file__).resolve().parents[1]
WORKER = Path(__file__).with_name("zero_worker.py")
BOUND = 1e-5
STEPS = 20
LAST = DEFAULT_ORDER[-1]
ASSIGNMENTS = [text for text in TINY if not text.startswith("training.steps")] + ["training.steps=12"]
DIVIDED = ("zero 1", "zero 2")  # one rank has nothing to divide, and takes ZeRO 0 for these
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
GRAPHS = {"graphs by a stand-in": True}
ZERO = {f"zero {stage}": {"parallel.zero": stage} for stage in (0, 1, 2, 3)}


@pytest.fixture(scope="module")
def run(tiny_sets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run whose stages before the last are complete."""
    folder = tmp_path_factory.mktemp("zero") / "run"
    flags = [part for text in ASSIGNMENTS for part in ("--set", text)]
    command = [
        sys.executable,
        REPOSITORY / "engine" / "train.py",
        "--stage",
        DEFAULT_ORDER[-2],
        "--run",
        folder,
    ]
    command += ["--data", tiny_sets, *flags]
    done = subprocess.run(command, check=False, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def train(
    run: Path, data: Path, variants: dict[str, Any], *, ranks: int, watched: list[int]
) -> dict[str, Any]:
    answer = run.parent / f"answer-{ranks}.json"
    request = {
        "run": str(run),
        "data": str(data),
        "stage": LAST,
        "assignments": ASSIGNMENTS,
        "steps": STEPS,
        "watched": watched,
        "variants": variants,
        "answer": str(answer),
    }
    file = run.parent / f"request-{ranks}.json"
    file.write_text(json.dumps(request), encoding="utf-8")
    command = [*deepspeed_command(WORKER, ranks=ranks), file] if ranks > 1 else [sys.executable, WORKER, file]
    done = subprocess.run(command, check=False, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
    return found


@pytest.fixture(scope="module")
def one_rank(run: Path, tiny_sets: Path) -> dict[str, Any]:
    variants = {
        **ZERO,
        "micro-batches": {"parallel.zero": 2, "training.micro_batch": 4},
        "micro-batches under zero 3": {"parallel.zero": 3, "training.micro_batch": 4},
        "recomputed": {"training.recompute": True},
        "graphs": GRAPHS,
        "graphs in bf16": {"training.precision": "bf16", **GRAPHS},
        **{f"bf16 {name}": {**zero, "training.precision": "bf16"} for name, zero in ZERO.items()},
    }
    return train(run, tiny_sets, variants, ranks=1, watched=[5, 6, 7, 8, 9, 10, 11])


@pytest.fixture(scope="module")
def two_ranks(run: Path, tiny_sets: Path) -> dict[str, Any]:
    variants = {
        **ZERO,
        **{f"bf16 {name}": {**ZERO[name], "training.precision": "bf16"} for name in DIVIDED},
        **{f"graphs, {name}": {**ZERO[name], **GRAPHS} for name in DIVIDED},
    }
    return train(run, tiny_sets, variants, ranks=2, watched=[5, 6, 7, 8, 9, 10, 11])


def worst(answer: dict[str, Any], reference: dict[str, Any]) -> float:
    """Return the largest relative difference between two runs' losses."""
    pairs = zip(answer["losses"], reference["losses"], strict=True)
    values = [(float.fromhex(ours), float.fromhex(theirs)) for ours, theirs in pairs]
    found = max(abs(ours - theirs) / abs(theirs) for ours, theirs in values)
    print(f"largest relative difference over {len(values)} updates: {found:.1e}")  # shown by pytest -rP
    return found


def test_every_earlier_modality_is_rehearsed_within_the_steps(one_rank: dict[str, Any]) -> None:
    phases = one_rank["zero 1"]["phases"]
    assert len(phases) == STEPS
    assert set(phases) == {f"{LAST} pretext", *(f"{name} rehearsal" for name in DEFAULT_ORDER[:-1])}


@pytest.mark.parametrize("name", [*ZERO, "micro-batches", "micro-batches under zero 3", "recomputed"])
def test_one_rank_gives_the_same_losses(one_rank: dict[str, Any], name: str) -> None:
    assert one_rank[name]["phases"] == one_rank["zero 1"]["phases"]
    assert worst(one_rank[name], one_rank["zero 1"]) <= BOUND


@pytest.mark.parametrize("name", ZERO)
def test_two_ranks_give_the_losses_of_one(
    one_rank: dict[str, Any], two_ranks: dict[str, Any], name: str
) -> None:
    assert two_ranks[name]["phases"] == one_rank["zero 1"]["phases"]
    assert worst(two_ranks[name], one_rank["zero 1"]) <= BOUND


def test_the_losses_change_when_anything_random_does(one_rank: dict[str, Any]) -> None:
    """Else the comparisons above would hold of losses that say nothing."""
    first, last = one_rank["zero 1"]["losses"][0], one_rank["zero 1"]["losses"][-1]
    assert len(set(one_rank["zero 1"]["losses"])) == STEPS and first != last
    assert worst(one_rank["bf16 zero 1"], one_rank["zero 1"]) > 10 * BOUND


@pytest.mark.parametrize("name", [*ZERO, *(f"bf16 {name}" for name in ZERO)])
def test_idle_parts_keep_values_and_moments(one_rank: dict[str, Any], name: str) -> None:
    assert one_rank[name]["moved"] == []


@pytest.mark.parametrize(
    ("ranks", "name", "without"),
    [
        (1, "graphs", "zero 0"),
        (1, "graphs in bf16", "bf16 zero 0"),
        *((2, f"graphs, {name}", name) for name in DIVIDED),
    ],
)
def test_graphs_change_no_bit(
    one_rank: dict[str, Any], two_ranks: dict[str, Any], ranks: int, name: str, without: str
) -> None:
    answer = {1: one_rank, 2: two_ranks}[ranks]
    assert answer[name]["losses"] == answer[without]["losses"]
    replays = [int(told.split()[-1]) for told in answer[name]["replays"]]
    assert len(replays) == len(DEFAULT_ORDER) - 1 and max(replays) >= 2, "texts have no graph"
    assert answer[without]["replays"] == []


@pytest.mark.parametrize("name", [*ZERO, *(f"bf16 {name}" for name in DIVIDED)])
def test_idle_parts_keep_values_and_moments_on_two_ranks(two_ranks: dict[str, Any], name: str) -> None:
    assert two_ranks[name]["moved"] == []
