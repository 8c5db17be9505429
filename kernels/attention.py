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
a packed batch; H = heads; W = head width; N = B * H. A packed batch keeps a leading axis of 1: [1, T, H, W].
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mnemos.kernels._common.padding import Pad, Unpad, layout, text_of_token

TABLE_PATH = Path(__file__).with_name("attention_table.json")
HALF = (torch.bfloat16, torch.float16)
CPU_VECTOR = 32  # half-precision values in one of AVX-512


@dataclass(frozen=True, kw_only=True, eq=False)  # eq: comparing tensors would give tensors
class Packing:
    """Where the sequences of a packed batch begin and end.

    Attributes:
        offsets_B1: int32 [B + 1] on the device of the batch; the first is 0, the last T, none falls.
        longest: tokens of the longest sequence. Known on the host: no call waits for the device to learn it.

    The values are not checked, which would wait for the device; `from_lengths` makes both from one list.
    """

    offsets_B1: Tensor
    longest: int

    def __post_init__(self) -> None:
        offsets = self.offsets_B1
        if offsets.dtype != torch.int32 or offsets.ndim != 1 or len(offsets) < 2:
            raise ValueError(
                f"packing: offsets_B1 is {offsets.dtype} {list(offsets.shape)}; it must be torch.int32 [B + 1], B >= 1"
            )
        if self.longest < 1:
            raise ValueError(f"packing: longest is {self.longest}; it must be at least 1, or drop the batch")

    @classmethod
    def from_lengths(cls, lengths: Sequence[int], device: torch.device | str = "cpu") -> Self:
        """Return the packing of sequences with these numbers of tokens."""
        offsets_B1 = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).to(device)
        return cls(offsets_B1=offsets_B1, longest=max(lengths))


# ---- reference: the definition, with its gradient written out. Any device, any floating dtype.
class _Definition(torch.autograd.Function):
    """softmax(q k^T / sqrt(W) + bias) v on [B, L, H, W]; torch's softmax works in fp32 inside and rounds once.

    The bias hides keys: None, or of a shape that expands to [N, L, L].
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        q_NLW, k_NLW, v_NLW = _by_head(q), _by_head(k), _by_head(v)
        # alpha: the scale acts on the fp32 sum; on q it would be one more pass and one more rounding
        added, beta = (q.new_zeros(()), 0) if bias is None else (bias, 1)
        score_NLL = torch.baddbmm(added, q_NLW, k_NLW.mT, beta=beta, alpha=q.shape[3] ** -0.5)
        weight_NLL = score_NLL.softmax(-1, dtype=_inside(score_NLL)).to(q.dtype)
        ctx.save_for_backward(q_NLW, k_NLW, v_NLW, weight_NLL)
        return _by_token(torch.bmm(weight_NLL, v_NLW), q.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q_NLW, k_NLW, v_NLW, weight_NLL = ctx.saved_tensors
        B, scale, zero, inside = grad.shape[0], grad.shape[3] ** -0.5, grad.new_zeros(()), _inside(weight_NLL)
        grad_NLW = _by_head(grad)
        grad_weight_NLL = torch.bmm(grad_NLW, v_NLW.mT)
        # a hidden key has weight 0 and therefore score gradient 0: no bias is needed
        grad_score_NLL = torch._softmax_backward_data(
            grad_weight_NLL.to(inside), weight_NLL.to(inside), -1, inside
        ).to(grad.dtype)
        dq = torch.baddbmm(zero, grad_score_NLL, k_NLW, beta=0, alpha=scale)
        dk = torch.baddbmm(zero, grad_score_NLL.mT, q_NLW, beta=0, alpha=scale)
        dv = torch.bmm(weight_NLL.mT, grad_NLW)
        return _by_token(dq, B), _by_token(dk, B), _by_token(dv, B), None


def _inside(rows: Tensor) -> torch.dtype:
    """Return the dtype to call torch's softmax in; half-precision rows shorter than a vector are slow on a CPU."""
    return torch.promote_types(rows.dtype, torch.float32) if rows.shape[-1] < CPU_VECTOR else rows.dtype


