"""The one encoder for texts (1D), images (2D) and volumes (3D).

Source: Ye et al., "Continual Self-supervised Learning: Towards Universal Multi-modal Medical Data Representation
Learning", CVPR 2024: a pre-norm ViT with LayerScale after DropPath and no final norm.

Between the blocks a sequence travels as residual stream and branch: the branch is added where the next block
normalises, in one pass over both.

Shape suffixes: B samples, L tokens, K visible patches, N = tokens of a sequence with CLS, T = tokens of a packed batch of
texts, D width, P values a patch.
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
from mnemos.kernels.cross_attention import cross_attention
from mnemos.kernels.gather_tokens import gather_tokens
from mnemos.kernels.layer_scale_residual_norm import layer_scale_residual_norm
from mnemos.kernels.linear import linear
from mnemos.kernels.packing import Packing

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


class Linear(nn.Linear):
    """torch's layer, computed by `mnemos.kernels.linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x W^T + b."""
        return linear(x, self.weight, self.bias)


class Attention(nn.Module):
    """Multi-head self-attention over one packed projection; `backend` as in `mnemos.kernels.attention`."""

    def __init__(self, width: int, heads: int, backend: str) -> None:
        super().__init__()
        self.heads = heads
        self.backend = backend
        self.qkv = Linear(width, 3 * width)
        self.out = Linear(width, width)

    def forward(
        self,
        x_BLD: Tensor,
        packing: Packing | None = None,
        causal: bool = False,
        wanted_BM: Tensor | None = None,
    ) -> Tensor:
        """Return [B, L, D]; with a packing B is 1 and its sequences do not see each other.

        With `wanted_BM`, int64 rows, only those ask and all are asked: [B, M, D].
        """
        if wanted_BM is None:
            return self.mix(self.qkv(x_BLD), packing, causal)
        width = x_BLD.shape[2]
        (to_query, to_both), (add_query, add_both) = (
            part.split_with_sizes([width, 2 * width]) for part in (self.qkv.weight, self.qkv.bias)
        )
        query = linear(gather_tokens(x_BLD, wanted_BM), to_query, add_query)
        return self._cross(query, linear(x_BLD, to_both, add_both))

    def mix(self, qkv_BLF: Tensor, packing: Packing | None = None, causal: bool = False) -> Tensor:
        """Return what comes after the projection `qkv`, whose result [B, L, 3 * D] this takes."""
        B, L, triple = qkv_BLF.shape
        qkv = qkv_BLF.view(B, L, 3, self.heads, triple // (3 * self.heads))
        mixed = attention(qkv, packing=packing, causal=causal, backend=self.backend)
        out_BLD: Tensor = self.out(mixed.reshape(B, L, triple // 3))
        return out_BLD

    def mix_some(self, qkv_BLF: Tensor, wanted_BM: Tensor) -> Tensor:
        """Return [B, M, D], `mix` of the wanted rows alone."""
        width = qkv_BLF.shape[2] // 3
        query, both = qkv_BLF.split_with_sizes([width, 2 * width], dim=2)
        return self._cross(gather_tokens(query.contiguous(), wanted_BM), both.contiguous())

    def _cross(self, query_BMD: Tensor, both_BLE: Tensor) -> Tensor:
        B, M, D = query_BMD.shape
        W = D // self.heads
        query, both = query_BMD.view(B, M, self.heads, W), both_BLE.view(B, -1, 2, self.heads, W)
        backend = (
            self.backend if self.backend in ("definition", "sdpa") else "auto"
        )  # others have no such form
        mixed = cross_attention(query, both, backend=backend)
        out_BMD: Tensor = self.out(mixed.reshape(B, M, D))
        return out_BMD


class ResidualNorm(nn.LayerNorm):
    """Add a branch to the residual stream and normalise the sum, in one pass over both."""

    def forward(  # type: ignore[override]
        self, x: Tensor, branch: Tensor | None, scale_D: Tensor | None = None, keep: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return x + keep * scale * branch, and its LayerNorm; without a branch x itself, and its LayerNorm."""
        if branch is None:
            return x, super().forward(x)
        return layer_scale_residual_norm(x, branch, scale_D, keep, self.weight, self.bias, self.eps)


class Block(nn.Module):
    """Pre-norm block: x + keep * scale_1 * attention(norm_1(x)), then the same with the feed-forward part."""

    def __init__(self, shape: EncoderShape, attention: str) -> None:
        super().__init__()
        self.norm_1 = ResidualNorm(shape.width)
        self.attention = Attention(shape.width, shape.heads, attention)
        self.scale_1 = nn.Parameter(torch.full((shape.width,), shape.layer_scale))
        self.norm_2 = ResidualNorm(shape.width)
        self.fc_1 = Linear(shape.width, shape.ffn)
        self.fc_2 = Linear(shape.ffn, shape.width)
        self.scale_2 = nn.Parameter(torch.full((shape.width,), shape.layer_scale))

    def forward(
        self,
        x: Tensor,
        before: tuple[Tensor, Tensor, Tensor | None] | None,
        keep: Tensor | None = None,
        packing: Packing | None = None,
        causal: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the residual stream, and the branch still to be added to it with its scale.

        Args:
            x: residual stream [B, L, D].
            before: branch, scale and keep that the block before left to be added; None at the first.
            keep: factors [B] of the attention branch ([T] where packed): 0 dropped, else 1 / (1 - rate).
            packing: of texts.
            causal: a token attends to itself and what stands before it only.
        """
        x, normed = self.norm_1(x, *(before or (None,)))
        branch: Tensor = self.attention(normed, packing, causal)
        x, normed = self.norm_2(x, branch, self.scale_1, keep)
        branch = self.fc_2(F.gelu(self.fc_1(normed)))
        return x, branch, self.scale_2.clone()  # ZeRO 3 takes the parameter itself back before it is used


class PatchTokenizer(nn.Module):
    """Patches of images or of volumes to tokens: one matrix product plus a learned position on a grid."""

    def __init__(self, values: int, width: int, grid: tuple[int, ...]) -> None:
        super().__init__()
        self.grid = grid
        self.project = Linear(values, width)
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
        self.project = Linear(values, width)
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

    def forward(self, ids_T: Tensor, position_T: Tensor) -> Tensor:
        """Return [T, D]."""
        tokens = self.embedding(ids_T) + self.position[position_T]
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

    def __init__(self, shape: EncoderShape, *, recompute: bool = False, attention: str = "auto") -> None:
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
        self.blocks = nn.ModuleList(Block(shape, attention) for _ in range(shape.depth))
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
        return self._run_blocks(self.stem(tokens), keep)

    def forward_text(
        self, ids_T: Tensor, position_T: Tensor, packing: Packing, keep: Tensor | None = None
    ) -> Tensor:
        """Return features [1, T, D] of texts that lie one after the other.

        Args:
            ids_T: int64 token ids.
            position_T: int64 place of each token in its text.
            packing: where the texts begin and end.
            keep: [B, 2 * depth] DropPath factors; None keeps every branch.
        """
        if "text" not in self.tokenizers:
            raise ValueError("this encoder was made without texts; train a curriculum that has a text stage")
        tokens = self.tokenizers["text"](ids_T, position_T)
        if keep is not None:
            keep = keep.repeat_interleave(packing.offsets_B1.diff(), 0, output_size=len(ids_T))
        return self._run_blocks(tokens[None], keep, packing, causal=self.shape.official)

    def _run_blocks(
        self, x: Tensor, keep: Tensor | None, packing: Packing | None = None, *, causal: bool = False
    ) -> Tensor:
        factors = [None] * (2 * len(self.blocks)) if keep is None else keep.t().contiguous().unbind()
        before = None
        for number, block in enumerate(self.blocks):
            inputs = (x, before, factors[2 * number], packing, causal)
            if self.recompute and torch.is_grad_enabled():
                x, branch, scale_D = checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
            else:
                x, branch, scale_D = block(*inputs)
            before = (branch, scale_D, factors[2 * number + 1])
        if before is None:
            return x
        branch, scale_D, last = before
        factor = scale_D if last is None else scale_D * last.view(x.shape[0], -1, 1)
        return torch.addcmul(x, branch, factor.to(x.dtype))


def patch_edges(shape: EncoderShape, kind: str) -> tuple[tuple[int, ...], int]:
    """Return a patch's edges, (y, x) or (z, y, x), and the channels it holds once grey is broadcast."""
    return ((shape.image_patch,) * 2, shape.channels) if kind == "image" else ((shape.volume_patch,) * 3, 1)


def pooled(features: Tensor, packing: Packing | None) -> Tensor:
    """Return fp32 [B, D]: the mean over a text's tokens, or over patch tokens with CLS (row 0) left out."""
    if packing is None:
        return features[:, 1:].float().mean(dim=1)
    return torch.segment_reduce(features[0].float(), "mean", offsets=packing.offsets_B1.long(), axis=0)


def initialise(module: nn.Module) -> None:
    """Initialise matrices as MAE does (He et al., 2021, appendix A): Xavier uniform, biases 0."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def block_parameters(blocks: Sequence[nn.Module]) -> int:
    """Return the number of values in the parameters of the blocks."""
    return sum(parameter.numel() for block in blocks for parameter in block.parameters())
