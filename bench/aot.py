"""Compile every Triton kernel ahead of time, for targets that need not be there, and show what it takes of each.

    python bench/aot.py                 every kernel, every target
    python bench/aot.py --op NAME       the kernels of one operation; again for more

The launch functions run on tensors without storage under a driver that only names a target, so that what is compiled is
what a launch would compile: the same constants, alignments and warps. Launches that lead to the same machine code share
one line, that of the first. Exits 1 when a kernel spills to local memory or wants more shared memory than the target has.
"""

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton
from tqdm import tqdm
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from mnemos.bench.op_cases import BATCH, DTYPES, OPS
from mnemos.engine.plain_table import format_table
from mnemos.sharding.command import Parser, run_command
from mnemos.sharding.errors import UserError

KIB = 1024
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
COLUMNS = {
    "target": "target",
    "kernel": "kernel",
    "inputs": "first launched for",
    "warps": "warps",
    "registers": "regs",
    "scalar_spills": "sspill",
    "stack_bytes": "STACK",
    "local_bytes": "LOCAL",
    "shared_bytes": "shared",
    "fault": "",
}


@dataclass(frozen=True, kw_only=True)
class Target:
    """A GPU to compile for."""

    name: str
    gpu: GPUTarget
    shared_bytes: int  # the most one program may have


TARGETS = (
    Target(name="sm_80", gpu=GPUTarget("cuda", 80, 32), shared_bytes=163 * KIB),
    Target(name="sm_90", gpu=GPUTarget("cuda", 90, 32), shared_bytes=227 * KIB),
    Target(name="sm_100", gpu=GPUTarget("cuda", 100, 32), shared_bytes=227 * KIB),
    Target(name="gfx942", gpu=GPUTarget("hip", "gfx942", 64), shared_bytes=64 * KIB),
)


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What one compiled kernel takes. Zero where the target has no such thing."""

    registers: int  # vector registers on gfx942
    scalar_spills: int  # to vector registers: shown, no fault
    stack_bytes: int  # private segment on gfx942
    local_bytes: int  # registers spilled to memory
    shared_bytes: int

    def faults(self, target: Target) -> list[str]:
        """Return why the kernel must not ship."""
        found = []
        if self.stack_bytes or self.local_bytes:
            found.append("spills to memory")
        if self.shared_bytes > target.shared_bytes:
            found.append(f"needs more than {target.shared_bytes} bytes of shared memory")
        return found


class _NamedTarget:
    """The part of a Triton driver that compiling asks for."""

    def __init__(self, target: Target) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target.gpu

    def get_current_device(self) -> str:
        return self._target.name  # keys the kernels' caches, so each target gets its own

    def get_current_stream(self, device: str) -> int:
        return 0


def compiled_by(launch: Callable[[], Any], target: Target) -> list[Any]:
    """Return the kernels a launch would run, compiled for the target and not run."""
    kernels: list[Any] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        kernels.append(run(self, *args, grid=grid, warmup=True, **kwargs))

    driver.set_active(_NamedTarget(target))
    JITFunction.run = compile_only
    try:
        launch()
    finally:
        JITFunction.run = run
    return kernels


def launches(op: str) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield (inputs, launch) of one operation's device code, at every shape and type of its cases."""
    for case, make in OPS[op].cases.items():
        for short, dtype in DTYPES.items():
            for what, launch in OPS[op].launches(make(torch.device("meta"), BATCH, dtype)):
                yield f"{case} {short} {what}", launch


def compile_op(op: str, target: Target) -> list[dict[str, Any]]:
    """Compile one operation's launches for a target; return a row of the table for every distinct kernel."""
    rows: dict[str, dict[str, Any]] = {}
    for inputs, launch in launches(op):
        for kernel in compiled_by(launch, target):
            if kernel.hash in rows:
                continue
            used = usage(kernel)
            faults = ", ".join(used.faults(target))
            rows[kernel.hash] = {
                "target": target.name,
                "kernel": kernel.metadata.name.strip("_"),
                "inputs": f"{op} {inputs}",
                "warps": kernel.metadata.num_warps,
                **vars(used),
                "hash": kernel.hash,
                "fault": f"FAULT: {faults}" if faults else "",
            }
    return list(rows.values())


def usage(kernel: Any) -> Usage:
    """Read registers, spills and memory from the compiled kernel."""
    shared_bytes = kernel.metadata.shared  # asked for at the launch, so it stands in no machine code
    if "cubin" in kernel.asm:
        found = _fields(r"\b(REG|STACK|LOCAL):(\d+)", _resource_usage(kernel.asm["cubin"]))
        return Usage(
            registers=found["REG"],
            scalar_spills=0,
            stack_bytes=found["STACK"],
            local_bytes=found["LOCAL"],
            shared_bytes=shared_bytes,
        )
    found = _fields(r"\.(\w+):\s+(\d+)", kernel.asm["amdgcn"])
    return Usage(
        registers=found["vgpr_count"],
        scalar_spills=found["sgpr_spill_count"],
        stack_bytes=found["private_segment_fixed_size"],
        local_bytes=4 * found["vgpr_spill_count"],
        shared_bytes=shared_bytes,
    )


def _fields(pattern: str, text: str) -> dict[str, int]:
    return {name: int(value) for name, value in re.findall(pattern, text)}


def _resource_usage(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(CUOBJDUMP), "--dump-resource-usage", file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def compile_all(ops: Sequence[str], jobs: int) -> list[dict[str, Any]]:
    """Return the rows of all targets, compiled by `jobs` processes; a kernel that operations share comes once."""
    tasks = [(op, target) for target in TARGETS for op in ops]
    found = {}
    with ProcessPoolExecutor(jobs, get_context("spawn"), _leave_the_signal_to_the_parent) as pool:
        waiting = {pool.submit(compile_op, *task): task for task in tasks}
        try:
            for done in tqdm(as_completed(waiting), total=len(tasks), desc="compile", unit="op"):
                found[waiting[done]] = done.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    rows: dict[str, dict[str, Any]] = {}
    for task in tasks:
        for row in found[task]:
            rows.setdefault(row["hash"], row)
    return list(rows.values())


def _leave_the_signal_to_the_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def main(argv: Sequence[str] | None = None) -> int:
    """Compile everything, print the table, return the exit code."""
    faults: list[str] = []

    def command(argv: Sequence[str] | None) -> None:
        parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--op", action="append", choices=sorted(OPS), help="of this operation only")
        cores = len(os.sched_getaffinity(0))
        parser.add_argument("--jobs", type=int, default=cores, help=f"processes that compile ({cores})")
        given = parser.parse_args(argv)
        if given.jobs < 1:
            raise UserError(
                f"--jobs {given.jobs}: at least one process must compile; leave it out, or give 1"
            )
        if os.environ.get("TRITON_INTERPRET", "0") != "0":
            raise UserError("TRITON_INTERPRET is set, nothing can be compiled; unset it")
        start = time.monotonic()
        rows = compile_all(given.op or list(OPS), given.jobs)
        print(format_table(rows, COLUMNS))
        print(
            f"Triton {triton.__version__}; registers, STACK and LOCAL (bytes) of a thread, shared (bytes) of a program"
        )
        print(f"{len(rows)} kernels in {time.monotonic() - start:.0f} s with {given.jobs} processes")
        faults.extend(row["kernel"] for row in rows if row["fault"])
        print(f"{len(faults)} faults" if faults else "no kernel spills")

    return run_command(command, argv) or int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
