"""Softmax attention over short sequences, dense or packed, by the backend that measured best.

Source: Vaswani et al., "Attention Is All You Need" (2017), section 3.2.1.

Backends; "definition" and "sdpa" lay a packed batch out with padding, the others read it as it is:
    definition  softmax written out: scores, weights and their gradients as matrix products; any device
    sdpa        torch.nn.functional.scaled_dot_product_attention; any device
    varlen      torch.nn.attention.varlen: packed batches on a GPU, bfloat16 and float16
    xformers    xformers.ops.memory_efficient_attention: on a GPU, bfloat16 and float16
    flex        torch.nn.attention.flex_attention, compiled on a GPU; on a CPU for inference, and slow

What backend="auto" takes: attention_table.json holds what `python bench/attention.py --write` measured. Of its rows
for this device (a GPU's own name, else its compute capability; all CPUs count as one), dtype, layout (packed or
dense) and causality, those with the nearest head width count, and of them the one with the nearest number of tokens
(the longest text's in a packed batch). A row whose backend cannot take the call is passed over. Without a row: the
definition on a CPU; elsewhere varlen where it can take the call, else sdpa.

Shape suffixes: B = samples, or texts of a packed batch; L = tokens of a sample, or of the longest text; T = tokens of
a packed batch; H = heads; W = head width; N = B * H. A packed batch keeps a leading axis of 1: [1, T, 3, H, W].
"""

import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mnemos.kernels._common.attention_products import gradients, weighted_values
from mnemos.kernels.packing import (
    Layout,
    Packing,
    Pad,
    UnpadHeads,
    pad,
    pad_heads,
    text_of_token,
    unpad,
    unpad_heads,
)

TABLE_PATH = Path(__file__).with_name("attention_table.json")
MAX_TOKENS = 1 << 30  # in the table one step of head width outweighs any number of tokens
HALF = (torch.bfloat16, torch.float16)