def _by_head(x_BLHW: Tensor) -> Tensor:
    B, L, H, W = x_BLHW.shape
    return x_BLHW.transpose(1, 2).reshape(B * H, L, W)


def _by_token(x_NLW: Tensor, batch: int) -> Tensor:
    N, L, W = x_NLW.shape
    return x_NLW.view(batch, N // batch, L, W).transpose(1, 2)


# ---- backends: q, k, v [B, L, H, W] (packed: [1, T, H, W]), packing or None, causal -> the same shape
def _padded(
    dense: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, packing: Packing | None, causal: bool
) -> Tensor:
    """Run `dense` on a batch [B, L]: as it is, or with the texts laid out and their real rows taken back."""
    if packing is None:
        return dense(q, k, v, None, causal)
    longest = packing.longest
    visible_BL, *rows = layout(packing.offsets_B1, q.shape[1], longest, q.shape[2])
    q, k, v = (Pad.apply(x, *rows, longest) for x in (q, k, v))
    # causal needs no mask: all that stands before a real token is real
    out: Tensor = Unpad.apply(dense(q, k, v, None if causal else visible_BL, causal), *rows)
    return out


def _definition(q: Tensor, k: Tensor, v: Tensor, visible_BL: Tensor | None, causal: bool) -> Tensor:
    _, L, H, _ = q.shape
    bias, hidden = None, torch.finfo(q.dtype).min  # finite: the rows of an empty text give a mean, not NaN
    if causal:
        bias = q.new_full((L, L), hidden).triu(1)
    elif visible_BL is not None:
        bias_BL = q.new_zeros(visible_BL.shape).masked_fill_(~visible_BL, hidden)
        bias = bias_BL[:, None].repeat_interleave(H, 0)
    out: Tensor = _Definition.apply(q, k, v, bias)
    return out


def _sdpa(q: Tensor, k: Tensor, v: Tensor, visible_BL: Tensor | None, causal: bool) -> Tensor:
    mask = None if visible_BL is None else visible_BL[:, None, None]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal).transpose(1, 2)


def _varlen(q: Tensor, k: Tensor, v: Tensor, packing: Packing, causal: bool) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    offsets, longest = packing.offsets_B1, packing.longest
    window = (-1, 0) if causal else (-1, -1)  # a tuple: a list would not be recognised as causal
    out = varlen_attn(q[0], k[0], v[0], offsets, offsets, longest, longest, window_size=window)
    return cast(Tensor, out)[None]


def _xformers(q: Tensor, k: Tensor, v: Tensor, packing: Packing | None, causal: bool) -> Tensor:
    try:
        from xformers.ops import memory_efficient_attention
        from xformers.ops.fmha import attn_bias
    except ModuleNotFoundError as error:
        raise RuntimeError(
            f"attention: backend xformers needs the package {error.name}, which is not installed; "
            "install it with pip install -e '.[gpu]' or ask for another backend"
        ) from None
    if packing is None:
        mask = attn_bias.LowerTriangularMask() if causal else None
        return memory_efficient_attention(q, k, v, attn_bias=mask)
    # from_seqlens would take the lengths from the host and copy them over again
    sequences = attn_bias._SeqLenInfo(
        seqstart=packing.offsets_B1, max_seqlen=packing.longest, min_seqlen=1, seqstart_py=[0, q.shape[1]]
    )
    kind = attn_bias.BlockDiagonalCausalMask if causal else attn_bias.BlockDiagonalMask
    return memory_efficient_attention(q, k, v, attn_bias=kind(q_seqinfo=sequences, k_seqinfo=sequences))


