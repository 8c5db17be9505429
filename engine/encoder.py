"""The one encoder for texts (1D), images (2D) and volumes (3D).

Source: Ye et al., "Continual Self-supervised Learning: Towards Universal Multi-modal Medical Data Representation
Learning", CVPR 2024: a pre-norm ViT with LayerScale after DropPath and no final norm.

Shape suffixes: B samples, L tokens, K visible patches, N = tokens of a sequence with CLS, D width, P values a patch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mnemos.engine.positions import interpolate_table, sin_cos_table
from mnemos.kernels.attention import attention
from mnemos.kernels.layer_scale_residual_norm import layer_scale_residual_norm

ImageKind = Literal["image", "volume"]


@dataclass(frozen=True, kw_only=True)
class EncoderShape:
    """Everything the encoder's parameters depend on.

    Attributes:
        image_grid: patches (Y, X) of an image the position table is made for.
        volume_grid: patches (Z, Y, X) of a volume the position table is made for.
        vocab: rows of the token table; 0 leaves texts out.
        official: the MedCoSS authors' arithmetic: texts attend to the left only, positions are rows of flat tables of
            their sizes. What they carry and never use is kept, so that a checkpoint goes in and out whole.
    """

    width: int
    depth: int
    heads: int
    ffn: int
    layer_scale: float
    drop_path: float
    image_patch: int
    volume_patch: int
    image_grid: tuple[int, int]
    volume_grid: tuple[int, int, int]
    vocab: int
    text_positions: int
    channels: int = 3  # of an image patch; grey images are broadcast to it
    official: bool = False


class Attention(nn.Module):
    """Multi-head self-attention over one packed projection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x_BLD: Tensor, mask_BL: Tensor | None = None, causal: bool = False) -> Tensor:
        """Return [B, L, D]; `mask_BL` (bool) is True at tokens that may be attended to."""
        B, L, D = x_BLD.shape
        q, k, v = self.qkv(x_BLD).view(B, L, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        mixed = attention(q, k, v, mask_BL, causal=causal)
        out_BLD: Tensor = self.out(mixed.transpose(1, 2).reshape(B, L, D))
        return out_BLD


class Block(nn.Module):
    """Pre-norm block: x + keep * scale_1 * attention(norm_1(x)), then the same with the feed-forward part."""

    def __init__(self, shape: EncoderShape) -> None:
        super().__init__()
        self.norm_1 = nn.LayerNorm(shape.width)
        self.attention = Attention(shape.width, shape.heads)
        self.scale_1 = nn.Parameter(torch.full((shape.width,), shape.layer_scale))
        self.norm_2 = nn.LayerNorm(shape.width)
        self.fc_1 = nn.Linear(shape.width, shape.ffn)
        self.fc_2 = nn.Linear(shape.ffn, shape.width)
        self.scale_2 = nn.Parameter(torch.full((shape.width,), shape.layer_scale))

    def forward(
        self,
        x_BLD: Tensor,
        mask_BL: Tensor | None = None,
        keep_B2: Tensor | None = None,
        causal: bool = False,
    ) -> Tensor:
        """Return [B, L, D]; `keep_B2` scales the two branches of each sample: 0 dropped, else 1 / (1 - rate)."""
        branch: Tensor = self.attention(self.norm_1(x_BLD), mask_BL, causal)
        norm_2 = self.norm_2
        x_BLD, normed = layer_scale_residual_norm(
            x_BLD,
            branch,
            self.scale_1,
            None if keep_B2 is None else keep_B2[:, 0].contiguous(),
            norm_2.weight,
            norm_2.bias,
            norm_2.eps,
        )
        branch = self.fc_2(F.gelu(self.fc_1(normed))) * self.scale_2
        if keep_B2 is not None:
            branch = branch * keep_B2[:, 1, None, None].to(branch.dtype)
        return x_BLD + branch


class PatchTokenizer(nn.Module):
    """Patches of images or of volumes to tokens: one matrix product plus a learned position on a grid."""

    def __init__(self, values: int, width: int, grid: tuple[int, ...]) -> None:
        super().__init__()
        self.grid = grid
        self.project = nn.Linear(values, width)
        self.position = nn.Parameter(sin_cos_table(grid[-2:], width))  # learned from there on
        self.depth = nn.Parameter(torch.zeros(grid[0] if len(grid) == 3 else 1, width))

    def forward(self, patches_BKP: Tensor, ids_BK: Tensor, grid: tuple[int, ...]) -> Tensor:
        """Return tokens [B, K, D] of the patches at `ids_BK` (places in C order over `grid`)."""
        plane = interpolate_table(self.position, self.grid[-2:], grid[-2:])
        depth: Tensor = self.depth
        if len(grid) == 3 and grid[0] != self.grid[0]:
            depth = F.interpolate(depth.float().T[None], size=grid[0], mode="linear")[0].T.to(plane.dtype)
        tokens: Tensor = self.project(patches_BKP) + plane[ids_BK % plane.shape[0]]
        return tokens + depth[ids_BK // plane.shape[0]]


class FlatPatchTokenizer(nn.Module):
    """The authors' patch tokenizer: rows of one flat table by patch number, and always the first temporal row."""

    ROWS: ClassVar[dict[int, int]] = {2: 1024, 3: 4096}  # by the number of axes
    TEMPORAL_ROWS = 8

    def __init__(self, values: int, width: int, grid: tuple[int, ...]) -> None:
        super().__init__()
        self.project = nn.Linear(values, width)
        self.position = nn.Parameter(torch.randn(self.ROWS[len(grid)], width))
        self.depth = nn.Parameter(torch.randn(self.TEMPORAL_ROWS, width))

    def forward(self, patches_BKP: Tensor, ids_BK: Tensor, grid: tuple[int, ...]) -> Tensor:
        """Return tokens [B, K, D] of the patches at `ids_BK` (places in C order over `grid`)."""
        tokens: Tensor = self.project(patches_BKP) + self.position[ids_BK]
        return tokens + self.depth[0]


class TextTokenizer(nn.Module):
    """Token ids to tokens: embedding plus learned position plus one type row, then LayerNorm."""

    def __init__(self, vocab: int, positions: int, width: int, *, official: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab, width)
        self.position = nn.Parameter(torch.randn(positions, width) * 0.02)
        # the authors' table has a second row that no text uses
        self.token_type = nn.Parameter(torch.zeros((2, width) if official else width))
        self.norm = nn.LayerNorm(width)
        nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(self, ids_BL: Tensor) -> Tensor:
        """Return [B, L, D]."""
        tokens = self.embedding(ids_BL) + self.position[: ids_BL.shape[1]]
        token_type = self.token_type[0] if self.token_type.ndim == 2 else self.token_type
        normed: Tensor = self.norm(tokens + token_type)
        return normed


class Stem(nn.Module):
    """What images and volumes share before the blocks: LayerNorm of the tokens, then the CLS token in front."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.cls = nn.Parameter(torch.randn(width) * 0.02)

    def forward(self, tokens_BKD: Tensor) -> Tensor:
        """Return [B, 1 + K, D]."""
        cls = self.cls.expand(tokens_BKD.shape[0], 1, -1)
        return torch.cat([cls, self.norm(tokens_BKD)], dim=1)


class Encoder(nn.Module):
    """Texts, images and volumes to feature sequences."""

    def __init__(self, shape: EncoderShape, *, recompute: bool = False) -> None:
        super().__init__()
        self.shape = shape
        self.recompute = recompute
        values = {"image": shape.image_patch**2 * shape.channels, "volume": shape.volume_patch**3}
        grids: dict[str, tuple[int, ...]] = {"image": shape.image_grid, "volume": shape.volume_grid}
        tokenizer = FlatPatchTokenizer if shape.official else PatchTokenizer
        self.tokenizers = nn.ModuleDict(
            {kind: tokenizer(values[kind], shape.width, grid) for kind, grid in grids.items()}
        )
        if shape.vocab:
            self.tokenizers["text"] = TextTokenizer(
                shape.vocab, shape.text_positions, shape.width, official=shape.official
            )
        if shape.official:  # in the authors' files, used by nothing
            self.unused = nn.ParameterDict(
                {"positions": torch.zeros(1600, shape.width), "types": torch.zeros(1, shape.width)}
            )
        self.stem = Stem(shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.depth))
        self.apply(initialise)

    def forward_patches(
        self,
        kind: ImageKind,
        patches_BKP: Tensor,
        ids_BK: Tensor,
        grid: tuple[int, ...],
        keep: Tensor | None = None,
    ) -> Tensor:
        """Return features [B, 1 + K, D], CLS first, of patches at the places `ids_BK` of a grid.

        Args:
            kind: image or volume.
            patches_BKP: model values in patch order, from `mnemos.kernels.gather_patches`.
            ids_BK: int64 places in C order over `grid`.
            grid: patches of the whole sample along each axis.
            keep: [B, 2 * depth] DropPath factors; None keeps every branch.
        """
        tokens = self.tokenizers[kind](patches_BKP, ids_BK, grid)
        return self._run_blocks(self.stem(tokens), None, keep)

    def forward_text(self, ids_BL: Tensor, valid_BL: Tensor, keep: Tensor | None = None) -> Tensor:
        """Return features [B, L, D]; rows where `valid_BL` is False are neither attended to nor meaningful."""
        if "text" not in self.tokenizers:
            raise ValueError("this encoder was made without texts; train a curriculum that has a text stage")
        return self._run_blocks(self.tokenizers["text"](ids_BL), valid_BL, keep, causal=self.shape.official)

    def _run_blocks(
        self, x_BLD: Tensor, mask_BL: Tensor | None, keep: Tensor | None, *, causal: bool = False
    ) -> Tensor:
        for number, block in enumerate(self.blocks):
            keep_B2 = None if keep is None else keep[:, 2 * number : 2 * number + 2]
            if self.recompute and torch.is_grad_enabled():
                x_BLD = checkpoint(block, x_BLD, mask_BL, keep_B2, causal, use_reentrant=False)
            else:
                x_BLD = block(x_BLD, mask_BL, keep_B2, causal)
        return x_BLD


def pooled(features_BND: Tensor, valid_BN: Tensor | None) -> Tensor:
    """Return fp32 [B, D]: the mean over real text tokens, or over patch tokens with CLS (row 0) left out."""
    if valid_BN is None:
        return features_BND[:, 1:].float().mean(dim=1)
    weight = valid_BN.unsqueeze(-1).float()
    return (features_BND.float() * weight).sum(dim=1) / weight.sum(dim=1).clamp_min(1.0)


def initialise(module: nn.Module) -> None:
    """Initialise matrices as MAE does (He et al., 2021, appendix A): Xavier uniform, biases 0."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def block_parameters(blocks: Sequence[nn.Module]) -> int:
    """Return the number of values in the parameters of the blocks."""
    return sum(parameter.numel() for block in blocks for parameter in block.parameters())
