"""A training step as the MedCoSS authors' code does it, to measure ours against; no code of theirs is in it.

Source: Ye et al., "Continual Self-supervised Learning", CVPR 2024, and what is known of their code's step:

- every patch is embedded by a convolution and normalised, then three quarters are dropped by an int64 gather;
- the encoder is nn.MultiheadAttention on [L, B, D], DropPath, then LayerScale; texts keep their padding in all layers,
  behind additive fp32 masks [heads * B, L, L];
- the decoder repeats, joins and gathers whole sequences and predicts every patch; the targets of all patches are fp32,
  of an einsum patchify; texts have logits and log_softmax at every position;
- rehearsal mixes whole images; the teacher is a whole module in training mode that embeds every patch itself;
- autocast over fp32 weights, GradScaler, AdamW foreach, a gradient norm nobody reads, `.item()` every step.

Where the engine departs from them by decision the reference computes the engine's definition in their way, so that the
losses can be compared: texts attend to both sides under masks of their own, positions are the engine's tables, the
decoder's are sine-cosine, and DropPath takes the factors it is given (the teacher's are 1).

Shape suffixes: B samples, L tokens or patches, K visible, M masked, N = 1 + K, D encoder and E decoder width, P values
a patch, V vocabulary.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mnemos.engine.encoder import EncoderShape
from mnemos.engine.positions import sin_cos_table
from mnemos.engine.settings import ModelSettings

HIDDEN = -10_000.0  # added to the scores of padding


@dataclass(frozen=True, kw_only=True)
class Images:
    """A batch of images or volumes as their loader gives it: cropped, mirrored, fp32.

    Attributes:
        kind: image or volume.
        pixels: fp32 [B, C, Y, X] or [B, 1, Z, Y, X], model values.
        visible_BK, masked_BM: int64 patch places.
        keep: fp32 [B, 2 * depth] DropPath factors.
        partner_B, weight_B: of mixup; None in the pretext phase.
    """

    kind: str
    pixels: Tensor
    visible_BK: Tensor
    masked_BM: Tensor
    keep: Tensor
    partner_B: Tensor | None = None
    weight_B: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Texts:
    """A batch of padded texts.

    Attributes:
        ids_BL: int64, padded to the longest text a set may hold.
        valid_BL: bool, False where nothing stands.
        labels_BL: int64, -100 where nothing is predicted.
        keep: fp32 [B, 2 * depth] DropPath factors.
    """

    ids_BL: Tensor
    valid_BL: Tensor
    labels_BL: Tensor
    keep: Tensor


Inputs = Images | Texts


class EncoderBlock(nn.Module):
    """Pre-norm block with LayerScale after DropPath, attention with the sequence in front."""

    def __init__(self, width: int, heads: int, ffn: int) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads)
        self.gamma_1, self.gamma_2 = (nn.Parameter(torch.ones(width)) for _ in range(2))
        self.mlp = nn.Sequential(nn.Linear(width, ffn), nn.GELU(), nn.Linear(ffn, width))

    def forward(self, x_BLD: Tensor, mask: Tensor | None, keep_B2: Tensor) -> Tensor:
        """Return [B, L, D]."""
        y_LBD = self.norm_1(x_BLD).permute(1, 0, 2)
        y_LBD, _ = self.attention(y_LBD, y_LBD, y_LBD, need_weights=False, attn_mask=mask)
        x_BLD = x_BLD + self.gamma_1 * _drop_path(y_LBD.permute(1, 0, 2), keep_B2[:, 0])
        return x_BLD + self.gamma_2 * _drop_path(self.mlp(self.norm_2(x_BLD)), keep_B2[:, 1])


class DecoderBlock(nn.Module):
    """Plain pre-norm block with fused attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = (nn.LayerNorm(width, eps=1e-6) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x_BLE: Tensor) -> Tensor:
        """Return [B, L, E]."""
        B, L, E = x_BLE.shape
        rows = self.qkv(self.norm_1(x_BLE)).reshape(B, L, 3, self.heads, E // self.heads)
        q, k, v = rows.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, L, E)
        x_BLE = x_BLE + self.out(mixed)
        added: Tensor = x_BLE + self.mlp(self.norm_2(x_BLE))
        return added


