"""Shard sets of every modality, made in a second: a few seeded smooth samples of the sample preset's size."""

from collections.abc import Iterable
from functools import reduce
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from mnemos.engine.data_root import find_shard_sets
from mnemos.engine.settings import Settings, parse_assignment, resolve
from mnemos.sharding.manifest import load_manifest
from mnemos.sharding.modalities import MODALITIES, STORED_SIZES, Modality
from mnemos.sharding.sample import Sample
from mnemos.sharding.tokenizer import train_tokenizer
from mnemos.sharding.writer import ShardSetWriter

if TYPE_CHECKING:
    from mnemos.engine.encoder import EncoderShape

KEY = b"a key for tests, sixteen bytes or more"
WORDS = [
    "the",
    "heart",
    "is",
    "normal",
    "in",
    "size",
    "no",
    "effusion",
    "pneumothorax",
    "seen",
    "lungs",
    "are",
    "clear",
    "left",
    "right",
    "lower",
    "upper",
    "lobe",
    "opacity",
    "mild",
    "cardiomegaly",
    "unchanged",
    "atelectasis",
    "bibasilar",
    "consolidation",
    "suspected",
]
TINY = [  # a model and a recipe that take seconds, as --set takes them
    "model.width=32",
    "model.depth=2",
    "model.heads=2",
    "model.ffn=64",
    "model.decoder_width=32",
    "model.decoder_depth=1",
    "model.decoder_heads=2",
    "training.batch=8",
    "training.steps=3",
    "training.log_every=2",
    "training.precision=fp32",
    "rehearsal.mix_group=4",
]


def make_tiny_sets(folder: Path, *, samples: int = 32, modalities: Iterable[str] | None = None) -> Path:
    """Write one shard set for each modality below `folder`, named as the modality; return the folder.

    Args:
        folder: where; made if missing.
        samples: of the training split; a quarter as many validate. Two samples in a row share a group.
        modalities: names; all by default.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer_file = folder / ".tokenizer.json"  # hidden: it is copied into the set of texts
    train_tokenizer((_text(number) for number in range(64)), 300).save(str(tokenizer_file))
    for name in modalities or MODALITIES:
        _make_set(folder / name, MODALITIES[name], samples, tokenizer_file)
    return folder


def _make_set(folder: Path, modality: Modality, samples: int, tokenizer_file: Path) -> None:
    size = STORED_SIZES["sample"]
    shape = {"text": (size.text,), "image": size.image, "volume": size.volume}[modality.kind]
    with ShardSetWriter(
        folder,
        modality=modality,
        source="synthetic",
        shape=shape,
        spacing_mm=size.spacing_mm if modality.kind == "volume" else None,
        preset="sample",
        classes=("healthy", "ill"),
        recipe={"made": "seeded waves for tests"},
        key=KEY,
        tokenizer_file=tokenizer_file if modality.kind == "text" else None,
        lossless=True,
    ) as writer:
        for number in range(samples + samples // 4):
            split = "train" if number < samples else "val"
            writer.add(split, _sample(modality, shape, number))


def _sample(modality: Modality, shape: tuple[int, ...], number: int) -> Sample:
    common = {
        "source": f"{modality.name}-{number}",
        "group": f"patient-{number // 2}",
        "label": "ill" if number % 2 else "healthy",
    }
    if modality.kind == "text":
        return Sample(array=_text(number), **common)
    seed = np.random.SeedSequence([number, *modality.name.encode()])
    random = np.random.default_rng(seed)
    if modality.kind == "image":
        waves = np.stack([_waves(shape, random) for _ in range(modality.channels)])
        return Sample(array=np.round(127 + 60 * waves).astype(np.uint8), scale=1 / 255, **common)
    values = np.round(400 * _waves(shape, random)).astype(np.int16)
    scale = 1 / 1024 if modality.values == "hounsfield" else 1 / 400
    shift = 0.0 if modality.values == "hounsfield" else -0.1
    return Sample(array=values, scale=scale, shift=shift, **common)


def _waves(shape: tuple[int, ...], random: np.random.Generator) -> np.ndarray:
    """Return values within -2..2: the sum of two products of waves along the axes."""
    field = np.zeros(shape)
    for _ in range(2):
        waves = [
            np.cos(np.linspace(0, np.pi * random.uniform(0.5, 6), size) + random.uniform(0, 6))
            for size in shape
        ]
        field += reduce(np.multiply.outer, waves)
    return field


def _text(number: int) -> str:
    """Return 4 to 40 words."""
    random = np.random.default_rng([7, number])
    return " ".join(random.choice(WORDS, size=random.integers(4, 41)))


def tiny_settings(**overrides: object) -> Settings:
    """Return the settings of `TINY`; overrides are written with two underscores for the dot."""
    flat = dict(parse_assignment(text) for text in TINY)
    return resolve("sample", {**flat, **{key.replace("__", "."): value for key, value in overrides.items()}})


def shape_of(settings: Settings, sets: Path | None = None) -> "EncoderShape":
    """Return the encoder's shape under some settings, with the texts of `sets` where given."""
    from mnemos.engine.stage_model import encoder_shape

    manifests = [load_manifest(path) for path in find_shard_sets(sets).values()] if sets else []
    stages = [SimpleNamespace(manifest=manifest) for manifest in manifests]
    return encoder_shape(cast(Any, SimpleNamespace(settings=settings, stages=stages)))
