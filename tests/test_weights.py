"""The encoder as a file: what is written comes back, and three lines give features."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny_data import shape_of, tiny_settings

from mnemos.engine.encoder import Encoder
from mnemos.engine.run_directory import CARD, WEIGHTS
from mnemos.engine.weights import (
    PretrainedEncoder,
    load_encoder,
    modality_record,
    read_card,
    read_encoder,
    read_shape,
    read_weights,
    save_encoder,
)
from mnemos.sharding.errors import UserError
from mnemos.sharding.manifest import load_manifest
from mnemos.sharding.reader import ShardSet

NAMES = ("report", "xray", "ct", "mri")


@pytest.fixture
def encoder(tiny_sets: Path) -> Encoder:
    torch.manual_seed(0)
    return Encoder(shape_of(tiny_settings(), tiny_sets)).eval()


@pytest.fixture
def stage(tiny_sets: Path, tmp_path: Path, encoder: Encoder) -> Path:
    """Return the folder of a stage with an encoder of four modalities."""
    save_encoder(
        tmp_path / "stage",
        encoder.state_dict(),
        encoder.shape,
        stage="mri",
        modalities={name: modality_record(load_manifest(tiny_sets / name)) for name in NAMES},
        tokenizer=tiny_sets / "report" / "tokenizer.json",
    )
    return tmp_path / "stage"


def test_what_is_saved_comes_back(stage: Path, encoder: Encoder) -> None:
    assert sorted(path.name for path in stage.iterdir()) == [CARD, WEIGHTS, "tokenizer.json"]
    read = read_encoder(stage)
    assert read.shape == encoder.shape and not read.training
    assert all(torch.equal(value, encoder.state_dict()[name]) for name, value in read.state_dict().items())
    assert all(value.dtype == torch.float32 for value in read_weights(stage).values())


def test_the_card_carries_the_preprocessing(stage: Path, tiny_sets: Path) -> None:
    card = json.loads((stage / CARD).read_text())
    assert (card["format"], card["stage"], list(card["modalities"])) == (
        "mnemos-encoder-1",
        "mri",
        list(NAMES),
    )
    for name in NAMES:
        manifest, record = load_manifest(tiny_sets / name), card["modalities"][name]
        assert record["recipe"] == manifest.recipe and record["fingerprint"] == manifest.fingerprint
        assert (tuple(record["shape"]), record["modality"]["values"]) == (manifest.shape, manifest.values)
        assert record["spacing_mm"] == (None if manifest.spacing_mm is None else list(manifest.spacing_mm))
    assert read_shape(read_card(stage)) == read_encoder(stage).shape


def test_three_lines_give_features(stage: Path, tiny_sets: Path) -> None:
    encoder = load_encoder(stage)
    text = encoder.features("report", "The heart is normal in size.")
    assert encoder.modalities == list(NAMES)
    assert text.shape == (1, 32) and text.isfinite().all() and not text.requires_grad
    assert torch.equal(text, encoder.features("report", "the HEART is normal in size.")), (
        "case does not matter"
    )
    assert not torch.allclose(text, encoder.features("report", "cardiomegaly unchanged"))
    for name in ("xray", "ct", "mri"):
        shards = ShardSet(tiny_sets / name, "train")
        one, two = (encoder.features(name, shards.read(number)) for number in (0, 1))
        assert one.shape == (1, 32) and one.isfinite().all() and not torch.allclose(one, two)


def test_a_picture_file_gives_the_features_of_its_values(
    stage: Path, tiny_sets: Path, tmp_path: Path
) -> None:
    encoder = load_encoder(stage)
    values = ShardSet(tiny_sets / "xray", "train").read(3)
    Image.fromarray(values[0]).save(tmp_path / "film.png")
    torch.testing.assert_close(
        encoder.features("xray", tmp_path / "film.png"), encoder.features("xray", values)
    )


def test_tokens_keep_their_places(stage: Path, tiny_sets: Path) -> None:
    encoder = load_encoder(stage)
    tokens = encoder.tokens("xray", ShardSet(tiny_sets / "xray", "train").read(0))
    assert tokens.shape == (1, 1 + 64, 32)
    tokens = encoder.tokens("report", "lungs are clear " * 40)
    assert tokens.shape == (1, 64, 32), "cut at the stored length"


@pytest.mark.parametrize("lost", [None, CARD, WEIGHTS])
def test_a_folder_without_an_encoder_is_refused(stage: Path, tmp_path: Path, lost: str | None) -> None:
    folder = tmp_path / "nowhere"
    if lost is not None:
        (stage / lost).unlink()
        folder = stage
    with pytest.raises(UserError) as caught:
        load_encoder(folder)
    assert str(folder) in str(caught.value) and ";" in str(caught.value)


def test_damaged_or_foreign_files_are_refused(stage: Path) -> None:
    weights = (stage / WEIGHTS).read_bytes()
    (stage / WEIGHTS).write_bytes(weights[: len(weights) // 2])
    with pytest.raises(UserError, match="cannot be read"):
        load_encoder(stage)
    save_file({"other": torch.zeros(3)}, stage / WEIGHTS)
    with pytest.raises(UserError, match="do not fit"):
        load_encoder(stage)
    (stage / CARD).write_text('{"format": "mnemos-encoder-9"}')
    with pytest.raises(UserError, match="mnemos-encoder-9"):
        load_encoder(stage)
    (stage / CARD).write_text('{"format": "mnemos-encoder-1"}')
    with pytest.raises(UserError, match="damaged"):
        load_encoder(stage)


@pytest.mark.parametrize(
    ("modality", "source", "words"),
    [
        ("pathology", "tile.png", ["'pathology'", "report, xray, ct, mri"]),
        ("report", "  ", ["is empty"]),
        ("xray", "nowhere.png", ["nowhere.png", "does not exist"]),
        ("xray", np.zeros((1, 32, 32), np.uint8), ["(1, 32, 32)", "(1, 64, 64)"]),
        ("xray", np.zeros((1, 64, 64), np.float32), ["float32", "uint8"]),
        ("ct", np.zeros((8, 64, 64), np.uint8), ["uint8", "int16"]),
    ],
    ids=["modality", "empty text", "no file", "size", "float image", "byte volume"],
)
def test_a_source_of_the_wrong_kind_is_refused(
    stage: Path, modality: str, source: str | np.ndarray, words: list[str]
) -> None:
    encoder: PretrainedEncoder = load_encoder(stage)
    with pytest.raises(UserError) as caught:
        encoder.features(modality, source)
    assert all(word in str(caught.value) for word in words), str(caught.value)