class Embeddings(nn.Module):
    """All patches of a kind to tokens, by a convolution."""

    def __init__(self, channels: int, patch: tuple[int, ...], grid: tuple[int, ...], width: int) -> None:
        super().__init__()
        kind = nn.Conv2d if len(patch) == 2 else nn.Conv3d
        self.project = kind(channels, width, kernel_size=patch, stride=patch)  # type: ignore[arg-type]
        self.grid = (1, *grid)[-3:]
        self.spatial = nn.Parameter(torch.zeros(math.prod(grid[-2:]), width))
        self.temporal = nn.Parameter(torch.zeros(self.grid[0], width))

    def forward(self, pixels: Tensor) -> Tensor:
        """Return [B, L, D]."""
        tokens: Tensor = self.project(pixels).flatten(2).transpose(1, 2)
        tokens = tokens + self.spatial.repeat(self.grid[0], 1)
        return tokens + self.temporal.repeat_interleave(len(self.spatial), 0)


class ReferenceModel(nn.Module):
    """Encoder, image decoder and word head.

    Args:
        shape: of the engine's encoder.
        model: sizes of the decoder.
    """

    def __init__(self, shape: EncoderShape, model: ModelSettings) -> None:
        super().__init__()
        self.shape = shape
        D, E = shape.width, model.decoder_width
        self.patches = {"image": (shape.image_patch,) * 2, "volume": (shape.volume_patch,) * 3}
        grids: dict[str, tuple[int, ...]] = {"image": shape.image_grid, "volume": shape.volume_grid}
        channels = {"image": shape.channels, "volume": 1}
        self.embeddings = nn.ModuleDict(
            {kind: Embeddings(channels[kind], self.patches[kind], grids[kind], D) for kind in grids}
        )
        self.norm, self.cls = nn.LayerNorm(D), nn.Parameter(torch.zeros(1, 1, D))
        self.blocks = nn.ModuleList(EncoderBlock(D, shape.heads, shape.ffn) for _ in range(shape.depth))
        if shape.vocab:
            self.words, self.word_norm = nn.Embedding(shape.vocab, D), nn.LayerNorm(D)
            self.word_positions = nn.Parameter(torch.zeros(shape.text_positions, D))
            self.word_type = nn.Parameter(torch.zeros(D))
            self.transform = nn.Sequential(nn.Linear(D, D), nn.GELU(), nn.LayerNorm(D, eps=1e-12))
            self.vocabulary = nn.Linear(D, shape.vocab, bias=False)
            self.vocabulary_bias = nn.Parameter(torch.zeros(shape.vocab))
        self.decoder_embed, self.mask_token = nn.Linear(D, E), nn.Parameter(torch.zeros(1, 1, E))
        self.decoder_blocks = nn.ModuleList(
            DecoderBlock(E, model.decoder_heads) for _ in range(model.decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(E, eps=1e-6)
        self.predict = nn.ModuleDict(
            {kind: nn.Linear(E, math.prod(self.patches[kind]) * channels[kind]) for kind in grids}
        )
        for kind, grid in grids.items():
            table = torch.cat([torch.zeros(1, E), sin_cos_table(grid, E)])
            self.register_buffer(f"positions_{kind}", table, persistent=False)

    def encode_images(self, kind: str, pixels: Tensor, visible_BK: Tensor | None, keep: Tensor) -> Tensor:
        """Return features [B, 1 + K, D], CLS first; of all patches where `visible_BK` is None."""
        x_BLD = self.norm(self.embeddings[kind](pixels))
        if visible_BK is not None:
            x_BLD = torch.gather(x_BLD, 1, visible_BK.unsqueeze(-1).repeat(1, 1, x_BLD.shape[-1]))
        x_BLD = torch.cat([self.cls.expand(len(x_BLD), -1, -1).to(x_BLD.dtype), x_BLD], dim=1)
        return self._run_blocks(x_BLD, None, keep)

    def encode_texts(self, texts: Texts) -> Tensor:
        """Return features [B, L, D], padding included."""
        L = texts.ids_BL.shape[1]
        x_BLD = self.words(texts.ids_BL) + self.word_positions[:L] + self.word_type
        hidden_B1L = (1.0 - texts.valid_BL[:, None, :].float()) * HIDDEN
        mask = hidden_B1L.repeat(1, L, 1).repeat_interleave(self.shape.heads, 0)
        return self._run_blocks(self.word_norm(x_BLD), mask, texts.keep)

    def _run_blocks(self, x_BLD: Tensor, mask: Tensor | None, keep: Tensor) -> Tensor:
        for number, block in enumerate(self.blocks):
            x_BLD = block(x_BLD, mask, keep[:, 2 * number : 2 * number + 2])
        return x_BLD

    def image_loss(self, images: Images) -> Tensor:
        """Return the mean over masked patches of the squared error in normalised pixels."""
        features_BND = self.encode_images(images.kind, images.pixels, images.visible_BK, images.keep)
        x_BNE = self.decoder_embed(features_BND)
        (B, _, E), M = x_BNE.shape, images.masked_BM.shape[1]
        restore_BL = torch.argsort(torch.cat([images.visible_BK, images.masked_BM], dim=1), dim=1)
        mask_tokens = self.mask_token.repeat(B, M, 1).to(x_BNE.dtype)
        x_BLE = torch.cat([x_BNE[:, 1:], mask_tokens], dim=1)
        x_BLE = torch.gather(x_BLE, 1, restore_BL.unsqueeze(-1).repeat(1, 1, E))
        x_BLE = torch.cat([x_BNE[:, :1], x_BLE], dim=1) + getattr(self, f"positions_{images.kind}")
        for block in self.decoder_blocks:
            x_BLE = block(x_BLE)
        predicted_BLP = self.predict[images.kind](self.decoder_norm(x_BLE))[:, 1:]
        target_BLP = patchify(images.pixels, self.patches[images.kind])
        mean, variance = target_BLP.mean(-1, keepdim=True), target_BLP.var(-1, keepdim=True)
        target_BLP = (target_BLP - mean) / (variance + 1e-6) ** 0.5
        loss_BL = ((predicted_BLP - target_BLP) ** 2).mean(-1)
        masked_BL = torch.zeros_like(loss_BL).scatter_(1, images.masked_BM, 1.0)
        return (loss_BL * masked_BL).sum() / masked_BL.sum()

    def word_loss(self, texts: Texts) -> Tensor:
        """Return the mean cross-entropy of the scored words, from the logits of all of them."""
        logits = self.vocabulary(self.transform(self.encode_texts(texts))) + self.vocabulary_bias
        chances = F.log_softmax(logits.flatten(0, 1), dim=-1)
        return F.nll_loss(chances, texts.labels_BL.flatten(), ignore_index=-100)

    def features(self, inputs: Inputs) -> Tensor:
        """Return what distillation compares; mixes whole images where they have partners."""
        if isinstance(inputs, Texts):
            return self.encode_texts(inputs)
        return self.encode_images(inputs.kind, mixed(inputs), inputs.visible_BK, inputs.keep)

    def embed(self, inputs: Inputs) -> Tensor:
        """Return fp32 [B, D]: the mean over real tokens, or over all patches without CLS; nothing is masked."""
        if isinstance(inputs, Images):
            return self.encode_images(inputs.kind, inputs.pixels, None, inputs.keep)[:, 1:].float().mean(1)
        valid_BL1 = inputs.valid_BL[..., None].float()
        return (self.encode_texts(inputs).float() * valid_BL1).sum(1) / valid_BL1.sum(1)

    @torch.no_grad()
    def load_ours(self, weights: Mapping[str, Tensor]) -> None:
        """Take the engine's weights, fp32 by name as `Engine.full_weights` returns them.

        Raises:
            RuntimeError: a parameter of one has no counterpart in the other, or another size.
        """
        taken = {}
        for name, value in weights.items():
            ours = _OUR_NAMES.get(name) or _block_name(name)
            conv = name.startswith("encoder.tokenizers.") and name.endswith("project.weight")
            taken[ours] = self._kernel(name.split(".")[2], value) if conv else value
        for name, like in self.named_parameters():
            if name in taken and taken[name].numel() == like.numel():
                taken[name] = taken[name].reshape(like.shape)
        self.load_state_dict(taken)

    def _kernel(self, kind: str, weight_DP: Tensor) -> Tensor:
        """Return a convolution's weight; the engine's rows hold (row, column, channel) or (z, y, x)."""
        patch = self.patches[kind]
        blocks = weight_DP.view(len(weight_DP), *patch, -1)
        return blocks.permute(0, -1, *range(1, 1 + len(patch)))


def patchify(pixels: Tensor, patch: tuple[int, ...]) -> Tensor:
    """Return [B, L, P], the values of every patch in the order (row, column, channel) or (z, y, x)."""
    B, C = pixels.shape[:2]
    if len(patch) == 2:
        rows, columns = (size // edge for size, edge in zip(pixels.shape[2:], patch, strict=True))
        blocks = pixels.reshape(B, C, rows, patch[0], columns, patch[1])
        return torch.einsum("bchpwq->bhwpqc", blocks).reshape(B, rows * columns, -1)
    grid = [size // edge for size, edge in zip(pixels.shape[2:], patch, strict=True)]
    blocks = pixels.reshape(B, C, grid[0], patch[0], grid[1], patch[1], grid[2], patch[2])
    return torch.einsum("bctohpwq->bthwopqc", blocks).reshape(B, math.prod(grid), -1)


def mixed(images: Images) -> Tensor:
    """Return the pixels, of whole images mixed with their partners' where there are some."""
    if images.partner_B is None or images.weight_B is None:
        return images.pixels
    weight = images.weight_B.view(-1, *(1,) * (images.pixels.dim() - 1))
    return weight * images.pixels + (1.0 - weight) * images.pixels[images.partner_B]


def _drop_path(branch_BLD: Tensor, keep_B: Tensor) -> Tensor:
    return branch_BLD * keep_B.view(-1, 1, 1).to(branch_BLD.dtype)


_ENDS = {
    "attention.qkv.weight": "attention.in_proj_weight",
    "attention.qkv.bias": "attention.in_proj_bias",
    "attention.out": "attention.out_proj",
    "scale_1": "gamma_1",
    "scale_2": "gamma_2",
    "fc_1": "mlp.0",
    "fc_2": "mlp.2",
}
_OUR_NAMES = {
    "encoder.stem.cls": "cls",
    "encoder.tokenizers.text.position": "word_positions",
    "encoder.tokenizers.text.token_type": "word_type",
    "encoder.tokenizers.text.embedding.weight": "words.weight",
    "image_decoder.stem.mask_token": "mask_token",
    "word_head.words.weight": "vocabulary.weight",
    "word_head.words.bias": "vocabulary_bias",
}
_BEGINNINGS = {
    "encoder.stem.norm.": "norm.",
    "encoder.tokenizers.text.norm.": "word_norm.",
    "encoder.tokenizers.": "embeddings.",
    "encoder.blocks.": "blocks.",
    "image_decoder.stem.project.": "decoder_embed.",
    "image_decoder.blocks.": "decoder_blocks.",
    "image_decoder.norm.": "decoder_norm.",
    "image_decoder.heads.": "predict.",
    "word_head.transform.": "transform.0.",
    "word_head.norm.": "transform.2.",
}


def _block_name(name: str) -> str:
    """Return the reference's name of a parameter that stands in no table of its own."""
    begin = next((begin for begin in _BEGINNINGS if name.startswith(begin)), None)
    if begin is None:
        raise RuntimeError(f"the reference has no counterpart of {name}; give step_reference._OUR_NAMES one")
    rest = name.removeprefix(begin)
    if begin == "encoder.tokenizers.":
        return _BEGINNINGS[begin] + rest.replace("position", "spatial").replace("depth", "temporal")
    if begin == "image_decoder.blocks.":
        ends = {"attention.qkv": "qkv", "attention.out": "out", "fc_1": "mlp.0", "fc_2": "mlp.2"}
    else:
        ends = _ENDS if begin == "encoder.blocks." else {}
    for ours, theirs in ends.items():
        rest = rest.replace(ours, theirs)
    return _BEGINNINGS[begin] + rest
