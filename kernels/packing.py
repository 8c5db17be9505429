"""Packed batches: where their texts lie, and how they are laid out with padding for what cannot read them as they are.

Every text has rows of its own and its padding repeats its own first token, so that nothing of one text reaches another,
NaN included; the caller hides the padding.

Shape suffixes: B = texts, L = tokens of the longest text, T = tokens of all texts, H = heads, W = head width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

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


class Layout(NamedTuple):
    """Where the rows of both layouts come from; a row is one token's W values of one head.

    Attributes:
        visible_BL: bool, True where a padded row holds a token.
        from_packed: int64 [3 * B * H * L], the row of [T, 3, H, W] at each row of [3, B, H, L, W].
        from_padded: int64 [T * 3 * H], the other way.
        from_padded_TH: int64 [T * H], the row of [B, H, L, W] at each row of [T, H, W].
    """

    visible_BL: Tensor
    from_packed: Tensor
    from_padded: Tensor
    from_padded_TH: Tensor


def layout(offsets_B1: Tensor, tokens: int, longest: int, heads: int) -> Layout:
    """Return the layout of a packed batch."""
    begin_B1, device = offsets_B1.long(), offsets_B1.device
    num_texts, part_3H1 = len(offsets_B1) - 1, torch.arange(3 * heads, device=device).view(3, 1, heads, 1)
    token_BL = begin_B1[:-1, None] + torch.arange(longest, device=device)
    visible_BL = token_BL < begin_B1[1:, None]
    own_BL = torch.where(visible_BL, token_BL, begin_B1[:-1, None].clamp_max(tokens - 1))
    from_packed = own_BL[:, None] * (3 * heads) + part_3H1
    text_T = text_of_token(offsets_B1, tokens)
    place_T = torch.arange(tokens, device=device) - begin_B1[text_T]
    number_3 = torch.arange(3, device=device)[:, None] * num_texts
    text_T3H = (text_T[:, None, None] + number_3) * heads + torch.arange(heads, device=device)
    from_padded_T3H = text_T3H * longest + place_T[:, None, None]
    return Layout(
        visible_BL, from_packed.flatten(), from_padded_T3H.flatten(), from_padded_T3H[:, 0].flatten()
    )


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
    _layouts: dict[tuple[int, int], Layout] = field(default_factory=dict, init=False, repr=False)

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

    def layout(self, tokens: int, heads: int) -> Layout:
        """Return the padded layout of `tokens` packed tokens, made at the first call: all blocks have the same."""
        key = (tokens, heads)
        if key not in self._layouts:
            self._layouts[key] = layout(self.offsets_B1, tokens, self.longest, heads)
        return self._layouts[key]


def pad(qkv_1T3HW: Tensor, rows: Layout) -> Tensor:
    """Return [3, B, H, L, W]."""
    _, _, _, H, W = qkv_1T3HW.shape
    B, L = rows.visible_BL.shape
    return qkv_1T3HW.view(-1, W).index_select(0, rows.from_packed).view(3, B, H, L, W)


def unpad(padded_3BHLW: Tensor, rows: Layout) -> Tensor:
    """Return [1, T, 3, H, W], the inverse of `pad`."""
    _, _, H, _, W = padded_3BHLW.shape
    return padded_3BHLW.reshape(-1, W).index_select(0, rows.from_padded).view(1, -1, 3, H, W)


def unpad_heads(padded_BHLW: Tensor, rows: Layout) -> Tensor:
    """Return [1, T, H, W]."""
    _, H, _, W = padded_BHLW.shape
    return padded_BHLW.reshape(-1, W).index_select(0, rows.from_padded_TH).view(1, -1, H, W)


def pad_heads(grad_1THW: Tensor, rows: Layout) -> Tensor:
    """Return [B, H, L, W] with zeros at the padding: the gradient of `unpad_heads`."""
    _, _, H, W = grad_1THW.shape
    B, L = rows.visible_BL.shape
    padded = grad_1THW.new_zeros(B * H * L, W)
    padded.index_copy_(0, rows.from_padded_TH, grad_1THW.reshape(-1, W))
    return padded.view(B, H, L, W)


class Pad(torch.autograd.Function):
    """`pad` for autograd; what hides the padding leaves it no gradient, so there is nothing to add up."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, *rows: Tensor) -> Tensor:
        ctx.save_for_backward(*rows)
        return pad(qkv, Layout(*rows))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return unpad(grad, Layout(*ctx.saved_tensors)), None, None, None, None


class UnpadHeads(torch.autograd.Function):
    """`unpad_heads` for autograd."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *rows: Tensor) -> Tensor:
        ctx.save_for_backward(*rows)
        return unpad_heads(x, Layout(*rows))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return pad_heads(grad, Layout(*ctx.saved_tensors)), None, None, None, None
