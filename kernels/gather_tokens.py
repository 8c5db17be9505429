"""Rows of a token sequence by their ids, with an exact backward.

Source: the masked-token gather of He et al., "Masked Autoencoders Are Scalable Vision Learners" (2021), section 3.
Plain PyTorch on every device.

Shape suffixes: B = samples, L = tokens, K = tokens kept, D = width.
"""

from typing import Any

import torch
from torch import Tensor


class _GatherTokens(torch.autograd.Function):
    """Indexing whose backward copies rows: ids are unique, so there is nothing to add up."""

    @staticmethod
    def forward(ctx: Any, x_BLD: Tensor, ids_BK: Tensor) -> Tensor:
        ctx.save_for_backward(ids_BK)
        ctx.num_tokens = x_BLD.shape[1]
        return x_BLD[_sample_index(ids_BK), ids_BK]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (ids_BK,) = ctx.saved_tensors
        (grad_BKD,) = grads
        B, _, D = grad_BKD.shape
        grad_BLD = grad_BKD.new_zeros(B, ctx.num_tokens, D)
        grad_BLD[_sample_index(ids_BK), ids_BK] = grad_BKD
        return grad_BLD, None


def _sample_index(ids_BK: Tensor) -> Tensor:
    return torch.arange(ids_BK.shape[0], device=ids_BK.device)[:, None]


def gather_tokens(x_BLD: Tensor, ids_BK: Tensor) -> Tensor:
    """Return x[b, ids[b, k], :].

    Args:
        x_BLD: tokens, any floating type.
        ids_BK: int64, 0 to L - 1, unique within a sample (not checked: that would wait for the device).

    Returns:
        [B, K, D] in the type of x. In backward the tokens that were not asked for get exactly zero.

    Raises:
        ValueError: the shapes do not fit each other.
    """
    if x_BLD.dim() != 3 or ids_BK.dim() != 2 or x_BLD.shape[0] != ids_BK.shape[0]:
        raise ValueError(
            f"x {tuple(x_BLD.shape)} and ids {tuple(ids_BK.shape)} must be [B, L, D] and [B, K] of the same B"
        )
    return _GatherTokens.apply(x_BLD, ids_BK)
