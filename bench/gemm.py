"""Rates of the plain matrix products that a step of the base preset is made of; what the targets rest on.

    python bench/gemm.py                                      the step's shapes in bf16; few rows on a CPU
    python bench/gemm.py --rows 51200 --sizes 768x3072 --passes forward dgrad
    python bench/gemm.py --out bench/results/gemm.jsonl       one JSON line a row, appended

For a layer of K inputs and N outputs on M rows: forward [M, K] x [K, N], dgrad [M, N] x [N, K], wgrad [N, M] x [M, K],
laid out as a linear layer has them, outputs in the dtype of the inputs. M: 6,400 = 128 samples x 50 visible tokens,
25,216 = 128 x 197 decoder tokens, 51,200 = 1,024 x 50. Products take turns, round by round, in another order each; printed
are TFLOP/s from the median over the rounds, and from the 20th and 80th percentile of time. On a GPU a window replays a graph,
timed by events, over operands that together no cache holds.
"""

import argparse
import json
import math
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from mnemos.bench.runs import machine
from mnemos.engine import dist
from mnemos.engine.plain_table import format_table
from mnemos.sharding.command import Parser, run_command
from mnemos.sharding.errors import UserError

Pass = Literal["forward", "dgrad", "wgrad"]
ROWS = {"cuda": (6_400, 25_216, 51_200), "cpu": (400, 1_576)}  # of 128 and 1,024 samples; of 8
SIZES = (  # inputs x outputs of the base preset's layers
    (768, 2304),
    (768, 768),
    (768, 3072),
    (3072, 768),
    (768, 512),
    (512, 1536),
    (512, 512),
    (512, 2048),
    (2048, 512),
    (512, 768),
)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
COLD_BYTES = 128 << 20  # of operands in turn: more than a GPU's L2 cache
MOST_SETS = 16
WINDOW_S = {"cuda": 0.004, "cpu": 0.02}  # least length of a window
COLUMNS = {
    "m": "M",
    "k": "K",
    "n": "N",
    "pass": "pass",
    "us": "us",
    "tflop_per_s": "TFLOP/s",
    "low": "at p80",
    "high": "at p20",
}


