"""softmax(q k^T / sqrt(W) + bias) v and its gradient, written out as matrix products head by head.

Source: Vaswani et al., "Attention Is All You Need" (2017), section 3.2.1.

Any device, any floating dtype. What only a CPU sees: a few samples at a time, whose scores stay in its caches and in
memory it already holds, and oneDNN's softmax for bfloat16.

Shape suffixes: B = samples, H = heads, M = queries, L = keys, W = head width, N = heads of some samples. Tensors by head
come as one or more parts, [P, B, H, M or L, W], strided as they like, that one after the other hold q, k and v.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache

import torch
from torch import Tensor

SCORE_BYTES = (
    5 << 18
)  # of the samples worked on at a time, per thread: about what a core's level-2 cache holds
CPU_VECTOR, CPU_TAIL = (
    32,
    4,
)  # half-precision values in one of AVX-512; how many past the last torch is quick with


def weighted_values(
    out_BHMW: Tensor, parts: Sequence[Tensor], bias: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Write softmax(q k^T / sqrt(W) + bias) v and return what `gradients` needs; the softmax works in fp32 inside.

    Args:
        out_BHMW: any strides; all of it is written.
        parts: as on top of the file.
        bias: hides keys, by the least finite value: [M, L], or [B * H, 1, L].
    """
    B, H, M, W = out_BHMW.shape
    kept: list[Tensor] = []
    for some in _samples_at_a_time(out_BHMW, B, H * M * parts[-1].shape[3]):
        # one copy of each part: strided by tokens, oneDNN's products take longer by more than the copies
        rows = [part[:, some].contiguous().flatten(1, 2) for part in parts]
        q_NMW, k_NLW, v_NLW = _unbind(rows)
        added, beta = (q_NMW.new_zeros(()), 0) if bias is None else (bias, 1)
        if added.dim() == 3:
            added = added[some.start * H : some.stop * H]
        # alpha: the scale acts on the fp32 sum; on q it would be one more pass and one more rounding
        score_NML = torch.baddbmm(added, q_NMW, k_NLW.mT, beta=beta, alpha=W**-0.5)
        weight_NML = _softmax(score_NML)
        out_BHMW[some] = torch.bmm(weight_NML, v_NLW).view(-1, H, M, W)
        kept += [*rows, weight_NML]
    return tuple(kept)


def gradients(parts: Sequence[Tensor], grad_BHMW: Tensor, kept: Sequence[Tensor]) -> None:
    """Write the gradients of the parts.

    Args:
        parts: shaped as those of `weighted_values`, any strides; all of them is written.
        grad_BHMW: of the output, any strides.
        kept: what `weighted_values` returned.
    """
    (_, H, _, W), each, end = grad_BHMW.shape, len(parts) + 1, 0
    for at in range(0, len(kept), each):
        *rows, weight_NML = kept[at : at + each]
        some = slice(end, end := end + len(weight_NML) // H)
        q_NMW, k_NLW, v_NLW = _unbind(rows)
        grad_NMW = grad_BHMW[some].contiguous().flatten(0, 1)
        grad_weight_NML = torch.bmm(grad_NMW, v_NLW.mT)
        # a hidden key has weight 0 and therefore score gradient 0: no bias is needed
        grad_score_NML = _softmax_gradient(grad_weight_NML, weight_NML)
        scale, zero = W**-0.5, q_NMW.new_zeros(())
        dq = torch.baddbmm(zero, grad_score_NML, k_NLW, beta=0, alpha=scale)
        dk = torch.baddbmm(zero, grad_score_NML.mT, q_NMW, beta=0, alpha=scale)
        dv = torch.bmm(weight_NML.mT, grad_NMW)
        for place, grad in zip(_unbind(parts), (dq, dk, dv), strict=True):
            place[some] = grad.view(-1, H, *grad.shape[1:])


def _unbind(parts: Sequence[Tensor]) -> list[Tensor]:
    return [row for part in parts for row in part.unbind()]


def _samples_at_a_time(like: Tensor, samples: int, scores: int) -> Iterator[slice]:
    """Yield which samples to work on, each with so many scores; elsewhere than on a CPU, and in a graph, all at once."""
    step = samples
    if like.device.type == "cpu" and not torch.compiler.is_compiling():
        step = SCORE_BYTES * torch.get_num_threads() // max(1, scores * like.itemsize)
    step = max(1, step)
    for start in range(0, samples, step):
        yield slice(start, min(samples, start + step))


def _softmax(rows: Tensor) -> Tensor:
    """Return softmax over the last axis, in fp32 inside, rounded once to the dtype of the rows."""
    on_cpu = rows.device.type == "cpu" and not torch.compiler.is_compiling()
    if on_cpu and rows.dtype == torch.bfloat16 and _onednn_has_bfloat16():
        return rows.to_mkldnn().softmax(-1).to_dense()  # both copies together cost less than torch's softmax
    # torch's half-precision rows are slow on a CPU but in whole vectors
    short = rows.shape[-1] < CPU_VECTOR or rows.shape[-1] % CPU_VECTOR > CPU_TAIL
    inside = torch.promote_types(rows.dtype, torch.float32) if short else rows.dtype
    return rows.softmax(-1, dtype=inside).to(rows.dtype)


def _softmax_gradient(grad: Tensor, weight: Tensor) -> Tensor:
    """Return the gradient of the scores; in half precision torch is slow on a CPU with short rows only."""
    short = weight.shape[-1] < CPU_VECTOR
    inside = torch.promote_types(weight.dtype, torch.float32) if short else weight.dtype
    return torch._softmax_backward_data(grad.to(inside), weight.to(inside), -1, inside).to(weight.dtype)


@lru_cache
def _onednn_has_bfloat16() -> bool:
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
