"""Steps by graphs are the steps without: bit for bit where the graph is a stand-in, on one and two ranks."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import free_port
from step_graph_cases import STEPS, RealStep

from mnemos.engine.preparing import Phase
from mnemos.engine.step_graph import WARM_UP

WORKER = Path(__file__).with_name("step_graph_worker.py")
CPU = torch.device("cpu")


# Whole steps, from the raw batch on


@pytest.mark.parametrize(("name", "phase"), STEPS)
def test_a_step_by_a_graph_is_the_step(tiny_sets: Path, name: str, phase: Phase) -> None:
    told: list[str] = []
    eager, ours = (RealStep(tiny_sets, name, phase, CPU) for _ in range(2))
    graph = ours.graph(told=told)
    for update in range(WARM_UP + 4):
        rows = 4 if update == WARM_UP + 2 else 8  # a short batch among the others
        raw = eager.raw(update, rows)
        expected = eager.update(eager.compute(raw))
        assert torch.equal(ours.update(graph.loss(raw)), expected)
    assert torch.equal(ours.weights(), eager.weights())
    assert (graph.eager, graph.replays, told) == (WARM_UP + 1, 3, [])


@pytest.fixture(scope="module")
def under_deepspeed(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    """Return the worker's answers by the number of ranks; all are under way at once."""
    folder = tmp_path_factory.mktemp("graphs")
    started: list[subprocess.Popen[str]] = []
    for ranks in (1, 2):
        common = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
        common["MASTER_PORT"] = str(free_port())
        started += [
            subprocess.Popen(
                [sys.executable, WORKER, folder / f"{ranks}.json"],
                env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(ranks)
        ]
    outputs = [process.communicate(timeout=300)[0] for process in started]
    assert all(process.returncode == 0 for process in started), "\n".join(outputs)[-3000:]
    return {ranks: json.loads((folder / f"{ranks}.json").read_text(encoding="utf-8")) for ranks in (1, 2)}


@pytest.mark.parametrize("ranks", [1, 2])
def test_updates_under_deepspeed_are_the_same(under_deepspeed: dict[int, dict[str, Any]], ranks: int) -> None:
    assert len(under_deepspeed[ranks]) == 6
    for configuration, answer in under_deepspeed[ranks].items():
        eager, graphs = answer["eager"], answer["graphs"]
        assert len(set(eager["losses"])) == len(eager["losses"]), "the updates differ"
        assert graphs["losses"] == eager["losses"], configuration
        assert graphs["weights"] == eager["weights"], configuration
        assert graphs["counts"] == [[3, 5], [2, 1]] and graphs["told"] == [], configuration
