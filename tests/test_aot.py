"""bench/aot.py: what counts as a fault, how usage is read, and the launches it covers."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from mnemos.bench import aot

REPO = Path(__file__).resolve().parents[1]
CLEAN = {"registers": 32, "scalar_spills": 3, "stack_bytes": 0, "local_bytes": 0, "shared_bytes": 1024}
AMDGCN = """
    .group_segment_fixed_size: 512
    .private_segment_fixed_size: 16
    .sgpr_spill_count: 1
    .vgpr_count:     24
    .vgpr_spill_count: 2
"""


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"stack_bytes": 8}, "spills"),
        ({"local_bytes": 4}, "spills"),
        ({"shared_bytes": 64 * 1024 + 1}, "shared memory"),
    ],
    ids=["stack", "local", "shared"],
)
def test_spills_and_too_much_shared_memory_are_faults(change: dict[str, int], fault: str) -> None:
    target = next(target for target in aot.TARGETS if target.name == "gfx942")
    assert aot.Usage(**CLEAN).faults(target) == []
    assert fault in aot.Usage(**(CLEAN | change)).faults(target)[0]


def test_amdgcn_text_is_read() -> None:
    kernel = SimpleNamespace(asm={"amdgcn": AMDGCN}, metadata=SimpleNamespace(shared=512))
    expected = {"registers": 24, "scalar_spills": 1, "stack_bytes": 16, "local_bytes": 8, "shared_bytes": 512}
    assert aot.usage(kernel) == aot.Usage(**expected)


@pytest.mark.slow
def test_every_kernel_compiles_for_every_target() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "bench/aot.py"],
        cwd=REPO,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for target in aot.TARGETS:
        assert target.name in done.stdout


def test_interpreter_is_refused() -> None:
    done = subprocess.run(
        [sys.executable, "bench/aot.py"],
        cwd=REPO,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and done.stderr.startswith("TRITON_INTERPRET is set")
