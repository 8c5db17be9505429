"""What a step computes: batches made ready on the device, and the model with its two losses.

Everything random is keyed by the sample's place in the global order (`mnemos.kernels.counter_rng`), so that a sample
meets the same mask, crop, partner and DropPath on any number of ranks and in any micro-batch.

Source of the objectives: Ye et al., CVPR 2024 (MedCoSS), section 3; He et al., 2021 (MAE), section 3.

Shape suffixes: B samples, K visible, M masked, L patches or token positions, S scored positions, D width, P values a
patch, V vocabulary.
"""

import math
from dataclasses import dataclass, fields, replace
from typing import Literal, Self

import torch
from torch import Tensor, nn

from mnemos.engine.augmentation import mirror_flags, mixing_partner, mixing_weight, random_resized_crop
from mnemos.engine.decoder import ImageDecoder, WordHead
from mnemos.engine.encoder import Encoder, EncoderShape, ImageKind
from mnemos.engine.patches import patch_grid
from mnemos.engine.settings import Settings
from mnemos.kernels.counter_rng import stream_key, uniform
from mnemos.kernels.feature_mse import feature_mse
from mnemos.kernels.gather_patches import gather_patches
from mnemos.kernels.gather_tokens import gather_tokens
from mnemos.kernels.masked_patch_mse import masked_patch_mse
from mnemos.kernels.random_patch_ids import random_patch_ids
from mnemos.sharding.manifest import Manifest
from mnemos.sharding.tokenizer import MASK, PAD, SPECIAL_TOKENS

Phase = Literal["pretext", "rehearsal"]
# places kept for scored tokens, as a share of the longest text; 15 % of the words pass it once in 1,000
SCORED_SHARE = 0.35


