"""Cross-entropy of a linear vocabulary head, without ever holding all logits.

Source: the chunked linear cross-entropy of Hsu et al., "Liger Kernel" (2024), section 3.2: a chunk's gradient is
formed while its logits are at hand. Plain PyTorch on every device.

Shape suffixes: N = rows, C = rows of one chunk, D = width, V = vocabulary.
"""

from typing import Any

import torch
from torch import Tensor

IGNORE = -100  # label of a row that is not scored, as in torch.nn.functional.cross_entropy
CHUNK_LOGITS = 1 << 24  # logits held at once (64 MiB in fp32)


class _MaskedLmLoss(torch.autograd.Function):
    """Loss and gradients in one pass over the chunks; backward only scales them."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor, labels_N: Tensor) -> Tensor:
        inside = torch.promote_types(hidden_ND.dtype, torch.float32)
        V = weight_VD.shape[0]
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        wants_any = wants_hidden or wants_weight or wants_bias
        grad_hidden_ND = torch.empty_like(hidden_ND) if wants_hidden else None
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=inside) if wants_weight else None
        grad_bias_V = torch.zeros_like(bias_V, dtype=inside) if wants_bias else None
        loss = hidden_ND.new_zeros((), dtype=inside)
        rows = max(1, CHUNK_LOGITS // V)
        for start in range(0, hidden_ND.shape[0], rows):
            chunk = slice(start, start + rows)
            hidden_CD, labels_C1 = hidden_ND[chunk], labels_N[chunk, None]
            scored_C1 = labels_C1 != IGNORE
            label_C1 = labels_C1.clamp_min(0)
            logits_CV = torch.addmm(bias_V.to(hidden_ND.dtype), hidden_CD, weight_VD.t()).to(inside)
            log_probs_CV = logits_CV.log_softmax(-1)
            loss -= log_probs_CV.gather(1, label_C1).masked_fill(~scored_C1, 0.0).sum()
            if not wants_any:
                continue
            grad_CV = log_probs_CV.exp_()
            grad_CV.scatter_add_(1, label_C1, grad_CV.new_full((), -1.0).expand_as(label_C1))
            grad_CV.mul_(scored_C1)
            if grad_bias_V is not None:
                grad_bias_V += grad_CV.sum(0)
            grad_CV = grad_CV.to(hidden_ND.dtype)
            if grad_hidden_ND is not None:
                torch.mm(grad_CV, weight_VD, out=grad_hidden_ND[chunk])
            if grad_weight_VD is not None:
                grad_weight_VD += grad_CV.t() @ hidden_CD
        ctx.grads = grad_hidden_ND, grad_weight_VD, grad_bias_V
        ctx.dtypes = hidden_ND.dtype, weight_VD.dtype, bias_V.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (upstream,) = grads
        scaled = (
            None if grad is None else (grad * upstream).to(dtype)
            for grad, dtype in zip(ctx.grads, ctx.dtypes, strict=True)
        )
        return (*scaled, None)


def masked_lm_loss(hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor, labels_N: Tensor) -> Tensor:
    """Return the sum of the cross-entropies of the scored rows.

    Every row costs its logits, scored or not: pass the selected positions only, filled up with label -100.

    Args:
        hidden_ND: inputs of the vocabulary layer, any floating type.
        weight_VD: the vocabulary layer, same type.
        bias_V: its bias.
        labels_N: int64, 0 to V - 1, or -100 for a row that is not scored.

    Returns:
        Scalar in nats, fp32 (fp64 for fp64 inputs), 0 when no row is scored; divide by the number of scored rows.

    Raises:
        ValueError: the shapes or types do not fit each other.
    """
    (N, D), V = hidden_ND.shape, weight_VD.shape[0]
    if hidden_ND.dtype != weight_VD.dtype:
        raise ValueError(
            f"hidden is {hidden_ND.dtype}, weight {weight_VD.dtype}; bring them to one type before the call"
        )
    if weight_VD.shape != (V, D) or bias_V.shape != (V,) or labels_N.shape != (N,):
        raise ValueError(
            f"hidden {tuple(hidden_ND.shape)}, weight {tuple(weight_VD.shape)}, bias {tuple(bias_V.shape)} and "
            f"labels {tuple(labels_N.shape)} must be [N, D], [V, D], [V] and [N]"
        )
    return _MaskedLmLoss.apply(hidden_ND, weight_VD, bias_V, labels_N)