# ---- reference: the definition, with its gradient written out. Any device, any floating dtype.
class _Definition(torch.autograd.Function):
    """softmax(q k^T / sqrt(W) + bias) v of [B, L, 3, H, W]. A packed batch comes with its layout."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, bias: Tensor | None, *rows: Tensor) -> Tensor:
        by_head = pad(qkv, Layout(*rows)) if rows else qkv.permute(2, 0, 3, 1, 4)
        _, B, H, L, W = by_head.shape
        out_BHLW = qkv.new_empty(B, H, L, W) if rows else qkv.new_empty(B, L, H, W).transpose(1, 2)
        kept = weighted_values(out_BHLW, (by_head,), bias)
        ctx.num_rows, ctx.shape = len(rows), by_head.shape
        ctx.save_for_backward(*rows, *kept)
        return unpad_heads(out_BHLW, Layout(*rows)) if rows else out_BHLW.transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: recomputed activations may be taken out only once
        rows, kept = saved[: ctx.num_rows], saved[ctx.num_rows :]
        if rows:
            grad_3BHLW = grad.new_empty(ctx.shape)
            gradients((grad_3BHLW,), pad_heads(grad, Layout(*rows)), kept)
            grad_qkv = unpad(grad_3BHLW, Layout(*rows))
        else:
            _, B, H, L, W = ctx.shape
            grad_qkv = grad.new_empty(B, L, 3, H, W)
            gradients((grad_qkv.permute(2, 0, 3, 1, 4),), grad.transpose(1, 2), kept)
        return grad_qkv, *(None,) * (1 + len(rows))


# ---- backends: qkv [B, L, 3, H, W] (packed: [1, T, 3, H, W]), packing or None, causal -> [B, L, H, W] ([1, T, H, W])
def _definition(qkv: Tensor, packing: Packing | None, causal: bool) -> Tensor:
    rows = () if packing is None else packing.layout(qkv.shape[1], qkv.shape[3])
    bias, hidden = None, torch.finfo(qkv.dtype).min  # finite: the rows of an empty text give a mean, not NaN
    if causal:  # hides the padding, too: all that stands before a real token is real
        L = qkv.shape[1] if packing is None else packing.longest
        bias = qkv.new_full((L, L), hidden).triu(1)
    elif rows:
        bias_BL = qkv.new_zeros(rows.visible_BL.shape).masked_fill_(~rows.visible_BL, hidden)
        bias = bias_BL[:, None].repeat_interleave(qkv.shape[3], 0)
    out: Tensor = _Definition.apply(qkv, bias, *rows)
    return out


def _sdpa(qkv: Tensor, packing: Packing | None, causal: bool) -> Tensor:
    if packing is None:
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))  # so qkv's gradient is contiguous
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2)
    rows = packing.layout(qkv.shape[1], qkv.shape[3])
    q, k, v = Pad.apply(qkv, *rows).unbind()
    mask = None if causal else rows.visible_BL[:, None, None]  # causal: as above
    out: Tensor = UnpadHeads.apply(
        F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal), *rows
    )
    return out


def _varlen(qkv: Tensor, packing: Packing, causal: bool) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = qkv[0].unbind(1)
    offsets, longest = packing.offsets_B1, packing.longest
    window = (-1, 0) if causal else (-1, -1)  # a tuple: a list would not be recognised as causal
    out = varlen_attn(q, k, v, offsets, offsets, longest, longest, window_size=window)
    return cast(Tensor, out)[None]


def _xformers(qkv: Tensor, packing: Packing | None, causal: bool) -> Tensor:
    try:
        from xformers.ops import memory_efficient_attention
        from xformers.ops.fmha import attn_bias
    except ModuleNotFoundError as error:
        raise RuntimeError(
            f"attention: backend xformers needs the package {error.name}, which is not installed; "
            "install it with pip install -e '.[gpu]' or ask for another backend"
        ) from None
    q, k, v = qkv.unbind(2)
    if packing is None:
        mask = attn_bias.LowerTriangularMask() if causal else None
        return memory_efficient_attention(q, k, v, attn_bias=mask)
    # from_seqlens would take the lengths from the host and copy them over again
    sequences = attn_bias._SeqLenInfo(
        seqstart=packing.offsets_B1, max_seqlen=packing.longest, min_seqlen=1, seqstart_py=[0, q.shape[1]]
    )
    kind = attn_bias.BlockDiagonalCausalMask if causal else attn_bias.BlockDiagonalMask
    return memory_efficient_attention(q, k, v, attn_bias=kind(q_seqinfo=sequences, k_seqinfo=sequences))


def _flex(qkv: Tensor, packing: Packing | None, causal: bool) -> Tensor:
    flex_attention, create_block_mask = _flex_functions(qkv.device.type)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()
    mask, L = None, qkv.shape[1]
    if packing is not None or causal:
        text_T = None if packing is None else text_of_token(packing.offsets_B1, L)

        def visible(_b: Tensor, _h: Tensor, query: Tensor, key: Tensor) -> Tensor:
            if text_T is None:
                return query >= key
            same = text_T[query] == text_T[key]
            return same & (query >= key) if causal else same

        mask = create_block_mask(visible, None, None, L, L, device=q.device)
    out: Tensor = flex_attention(q, k, v, block_mask=mask)
    return out.transpose(1, 2)


@lru_cache
def _flex_functions(device_type: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if device_type == "cuda":  # uncompiled it writes out the T x T scores
        return torch.compile(flex_attention), torch.compile(create_block_mask)
    return flex_attention, create_block_mask


BACKENDS: dict[str, Callable[..., Tensor]] = {
    "definition": _definition,
    "sdpa": _sdpa,
    "varlen": _varlen,
    "xformers": _xformers,
    "flex": _flex,
}


# ---- which backend can, and which measured best
def refusal(backend: str, qkv: Tensor, packing: Packing | None = None) -> str | None:
    """Return why `backend` cannot take `qkv` in one sentence; None if it can.

    Args:
        backend: a key of `BACKENDS`.
        qkv: as `attention` takes it; whether it wants a gradient counts.
        packing: None for a dense batch.
    """
    came, width, cuda = f"attention: backend {backend}", qkv.shape[-1], qkv.device.type == "cuda"
    if backend == "varlen" and packing is None:
        return f"{came} takes packed batches and got none; pass packing= or ask for sdpa"
    if backend in ("varlen", "xformers"):
        if not cuda:
            return f"{came} has no operator for {qkv.device.type} tensors; use a CUDA device or ask for sdpa"
        if qkv.dtype not in HALF:
            return (
                f"{came} takes torch.bfloat16 or torch.float16 and got {qkv.dtype}; convert, or ask for sdpa"
            )
        if width % 8 or width > 256:
            return f"{came} takes head widths that are multiples of 8 up to 256 and got {width}; ask for sdpa"
        if float(capability := _gpu(qkv.device)[1]) < 8:
            return f"{came} is used from compute capability 8.0 on and got {capability}; ask for sdpa"
    if backend == "flex":
        if qkv.dtype not in (*HALF, torch.float32):
            return f"{came} takes torch.bfloat16, torch.float16 or torch.float32 and got {qkv.dtype}; ask for definition"
        if cuda and width < 16:
            return f"{came} takes head widths of 16 or more on a GPU and got {width}; ask for sdpa"
        if not cuda and qkv.requires_grad and torch.is_grad_enabled():
            return f"{came} has no gradient on {qkv.device.type} tensors; use torch.no_grad() or ask for sdpa"
    return None


@torch.compiler.assume_constant_result  # asked while a graph is made, never inside it
def _gpu(device: torch.device) -> tuple[str, str]:
    """Return a GPU's name and its compute capability, such as "9.0"."""
    major, minor = torch.cuda.get_device_capability(device)
    return torch.cuda.get_device_name(device), f"{major}.{minor}"