def _flex(q: Tensor, k: Tensor, v: Tensor, packing: Packing | None, causal: bool) -> Tensor:
    flex_attention, create_block_mask = _flex_functions(q.device.type)
    mask = None
    if packing is not None or causal:
        text_T = None if packing is None else text_of_token(packing.offsets_B1, q.shape[1])

        def visible(_b: Tensor, _h: Tensor, query: Tensor, key: Tensor) -> Tensor:
            if text_T is None:
                return query >= key
            same = text_T[query] == text_T[key]
            return same & (query >= key) if causal else same

        L = q.shape[1]
        mask = create_block_mask(visible, None, None, L, L, device=q.device)
    out: Tensor = flex_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), block_mask=mask)
    return out.transpose(1, 2)


@lru_cache
def _flex_functions(device_type: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if device_type == "cuda":  # uncompiled it writes out the T x T scores
        return torch.compile(flex_attention), torch.compile(create_block_mask)
    return flex_attention, create_block_mask


BACKENDS: dict[str, Callable[..., Tensor]] = {
    "definition": partial(_padded, _definition),
    "sdpa": partial(_padded, _sdpa),
    "varlen": _varlen,
    "xformers": _xformers,
    "flex": _flex,
}


# ---- which backend can, and which measured best
def refusal(backend: str, q: Tensor, packing: Packing | None = None) -> str | None:
    """Return why `backend` cannot take `q` (and k and v like it) in one sentence; None if it can.

    Args:
        backend: a key of `BACKENDS`.
        q: queries as `attention` takes them; whether it wants a gradient counts.
        packing: None for a dense batch.
    """
    came, width, cuda = f"attention: backend {backend}", q.shape[-1], q.device.type == "cuda"
    if backend == "varlen" and packing is None:
        return f"{came} takes packed batches and got none; pass packing= or ask for sdpa"
    if backend in ("varlen", "xformers"):
        if not cuda:
            return f"{came} has no operator for {q.device.type} tensors; use a CUDA device or ask for sdpa"
        if q.dtype not in HALF:
            return f"{came} takes torch.bfloat16 or torch.float16 and got {q.dtype}; convert, or ask for sdpa"
        if width % 8 or width > 256:
            return f"{came} takes head widths that are multiples of 8 up to 256 and got {width}; ask for sdpa"
        if float(capability := _gpu(q.device)[1]) < 8:
            return f"{came} is used from compute capability 8.0 on and got {capability}; ask for sdpa"
    if backend == "flex":
        if q.dtype not in (*HALF, torch.float32):
            return f"{came} takes torch.bfloat16, torch.float16 or torch.float32 and got {q.dtype}; ask for definition"
        if cuda and width < 16:
            return f"{came} takes head widths of 16 or more on a GPU and got {width}; ask for sdpa"
        if not cuda and q.requires_grad and torch.is_grad_enabled():
            return f"{came} has no gradient on {q.device.type} tensors; use torch.no_grad() or ask for sdpa"
    return None


@torch.compiler.assume_constant_result  # asked while a graph is made, never inside it
def _gpu(device: torch.device) -> tuple[str, str]:
    """Return a GPU's name and its compute capability, such as "9.0"."""
    major, minor = torch.cuda.get_device_capability(device)
    return torch.cuda.get_device_name(device), f"{major}.{minor}"


def _read_table(text: str) -> dict[tuple[str, str, bool, bool], list[tuple[int, int, str]]]:
    """Return (width, tokens, backend) by (device, dtype, packed, causal); a GPU's rows by name and capability."""
    table: dict[tuple[str, str, bool, bool], list[tuple[int, int, str]]] = {}
    for row in json.loads(text)["rows"]:
        for device in filter(None, (row["device"], row.get("capability"))):
            key = (device, f"torch.{row['dtype']}", row["packed"], row["causal"])
            table.setdefault(key, []).append((row["width"], row["tokens"], row["backend"]))
    return table


TABLE = _read_table(TABLE_PATH.read_text())


def choose_backend(q: Tensor, packing: Packing | None = None, causal: bool = False) -> str:
    """Return the backend that "auto" takes for these arguments of `attention`; the rule stands on top of the file."""
    cuda = q.device.type == "cuda"
    tokens = q.shape[1] if packing is None else packing.longest
    for device in _gpu(q.device) if cuda else (q.device.type,):
        best: tuple[tuple[int, int], str] | None = None
        for width, measured, backend in TABLE.get((device, str(q.dtype), packing is not None, causal), ()):
            distance = (abs(width - q.shape[-1]), abs(measured - tokens))
            if (best is None or distance < best[0]) and refusal(backend, q, packing) is None:
                best = distance, backend
        if best is not None:
            return best[1]
    if q.device.type == "cpu":
        return "definition"
    return "varlen" if refusal("varlen", q, packing) is None else "sdpa"


def attention(
    q_BLHW: Tensor,
    k_BLHW: Tensor,
    v_BLHW: Tensor,
    *,
    packing: Packing | None = None,
    causal: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Return softmax(q k^T / sqrt(W)) v for every sample and head.

    Args:
        q_BLHW, k_BLHW, v_BLHW: queries, keys and values, floating, one dtype and device; views of one packed projection
            [B, L, 3, H, W] are read where they lie. Packed: [1, T, H, W].
        packing: where the sequences of a packed batch begin and end; a token sees those of its own sequence only.
        causal: a token attends to itself and what stands before it only.
        backend: one of `BACKENDS`, or "auto": the measured best, by the rule on top of the file.

    Returns:
        [B, L, H, W] (packed: [1, T, H, W]) in the inputs' dtype, in whichever layout the backend writes.

    Raises:
        ValueError: shapes, dtypes or devices disagree, or the backend cannot take them. A backend asked for by name is
            never replaced by another one.
        RuntimeError: the backend's package is not installed.
    """
    _check(q_BLHW, k_BLHW, v_BLHW, packing)
    if backend == "auto":
        backend = choose_backend(q_BLHW, packing, causal)
    elif backend not in BACKENDS:
        raise ValueError(f"attention: backend is {backend!r}; it must be auto, {', '.join(BACKENDS)}")
    else:
        reason = refusal(backend, q_BLHW, packing)
        if reason is not None:
            raise ValueError(reason)
    return BACKENDS[backend](q_BLHW, k_BLHW, v_BLHW, packing, causal)


def _check(q: Tensor, k: Tensor, v: Tensor, packing: Packing | None) -> None:
    if not q.shape == k.shape == v.shape or q.ndim != 4:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise ValueError(f"attention: q, k, v have shapes {shapes}; all must be the same [B, L, H, W]")
    if not (q.dtype == k.dtype == v.dtype and q.device == k.device == v.device and q.dtype.is_floating_point):
        kinds = ", ".join(f"{x.dtype} on {x.device}" for x in (q, k, v))
        raise ValueError(f"attention: q, k, v are {kinds}; all must be of one floating dtype on one device")
    if q.shape[3] > 1 and not q.stride(3) == k.stride(3) == v.stride(3) == 1:
        strides = ", ".join(str(x.stride(3)) for x in (q, k, v))
        raise ValueError(
            f"attention: the last axes of q, k and v have strides {strides}; the values of a head must lie side "
            "by side, so make q, k and v contiguous where they are computed"
        )
    if packing is not None and (q.shape[0] != 1 or packing.offsets_B1.device != q.device):
        raise ValueError(
            f"attention: with packing, q is {list(q.shape)} on {q.device} and the offsets are on "
            f"{packing.offsets_B1.device}; q must be [1, T, H, W] and both on one device"
        )
    if packing is not None and packing.longest > q.shape[1]:
        raise ValueError(
            f"attention: packing.longest is {packing.longest} of {q.shape[1]} tokens; no sequence is longer than all"
        )