@dataclass(frozen=True, kw_only=True)
class _Rows:
    """A batch whose tensors share the first axis."""

    keep: Tensor | None = None  # [B, 2 * depth] DropPath factors

    def rows(self, start: int, stop: int) -> Self:
        """Return the part of the batch from row `start` up to `stop`."""
        parts = {
            field.name: value[start:stop]
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return replace(self, **parts)  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class ImageRows(_Rows):
    """Images or volumes with their masks.

    Attributes:
        images: raw values [B, C, Y, X] or [B, 1, Z, Y, X], uint8 or int16.
        scale_B, shift_B: model value = raw * scale + shift.
        visible_BK, masked_BM: int64 patch places, ascending.
        flip_BA: bool, axes to mirror; None for none.
        partner_B: int64 row of the other sample of a mixup pair; None for no mixture.
        weight_B: share of the sample itself in the mixture; None for no mixture.
    """

    kind: ImageKind
    images: Tensor
    scale_B: Tensor
    shift_B: Tensor
    visible_BK: Tensor
    masked_BM: Tensor
    flip_BA: Tensor | None = None
    partner_B: Tensor | None = None
    weight_B: Tensor | None = None

    @property
    def num_samples(self) -> int:
        return self.images.shape[0]

    def rows(self, start: int, stop: int) -> Self:
        """Return rows `start` to `stop`; partners lie within runs that are never cut, so they only shift."""
        part = super().rows(start, stop)
        return part if part.partner_B is None else replace(part, partner_B=part.partner_B - start)


@dataclass(frozen=True, kw_only=True)
class TextRows(_Rows):
    """Token sequences.

    Attributes:
        ids_BL: int64 inputs, already corrupted in the pretext phase.
        valid_BL: bool, real tokens.
        scored_BS: int64 positions to predict, padded; labels_BS: their ids, -100 where padded. None in rehearsal.
    """

    ids_BL: Tensor
    valid_BL: Tensor
    scored_BS: Tensor | None = None
    labels_BS: Tensor | None = None

    @property
    def num_samples(self) -> int:
        return self.ids_BL.shape[0]


Rows = ImageRows | TextRows


class Preparer:
    """Make raw batches ready on their device: crops, flips, masks, partners, word masks; no host synchronisation."""

    def __init__(
        self, settings: Settings, shape: EncoderShape, starts_word_V: Tensor | None, *, stream: str
    ) -> None:
        """Take what is fixed for a stage; `stream` names it in every random key."""
        self.settings = settings
        self.shape = shape
        self.starts_word_V = starts_word_V
        self.stream = stream

    def _key(self, purpose: str) -> int:
        return stream_key(self.settings.training.seed, self.stream, purpose)

    def _keep(self, place_B: Tensor, training: bool) -> Tensor | None:
        rate = self.shape.drop_path
        if not training or rate == 0:
            return None
        kept = uniform(self._key("drop_path"), place_B, 2 * self.shape.depth) >= rate
        return kept.float() / (1.0 - rate)

    def images(self, manifest: Manifest, raw: "RawImages", *, phase: Phase, training: bool) -> ImageRows:
        """Return the batch for one phase; validation (training=False) neither crops, mirrors nor drops."""
        kind: ImageKind = "image" if manifest.kind == "image" else "volume"
        images, place_B = raw.images, raw.place_B
        flip_BA = None
        if training and phase == "pretext" and manifest.augment == "crop":
            least = self.settings.training.crop_area
            images = random_resized_crop(images, place_B, key=self._key("crop"), scale=(least, 1.0))
        if training and phase == "pretext" and manifest.augment == "mirror":
            flip_BA = mirror_flags(place_B, key=self._key("mirror"), num_axes=images.ndim - 2)
        num_patches = math.prod(patch_grid(images.shape[2:], patch_edges(self.shape, kind)[0]))
        num_visible = max(1, int((1.0 - self.settings.training.mask_ratio) * num_patches))
        visible_BK, masked_BM = random_patch_ids(place_B, num_patches, num_visible, key=self._key("mask"))
        partner_B = weight_B = None
        if phase == "rehearsal" and self.settings.rehearsal.mixup:
            partner_B = mixing_partner(
                place_B, key=self._key("partner"), group=self.settings.rehearsal.mix_group
            )
            weight_B = mixing_weight(place_B, key=self._key("mixture"))
        elif self.settings.training.shuffle_visible:
            partner_B = next_partner(len(place_B), self.settings.rehearsal.mix_group, place_B.device)
            weight_B = torch.zeros_like(raw.scale_B)
        return ImageRows(
            kind=kind,
            images=images,
            scale_B=raw.scale_B,
            shift_B=raw.shift_B,
            visible_BK=visible_BK,
            masked_BM=masked_BM,
            flip_BA=flip_BA,
            partner_B=partner_B,
            weight_B=weight_B,
            keep=self._keep(place_B, training),
        )

    def texts(self, manifest: Manifest, raw: "RawTexts", *, phase: Phase, training: bool) -> TextRows:
        """Return the batch for one phase: words masked (pretext) or sequences mixed (rehearsal)."""
        keep = self._keep(raw.place_B, training)
        valid_BL = raw.ids_BL != PAD
        if phase == "pretext":
            return self._mask_words(raw, valid_BL, keep, longest=manifest.shape[0])
        ids_BL = raw.ids_BL
        if self.settings.rehearsal.mixup:
            partner_B = mixing_partner(
                raw.place_B, key=self._key("partner"), group=self.settings.rehearsal.mix_group
            )
            step_B = raw.place_B // self.settings.training.batch  # one share for the whole global batch
            share_B1 = uniform(self._key("share"), step_B, 1)
            own_BL = uniform(self._key("source"), raw.place_B, ids_BL.shape[1]) < share_B1
            valid_BL = torch.where(own_BL, valid_BL, valid_BL[partner_B])
            ids_BL = torch.where(own_BL, ids_BL, ids_BL[partner_B])
        return TextRows(ids_BL=ids_BL, valid_BL=valid_BL, keep=keep)

    def _mask_words(
        self, raw: "RawTexts", valid_BL: Tensor, keep: Tensor | None, *, longest: int
    ) -> TextRows:
        ids_BL, place_B = raw.ids_BL, raw.place_B
        assert self.starts_word_V is not None
        length = ids_BL.shape[1]
        starts_BL = self.starts_word_V[ids_BL] & valid_BL
        starts_BL[:, 0] = True
        word_BL = starts_BL.cumsum(1) - 1
        chance_BL = uniform(self._key("word"), place_B, length)  # row w: the chance of word w
        chance_BL = torch.where(word_BL[:, -1:] >= torch.arange(length, device=ids_BL.device), chance_BL, 2.0)
        chosen_BL = (chance_BL < self.settings.training.word_ratio) | (
            chance_BL == chance_BL.amin(1, keepdim=True)
        )
        scored_BL = chosen_BL.gather(1, word_BL) & valid_BL
        num_scored = min(length, math.ceil(SCORED_SHARE * longest))  # of the set, not of this rank's batch
        scored_BL &= scored_BL.cumsum(1) <= num_scored
        place_BL = torch.arange(length, device=ids_BL.device).expand_as(ids_BL)
        scored_BS = torch.where(scored_BL, place_BL, place_BL + length).argsort(1)[:, :num_scored]
        labels_BS = torch.where(scored_BL.gather(1, scored_BS), ids_BL.gather(1, scored_BS), -100)
        fate_BL = uniform(self._key("fate"), place_B, length)  # 80 % [MASK], 10 % random, 10 % kept
        num_special = len(SPECIAL_TOKENS)
        drawn_BL = num_special + (
            uniform(self._key("random_word"), place_B, length) * (len(self.starts_word_V) - num_special)
        ).to(ids_BL.dtype)
        corrupted_BL = torch.where(fate_BL < 0.8, MASK, torch.where(fate_BL < 0.9, drawn_BL, ids_BL))
        return TextRows(
            ids_BL=torch.where(scored_BL, corrupted_BL, ids_BL),
            valid_BL=valid_BL,
            scored_BS=scored_BS,
            labels_BS=labels_BS,
            keep=keep,
        )


@dataclass(frozen=True, kw_only=True)
class RawImages:
    """Images or volumes as stored, on the device: images uint8/int16, scale and shift fp32 [B], places int64 [B]."""

    images: Tensor
    scale_B: Tensor
    shift_B: Tensor
    place_B: Tensor


@dataclass(frozen=True, kw_only=True)
class RawTexts:
    """Token ids int64 [B, L], padded with PAD, and places int64 [B], on the device."""

    ids_BL: Tensor
    place_B: Tensor


def next_partner(rows: int, group: int, device: torch.device) -> Tensor:
    """Return int64 [rows]: the next row of the same run of `group` rows, the run's first for its last."""
    row_B = torch.arange(rows, device=device)
    next_B = row_B + 1
    return torch.where((next_B % group == 0) | (next_B == rows), row_B // group * group, next_B)


def patch_edges(shape: EncoderShape, kind: str) -> tuple[tuple[int, ...], int]:
    """Return a patch's edges, (y, x) or (z, y, x), and the channels it holds once grey is broadcast."""
    return ((shape.image_patch,) * 2, shape.channels) if kind == "image" else ((shape.volume_patch,) * 3, 1)


def visible_patches(shape: EncoderShape, rows: ImageRows, dtype: torch.dtype) -> Tensor:
    """Return the model values [B, K, P] of the visible patches, mixed with the partner's where there is one."""
    patch, channels = patch_edges(shape, rows.kind)
    return gather_patches(
        rows.images,
        rows.visible_BK,
        patch=patch,
        channels=channels,
        scale_B=rows.scale_B,
        shift_B=rows.shift_B,
        flip_BA=rows.flip_BA,
        partner_B=rows.partner_B,
        weight_B=rows.weight_B,
        dtype=dtype,
    )


def encode(encoder: Encoder, rows: Rows, patches_BKP: Tensor | None) -> Tensor:
    """Return the encoder's features of a batch: [B, 1 + K, D] for images and volumes, [B, L, D] for texts."""
    if isinstance(rows, TextRows):
        return encoder.forward_text(rows.ids_BL, rows.valid_BL, rows.keep)
    assert patches_BKP is not None
    grid = patch_grid(rows.images.shape[2:], patch_edges(encoder.shape, rows.kind)[0])
    return encoder.forward_patches(rows.kind, patches_BKP, rows.visible_BK, grid, rows.keep)


class Pretrainer(nn.Module):
    """The encoder with what trains it. Its forward gives one micro-batch's loss as a sum."""

    def __init__(self, encoder: Encoder, settings: Settings) -> None:
        super().__init__()
        shape, model = encoder.shape, settings.model
        self.encoder = encoder
        self.image_decoder = ImageDecoder(
            shape.width,
            model.decoder_width,
            model.decoder_depth,
            model.decoder_heads,
            grids={"image": shape.image_grid, "volume": shape.volume_grid},
            values={"image": shape.image_patch**2 * shape.channels, "volume": shape.volume_patch**3},
            official=shape.official,
        )
        if shape.vocab:
            self.word_head = WordHead(shape.width, shape.vocab, official=shape.official)

    def forward(
        self, rows: Rows, patches_BKP: Tensor | None = None, target_BND: Tensor | None = None
    ) -> Tensor:
        """Return the fp32 sum of one micro-batch's losses.

        Without a target, the pretext loss: summed over masked patches (mean over a patch's values) or over scored
        words. With a target, the teacher's features, the distillation loss: summed over CLS and visible tokens, or
        over real text tokens (mean over the width).
        """
        features_BND = encode(self.encoder, rows, patches_BKP)
        if target_BND is not None:
            return feature_mse(
                features_BND, target_BND, rows.valid_BL if isinstance(rows, TextRows) else None
            )
        if isinstance(rows, TextRows):
            assert rows.scored_BS is not None and rows.labels_BS is not None
            scored_BSD = gather_tokens(features_BND, rows.scored_BS)
            loss: Tensor = self.word_head(scored_BSD.flatten(0, 1), rows.labels_BS.flatten())
            return loss
        patch, channels = patch_edges(self.encoder.shape, rows.kind)
        return masked_patch_mse(
            self.predict(rows, features_BND),
            rows.images,
            rows.masked_BM,
            patch=patch,
            channels=channels,
            scale_B=rows.scale_B,
            shift_B=rows.shift_B,
            flip_BA=rows.flip_BA,
        )

    def predict(self, rows: ImageRows, features_BND: Tensor) -> Tensor:
        """Return the decoder's predictions [B, M, P], in normalised patch units."""
        prediction: Tensor = self.image_decoder(rows.kind, features_BND, rows.visible_BK, rows.masked_BM)
        return prediction


def local_count(rows: Rows, phase: Phase) -> Tensor | int:
    """Return how many terms this rank's part of a loss has: an int where shapes tell, else a device scalar."""
    if isinstance(rows, ImageRows):
        per_sample = rows.masked_BM.shape[1] if phase == "pretext" else 1 + rows.visible_BK.shape[1]
        return rows.num_samples * per_sample
    if phase == "pretext":
        assert rows.labels_BS is not None
        return (rows.labels_BS != -100).sum()
    return rows.valid_BL.sum()
