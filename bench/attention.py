"""Attention at the shapes of the presets: every backend that runs on this machine, and the table "auto" reads.

    python bench/attention.py                 measure and print
    python bench/attention.py --write         also store the winners of this device in kernels/attention_table.json
    python bench/attention.py --threads 1     CPU threads; all cores unless given

Microseconds of forward and backward from one packed projection to its gradient, and the ratio to the best of the
row. Several sweeps over all rows, backends interleaved; of each sweep the median, of the medians the lowest: other
work on the machine only ever adds. On a GPU the L2 is cold and the launches are queued beforehand. A backend whose
output or gradient is further from the formula in fp64 than four times the formula in the same dtype is not timed,
prints WRONG, and the exit code is 1. "-": the backend does not take such a call, or its package is not installed.
"""

import argparse
import importlib.util
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from mnemos.engine.plain_table import format_table
from mnemos.kernels.attention import BACKENDS, TABLE_PATH, attention, refusal
from mnemos.kernels.packing import Packing
from mnemos.sharding.command import Parser, run_command
from mnemos.sharding.errors import UserError

SWEEPS, REPEATS = 5, 5
TIE = (
    1.05  # this close to the best, the backend that stands first in BACKENDS is stored: noise decides nothing
)
MUST_BE_WITHIN = 4  # times the formula's own error; torch's fused kernels, which add up in blocks, reach 2.1
COLD_BYTES = 256 * 2**20  # written before every timed call on a GPU: more than any L2 holds
HEAD_START_CYCLES = 2_000_000  # about a millisecond in which the host queues what is timed


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One call of `attention`. The lengths of a packed batch lie around two thirds of `tokens`, the first takes all."""

    name: str
    tokens: int
    heads: int
    width: int
    cpu_batch: int
    gpu_batch: int = 128
    packed: bool = False
    causal: bool = False


def _shapes() -> list[Shape]:
    shapes = [
        Shape(name="sample encoder", tokens=17, heads=3, width=64, cpu_batch=32),
        Shape(name="sample decoder", tokens=65, heads=4, width=32, cpu_batch=32),
        *(Shape(name="decoder", tokens=tokens, heads=16, width=32, cpu_batch=2) for tokens in (145, 197)),
    ]
    # one of base and large: the table does not tell numbers of heads apart
    for name, heads, width in (("base", 12, 64), ("huge", 16, 80), ("giant", 16, 88)):
        shapes += [
            Shape(
                name=f"{name} encoder",
                tokens=tokens,
                heads=heads,
                width=width,
                cpu_batch=4 if tokens < 64 else 2,
            )
            for tokens in (37, 50, 145, 197)
        ]
    texts = (
        ("sample", 64, 3, 64, 32),
        ("base", 112, 12, 64, 4),
        ("huge", 112, 16, 80, 4),
        ("giant", 112, 16, 88, 4),
    )
    for name, tokens, heads, width, batch in texts:
        shapes += [
            Shape(
                name=f"{name} texts",
                tokens=tokens,
                heads=heads,
                width=width,
                cpu_batch=batch,
                packed=True,
                causal=causal,
            )
            for causal in (False, True)
        ]
    return shapes


@dataclass(frozen=True, kw_only=True)
class Case:
    """The tensors of one row."""

    qkv: Tensor  # [B, L, 3, H, W] (packed: [1, T, 3, H, W])
    upstream: Tensor  # [B, L, H * W]
    packing: Packing | None
    lengths: tuple[int, ...] | None
    causal: bool

    def run(self, backend: str) -> tuple[Tensor, Tensor]:
        """Return the output and the gradient of the projection."""
        self.qkv.grad = None
        out = attention(self.qkv, packing=self.packing, causal=self.causal, backend=backend).flatten(2)
        out.backward(self.upstream)
        assert self.qkv.grad is not None
        return out.detach(), self.qkv.grad


def make_case(shape: Shape, dtype: torch.dtype, device: torch.device) -> Case:
    """Return random tensors of a shape, the same ones every time."""
    generator = torch.Generator().manual_seed(0)
    batch, tokens, lengths, packing = shape.cpu_batch, shape.tokens, None, None
    if device.type == "cuda":
        batch = shape.gpu_batch
    if shape.packed:
        drawn = (torch.randn(batch - 1, generator=generator) * tokens / 8 + tokens * 2 / 3).round().int()
        lengths = (tokens, *drawn.clamp(1, tokens).tolist())
        packing = Packing.from_lengths(lengths, device)
        batch, tokens = 1, sum(lengths)
    qkv = torch.randn(batch, tokens, 3, shape.heads, shape.width, generator=generator)
    upstream = torch.randn(batch, tokens, shape.heads * shape.width, generator=generator)
    return Case(
        qkv=qkv.to(device, dtype).requires_grad_(),
        upstream=upstream.to(device, dtype),
        packing=packing,
        lengths=lengths,
        causal=shape.causal,
    )


def formula(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return what `Case.run` returns, by the formula, text by text, all in `dtype`."""
    qkv = case.qkv.detach().to(dtype).requires_grad_()
    parts = []
    for part in qkv.split(case.lengths, 1) if case.lengths else (qkv,):
        q, k, v = (x.transpose(1, 2) for x in part.unbind(2))
        score = q @ k.mT / q.shape[-1] ** 0.5
        if case.causal:
            score = score.masked_fill(score.new_ones(score.shape[-2:]).triu(1).bool(), float("-inf"))
        parts.append((score.softmax(-1) @ v).transpose(1, 2).flatten(2))
    out = torch.cat(parts, 1)
    out.backward(case.upstream.to(dtype))
    assert qkv.grad is not None
    return out.detach(), qkv.grad


