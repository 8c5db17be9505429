"""Threads and memory of a run on a CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mnemos.engine import cpu

TORCHRUN = {"TORCHELASTIC_RUN_ID": "none"}


@pytest.mark.parametrize(
    ("text", "cores"),
    [("max 100000", 8), ("200000 100000", 2), ("50000 100000", 1), ("9900000 100000", 8), ("", 8), ("x", 8)],
)
def test_a_containers_quota_bounds_the_cores(
    text: str, cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quota = tmp_path / "cpu.max"
    quota.write_text(text)
    monkeypatch.setattr(cpu, "_QUOTA", quota)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert cpu.num_cores() == cores
    monkeypatch.setattr(cpu, "_QUOTA", tmp_path / "none")
    assert cpu.num_cores() == 8


@pytest.mark.parametrize(
    ("environment", "ranks", "threads"),
    [
        ({}, 1, 8),
        ({}, 3, 2),
        ({}, 100, 1),
        ({"OMP_NUM_THREADS": "5"}, 2, None),
        ({"OMP_NUM_THREADS": "1"}, 2, None),
        ({"OMP_NUM_THREADS": "1", **TORCHRUN}, 2, 4),
        ({"OMP_NUM_THREADS": "1", **TORCHRUN}, 1, None),
        ({"OMP_NUM_THREADS": "3", **TORCHRUN}, 2, None),
    ],
)
def test_ranks_share_the_cores_unless_the_user_chose(
    environment: dict[str, str], ranks: int, threads: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    chosen: list[int] = []
    for name in ("OMP_NUM_THREADS", *TORCHRUN):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(cpu, "num_cores", lambda: 8)
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    cpu.use_cores(ranks)
    assert chosen == ([] if threads is None else [threads])


def test_freed_memory_is_taken_again_without_the_kernel() -> None:
    probe = """
import resource, sys
from mnemos.engine.cpu import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
touch = lambda: bytearray(40 << 20)
touch()
before = faults()
for _ in range(5):
    touch()
print(faults() - before)
"""
    faults = [
        int(
            subprocess.run(
                [sys.executable, "-c", probe, how], check=True, capture_output=True, text=True
            ).stdout
        )
        for how in ("kept", "returned")
    ]
    if sys.platform != "linux" or faults[1] < 1000:
        pytest.skip("this C library keeps large blocks by itself")
    assert faults[0] < faults[1] / 10
