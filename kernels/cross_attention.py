"""Softmax attention of some tokens to all: fewer queries than keys, as where only masked places are predicted.

Source: Vaswani et al., "Attention Is All You Need" (2017), section 3.2.1.

Backends:
    definition  softmax written out: scores, weights and their gradients as matrix products; any device
    sdpa        torch.nn.functional.scaled_dot_product_attention; any device

backend="auto" takes the definition on a CPU and sdpa elsewhere.

Shape suffixes: B = samples, M = queries, L = keys, H = heads, W = head width.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mnemos.kernels._common.attention_products import gradients, weighted_values


# ---- reference: the definition, with its gradient written out. Any device, any floating dtype.
class _Definition(torch.autograd.Function):
    """softmax(q k^T / sqrt(W)) v of [B, M, H, W] and [B, L, 2, H, W]."""

    @staticmethod
    def forward(ctx: Any, q_BMHW: Tensor, kv_BL2HW: Tensor) -> Tensor:
        out_BMHW = torch.empty_like(q_BMHW)
        kept = weighted_values(out_BMHW.transpose(1, 2), _by_head(q_BMHW, kv_BL2HW))
        ctx.save_for_backward(*kept)
        ctx.shapes = q_BMHW.shape, kv_BL2HW.shape
        return out_BMHW

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BMHW: Tensor) -> tuple[Tensor, Tensor]:
        grad_q, grad_kv = (grad_BMHW.new_empty(shape) for shape in ctx.shapes)
        gradients(_by_head(grad_q, grad_kv), grad_BMHW.transpose(1, 2), ctx.saved_tensors)
        return grad_q, grad_kv


def _by_head(q_BMHW: Tensor, kv_BL2HW: Tensor) -> tuple[Tensor, Tensor]:
    """Return views [1, B, H, M, W] and [2, B, H, L, W]."""
    return q_BMHW.transpose(1, 2)[None], kv_BL2HW.permute(2, 0, 3, 1, 4)


# ---- backends
def _definition(q_BMHW: Tensor, kv_BL2HW: Tensor) -> Tensor:
    out_BMHW: Tensor = _Definition.apply(q_BMHW, kv_BL2HW)
    return out_BMHW


def _sdpa(q_BMHW: Tensor, kv_BL2HW: Tensor) -> Tensor:
    k, v = (part.transpose(1, 2) for part in kv_BL2HW.unbind(2))  # so the gradient of both is contiguous
    return F.scaled_dot_product_attention(q_BMHW.transpose(1, 2), k, v).transpose(1, 2)


BACKENDS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"definition": _definition, "sdpa": _sdpa}


# ---- public function: checks, then one call. The only name engine/ imports.
def cross_attention(q_BMHW: Tensor, kv_BL2HW: Tensor, *, backend: str = "auto") -> Tensor:
    """Return softmax(q k^T / sqrt(W)) v for every sample and head; every query sees all keys.

    Args:
        q_BMHW: queries, floating, contiguous.
        kv_BL2HW: keys and values of the same samples, type and device, contiguous, at least one key.
        backend: "definition", "sdpa" or "auto", by the rule on top of the file.

    Returns:
        [B, M, H, W] in the type of the inputs, in whichever layout the backend writes. The gradient of keys and
        values is contiguous.

    Raises:
        ValueError: shape, type or layout is not such, or there is no such backend.
    """
    _check(q_BMHW, kv_BL2HW)
    if backend == "auto":
        backend = "definition" if q_BMHW.device.type == "cpu" else "sdpa"
    elif backend not in BACKENDS:
        raise ValueError(f"cross_attention: backend is {backend!r}; it must be auto, {', '.join(BACKENDS)}")
    return BACKENDS[backend](q_BMHW, kv_BL2HW)


def _check(q: Tensor, kv: Tensor) -> None:
    if (
        (q.ndim, kv.ndim) != (4, 5)
        or kv.shape != (len(q), kv.shape[1], 2, *q.shape[2:])
        or not (kv.shape[1] and q.dtype.is_floating_point)
    ):
        raise ValueError(
            f"cross_attention: queries are {q.dtype} {list(q.shape)}, keys and values {list(kv.shape)}; they must be "
            "floating [B, M, H, W] and [B, L, 2, H, W] of the same B, H and W with L >= 1, axis 2 for keys and values"
        )
    if (q.dtype, q.device) != (kv.dtype, kv.device):
        raise ValueError(
            f"cross_attention: queries are {q.dtype} on {q.device}, keys and values {kv.dtype} on {kv.device}; "
            "they must be of one type on one device; convert one of them"
        )
    if not (q.is_contiguous() and kv.is_contiguous()):
        raise ValueError(
            "cross_attention: queries, keys and values must be contiguous; call .contiguous() where you made them"
        )
