"""Attention on a CPU: the definition against torch's fused kernel, at the sample preset's shapes.

    python bench/attention_cpu.py

Refuses to time an attention that disagrees with the fused one. Milliseconds of forward and backward, median of 30,
interleaved, one thread.
"""

import statistics
import time

import torch
import torch.nn.functional as F
from torch import Tensor

from mnemos.engine.plain_table import format_table
from mnemos.kernels.attention import attention

SHAPES = {
    "encoder, 17 tokens": (16, 3, 17, 64),
    "decoder, 65 tokens": (16, 4, 65, 32),
    "texts, 50 tokens": (16, 3, 50, 64),
}
REPEATS = 30


def fused(q_BHLW: Tensor, k_BHLW: Tensor, v_BHLW: Tensor) -> Tensor:
    """Return torch's own attention."""
    return F.scaled_dot_product_attention(q_BHLW, k_BHLW, v_BHLW)


def main() -> None:
    """Print one line a shape and dtype."""
    torch.set_num_threads(1)
    rows = []
    for dtype in (torch.bfloat16, torch.float32):
        for name, shape in SHAPES.items():
            inputs = [torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(3)]
            error = (attention(*inputs) - fused(*inputs)).abs().max()
            if error > 32 * torch.finfo(dtype).eps:
                raise SystemExit(f"{name}: the two differ by {error:.1e}; nothing is timed")
            times: dict[str, list[float]] = {"ours": [], "fused": []}
            for _ in range(REPEATS):
                for provider, function in (("ours", attention), ("fused", fused)):
                    start = time.perf_counter()
                    function(*inputs).sum().backward()
                    times[provider].append(1e3 * (time.perf_counter() - start))
            ours, theirs = (statistics.median(times[provider]) for provider in times)
            row = {
                "shape": name,
                "dtype": str(dtype).removeprefix("torch."),
                "ours": f"{ours:.2f}",
                "fused": f"{theirs:.2f}",
            }
            rows.append({**row, "fused / ours": f"{theirs / ours:.2f}"})
    print(format_table(rows, ["shape", "dtype", "ours", "fused", "fused / ours"]))


if __name__ == "__main__":
    main()
