"""The numbers beside the losses, against hands and loops."""

import math

import numpy as np
import pytest
import torch

from mnemos.engine.baselines import ConstantPredictor, NgramEntropy, NgramScore
from mnemos.engine.patches import all_patches, join_patches, patch_statistics
from mnemos.kernels.gather_patches import gather_patches
from mnemos.kernels.masked_patch_mse import masked_patch_mse
from mnemos.kernels.random_patch_ids import random_patch_ids


def unit(batch: int) -> dict[str, torch.Tensor]:
    return {"scale_B": torch.full((batch,), 1 / 255), "shift_B": torch.zeros(batch)}


def test_a_two_pixel_patch_by_hand() -> None:
    # one patch of two pixels: the target of (a, b) is -+1/sqrt(2) whatever a < b
    images = torch.tensor([[0, 200], [0, 100], [50, 30]], dtype=torch.uint8).view(3, 1, 1, 2)
    constant = ConstantPredictor(patch=(1, 2), channels=1)
    constant.add(images, **unit(3))
    root = 1 / math.sqrt(2)
    assert constant.mean_target().tolist() == [pytest.approx([-root / 3, root / 3], abs=1e-3)]  # 2 up, 1 down
    ids = torch.zeros(1, 1, dtype=torch.int64)
    up = constant.score(images[:1], ids, **unit(1))
    down = constant.score(images[2:], ids, **unit(1))
    assert float(up) == pytest.approx((root * 2 / 3) ** 2, rel=1e-3)
    assert float(down) == pytest.approx((root * 4 / 3) ** 2, rel=1e-3)


@pytest.mark.parametrize(
    ("shape", "dtype", "patch", "channels"),
    [
        ((150, 1, 16, 24), torch.uint8, (8, 8), 3),
        ((70, 3, 8, 8), torch.uint8, (4, 4), 3),
        ((5, 1, 4, 8, 8), torch.int16, (2, 4, 4), 1),
    ],
    ids=["grey-as-rgb", "rgb", "volume"],
)
def test_the_constant_is_the_mean_target_of_a_loop(
    shape: tuple[int, ...], dtype: torch.dtype, patch: tuple[int, ...], channels: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, shape, generator=generator).to(dtype)
    scale_B, shift_B = (
        torch.rand(shape[0], generator=generator) + 0.01,
        torch.rand(shape[0], generator=generator),
    )
    constant = ConstantPredictor(patch=patch, channels=channels)
    for rows in torch.arange(shape[0]).split(64 + 33):
        constant.add(images[rows], scale_B=scale_B[rows], shift_B=shift_B[rows])

    targets = []
    for image, scale, shift in zip(images.double(), scale_B.double(), shift_B.double(), strict=True):
        model = (image * scale + shift).expand(channels, *shape[2:])
        cells = model
        for axis, edge in enumerate(patch):
            cells = cells.unfold(1 + axis, edge, edge)  # [C, grid..., edges...]
        cells = cells.reshape(channels, -1, math.prod(patch)).permute(1, 2, 0).flatten(1)
        targets.append((cells - cells.mean(1, keepdim=True)) / (cells.var(1, keepdim=True) + 1e-6).sqrt())
    mean = torch.stack(targets).mean(0)
    assert constant.num_samples == shape[0]
    torch.testing.assert_close(constant.mean_target().double(), mean, atol=1e-5, rtol=1e-5)

    _, masked_BM = random_patch_ids(torch.arange(4), len(mean), 1, key=3)
    batch = {"scale_B": scale_B[:4], "shift_B": shift_B[:4]}
    expected = sum(
        float((targets[index][ids] - mean[ids]).square().mean(1).sum()) for index, ids in enumerate(masked_BM)
    )
    assert float(constant.score(images[:4], masked_BM, **batch)) == pytest.approx(expected, rel=1e-4)
    # no constant is better: nudging it can only raise the training set's loss
    every = torch.arange(len(mean)).repeat(shape[0], 1)
    kinds = {"patch": patch, "channels": channels, "scale_B": scale_B, "shift_B": shift_B}
    best = constant.score(images, every, scale_B=scale_B, shift_B=shift_B)
    assert best < masked_patch_mse((mean.float() + 0.01).repeat(shape[0], 1, 1), images, every, **kinds)
    assert best < masked_patch_mse((mean.float() * 0.9).repeat(shape[0], 1, 1), images, every, **kinds)


