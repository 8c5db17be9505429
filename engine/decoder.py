"""What trains the encoder and is thrown away after each stage: the image decoder and the word head.

Shape suffixes: B samples, K visible, M masked, L = K + M patches, D encoder width, E decoder width, P values a patch,
V vocabulary, S scored positions.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mnemos.engine.encoder import Attention, ImageKind, Linear, ResidualNorm, initialise
from mnemos.engine.positions import sin_cos_table
from mnemos.kernels.gather_tokens import gather_tokens
from mnemos.kernels.masked_lm_loss import masked_lm_loss
from mnemos.kernels.place_tokens import place_tokens


class DecoderBlock(nn.Module):
    """Plain pre-norm block (He et al., 2021): x + attention(norm_1(x)), then x + mlp(norm_2(x))."""

    def __init__(self, width: int, heads: int, attention: str) -> None:
        super().__init__()
        self.norm_1 = ResidualNorm(width, eps=1e-6)
        self.attention = Attention(width, heads, attention)
        self.norm_2 = ResidualNorm(width, eps=1e-6)
        self.fc_1 = Linear(width, 4 * width)
        self.fc_2 = Linear(4 * width, width)

    def forward(
        self,
        x: Tensor,
        branch_BLE: Tensor | None = None,
        *,
        unseen_LE: Tensor | None = None,
        visible_BK: Tensor | None = None,
        wanted_BM: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the residual stream and the branch still to be added to it, [B, 1 + L, E] each.

        Args:
            x: residual stream [B, 1 + L, E]; in the first block the seen tokens alone, [B, 1 + K, E].
            branch_BLE: what the block before left to be added; None in the first block.
            unseen_LE: in the first block, tokens of places that were not seen. They are the same in every sample, so
                they are normalised and projected once a place.
            visible_BK: in the first block, the places that were seen.
            wanted_BM: in the last block, the rows that are predicted. Others are attended to and cost nothing more;
                the results are [B, M, E].
        """
        if unseen_LE is not None and visible_BK is not None:
            seen, unseen = (self.attention.qkv(self.norm_1(tokens, None)[1]) for tokens in (x, unseen_LE))
            x = place_tokens(x, unseen_LE, visible_BK)
            qkv = place_tokens(seen, unseen, visible_BK)
            mixed = self.attention.mix(qkv) if wanted_BM is None else self.attention.mix_some(qkv, wanted_BM)
        else:
            x, normed = self.norm_1(x, branch_BLE)
            mixed = self.attention(normed, wanted_BM=wanted_BM)
        if wanted_BM is not None:
            x = gather_tokens(x, wanted_BM)
        x, normed = self.norm_2(x, mixed)
        return x, self.fc_2(F.gelu(self.fc_1(normed)))


class DecoderStem(nn.Module):
    """Visible features to what the first block takes: seen tokens, and mask tokens with the positions of all places."""

    def __init__(self, encoder_width: int, width: int) -> None:
        super().__init__()
        self.project = Linear(encoder_width, width)
        self.mask_token = nn.Parameter(torch.randn(width) * 0.02)

    def forward(
        self, features_BND: Tensor, visible_BK: Tensor, positions_SE: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return seen tokens [B, 1 + K, E], CLS first, and unseen ones [L, E]; S = 1 + L rows, that of CLS first."""
        row_BN = F.pad(visible_BK + 1, (1, 0))
        tokens = self.project(features_BND)
        seen = tokens + positions_SE[row_BN]
        return seen.to(tokens.dtype), (self.mask_token + positions_SE[1:]).to(tokens.dtype)


class ImageDecoder(nn.Module):
    """Predict the masked patches of images and volumes; everything but the last layer is shared by both."""

    def __init__(
        self,
        encoder_width: int,
        width: int,
        depth: int,
        heads: int,
        grids: dict[str, tuple[int, ...]],
        values: dict[str, int],
        *,
        official: bool = False,
        attention: str = "auto",
    ) -> None:
        super().__init__()
        self.stem = DecoderStem(encoder_width, width)
        self.blocks = nn.ModuleList(DecoderBlock(width, heads, attention) for _ in range(depth))
        self.norm = ResidualNorm(width, eps=1e-6)
        self.heads = nn.ModuleDict({kind: Linear(width, size) for kind, size in values.items()})
        for kind, grid in grids.items():
            if official:  # the authors' positions: trained, from zeros
                rows = 1 + math.prod(grid)
                self.register_parameter(f"positions_{kind}", nn.Parameter(torch.zeros(rows, width)))
            else:
                table = torch.cat([torch.zeros(1, width), sin_cos_table(grid, width)])  # CLS has no place
                self.register_buffer(f"positions_{kind}", table, persistent=False)
        self.apply(initialise)

    def forward(self, kind: ImageKind, features_BND: Tensor, visible_BK: Tensor, masked_BM: Tensor) -> Tensor:
        """Return predictions [B, M, P] of the masked patches, in the order of `masked_BM`."""
        seen, unseen = self.stem(features_BND, visible_BK, getattr(self, f"positions_{kind}"))
        x, branch = seen, None
        for block in self.blocks:
            first = {"unseen_LE": unseen, "visible_BK": visible_BK} if block is self.blocks[0] else {}
            last = {"wanted_BM": masked_BM + 1} if block is self.blocks[-1] else {}  # row 0 is CLS
            x, branch = block(x, branch, **first, **last)
        _, normed_BME = self.norm(x, branch)
        predicted_BMP: Tensor = self.heads[kind](normed_BME)
        return predicted_BMP


class WordHead(nn.Module):
    """Predict words at scored positions: Linear, GELU, LayerNorm, then an untied matrix to the vocabulary."""

    def __init__(self, width: int, vocab: int, *, official: bool = False) -> None:
        super().__init__()
        # the authors add the first of two learned rows to every feature
        self.position = nn.Parameter(torch.zeros(2, width)) if official else None
        self.transform = Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.words = Linear(width, vocab)
        self.apply(initialise)
        nn.init.normal_(self.words.weight, std=1 / math.sqrt(width) / 4)

    def forward(self, features_SD: Tensor, labels_S: Tensor, factor: Tensor | None = None) -> Tensor:
        """Return factor * the fp32 sum of cross-entropies over the rows whose label is not -100."""
        hidden = self._hidden(features_SD)
        return masked_lm_loss(hidden, self.words.weight, self.words.bias, labels_S, factor)

    def logits(self, features: Tensor) -> Tensor:
        """Return [..., V], for looking at predictions."""
        logits: Tensor = self.words(self._hidden(features))
        return logits

    def _hidden(self, features: Tensor) -> Tensor:
        if self.position is not None:
            features = features + self.position[0]
        hidden: Tensor = self.norm(F.gelu(self.transform(features)))
        return hidden