Row = tuple[int, int, str]


def _read_table(text: str) -> dict[tuple[str, str, bool, bool], tuple[Row, ...]]:
    """Return (width, tokens, backend) by (device, dtype, packed, causal); a GPU's rows by name and capability."""
    table: dict[tuple[str, str, bool, bool], tuple[Row, ...]] = {}
    for row in json.loads(text)["rows"]:
        for device in filter(None, (row["device"], row.get("capability"))):
            key = (device, f"torch.{row['dtype']}", row["packed"], row["causal"])
            table[key] = (*table.get(key, ()), (row["width"], row["tokens"], row["backend"]))
    return table


TABLE = _read_table(TABLE_PATH.read_text())


def choose_backend(qkv: Tensor, packing: Packing | None = None, causal: bool = False) -> str:
    """Return the backend that "auto" takes for these arguments of `attention`; the rule stands on top of the file."""
    cuda = qkv.device.type == "cuda"
    tokens = qkv.shape[1] if packing is None else packing.longest
    for device in _gpu(qkv.device) if cuda else (qkv.device.type,):
        rows = TABLE.get((device, str(qkv.dtype), packing is not None, causal), ())
        best: tuple[int, str] | None = None
        for width, measured, backend in rows:
            distance = abs(width - qkv.shape[-1]) * MAX_TOKENS + abs(measured - tokens)
            if (best is None or distance < best[0]) and refusal(backend, qkv, packing) is None:
                best = distance, backend
        if best is not None:
            return best[1]
    if qkv.device.type == "cpu":
        return "definition"
    return "varlen" if refusal("varlen", qkv, packing) is None else "sdpa"


def attention(
    qkv: Tensor, *, packing: Packing | None = None, causal: bool = False, backend: str = "auto"
) -> Tensor:
    """Return softmax(q k^T / sqrt(W)) v for every sample and head.

    Args:
        qkv: queries, keys and values in one [B, L, 3, H, W], as a projection leaves them, floating, contiguous. Packed:
            [1, T, 3, H, W].
        packing: where the sequences of a packed batch begin and end; a token sees those of its own sequence only.
        causal: a token attends to itself and what stands before it only.
        backend: one of `BACKENDS`, or "auto": the measured best, by the rule on top of the file.

    Returns:
        [B, L, H, W] (packed: [1, T, H, W]) in the type of the input, in whichever layout the backend writes.

    Raises:
        ValueError: shape or type is not such, or the backend cannot take it. A backend asked for by name is never
            replaced by another one.
        RuntimeError: the backend's package is not installed.
    """
    _check(qkv, packing)
    if backend == "auto":
        backend = choose_backend(qkv, packing, causal)
    elif backend not in BACKENDS:
        raise ValueError(f"attention: backend is {backend!r}; it must be auto, {', '.join(BACKENDS)}")
    else:
        reason = refusal(backend, qkv, packing)
        if reason is not None:
            raise ValueError(reason)
    return BACKENDS[backend](qkv, packing, causal)


def _check(qkv: Tensor, packing: Packing | None) -> None:
    if qkv.ndim != 5 or qkv.shape[2] != 3 or not qkv.dtype.is_floating_point:
        raise ValueError(
            f"attention: qkv is {qkv.dtype} {list(qkv.shape)}; it must be floating [B, L, 3, H, W], "
            "axis 2 for queries, keys and values"
        )
    if not qkv.is_contiguous():
        raise ValueError("attention: qkv must be contiguous; call .contiguous() where you made it")
    if packing is not None and (qkv.shape[0] != 1 or packing.offsets_B1.device != qkv.device):
        raise ValueError(
            f"attention: with packing, qkv is {list(qkv.shape)} on {qkv.device} and the offsets are on "
            f"{packing.offsets_B1.device}; qkv must be [1, T, 3, H, W] and both on one device"
        )
    if packing is not None and packing.longest > qkv.shape[1]:
        raise ValueError(
            f"attention: packing.longest is {packing.longest} of {qkv.shape[1]} tokens; no sequence is longer than all"
        )
