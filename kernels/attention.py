"""Softmax attention over short sequences.

Source: Vaswani et al., "Attention Is All You Need" (2017), section 3.2.1. A GPU takes torch's fused attention. A CPU
takes the definition: at 17 to 65 tokens in bf16 torch's fused CPU kernel took 2.5 to 4.9 times as long, because it works
in blocks much longer than the sequence; in fp32 it took 0.7 to 1.0 times as long (`python bench/attention_cpu.py`).

Shape suffixes: B = samples, H = heads, L = tokens, W = head width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


# ---- reference: the definition. Softmax in fp32; any device, any dtype.
def attention_reference(
    q_BHLW: Tensor, k_BHLW: Tensor, v_BHLW: Tensor, mask_BL: Tensor | None = None, *, causal: bool = False
) -> Tensor:
    """Return what `attention` defines, with the [L, L] weights written out."""
    score_BHLL = (q_BHLW * q_BHLW.shape[-1] ** -0.5) @ k_BHLW.transpose(-2, -1)
    mask = _mask(mask_BL, q_BHLW.shape[2], causal, q_BHLW.device)
    if mask is not None:
        # finite: a row without any visible token gives a mean, not NaN
        hidden = torch.finfo(score_BHLL.dtype).min
        score_BHLL = score_BHLL.masked_fill(~mask, hidden)
    softmax_in = torch.float32 if score_BHLL.dtype in (torch.bfloat16, torch.float16) else score_BHLL.dtype
    return score_BHLL.softmax(-1, dtype=softmax_in).to(v_BHLW.dtype) @ v_BHLW


def attention(
    q_BHLW: Tensor, k_BHLW: Tensor, v_BHLW: Tensor, mask_BL: Tensor | None = None, *, causal: bool = False
) -> Tensor:
    """Return softmax(q k^T / sqrt(W)) v for every sample and head.

    Args:
        q_BHLW, k_BHLW, v_BHLW: queries, keys and values, one dtype and device.
        mask_BL: bool, True at tokens that may be attended to; None for all.
        causal: a token attends to itself and what stands before it only.

    Returns:
        [B, H, L, W] in the inputs' dtype.

    Raises:
        ValueError: shapes disagree.
    """
    if not q_BHLW.shape == k_BHLW.shape == v_BHLW.shape or q_BHLW.ndim != 4:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (q_BHLW, k_BHLW, v_BHLW))
        raise ValueError(
            f"attention: q, k and v have shapes {shapes}; all three must be the same [B, H, L, W]"
        )
    if q_BHLW.device.type == "cpu":
        return attention_reference(q_BHLW, k_BHLW, v_BHLW, mask_BL, causal=causal)
    mask = _mask(mask_BL, q_BHLW.shape[2], causal, q_BHLW.device)
    return F.scaled_dot_product_attention(q_BHLW, k_BHLW, v_BHLW, attn_mask=mask)


def _mask(mask_BL: Tensor | None, length: int, causal: bool, device: torch.device) -> Tensor | None:
    """Return the bool mask that broadcasts over [B, H, L, L]; None where every token sees every token."""
    keys = None if mask_BL is None else mask_BL[:, None, None, :]
    if not causal:
        return keys
    before = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return before if keys is None else keys & before
