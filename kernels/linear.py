"""x W^T + b, by the library that is quickest at hand.

On a GPU and in half precision that is torch's own choice. In fp32 on a CPU torch asks MKL, which keeps to AVX2 on
processors that are not Intel's; oneDNN, which torch carries as well, uses AVX-512 there and takes half the time. Its
products are those of fp32, in another order of summation.

Shape suffixes: M = rows, K = values of an input row, N = values of an output row.
"""

from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


@cache
def _prefers_onednn() -> bool:
    """Tell whether this CPU has AVX-512, and MKL would not use it."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkldnn.is_available():
        return False
    flags = Path("/proc/cpuinfo")
    return flags.exists() and "GenuineIntel" not in flags.read_text(encoding="utf-8")


def _through_onednn(x: Tensor) -> bool:
    return x.is_cpu and x.dtype == torch.float32 and x.numel() > 0 and _prefers_onednn()


def product(x_MK: Tensor, w_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """Return x w^T + b, [..., N]; not differentiable. Strided inputs, such as transposes, are taken as they are."""
    if _through_onednn(x_MK):
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x_MK, w_NK, bias_N, "none", [], "")
        return out
    return F.linear(x_MK, w_NK, bias_N)


class _Linear(torch.autograd.Function):
    """`product` with its gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        grad_MN, x_MK = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        return (
            product(grad_MN, weight.t()).view(x.shape) if for_x else None,
            product(grad_MN.t(), x_MK.t()) if for_weight else None,
            grad_MN.sum(0) if for_bias else None,
        )


def linear(x: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """Return x W^T + b; arguments and result as `torch.nn.functional.linear`.

    Args:
        x: [..., K], floating.
        weight_NK: same type.
        bias_N: same type; None for none.

    Returns:
        [..., N] in the type of the input.
    """
    if torch.compiler.is_compiling() or not _through_onednn(x):
        return F.linear(x, weight_NK, bias_N)
    out: Tensor = _Linear.apply(x, weight_NK, bias_N)
    return out
