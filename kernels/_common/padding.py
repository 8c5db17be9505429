"""Packed batches laid out with padding, for what cannot read them as they are, and back.

The padding is 0 and every text has rows of its own, so nothing of one text reaches another, NaN included.

Shape suffixes: B = texts, L = tokens of the longest text, T = tokens of all texts, H = heads, W = head width.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def text_and_place(offsets_B1: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Return the text of every packed token and its place in that text, int64 [T] each.

    Args:
        offsets_B1: int32 [B + 1], where the texts begin; the last is T.
        tokens: T.
    """
    token_T = torch.arange(tokens, dtype=torch.int32, device=offsets_B1.device)
    text_T = torch.searchsorted(offsets_B1[1:], token_T, right=True)
    return text_T, (token_T - offsets_B1[text_T]).long()


def _lay_out(x: Tensor, text_T: Tensor, place_T: Tensor, num_texts: int, longest: int) -> Tensor:
    padded = x.new_zeros(num_texts, x.shape[2], longest, x.shape[3]).transpose(1, 2)  # by head, as it is read
    padded[text_T, place_T] = x[0]
    return padded


class Pad(torch.autograd.Function):
    """[1, T, H, W] to [B, L, H, W]; autograd's own gradient would add where there is nothing to add."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, text_T: Tensor, place_T: Tensor, num_texts: int, longest: int) -> Tensor:
        ctx.save_for_backward(text_T, place_T)
        return _lay_out(x, text_T, place_T, num_texts, longest)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        text_T, place_T = ctx.saved_tensors
        return grad[text_T, place_T][None], None, None, None, None


class Unpad(torch.autograd.Function):
    """[B, L, H, W] to [1, T, H, W]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, text_T: Tensor, place_T: Tensor) -> Tensor:
        ctx.save_for_backward(text_T, place_T)
        ctx.num_texts, ctx.longest = x.shape[:2]
        return x[text_T, place_T][None]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _lay_out(grad, *ctx.saved_tensors, ctx.num_texts, ctx.longest), None, None
