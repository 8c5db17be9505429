"""Packed batches laid out with padding, for what cannot read them as they are, and back.

The padding is 0 and every text has rows of its own, so nothing of one text reaches another, NaN included.

Shape suffixes: B = texts, L = tokens of the longest text, T = tokens of all texts, H = heads, W = head width.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def text_of_token(offsets_B1: Tensor, tokens: int) -> Tensor:
    """Return the text of every packed token, int64 [T].

    Args:
        offsets_B1: int32 [B + 1], where the texts begin; the last is T.
        tokens: T.
    """
    token_T = torch.arange(tokens, dtype=torch.int32, device=offsets_B1.device)
    return torch.searchsorted(offsets_B1[1:], token_T, right=True)


def layout(offsets_B1: Tensor, tokens: int, longest: int, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return where the rows of both layouts come from; a row is one token's values of one head.

    Returns:
        visible_BL: bool, True where a padded row holds a token.
        from_packed: int64 [B * H * L], the packed row at each padded one; T * H, the row of zeros, where there is none.
        from_padded: int64 [T * H], the padded row at each packed one.
    """
    begin_B1, device = offsets_B1.long(), offsets_B1.device
    head_H = torch.arange(heads, device=device)
    token_BL = begin_B1[:-1, None] + torch.arange(longest, device=device)
    visible_BL = token_BL < begin_B1[1:, None]
    packed_BHL = torch.where(visible_BL[:, None], token_BL[:, None] * heads + head_H[:, None], tokens * heads)
    text_T = text_of_token(offsets_B1, tokens)
    place_T = torch.arange(tokens, device=device) - begin_B1[text_T]
    padded_TH = (text_T[:, None] * heads + head_H) * longest + place_T[:, None]
    return visible_BL, packed_BHL.flatten(), padded_TH.flatten()


def _pad(x_1THW: Tensor, from_packed: Tensor, longest: int) -> Tensor:
    _, T, H, W = x_1THW.shape
    rows = x_1THW.new_empty(T + 1, H, W)  # and one token of zeros, for the padding
    rows[:T] = x_1THW[0]
    rows[T] = 0
    return rows.view(-1, W).index_select(0, from_packed).view(-1, H, longest, W).transpose(1, 2)


def _unpad(x_BLHW: Tensor, from_padded: Tensor) -> Tensor:
    _, _, H, W = x_BLHW.shape
    return x_BLHW.transpose(1, 2).reshape(-1, W).index_select(0, from_padded).view(1, -1, H, W)


class Pad(torch.autograd.Function):
    """[1, T, H, W] to [B, L, H, W], by head in memory; autograd's own gradient would add where nothing is to add."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, from_packed: Tensor, from_padded: Tensor, longest: int) -> Tensor:
        ctx.save_for_backward(from_padded)
        return _pad(x, from_packed, longest)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (from_padded,) = ctx.saved_tensors
        return _unpad(grad, from_padded), None, None, None


class Unpad(torch.autograd.Function):
    """[B, L, H, W] to [1, T, H, W]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, from_packed: Tensor, from_padded: Tensor) -> Tensor:
        ctx.save_for_backward(from_packed)
        ctx.longest = x.shape[1]
        return _unpad(x, from_padded)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (from_packed,) = ctx.saved_tensors
        return _pad(grad, from_packed, ctx.longest), None, None
