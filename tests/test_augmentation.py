"""Crops agree with Pillow, follow torchvision's law, and depend on a sample's place alone."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from mnemos.engine.augmentation import (
    crop_boxes,
    mirror_flags,
    mixing_partner,
    mixing_weight,
    random_resized_crop,
)
from mnemos.kernels.counter_rng import stream_key

KEY = stream_key(7, "crop", 0)


def some_images(batch: int, channels: int, rows: int, columns: int) -> torch.Tensor:
    """Return noise, hard edges and smooth ramps in turn: the cubic overshoots most at edges."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (batch, channels, rows, columns), generator=generator, dtype=torch.uint8)
    images[1::3] = (images[1::3] > 127) * 255
    images[2::3] = torch.linspace(0, 255, columns).to(torch.uint8)
    return images


@pytest.mark.parametrize(
    ("channels", "size", "out"),
    [
        (1, (64, 64), None),
        (3, (64, 64), None),
        (1, (48, 80), (32, 96)),
        (3, (37, 53), (64, 16)),
        (1, (9, 7), (11, 5)),
    ],
    ids=["grey", "rgb", "wide", "odd-rgb", "tiny"],
)
def test_crop_is_pillows_resize_of_the_box(
    channels: int, size: tuple[int, int], out: tuple[int, int] | None
) -> None:
    images = some_images(12, channels, *size)
    place_B = torch.arange(12) * 5
    ours = random_resized_crop(images, place_B, key=KEY, out=out).numpy()
    box_B4, flip_B = crop_boxes(place_B, size, key=KEY)
    rows, columns = out or size
    assert ours.shape == (12, channels, rows, columns)
    assert 0 < int(flip_B.sum()) < 12
    for index, (top, left, height, width) in enumerate(box_B4.int().tolist()):
        for channel in range(channels):
            whole = Image.fromarray(images[index, channel].numpy())
            crop = whole.crop((left, top, left + width, top + height))
            # one axis at a time: Pillow 13 takes the cheaper axis first and cuts overshoots in between
            narrow = crop.resize((columns, height), Image.Resampling.BICUBIC)
            expected = np.asarray(narrow.resize((columns, rows), Image.Resampling.BICUBIC)).astype(int)
            expected = expected[:, ::-1] if flip_B[index] else expected
            assert np.abs(ours[index, channel] - expected).max() <= 1


def test_the_whole_image_comes_back_unchanged_or_flipped() -> None:
    images = some_images(8, 3, 20, 20)
    place_B = torch.arange(8)
    ours = random_resized_crop(images, place_B, key=KEY, scale=(1.0, 1.0), ratio=(1.0, 1.0))
    _, flip_B = crop_boxes(place_B, (20, 20), key=KEY, scale=(1.0, 1.0), ratio=(1.0, 1.0))
    assert torch.equal(ours, torch.where(flip_B[:, None, None, None], images.flip(3), images))


def test_boxes_follow_the_law() -> None:
    box_B4, flip_B = crop_boxes(torch.arange(20_000), (200, 200), key=KEY)
    top, left, height, width = box_B4.double().unbind(1)
    assert torch.equal(box_B4, box_B4.round())
    assert bool(((top >= 0) & (left >= 0) & (top + height <= 200) & (left + width <= 200)).all())
    assert abs(flip_B.double().mean() - 0.5) < 0.02

    # the reference: torchvision's loop in plain Python, its own random numbers
    rng = np.random.default_rng(0)
    areas, logs = [], []
    for _ in range(20_000):
        while True:
            area, ratio = (
                rng.uniform(0.2, 1) * 40_000,
                math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3))),
            )
            x, y = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < x <= 200 and 0 < y <= 200:
                break
        areas.append(x * y / 40_000)
        logs.append(math.log(x / y))
    share = np.linspace(0.02, 0.98, 25)
    assert (
        np.abs(np.quantile((height * width / 40_000).numpy(), share) - np.quantile(areas, share)).max()
        < 0.015
    )
    assert np.abs(np.quantile((width / height).log().numpy(), share) - np.quantile(logs, share)).max() < 0.015
    slack = 200 - height > 20
    assert abs((top / (200 - height))[slack].mean() - 0.5) < 0.02
    assert abs((left / (200 - width))[200 - width > 20].mean() - 0.5) < 0.02


