"""What a step computes: the model with its two losses.

Source: Ye et al., CVPR 2024 (MedCoSS), section 3; He et al., 2021 (MAE), section 3.

Shape suffixes: B samples, K visible, M masked patches, T = tokens of a packed batch of texts, S = scored words, D width,
P values a patch.
"""

import torch
from torch import Tensor, nn

from mnemos.engine.decoder import ImageDecoder, WordHead
from mnemos.engine.encoder import Encoder, EncoderShape, patch_edges
from mnemos.engine.patches import patch_grid
from mnemos.engine.preparing import ImageRows, Phase, Rows, TextRows
from mnemos.engine.settings import Settings
from mnemos.kernels.feature_mse import feature_mse
from mnemos.kernels.gather_patches import gather_patches
from mnemos.kernels.gather_tokens import gather_tokens
from mnemos.kernels.masked_patch_mse import masked_patch_mse


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
    """Return the encoder's features of a batch: [B, 1 + K, D] for images and volumes, [1, T, D] for texts."""
    if isinstance(rows, TextRows):
        return encoder.forward_text(rows.ids_T, rows.position_T, rows.packing, rows.keep)
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
            attention=settings.training.attention,
        )
        if shape.vocab:
            self.word_head = WordHead(shape.width, shape.vocab, official=shape.official)

    def forward(
        self,
        rows: Rows,
        patches_BKP: Tensor | None = None,
        target: Tensor | None = None,
        factor: Tensor | None = None,
    ) -> Tensor:
        """Return factor * the fp32 sum of one micro-batch's losses; factor None is 1.

        Without a target, the pretext loss: summed over masked patches (mean over a patch's values) or over scored
        words. With a target, the teacher's features, the distillation loss: summed over CLS and visible tokens, or
        over text tokens (mean over the width).
        """
        features = encode(self.encoder, rows, patches_BKP)
        if target is not None:
            return feature_mse(features, target, factor)
        if isinstance(rows, TextRows):
            assert rows.scored_S is not None and rows.labels_S is not None
            loss: Tensor = self.word_head(
                gather_tokens(features, rows.scored_S[None])[0], rows.labels_S, factor
            )
            return loss
        patch, channels = patch_edges(self.encoder.shape, rows.kind)
        return masked_patch_mse(
            self.predict(rows, features),
            rows.images,
            rows.masked_BM,
            patch=patch,
            channels=channels,
            scale_B=rows.scale_B,
            shift_B=rows.shift_B,
            flip_BA=rows.flip_BA,
            factor=factor,
        )

    def predict(self, rows: ImageRows, features_BND: Tensor) -> Tensor:
        """Return the decoder's predictions [B, M, P], in normalised patch units."""
        prediction: Tensor = self.image_decoder(rows.kind, features_BND, rows.visible_BK, rows.masked_BM)
        return prediction


def local_count(rows: Rows, phase: Phase) -> int:
    """Return how many terms this rank's part of a loss has."""
    if isinstance(rows, ImageRows):
        per_sample = rows.masked_BM.shape[1] if phase == "pretext" else 1 + rows.visible_BK.shape[1]
        return rows.num_samples * per_sample
    if phase == "rehearsal":
        return rows.ids_T.shape[0]
    assert rows.labels_S is not None
    return rows.labels_S.shape[0]
