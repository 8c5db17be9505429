"""Whole runs as measurements: start `engine/train.py`, wait, read its ledger. Started again, finished runs are kept."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

TRAIN = Path(__file__).resolve().parents[1] / "engine" / "train.py"


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run to do: its name, and the flags that make it what it is."""

    name: str
    flags: tuple[str, ...]


def do_runs(
    folder: Path, runs: Sequence[Run], stage: str, common: Sequence[str], jobs: int
) -> dict[str, dict[str, Any]]:
    """Do the runs, `jobs` at a time, and return the stages of each run's ledger by stage name, by run name.

    Raises:
        RuntimeError: a run failed; its output lies beside its folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    threads = max(1, len(os.sched_getaffinity(0)) // jobs)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}

    def one(run: Run) -> tuple[str, dict[str, Any]]:
        command = [
            sys.executable,
            str(TRAIN),
            "--stage",
            stage,
            "--run",
            str(folder / run.name),
            *common,
            *run.flags,
        ]
        log = folder / f"{run.name}.log"
        with log.open("w", encoding="utf-8") as file:
            code = subprocess.run(
                command, stdout=file, stderr=subprocess.STDOUT, env=environment, check=False
            ).returncode
        if code:
            raise RuntimeError(f"run {run.name} ended with exit code {code}; its output is in {log}")
        ledger = json.loads((folder / run.name / "ledger.json").read_text(encoding="utf-8"))
        return run.name, {entry["name"]: entry for entry in ledger["stages"]}

    with ThreadPoolExecutor(jobs) as pool:
        done = tqdm(pool.map(one, runs), total=len(runs), desc="runs", unit="run")
        return dict(done)


def machine() -> dict[str, str]:
    """Return what a result line says of where it was measured: device, versions, commit."""
    import platform

    import deepspeed
    import torch

    name = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else platform.processor() or platform.machine()
    )
    commit = subprocess.run(
        ["git", "-C", TRAIN.parent, "describe", "--always", "--dirty"],
        check=False,
        capture_output=True,
        text=True,
    ).stdout.strip()
    return {
        "device": name,
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "deepspeed": deepspeed.__version__,
        "commit": commit or "unknown",
    }


def without_model(entry: dict[str, Any]) -> float:
    """Return the loss that needs no model: the best constant's, or the unigram entropy of texts."""
    measured = entry["validation"]
    loss: float = measured.get("constant", measured.get("unigram"))
    return loss