def test_a_crop_that_never_fits_is_cut_to_the_image() -> None:
    box_B4, _ = crop_boxes(torch.arange(50), (8, 64), key=KEY, scale=(1.0, 1.0), ratio=(1.0, 1.0))
    assert bool((box_B4[:, 2] == 8).all())
    assert bool((box_B4[:, 3] == 23).all())  # sqrt(8 * 64), rounded


def test_a_crop_depends_on_its_place_alone() -> None:
    images = some_images(16, 3, 64, 64)
    place_B = torch.arange(100, 116)
    whole = random_resized_crop(images, place_B, key=KEY)
    for rows in (slice(0, 4), slice(5, 6), slice(8, 16)):
        assert torch.equal(random_resized_crop(images[rows], place_B[rows], key=KEY), whole[rows])
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(random_resized_crop(images[order], place_B[order], key=KEY), whole[order])
    assert not torch.equal(random_resized_crop(images, place_B, key=stream_key(7, "crop", 1)), whole)


@pytest.mark.gpu
def test_nothing_waits_for_the_device() -> None:
    images, place_B = some_images(16, 3, 64, 64).cuda(), torch.arange(16).cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        crops = random_resized_crop(images, place_B, key=KEY)
        flags, partner_B = (
            mirror_flags(place_B, key=KEY, num_axes=3),
            mixing_partner(place_B, key=KEY, group=4),
        )
        weight_B = mixing_weight(place_B, key=KEY)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    here = place_B.cpu()
    assert (crops.cpu().int() - random_resized_crop(images.cpu(), here, key=KEY).int()).abs().max() <= 1
    assert torch.equal(flags.cpu(), mirror_flags(here, key=KEY, num_axes=3))
    assert torch.equal(partner_B.cpu(), mixing_partner(here, key=KEY, group=4))
    assert torch.equal(weight_B.cpu(), mixing_weight(here, key=KEY))


def test_only_bytes_are_cropped() -> None:
    with pytest.raises(ValueError, match="uint8"):
        random_resized_crop(torch.zeros(2, 1, 8, 8), torch.arange(2), key=KEY)


def test_mirror_flags_follow_the_law() -> None:
    flip_BA = mirror_flags(torch.arange(20_000), key=KEY, num_axes=3)
    assert flip_BA.dtype == torch.bool
    assert flip_BA.shape == (20_000, 3)
    assert (flip_BA.double().mean(0) - 0.25).abs().max() < 0.015
    still = 1 - flip_BA.any(1).double().mean()
    assert abs(still - (0.5 + 0.5 / 8)) < 0.015
    moved = flip_BA[flip_BA.any(1)].double()
    assert (moved.mean(0) - 4 / 7).abs().max() < 0.02
    assert torch.equal(mirror_flags(torch.tensor([9, 4]), key=KEY, num_axes=3), flip_BA[[9, 4]])


def test_partners_are_permutations_inside_a_run() -> None:
    partner_B = mixing_partner(torch.arange(4_000), key=KEY, group=8).view(-1, 8)
    first = torch.arange(0, 4_000, 8)[:, None]
    assert torch.equal(partner_B.sort(dim=1).values, first + torch.arange(8))
    counts = torch.stack([(partner_B - first == column).double().mean(0) for column in range(8)])
    assert (counts - 1 / 8).abs().max() < 0.06  # every row meets every other row alike


@pytest.mark.parametrize("parts", [1, 2, 3, 6])
def test_a_split_batch_mixes_the_same_pairs(parts: int) -> None:
    place_B = torch.arange(48, 72)
    whole = mixing_partner(place_B, key=KEY, group=4)
    rows = 24 // parts
    for part in range(parts):
        piece = mixing_partner(place_B[part * rows : (part + 1) * rows], key=KEY, group=4)
        assert torch.equal(piece + part * rows, whole[part * rows : (part + 1) * rows])


def test_a_run_must_divide_the_batch() -> None:
    with pytest.raises(ValueError, match="10 rows in runs of 4"):
        mixing_partner(torch.arange(10), key=KEY, group=4)
    assert torch.equal(mixing_partner(torch.arange(3), key=KEY, group=1), torch.arange(3))


def test_mixing_weights_are_uniform_and_placed() -> None:
    weight_B = mixing_weight(torch.arange(20_000), key=KEY)
    assert weight_B.dtype == torch.float32
    assert 0 <= float(weight_B.min()) < float(weight_B.max()) < 1
    share = torch.linspace(0.05, 0.95, 19)
    assert (weight_B.quantile(share) - share).abs().max() < 0.015
    assert torch.equal(mixing_weight(torch.tensor([17]), key=KEY), weight_B[17:18])
