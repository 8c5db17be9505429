"""What trains the encoder and is thrown away after each stage: the image decoder and the word head.

Shape suffixes: B samples, K visible, M masked, L = K + M patches, D encoder width, E decoder width, P values a patch,
V vocabulary, S scored positions.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mnemos.engine.encoder import Attention, ImageKind, ResidualNorm, initialise
from mnemos.engine.positions import sin_cos_table
from mnemos.kernels.assemble_decoder_tokens import assemble_decoder_tokens
from mnemos.kernels.gather_tokens import gather_tokens
from mnemos.kernels.masked_lm_loss import masked_lm_loss


class DecoderBlock(nn.Module):
    """Plain pre-norm block (He et al., 2021): x + attention(norm_1(x)), then x + mlp(norm_2(x))."""

    def __init__(self, width: int, heads: int, attention: str) -> None:
        super().__init__()
        self.norm_1 = ResidualNorm(width, eps=1e-6)
        self.attention = Attention(width, heads, attention)
        self.norm_2 = ResidualNorm(width, eps=1e-6)
        self.fc_1 = nn.Linear(width, 4 * width)
        self.fc_2 = nn.Linear(4 * width, width)

    def forward(self, x_BLE: Tensor, branch_BLE: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the residual stream and the branch still to be added to it; `branch_BLE` is the block before's."""
        x_BLE, normed = self.norm_1(x_BLE, branch_BLE)
        x_BLE, normed = self.norm_2(x_BLE, self.attention(normed))
        return x_BLE, self.fc_2(F.gelu(self.fc_1(normed)))


class DecoderStem(nn.Module):
    """Visible features to a full sequence: projection, mask tokens where nothing was seen, positions."""

    def __init__(self, encoder_width: int, width: int) -> None:
        super().__init__()
        self.project = nn.Linear(encoder_width, width)
        self.mask_token = nn.Parameter(torch.randn(width) * 0.02)

    def forward(self, features_BND: Tensor, visible_BK: Tensor, positions_LE: Tensor) -> Tensor:
        """Return [B, 1 + L, E], CLS first."""
        tokens = self.project(features_BND)
        return assemble_decoder_tokens(tokens, self.mask_token, positions_LE, visible_BK)


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
        self.heads = nn.ModuleDict({kind: nn.Linear(width, size) for kind, size in values.items()})
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
        x_BLE = self.stem(features_BND, visible_BK, getattr(self, f"positions_{kind}"))
        branch_BLE = None
        for block in self.blocks:
            x_BLE, branch_BLE = block(x_BLE, branch_BLE)
        _, normed_BLE = self.norm(x_BLE, branch_BLE)
        predicted_BMP: Tensor = self.heads[kind](gather_tokens(normed_BLE, masked_BM + 1))  # row 0 is CLS
        return predicted_BMP


class WordHead(nn.Module):
    """Predict words at scored positions: Linear, GELU, LayerNorm, then an untied matrix to the vocabulary."""

    def __init__(self, width: int, vocab: int, *, official: bool = False) -> None:
        super().__init__()
        # the authors add the first of two learned rows to every feature
        self.position = nn.Parameter(torch.zeros(2, width)) if official else None
        self.transform = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.words = nn.Linear(width, vocab)
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
