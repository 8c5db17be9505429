"""Batches made ready for a step: crops, flips, masks, mixing partners; texts with their words masked, and packed.

Everything random is keyed by the sample's place in the global order (`mnemos.kernels.counter_rng`), so that a sample
meets the same mask, crop, partner and DropPath on any number of ranks and in any micro-batch. Images and volumes are made
ready on the device. Texts are made ready on the host, by the reading processes where there are any: how many tokens and
how many scored words a packed batch has must be known there, or a step would have to wait for the device.

Source of the objectives: Ye et al., CVPR 2024 (MedCoSS), section 3; He et al., 2021 (MAE), section 3.

Shape suffixes: B samples, L token positions, T = tokens of a packed batch, S = scored words, K visible, M masked patches,
A axes, V vocabulary.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Self

import torch
from torch import Tensor

from mnemos.engine.augmentation import mirror_flags, mixing_partner, mixing_weight, random_resized_crop
from mnemos.engine.encoder import EncoderShape, ImageKind, patch_edges
from mnemos.engine.patches import patch_grid
from mnemos.engine.settings import Settings
from mnemos.kernels.counter_rng import stream_key, uniform
from mnemos.kernels.packing import Packing
from mnemos.kernels.random_patch_ids import random_patch_ids
from mnemos.sharding.manifest import Manifest
from mnemos.sharding.stream import RawBatch
from mnemos.sharding.tokenizer import MASK, PAD, SPECIAL_TOKENS

Phase = Literal["pretext", "rehearsal"]


@dataclass(frozen=True, kw_only=True)
class _Rows:
    """A batch made ready."""

    keep: Tensor | None = None  # [B, 2 * depth] DropPath factors

    def to(self, device: torch.device) -> Self:
        """Return the batch on a device, copied without waiting."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Self:
        """Return the batch in page-locked memory (called by the loader)."""
        return self._each(lambda tensor: tensor.pin_memory())

    def _each(self, change: Callable[[Tensor], Tensor]) -> Self:
        tensors = {
            field.name: change(value)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return replace(self, **tensors)  # type: ignore[arg-type]


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
        """Return samples `start` to `stop`; partners lie within runs that are never cut, so they only shift."""
        part = self._each(lambda tensor: tensor[start:stop])
        return part if part.partner_B is None else replace(part, partner_B=part.partner_B - start)


@dataclass(frozen=True, kw_only=True)
class TextRows(_Rows):
    """Texts one after the other, without padding.

    Attributes:
        ids_T: int64 token ids, already corrupted in the pretext phase.
        position_T: int64 place of each token in its text.
        offsets_B1: int32, where each text begins, and the end.
        bounds: the same on the host.
        scored_S: int64 rows of `ids_T` to predict, text by text; labels_S: their ids. None in rehearsal.
        scored_bounds: where each text's scored words begin in `scored_S`, and the end; on the host.
    """

    ids_T: Tensor
    position_T: Tensor
    offsets_B1: Tensor
    bounds: tuple[int, ...]
    scored_S: Tensor | None = None
    labels_S: Tensor | None = None
    scored_bounds: tuple[int, ...] = ()

    @property
    def num_samples(self) -> int:
        return len(self.bounds) - 1

    @property
    def packing(self) -> Packing:
        """Where the texts lie, as attention wants it."""
        longest = max(end - begin for begin, end in zip(self.bounds, self.bounds[1:], strict=False))
        return Packing(offsets_B1=self.offsets_B1, longest=longest)

    def rows(self, start: int, stop: int) -> Self:
        """Return texts `start` to `stop`."""
        begin, end = self.bounds[start], self.bounds[stop]
        part = replace(
            self,
            ids_T=self.ids_T[begin:end],
            position_T=self.position_T[begin:end],
            offsets_B1=self.offsets_B1[start : stop + 1] - begin,
            bounds=tuple(bound - begin for bound in self.bounds[start : stop + 1]),
            keep=None if self.keep is None else self.keep[start:stop],
        )
        if self.scored_S is None or self.labels_S is None:
            return part
        first, last = self.scored_bounds[start], self.scored_bounds[stop]
        return replace(
            part,
            scored_S=self.scored_S[first:last] - begin,
            labels_S=self.labels_S[first:last],
            scored_bounds=tuple(bound - first for bound in self.scored_bounds[start : stop + 1]),
        )


Rows = ImageRows | TextRows


def pack_texts(ids_BL: Tensor, valid_BL: Tensor) -> TextRows:
    """Return the tokens where `valid_BL` is True, text by text; a kept token keeps its position. On the host."""
    position_BL = torch.arange(ids_BL.shape[1]).expand_as(ids_BL)
    bounds = _bounds(valid_BL)
    return TextRows(
        ids_T=ids_BL[valid_BL],
        position_T=position_BL[valid_BL],
        offsets_B1=torch.tensor(bounds, dtype=torch.int32),
        bounds=bounds,
    )


def _bounds(chosen_BL: Tensor) -> tuple[int, ...]:
    return (0, *chosen_BL.sum(1).cumsum(0).tolist())


class Preparer:
    """Make raw batches ready.

    Args:
        settings: of the run.
        shape: of the encoder.
        starts_word_V: bool, tokens that begin a word; None where there are no texts.
        stream: names the stage and the set in every random key.
    """

    def __init__(
        self, settings: Settings, shape: EncoderShape, starts_word_V: Tensor | None, *, stream: str
    ) -> None:
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

    def images(self, manifest: Manifest, raw: RawBatch, *, phase: Phase, training: bool) -> ImageRows:
        """Return images or volumes for one phase, on the device of the raw batch.

        Validation (training=False) neither crops, mirrors nor drops.
        """
        kind: ImageKind = "image" if manifest.kind == "image" else "volume"
        images, place_B = raw.data, raw.place_B
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
            partner_B = self._partner(place_B)
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

    def texts(self, raw: RawBatch, *, phase: Phase, training: bool) -> TextRows:
        """Return texts for one phase, on the host: words masked (pretext) or sequences mixed (rehearsal).

        In a mixture a token comes from the text itself or from its partner, and keeps its position; where that
        position is past the end of the chosen text, nothing stands.
        """
        ids_BL, place_B = raw.data, raw.place_B
        valid_BL = ids_BL != PAD
        keep = self._keep(place_B, training)
        if phase == "pretext":
            return replace(self._mask_words(ids_BL, valid_BL, place_B), keep=keep)
        if self.settings.rehearsal.mixup:
            partner_B = self._partner(place_B)
            step_B = place_B // self.settings.training.batch  # one share for the whole global batch
            share_B1 = uniform(self._key("share"), step_B, 1)
            own_BL = uniform(self._key("source"), place_B, ids_BL.shape[1]) < share_B1
            valid_BL = torch.where(own_BL, valid_BL, valid_BL[partner_B])
            ids_BL = torch.where(own_BL, ids_BL, ids_BL[partner_B])
        return replace(pack_texts(ids_BL, valid_BL), keep=keep)

    def _partner(self, place_B: Tensor) -> Tensor:
        return mixing_partner(place_B, key=self._key("partner"), group=self.settings.rehearsal.mix_group)

    def _mask_words(self, ids_BL: Tensor, valid_BL: Tensor, place_B: Tensor) -> TextRows:
        assert self.starts_word_V is not None
        length = ids_BL.shape[1]
        starts_BL = self.starts_word_V[ids_BL] & valid_BL
        starts_BL[:, 0] = True
        word_BL = starts_BL.cumsum(1) - 1
        chance_BL = uniform(self._key("word"), place_B, length)  # row w: the chance of word w
        chance_BL = torch.where(word_BL[:, -1:] >= torch.arange(length), chance_BL, 2.0)
        chosen_BL = (chance_BL < self.settings.training.word_ratio) | (
            chance_BL == chance_BL.amin(1, keepdim=True)
        )
        scored_BL = chosen_BL.gather(1, word_BL) & valid_BL
        fate_BL = uniform(self._key("fate"), place_B, length)  # 80 % [MASK], 10 % random, 10 % kept
        num_special = len(SPECIAL_TOKENS)
        drawn_BL = num_special + (
            uniform(self._key("random_word"), place_B, length) * (len(self.starts_word_V) - num_special)
        ).to(ids_BL.dtype)
        corrupted_BL = torch.where(fate_BL < 0.8, MASK, torch.where(fate_BL < 0.9, drawn_BL, ids_BL))
        row_BL = valid_BL.flatten().cumsum(0).view_as(valid_BL) - 1  # of a token in the packed batch
        return replace(
            pack_texts(torch.where(scored_BL, corrupted_BL, ids_BL), valid_BL),
            scored_S=row_BL[scored_BL],
            labels_S=ids_BL[scored_BL],
            scored_bounds=_bounds(scored_BL),
        )


@dataclass(frozen=True, kw_only=True)
class TextBatch:
    """What a reading process hands over of texts; `step` and `member` as in `RawBatch`."""

    step: int
    member: int
    rows: TextRows

    def to(self, device: torch.device) -> "TextBatch":
        """Return the batch on a device, copied without waiting."""
        return replace(self, rows=self.rows.to(device))

    def pin_memory(self) -> "TextBatch":
        """Return the batch in page-locked memory (called by the loader)."""
        return replace(self, rows=self.rows.pin_memory())


@dataclass(frozen=True, kw_only=True)
class TextsReady:
    """Make texts ready where they are read, and leave everything else as it is.

    Attributes:
        preparers: of every set a stage draws from.
        kinds: of the same sets.
        phases: of the same sets.
    """

    preparers: Sequence[Preparer]
    kinds: Sequence[str]
    phases: Sequence[Phase]

    def __call__(self, raw: RawBatch) -> Any:
        """Return a `TextBatch` of texts, else the raw batch."""
        if self.kinds[raw.member] != "text":
            return raw
        rows = self.preparers[raw.member].texts(raw, phase=self.phases[raw.member], training=True)
        return TextBatch(step=raw.step, member=raw.member, rows=rows)


def next_partner(rows: int, group: int, device: torch.device) -> Tensor:
    """Return int64 [rows]: the next row of the same run of `group` rows, the run's first for its last."""
    row_B = torch.arange(rows, device=device)
    next_B = row_B + 1
    return torch.where((next_B % group == 0) | (next_B == rows), row_B // group * group, next_B)
