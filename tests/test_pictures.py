"""Strips show the right pixels at the right places and say how predictions were de-normalised."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mnemos.engine.patches import all_patches, patch_statistics
from mnemos.engine.pictures import (
    IMAGE_CAPTION,
    TEXT_CAPTION,
    WINDOWS,
    TextExample,
    reconstruction_strip,
    text_strip,
)
from mnemos.kernels.random_patch_ids import random_patch_ids

HIDDEN = (58, 66, 92)


def panels_of(path: Path, num_rows: int, height: int, width: int) -> np.ndarray:
    """Return uint8 [row, column, height, width, 3]: the panels, shrunk back to the samples' own size."""
    factor = max(1, -(-160 // min(height, width)))
    picture = np.asarray(Image.open(path).convert("RGB"))
    top = picture.shape[0] - (num_rows * (height * factor + 8) + 22 + 8)
    assert picture.shape[1] == 8 + 4 * (width * factor + 8)
    return np.stack(
        [
            [
                picture[top + row * (height * factor + 8) :, 8 + column * (width * factor + 8) :][
                    : height * factor : factor, : width * factor : factor
                ]
                for column in range(4)
            ]
            for row in range(num_rows)
        ]
    )


def perfect(
    images: torch.Tensor, masked_BM: torch.Tensor, patch: tuple[int, ...], channels: int, scale: float
) -> torch.Tensor:
    batch = {"scale_B": torch.full((len(images),), scale), "shift_B": torch.zeros(len(images))}
    values = all_patches(images, patch=patch, channels=channels, **batch)
    mean, deviation = patch_statistics(values)
    target = (values - mean) / deviation
    return target.gather(1, masked_BM[:, :, None].expand(-1, -1, target.shape[2]))


@pytest.mark.parametrize(("stored", "channels"), [(1, 1), (1, 3), (3, 3)])
def test_a_perfect_prediction_reproduces_the_image(tmp_path: Path, stored: int, channels: int) -> None:
    images = torch.randint(
        0, 256, (3, stored, 32, 48), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    visible_BK, masked_BM = random_patch_ids(torch.arange(3), 24, 6, key=1)
    path = tmp_path / "new folder" / "strip.png"
    reconstruction_strip(
        path,
        images.numpy(),
        perfect(images, masked_BM, (8, 8), channels, 1 / 255).numpy(),
        visible_BK=visible_BK.numpy(),
        masked_BM=masked_BM.numpy(),
        scale_B=np.full(3, 1 / 255),
        shift_B=np.zeros(3),
        patch=(8, 8),
        channels=channels,
        window=WINDOWS["unit"],
        title="xray, step 5",
    )
    original, masked, restored, alone = panels_of(path, 3, 32, 48).transpose(1, 0, 2, 3, 4)
    expected = images.expand(3, 3, 32, 48).permute(0, 2, 3, 1).numpy()
    np.testing.assert_array_equal(original, expected)
    np.testing.assert_array_equal(restored, expected)

    seen = torch.zeros(3, 24, dtype=torch.bool).scatter(1, visible_BK, True).view(3, 4, 6)
    seen_pixels = seen.repeat_interleave(8, 1).repeat_interleave(8, 2).numpy()
    np.testing.assert_array_equal(masked[seen_pixels], expected[seen_pixels])
    assert (masked[~seen_pixels] == HIDDEN).all()
    np.testing.assert_array_equal(alone[~seen_pixels], expected[~seen_pixels])
    assert (alone[seen_pixels] == HIDDEN).all()

    notes = Image.open(path).text
    assert (
        notes["Description"]
        == IMAGE_CAPTION
        == "masked patches de-normalised with the patch's own statistics"
    )
    assert notes["Title"] == "xray, step 5"
    assert [file.name for file in path.parent.iterdir()] == ["strip.png"]


def test_a_prediction_of_zero_is_the_patch_mean(tmp_path: Path) -> None:
    images = torch.tensor([[10, 20], [30, 40]], dtype=torch.uint8).repeat_interleave(2, 1).view(1, 1, 2, 4)
    reconstruction_strip(
        tmp_path / "a.png",
        images,
        torch.zeros(1, 1, 4, dtype=torch.bfloat16),
        visible_BK=torch.tensor([[0]]),
        masked_BM=torch.tensor([[1]]),
        scale_B=torch.ones(1),
        shift_B=torch.full((1,), 2.0),
        patch=(2, 2),
        channels=1,
        window=(0.0, 51.0),
    )
    panels = panels_of(tmp_path / "a.png", 1, 2, 4)[0, :, :, :, 0]
    np.testing.assert_array_equal(
        panels[0], [[60, 60, 110, 110], [160, 160, 210, 210]]
    )  # (stored + 2) * 255 / 51
    np.testing.assert_array_equal(panels[2], [[60, 60, 160, 160], [160, 160, 160, 160]])


def test_a_volume_shows_its_middle_slice_through_the_window(tmp_path: Path) -> None:
    volumes = torch.randint(-1024, 1025, (2, 1, 4, 16, 16), generator=torch.Generator().manual_seed(0)).to(
        torch.int16
    )
    visible_BK, masked_BM = random_patch_ids(torch.arange(2), 8, 2, key=1)
    reconstruction_strip(
        tmp_path / "b.png",
        volumes,
        perfect(volumes, masked_BM, (4, 8, 4), 1, 1 / 1024),
        visible_BK=visible_BK,
        masked_BM=masked_BM,
        scale_B=torch.full((2,), 1 / 1024),
        shift_B=torch.zeros(2),
        patch=(4, 8, 4),
        channels=1,
        window=WINDOWS["hounsfield"],
    )
    original, _, restored, _ = panels_of(tmp_path / "b.png", 2, 16, 16).transpose(1, 0, 2, 3, 4)
    expected = ((volumes[:, 0, 2].double() + 160) / 400).clamp(0, 1).mul(255).numpy()
    assert np.abs(original[..., 0] - expected).max() <= 0.51
    assert np.abs(restored.astype(int) - original).max() <= 1


def test_words_are_coloured_right_and_wrong(tmp_path: Path) -> None:
    right, wrong = (0, 125, 50), (200, 25, 25)

    def colours(predicted: dict[int, str]) -> set[tuple[int, ...]]:
        example = TextExample(
            original=[" clear", " lung", "s"], masked=[" clear", " [MASK]", "s"], predicted=predicted
        )
        text_strip(tmp_path / "text.png", [example], title="report")
        picture = Image.open(tmp_path / "text.png")
        assert picture.text["Description"] == TEXT_CAPTION
        return {colour for _, colour in picture.convert("RGB").getcolors(1 << 16)} & {right, wrong}

    assert colours({1: " lung"}) == {right}
    assert colours({1: " heart"}) == {wrong}
    assert colours({1: " heart", 2: "s"}) == {right, wrong}
    assert colours({}) == set()


def test_long_texts_wrap_and_pictures_grow(tmp_path: Path) -> None:
    def height(words: int, texts: int) -> int:
        example = TextExample(original=[" opacity"] * words, masked=[" opacity"] * words, predicted={})
        text_strip(tmp_path / "text.png", [example] * texts)
        picture = Image.open(tmp_path / "text.png")
        assert picture.width == 1_100
        right = np.asarray(picture.convert("L"))[:, -8:]
        assert (right == 255).all()  # nothing runs over the edge
        return picture.height

    assert height(5, 1) < height(60, 1) < height(60, 2)
    assert height(5, 3) - height(5, 2) == height(5, 2) - height(5, 1)
