"""The model of a stage: its encoder from the stage before, everything else fresh."""

from pathlib import Path

import torch

from mnemos.engine.curriculum import Plan, Stage
from mnemos.engine.encoder import Encoder, EncoderShape
from mnemos.engine.objectives import Pretrainer
from mnemos.engine.weights import read_weights
from mnemos.kernels.counter_rng import stream_key
from mnemos.sharding.modalities import STORED_SIZES
from mnemos.sharding.reader import tokenizer_file
from mnemos.sharding.stores.storage import open_store

OFFICIAL_VOCAB = 49_411  # rows of the authors' word table, whatever the tokenizer


def encoder_shape(plan: Plan) -> EncoderShape:
    """Return the encoder's shape: sizes from the settings, the vocabulary from the texts among the plan's stages."""
    model, stored = plan.settings.model, STORED_SIZES[plan.settings.preset]
    (rows, columns), (depth, height, width) = stored.image, stored.volume
    tokenizers = [stage.manifest.tokenizer for stage in plan.stages if stage.manifest.tokenizer is not None]
    return EncoderShape(
        width=model.width,
        depth=model.depth,
        heads=model.heads,
        ffn=model.ffn,
        layer_scale=model.layer_scale,
        drop_path=model.drop_path,
        image_patch=model.image_patch,
        volume_patch=model.volume_patch,
        image_grid=(rows // model.image_patch, columns // model.image_patch),
        volume_grid=(depth // model.volume_patch, height // model.volume_patch, width // model.volume_patch),
        vocab=OFFICIAL_VOCAB if model.official else tokenizers[0].vocab_size if tokenizers else 0,
        text_positions=model.text_positions,
        official=model.official,
    )


def make_model(plan: Plan, stage: Stage, shape: EncoderShape) -> Pretrainer:
    """Return the stage's model: the encoder of the stage before, everything else fresh, the same on every rank."""
    torch.manual_seed(stream_key(plan.settings.training.seed, stage.name, "weights") % (1 << 63))
    training = plan.settings.training
    encoder = Encoder(shape, recompute=training.recompute, attention=training.attention)
    model = Pretrainer(encoder, plan.settings)
    if stage.number > 1:
        weights = read_weights(plan.stages[stage.number - 2].directory)
        missing, unexpected = model.encoder.load_state_dict(weights, strict=False)
        foreign = [name for name in missing if not name.startswith("tokenizers.")]
        assert not foreign and not unexpected, (
            f"weights of the stage before do not fit: {foreign} {unexpected}"
        )
    return model


def text_tokenizer(plan: Plan) -> Path | None:
    """Return the tokenizer file of the texts among the plan's stages."""
    for stage in plan.stages:
        if stage.manifest.tokenizer is not None:
            return tokenizer_file(open_store(stage.data or stage.buffer, plan.store), stage.manifest)
    return None