@dataclass(frozen=True, kw_only=True)
class Product:
    """One matrix product: rows, inputs, outputs of the layer, and which of its three."""

    m: int
    k: int
    n: int
    which: Pass

    @property
    def flops(self) -> int:
        """Floating-point operations, 2 a multiply-add; the same for all three."""
        return 2 * self.m * self.k * self.n

    def operands(self, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
        """Return new operands, as a linear layer has them: x [M, K], weight [N, K], gradient [M, N]."""
        x_MK, weight_NK, gradient_MN = (
            (self.m, self.k),
            (self.n, self.k),
            (self.m, self.n),
        )
        shapes = {
            "forward": (x_MK, weight_NK),
            "dgrad": (gradient_MN, weight_NK),
            "wgrad": (gradient_MN, x_MK),
        }
        left, right = (torch.randn(shape, device=device).mul_(0.05).to(dtype) for shape in shapes[self.which])
        return left, right

    def multiply(self, left: Tensor, right: Tensor) -> Tensor:
        """Return the product."""
        if self.which == "forward":
            return left @ right.t()
        return left @ right if self.which == "dgrad" else left.t() @ right


class Timed:
    """A product with operands enough that no cache holds them, and its seconds by round."""

    def __init__(self, product: Product, dtype: torch.dtype, device: str) -> None:
        self.product, self.seconds = product, list[float]()
        first = product.operands(dtype, device)
        each = sum(tensor.nbytes for tensor in first)
        number = min(MOST_SETS, max(1, math.ceil(COLD_BYTES / each))) if device == "cuda" else 1
        self.sets = [first, *(product.operands(dtype, device) for _ in range(number - 1))]
        self.multiply_all()  # loads the library
        self.replay = self._recorded() if device == "cuda" else partial(_clock_seconds, self.multiply_all)
        self.replay()
        self.turns = max(1, math.ceil(WINDOW_S[device] / self.replay()))

    def multiply_all(self) -> None:
        """Multiply every pair of operands once."""
        for left, right in self.sets:
            self.product.multiply(left, right)

    def window(self) -> None:
        """Time one window."""
        self.seconds.append(sum(self.replay() for _ in range(self.turns)) / self.turns / len(self.sets))

    def _recorded(self) -> Callable[[], float]:
        """Return what replays all products from a graph: the smallest take less time than their launch."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.multiply_all()  # the library's workspace belongs to the stream
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            self.multiply_all()
        return partial(_event_seconds, graph.replay)

    def row(self) -> dict[str, Any]:
        """Return what was found."""
        p20, p50, p80 = (float(value) for value in np.percentile(self.seconds, (20, 50, 80)))
        product = self.product
        rates = {"tflop_per_s": p50, "tflop_per_s_p20": p80, "tflop_per_s_p80": p20}
        return {
            "m": product.m,
            "k": product.k,
            "n": product.n,
            "pass": product.which,
            "us": 1e6 * p50,
            **{name: product.flops / seconds / 1e12 for name, seconds in rates.items()},
        }


def _clock_seconds(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _event_seconds(work: Callable[[], None]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    work()
    end.record()
    end.synchronize()
    return 1e-3 * float(begin.elapsed_time(end))


def measure(
    products: Sequence[Product], dtype: torch.dtype, device: str, rounds: int
) -> list[dict[str, Any]]:
    """Return a row for every product; all of one M take turns, so that their operands fit."""
    rows = []
    order = random.Random(0)
    with tqdm(total=len(products) * rounds, desc="windows", unit="window") as progress:
        for m in dict.fromkeys(product.m for product in products):
            turns = [Timed(product, dtype, device) for product in products if product.m == m]
            for _ in range(rounds):
                for one in order.sample(turns, len(turns)):
                    one.window()
                    progress.update()
            rows += [one.row() for one in turns]
    return rows


def parse_size(text: str) -> tuple[int, int]:
    """Return (inputs, outputs) of "KxN"."""
    parts = text.split("x")
    if len(parts) != 2 or not all(part.isdecimal() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not inputs x outputs; write for example 768x3072")
    return int(parts[0]), int(parts[1])


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write down, return the exit code."""

    def command(argv: Sequence[str] | None) -> None:
        given = make_parser().parse_args(argv)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        rows = given.rows or ROWS[device]
        if given.rounds < 1 or min(rows) < 1:
            raise UserError(
                f"--rounds {given.rounds} --rows {min(rows)}: nothing would be measured; give 1 or more"
            )
        if given.out and not given.out.parent.is_dir():
            raise UserError(f"--out {given.out}: there is no folder {given.out.parent}; make it first")
        products = [
            Product(m=m, k=k, n=n, which=which)
            for m in rows
            for k, n in given.sizes
            for which in given.passes
        ]
        found = measure(products, DTYPES[given.dtype], device, given.rounds)
        shown = [
            {
                **row,
                "us": f"{row['us']:.1f}",
                "low": f"{row['tflop_per_s_p20']:.2f}",
                "high": f"{row['tflop_per_s_p80']:.2f}",
                "tflop_per_s": f"{row['tflop_per_s']:.2f}",
            }
            for row in found
        ]
        print(format_table(shown, COLUMNS))
        share = sum(2 * row["m"] * row["k"] * row["n"] for row in found)
        seconds = sum(1e-6 * row["us"] for row in found)
        print(f"all of them in turn: {share / seconds / 1e12:.2f} TFLOP/s in {given.dtype}")
        if given.out:
            with dist.quiet():
                about = {"bench": "gemm", **machine(), "dtype": given.dtype, "rounds": given.rounds}
            with given.out.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps({**about, **row}) + "\n" for row in found)

    return run_command(command, argv)


def make_parser() -> Parser:
    """Return the parser with every flag."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    passes = list(get_args(Pass))
    add("--rows", type=int, nargs="+", metavar="M", help=f"({ROWS})")
    add("--sizes", type=parse_size, nargs="+", default=list(SIZES), metavar="KxN", help="inputs x outputs")
    add("--passes", nargs="+", choices=passes, default=passes, help=f"of {', '.join(passes)}")
    add("--dtype", choices=list(DTYPES), default="bf16", help="(bf16)")
    add("--rounds", type=int, default=7, help="(7)")
    add("--out", type=Path, metavar="FILE", help="append one JSON line a row")
    return parser


if __name__ == "__main__":
    sys.exit(main())
