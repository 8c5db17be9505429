"""bench/aot.py: what counts as a fault, how usage is read, and that kernels compile."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from mnemos.bench import aot
from mnemos.bench.op_cases import OPS

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


def run_aot(*flags: str, interpret: bool = False) -> "subprocess.CompletedProcess[str]":
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "bench/aot.py", *flags]
    return subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_every_kernel_compiles_for_every_target() -> None:
    done = run_aot()
    assert done.returncode == 0, done.stdout + done.stderr
    for target in aot.TARGETS:
        assert target.name in done.stdout
    for op in OPS:
        assert f"  {op} " in done.stdout, op


def test_one_operation_is_compiled_once_for_what_is_the_same() -> None:
    done = run_aot("--op", "feature_mse", "--jobs", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line.split()[:2] for line in done.stdout.splitlines() if "_kernel" in line]
    # two types, with and without a gradient; the scaling of a gradient for both types
    for target in aot.TARGETS:
        assert lines.count([target.name, "feature_mse_kernel"]) == 4
        assert lines.count([target.name, "scale_gradient_kernel"]) == 2
    assert "24 kernels" in done.stdout and "no kernel spills" in done.stdout


def test_interpreter_is_refused() -> None:
    done = run_aot(interpret=True)
    assert done.returncode == 2 and done.stderr.startswith("error: TRITON_INTERPRET is set")


@pytest.mark.parametrize("flags", [["--op", "nothing"], ["--jobs", "0"]], ids=" ".join)
def test_a_wrong_call_is_one_sentence(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert aot.main(flags) == 2
    assert capsys.readouterr().err.count("\n") == 1
