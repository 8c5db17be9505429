"""counter_rng and random_patch_ids against plain integers, and the statistics of the draws."""

import itertools
import zlib

import pytest
import torch

from mnemos.kernels.counter_rng import random_bits, stream_key, uniform
from mnemos.kernels.random_patch_ids import random_patch_ids

WORD = 1 << 64
GOLDEN = 0x9E3779B97F4A7C15
KEY = stream_key(7, "mask", "xray", 3)
PLACES = [0, 1, 2, 511, 355_840, 2**40 + 5]


def mix(word: int) -> int:
    """Return splitmix64's finaliser in Python integers."""
    word %= WORD
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 % WORD
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB % WORD
    return word ^ (word >> 31)


def bits(key: int, place: int, index: int) -> int:
    return mix(mix(place * GOLDEN + key) + (index + 1) * GOLDEN)


def signed(word: int) -> int:
    return word - WORD if word >= WORD // 2 else word


def test_generator_is_splitmix64_in_python_integers() -> None:
    word = mix(7 + GOLDEN)
    for part in (zlib.crc32(b"mask"), zlib.crc32(b"xray"), 3):
        word = mix(word + GOLDEN * (part + 1))
    assert signed(word) == KEY
    drawn = random_bits(KEY, torch.tensor(PLACES), 5)
    assert drawn.tolist() == [[signed(bits(KEY, place, i)) for i in range(5)] for place in PLACES]
    expected = [[(bits(KEY, place, i) >> 40) / 2**24 for i in range(5)] for place in PLACES]
    assert uniform(KEY, torch.tensor(PLACES), 5).tolist() == expected


def test_generator_has_not_changed() -> None:
    """Fixed numbers: another generator would give every resumed run other masks."""
    assert stream_key(0) == -2152535657050944081
    assert stream_key(7, "mask", "xray", 3) == -5348468727344533232
    assert random_bits(1, torch.tensor([0, 3]), 2).tolist() == [
        [-4616330145664149646, 6869446166584666695],
        [-6429142944794472162, 7876820519921869660],
    ]
    visible, masked = random_patch_ids(torch.tensor([0, 9]), 12, 4, key=5)
    assert visible.tolist() == [[1, 8, 9, 11], [3, 8, 9, 10]]
    assert masked.tolist() == [[0, 2, 3, 4, 5, 6, 7, 10], [0, 1, 2, 4, 5, 6, 7, 11]]


def test_streams_differ_in_every_part() -> None:
    parts = [(0,), (1,), (0, 0), (0, 1), (0, "mask"), (0, "crop"), (0, "mask", 0), (0, 0, "mask")]
    assert len({stream_key(*part) for part in parts}) == len(parts)


def test_uniform_fills_the_unit_interval_evenly() -> None:
    drawn = uniform(KEY, torch.arange(1000), 64).double()
    assert drawn.min() >= 0 and drawn.max() < 1
    counts = torch.histc(drawn, 64, 0, 1)
    assert (counts - 1000).square().sum() / 1000 < 63 + 4 * (
        2 * 63
    ) ** 0.5  # chi-square of 63 degrees of freedom
    for a, b in ((drawn[:, 0], drawn[:, 1]), (drawn[:-1, 0], drawn[1:, 0])):  # index to index, place to place
        assert torch.corrcoef(torch.stack([a, b]))[0, 1].abs() < 4 / 1000**0.5


@pytest.mark.parametrize(("L", "K"), [(1, 1), (2, 1), (5, 5), (64, 16), (63, 1), (144, 36), (196, 49)])
def test_visible_ids_are_those_of_the_smallest_keys(L: int, K: int) -> None:
    visible, masked = random_patch_ids(torch.tensor(PLACES), L, K, key=KEY)
    low = 1 << (L - 1).bit_length()
    for row, place in enumerate(PLACES):
        keys = [signed(bits(KEY, place, i)) // low * low + i for i in range(L)]
        order = sorted(range(L), key=keys.__getitem__)
        assert visible[row].tolist() == sorted(order[:K])
        assert masked[row].tolist() == sorted(order[K:])
    assert visible.dtype == masked.dtype == torch.int64
    assert visible.is_contiguous() and masked.is_contiguous()


def test_ids_of_a_place_do_not_depend_on_the_batch_around_it() -> None:
    whole = random_patch_ids(torch.arange(40), 64, 16, key=KEY)
    for places in (torch.tensor([17]), torch.tensor([39, 17, 2]), torch.arange(8, 24)):
        part = random_patch_ids(places, 64, 16, key=KEY)
        assert part[0].equal(whole[0][places]) and part[1].equal(whole[1][places])


def test_another_key_gives_other_ids() -> None:
    first, _ = random_patch_ids(torch.arange(100), 64, 16, key=KEY)
    second, _ = random_patch_ids(torch.arange(100), 64, 16, key=stream_key(7, "mask", "xray", 4))
    assert not first.eq(second).all(1).any()


def test_every_subset_is_equally_likely() -> None:
    num_draws = 28_000
    visible, _ = random_patch_ids(torch.arange(num_draws), 8, 3, key=KEY)
    subsets = list(itertools.combinations(range(8), 3))
    codes = (visible * torch.tensor([64, 8, 1])).sum(1)
    counts = torch.stack([(codes == 64 * a + 8 * b + c).sum() for a, b, c in subsets]).double()
    expected = num_draws / len(subsets)
    freedom = len(subsets) - 1
    assert counts.sum() == num_draws
    assert (counts - expected).square().sum() / expected < freedom + 4 * (2 * freedom) ** 0.5


def test_every_patch_is_visible_equally_often() -> None:
    visible, _ = random_patch_ids(torch.arange(10_000), 196, 49, key=KEY)
    counts = torch.bincount(visible.flatten(), minlength=196).double()
    spread = (10_000 * 0.25 * 0.75) ** 0.5
    assert (counts - 2500).abs().max() < 4.5 * spread


@pytest.mark.parametrize(("L", "K"), [(4, 0), (4, 5), (2**20 + 1, 4)])
def test_impossible_numbers_are_named(L: int, K: int) -> None:
    with pytest.raises(ValueError, match=f"num_visible {K} of num_patches {L}"):
        random_patch_ids(torch.arange(2), L, K, key=0)


def test_places_must_be_a_row_of_int64() -> None:
    with pytest.raises(ValueError, match=r"int32 \(2,\)"):
        random_patch_ids(torch.zeros(2, dtype=torch.int32), 4, 2, key=0)
