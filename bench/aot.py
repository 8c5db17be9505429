"""Compile every Triton kernel ahead of time, for targets that need not be there, and show what it takes of each.

    python bench/aot.py

The launch functions run on tensors without storage under a driver that only names a target, so that what is compiled is
what a launch would compile: the same constants, alignments and warps. Exits 1 when a kernel spills to local memory or
wants more shared memory than the target has.
"""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from mnemos.kernels.gather_patches import launch_gather_patches
from mnemos.kernels.masked_patch_mse import launch_masked_patch_mse

KIB = 1024
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


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

    registers: int
    scalar_spills: int
    stack_bytes: int
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


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a tensor without storage."""
    return torch.empty(shape, dtype=dtype, device="meta")


def launches() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield (what, launch) for every kernel at the shapes and types the preset `base` runs, batch 128."""
    B = 128
    inputs = {
        "16x16x3 uint8 rgb": ((B, 3, 224, 224), torch.uint8, (16, 16), 3, 49),
        "16x16x3 uint8 grey": ((B, 1, 224, 224), torch.uint8, (16, 16), 3, 49),
        "16x16x16 int16": ((B, 1, 16, 192, 192), torch.int16, (16, 16, 16), 1, 36),
    }
    per_sample, upstream = empty(B), empty()
    partner = empty(B, dtype=torch.int64)
    for dtype, short in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        for name, (shape, stored, patch, channels, num_visible) in inputs.items():
            what = f"{name} {short}"
            images, visible = empty(*shape, dtype=stored), empty(B, num_visible, dtype=torch.int64)
            masked = empty(B, 3 * num_visible, dtype=torch.int64)
            pred = empty(B, 3 * num_visible, torch.Size(patch).numel() * channels, dtype=dtype)
            flip = empty(B, len(patch), dtype=torch.bool)
            gather = partial(launch_gather_patches, images, visible, patch, channels, per_sample, per_sample)
            yield what, partial(gather, None, None, None, dtype)
            yield f"{what} flip mix", partial(gather, flip, partner, per_sample, dtype)
            loss = partial(launch_masked_patch_mse, pred, images, masked, patch, channels, per_sample)
            for mirror, suffix in ((None, ""), (flip, " flip")):
                yield f"{what}{suffix} loss", partial(loss, mirror)
                yield f"{what}{suffix} grad", partial(loss, mirror, upstream)


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


def main() -> int:
    """Compile everything, print the table, return the exit code."""
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        print("TRITON_INTERPRET is set, nothing can be compiled; unset it", file=sys.stderr)
        return 2
    print(
        f"Triton {triton.__version__}; regs, STACK and LOCAL (bytes) per thread, shared (bytes) per program"
    )
    print(
        f"{'target':8}{'kernel':26}{'inputs':34}{'warps':>6}"
        f"{'regs':>6}{'sspill':>8}{'STACK':>7}{'LOCAL':>7}{'shared':>8}"
    )
    num_faults = 0
    for target in TARGETS:
        for what, launch in launches():
            for kernel in compiled_by(launch, target):
                used = usage(kernel)
                faults = used.faults(target)
                num_faults += bool(faults)
                print(
                    f"{target.name:8}{kernel.metadata.name.strip('_'):26}{what:34}{kernel.metadata.num_warps:6}"
                    f"{used.registers:6}{used.scalar_spills:8}{used.stack_bytes:7}{used.local_bytes:7}"
                    f"{used.shared_bytes:8}{'  FAULT: ' + ', '.join(faults) if faults else ''}"
                )
    print(f"{num_faults} faults" if num_faults else "no kernel spills")
    return 1 if num_faults else 0


if __name__ == "__main__":
    sys.exit(main())