def is_right(case: Case, backend: str) -> bool:
    """Return whether output and gradient are about as far from fp64 as the formula in the same dtype is."""
    dtype = case.qkv.dtype
    for ours, plain, exact in zip(
        case.run(backend), formula(case, dtype), formula(case, torch.float64), strict=True
    ):
        allowed = MUST_BE_WITHIN * (plain - exact).abs().max() + torch.finfo(dtype).eps * exact.abs().max()
        if not (ours - exact).abs().max() <= allowed:  # not: NaN is wrong too
            return False
    return True


def measure(case: Case, backends: Sequence[str]) -> dict[str, float]:
    """Return microseconds of forward and backward by backend: medians of one sweep."""
    cold = torch.empty(COLD_BYTES, dtype=torch.uint8, device=case.qkv.device) if case.qkv.is_cuda else None
    times: dict[str, list[float]] = {backend: [] for backend in backends}
    for repeat in range(REPEATS + 1):
        for backend in backends:
            taken = _once_on_cpu(case, backend) if cold is None else _once_on_gpu(case, backend, cold)
            if repeat:  # the first one warms up
                times[backend].append(taken)
    return {backend: statistics.median(taken) for backend, taken in times.items()}


def _once_on_cpu(case: Case, backend: str) -> float:
    start = time.perf_counter()
    case.run(backend)
    return 1e6 * (time.perf_counter() - start)


def _once_on_gpu(case: Case, backend: str, cold: Tensor) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    cold.zero_()
    torch.cuda._sleep(HEAD_START_CYCLES)
    start.record()
    case.run(backend)
    end.record()
    end.synchronize()
    return 1e3 * start.elapsed_time(end)


def candidates(case: Case) -> list[str]:
    """Return the backends that take the case and whose packages are here."""
    here = [name for name in BACKENDS if name != "xformers" or importlib.util.find_spec(name)]
    return [name for name in here if refusal(name, case.qkv, case.packing) is None]


def device_row(device: torch.device) -> dict[str, Any]:
    """Return what a row of the table says of the device."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return {"device": torch.cuda.get_device_name(device), "capability": f"{major}.{minor}"}
    info = Path("/proc/cpuinfo")
    models = [
        line.partition(": ")[2] for line in info.read_text().splitlines() if line.startswith("model name")
    ]
    return {
        "device": "cpu",
        "machine": models[0] if models else platform.machine(),
        "threads": torch.get_num_threads(),
    }


def write_table(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Put the rows in place of those of the same device; those of other devices stay."""
    others = [row for row in json.loads(path.read_text())["rows"] if row["device"] != rows[0]["device"]]
    lines = ",\n".join(json.dumps(row) for row in [*others, *rows])
    written = path.with_suffix(".new")
    written.write_text(f'{{"rows": [\n{lines}\n]}}\n')
    written.replace(path)


def bench(argv: Sequence[str] | None) -> None:
    """Measure every row, print them, and store the winners where that is asked for."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"store the winners in {TABLE_PATH.name}")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="CPU threads")
    given = parser.parse_args(argv)
    if given.threads < 1:
        raise UserError(f"--threads {given.threads}: nothing could be computed; give 1 or more")
    torch.set_num_threads(given.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    about = {**device_row(device), "torch": torch.__version__}

    rows = [(shape, dtype) for dtype in (torch.bfloat16, torch.float32) for shape in _shapes()]
    right: list[list[str]] = []
    times: list[dict[str, float]] = []
    wrong = []
    for sweep in range(SWEEPS):
        for number, (shape, dtype) in enumerate(
            tqdm(rows, desc=f"sweep {sweep + 1} of {SWEEPS}", leave=False)
        ):
            torch.compiler.reset()  # flex compiles for every shape
            case = make_case(shape, dtype, device)
            if not sweep:
                can = candidates(case)
                right.append([backend for backend in can if is_right(case, backend)])
                times.append(dict.fromkeys(right[number], float("inf")))
                wrong += [(shape, dtype, backend) for backend in can if backend not in right[number]]
            for backend, us in measure(case, right[number]).items():
                times[number][backend] = min(times[number][backend], us)

    printed, stored = [], []
    for (shape, dtype), taken in zip(rows, times, strict=True):
        best = min(taken.values(), default=float("inf"))
        row = {
            "dtype": str(dtype).removeprefix("torch."),
            "packed": shape.packed,
            "causal": shape.causal,
            "tokens": shape.tokens,
            "width": shape.width,
        }
        cells = {backend: f"{us:.0f} ({us / best:.2f})" for backend, us in taken.items()}
        cells |= {backend: "WRONG" for *at, backend in wrong if at == [shape, dtype]}
        printed.append({"shape": shape.name, **row, **cells})
        if not taken:
            continue
        batch = shape.gpu_batch if device.type == "cuda" else shape.cpu_batch
        rounded = {backend: round(us) for backend, us in taken.items()}
        winner = next(backend for backend in BACKENDS if taken.get(backend, float("inf")) <= TIE * best)
        stored.append(
            {**about, **row, "batch": batch, "heads": shape.heads, "backend": winner, "us": rounded}
        )
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    print(format_table(printed, ["shape", *row, *BACKENDS]))
    if given.write:
        write_table(TABLE_PATH, stored)
        print(f"stored in {TABLE_PATH}")
    if wrong:
        where = "; ".join(f"{backend} at {shape.name}, {dtype}" for shape, dtype, backend in wrong)
        print(f"error: wrong and therefore not timed: {where}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    sys.exit(run_command(bench))