def test_patches_join_to_the_sample_they_came_from() -> None:
    images = torch.randint(
        0, 256, (2, 3, 12, 8), generator=torch.Generator().manual_seed(1), dtype=torch.uint8
    )
    values = all_patches(images, patch=(4, 2), channels=3, **unit(2))
    assert values.shape == (2, 12, 24)
    torch.testing.assert_close(join_patches(values, size=(12, 8), patch=(4, 2), channels=3), images / 255)
    volumes = torch.randint(-9, 9, (2, 1, 4, 6, 8), generator=torch.Generator().manual_seed(1)).to(
        torch.int16
    )
    values = all_patches(volumes, patch=(2, 3, 4), channels=1, scale_B=torch.ones(2), shift_B=torch.ones(2))
    torch.testing.assert_close(
        join_patches(values, size=(4, 6, 8), patch=(2, 3, 4), channels=1), volumes + 1.0
    )


@pytest.mark.parametrize(
    ("shape", "patch", "channels"),
    [((3, 1, 8, 12), (4, 6), 3), ((3, 3, 8, 12), (2, 4), 3), ((3, 1, 4, 6, 8), (2, 3, 4), 1)],
    ids=["grey-as-rgb", "rgb", "volume"],
)
def test_all_patches_are_what_the_model_gathers(
    shape: tuple[int, ...], patch: tuple[int, ...], channels: int
) -> None:
    images = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(2)).to(torch.int16)
    batch = {"scale_B": torch.tensor([0.5, 1.0, 0.1]), "shift_B": torch.tensor([0.0, -3.0, 2.0])}
    values = all_patches(images, patch=patch, channels=channels, **batch)
    ids = torch.arange(values.shape[1]).repeat(3, 1)
    gathered = gather_patches(images, ids, patch=patch, channels=channels, **batch)
    torch.testing.assert_close(values, gathered)


def test_a_flat_patch_has_a_target_of_zero() -> None:
    values = torch.full((1, 1, 16), 0.5)
    mean, deviation = patch_statistics(values)
    assert float(mean) == 0.5
    assert float(deviation) == pytest.approx(1e-3)


def test_a_predictor_without_data_says_so() -> None:
    with pytest.raises(RuntimeError, match="add"):
        ConstantPredictor(patch=(4, 4), channels=1).mean_target()


def test_ngrams_by_hand() -> None:
    # V = 10; texts "5 6" and "5 7 5": n(5)=3, n(6)=1, n(7)=1, n=5; pairs ^5 x2, 56, 57, 75
    counts = NgramEntropy(10)
    counts.add([[5, 6, 0, 0], [5, 7, 5, 0]])
    p = {5: 3.1 / 6, 6: 1.1 / 6, 7: 1.1 / 6, 8: 0.1 / 6}
    for word, left, pairs, follows, ids, place in [
        (5, "start", 2, 2, [5, 9, 9, 0], 0),
        (6, 5, 1, 2, [5, 6, 0, 0], 1),
        (8, 5, 0, 2, [5, 1, 0, 0], 1),  # 1 is a mask; the label is put back
        (5, 7, 1, 1, [5, 7, 5, 0], 2),
        (6, 8, 0, 0, [8, 6, 0, 0], 1),
    ]:
        score = counts.score([ids], [0], [place], [word])
        assert score.count == 1, left
        assert score.unigram == pytest.approx(-math.log(p[word]))
        assert score.bigram == pytest.approx(-math.log((pairs + p[word]) / (follows + 1)))


def test_the_left_neighbour_is_the_true_one() -> None:
    counts = NgramEntropy(10)
    counts.add([[5, 6, 7]])
    clean = counts.score([[5, 6, 7]], [0, 0], [1, 2], [6, 7])
    masked = counts.score([[5, 1, 1]], [0, 0], [1, 2], [6, 7])
    assert clean == masked


def test_counting_in_parts_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    ids = rng.integers(3, 40, size=(60, 12))
    ids[np.arange(12) >= rng.integers(1, 13, size=(60, 1))] = 0
    text, place = np.arange(60), np.zeros(60, np.int64)
    whole = NgramEntropy(40)
    whole.add(torch.from_numpy(ids))
    monkeypatch.setattr("mnemos.engine.baselines._PENDING", 20)
    parts = NgramEntropy(40)
    for row in ids:
        parts.add(row[None])
    first = whole.score(ids, text, place, ids[:, 0])
    assert parts.score(ids, text, place, ids[:, 0]) == first
    halves = [whole.score(part, text[:30], place[:30], part[:, 0]) for part in (ids[:30], ids[30:])]
    halves = halves[0] + halves[1]
    assert (halves.count, halves.unigram, halves.bigram) == pytest.approx((60, first.unigram, first.bigram))
    assert NgramScore() + first == first


def test_probabilities_of_all_words_sum_to_one() -> None:
    counts = NgramEntropy(12)
    counts.add(np.random.default_rng(1).integers(3, 12, size=(5, 6)))
    for left in (3, 8, 2):
        scores = [counts.score([[left, 1]], [0], [1], [word]) for word in range(12)]
        assert sum(math.exp(-score.bigram) for score in scores) == pytest.approx(1)
        assert sum(math.exp(-score.unigram) for score in scores) == pytest.approx(1)
