"""counter_rng and random_patch_ids, reference and device code, against plain integers; the statistics of the draws."""

import itertools
import zlib
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from mnemos.kernels._common.launch import launch_counts
from mnemos.kernels.counter_rng import device_random_bits, random_bits, stream_key, uniform
from mnemos.kernels.random_patch_ids import (
    MAX_BLOCK,
    launch_random_patch_ids,
    random_patch_ids,
    random_patch_ids_reference,
)

WORD = 1 << 64
GOLDEN = 0x9E3779B97F4A7C15
KEY = stream_key(7, "mask", "xray", 3)
PLACES = [0, 1, 2, 511, 355_840, 2**40 + 5]
# How many keys a program compares at once, how many bits an index takes and who is left over all change with L.
SIZES = [
    pytest.param(1, 1, id="smallest"),
    pytest.param(2, 1, id="L2-K1"),
    pytest.param(5, 5, id="all-visible"),
    pytest.param(63, 1, id="L63-K1"),
    pytest.param(64, 63, id="L64-K63"),
    pytest.param(64, 16, id="L64-K16"),
    pytest.param(144, 36, id="volume"),
    pytest.param(196, 49, id="image"),
    pytest.param(256, 256, id="L256-all-visible"),
    pytest.param(257, 100, id="L257-K100"),
    pytest.param(MAX_BLOCK, 512, id="one-whole-block"),
    pytest.param(MAX_BLOCK + 1, 600, id="one-past-a-block"),
    pytest.param(5000, 5000, id="blocks-past-the-end"),
    pytest.param(16384, 4096, id="L16384-K4096"),
]


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


def test_generator_has_not_changed(device: torch.device) -> None:
    """Fixed numbers: another generator would give every resumed run other masks."""
    assert stream_key(0) == -2152535657050944081
    assert stream_key(7, "mask", "xray", 3) == -5348468727344533232
    assert random_bits(1, torch.tensor([0, 3]), 2).tolist() == [
        [-4616330145664149646, 6869446166584666695],
        [-6429142944794472162, 7876820519921869660],
    ]
    places = torch.tensor([0, 9])
    for visible, masked in (
        random_patch_ids(places, 12, 4, key=5),
        launch_random_patch_ids(places.to(device), 12, 4, 5),
    ):
        assert visible.tolist() == [[1, 8, 9, 11], [3, 8, 9, 10]]
        assert masked.tolist() == [[0, 2, 3, 4, 5, 6, 7, 10], [0, 1, 2, 4, 5, 6, 7, 11]]
    for visible, masked in (
        random_patch_ids(torch.tensor([2**40]), 24, 6, key=-5348468727344533232),
        launch_random_patch_ids(torch.tensor([2**40], device=device), 24, 6, -5348468727344533232),
    ):
        assert visible.tolist() == [[4, 5, 8, 9, 20, 22]]
        assert sorted(visible.tolist()[0] + masked.tolist()[0]) == list(range(24))


@triton.jit
def _bits_kernel(place_ptr, out_ptr, key, NUM: tl.constexpr):
    index = tl.arange(0, NUM)
    bits = device_random_bits(key.to(tl.int64), tl.load(place_ptr + tl.program_id(0)), index)
    tl.store(out_ptr + tl.program_id(0) * NUM + index, bits)


@pytest.mark.parametrize("key", [KEY, 0, 1, -7, 2**31, 2**32 - 1, 2**63 - 1, -(2**63)])
def test_device_generator_is_the_same(key: int, device: torch.device) -> None:
    places = torch.tensor([*PLACES, 2**63 - 1], device=device)
    drawn = places.new_empty(len(places), 16)
    _bits_kernel[(len(places),)](places, drawn, key, 16)
    assert drawn.equal(random_bits(key, places, 16))


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


def sorted_by_key(place_B: Tensor, L: int, K: int, key: int) -> tuple[Tensor, Tensor]:
    """Return the ids from a whole sort of the keys."""
    low = 1 << (L - 1).bit_length()
    order = ((random_bits(key, place_B, L) // low) * low + torch.arange(L)).argsort(1)
    return order[:, :K].sort(1).values, order[:, K:].sort(1).values


@pytest.mark.parametrize(("L", "K"), SIZES)
def test_device_code_and_reference_draw_the_same_ids(L: int, K: int, device: torch.device) -> None:
    small = L <= 256  # the interpreter takes its time
    places = torch.tensor(PLACES if small else PLACES[-2:])
    for key in (KEY, 1) if small else (KEY,):
        expected = sorted_by_key(places, L, K, key)
        before = launch_counts["random_patch_ids"]
        launched = launch_random_patch_ids(places.to(device), L, K, key)
        assert launch_counts["random_patch_ids"] == before + 1
        for ours in (launched, random_patch_ids(places, L, K, key=key)):
            for drawn, ids in zip(ours, expected, strict=True):
                assert drawn.dtype == torch.int64 and drawn.is_contiguous()
                assert drawn.cpu().equal(ids)


def test_ids_of_a_place_do_not_depend_on_the_batch_around_it(device: torch.device) -> None:
    whole = random_patch_ids(torch.arange(40), 64, 16, key=KEY)
    for places in (torch.tensor([17]), torch.tensor([39, 17, 2]), torch.arange(8, 24)):
        part = random_patch_ids(places, 64, 16, key=KEY)
        launched = launch_random_patch_ids(places.to(device), 64, 16, KEY)
        for visible, masked in (part, launched):
            assert visible.cpu().equal(whole[0][places]) and masked.cpu().equal(whole[1][places])


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


def test_registered_as_a_custom_op() -> None:
    for L, K in ((64, 16), (5, 5)):
        torch.library.opcheck(torch.ops.mnemos.random_patch_ids, (torch.tensor(PLACES), L, K, KEY))


def test_compiles_as_one_graph() -> None:
    def draw(place_B: Tensor) -> tuple[Tensor, Tensor]:
        return random_patch_ids(place_B + 1, 64, 16, key=KEY)

    compiled = torch.compile(draw, fullgraph=True, backend="aot_eager")(torch.arange(3))
    assert all(ours.equal(eager) for ours, eager in zip(compiled, draw(torch.arange(3)), strict=True))


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "none-visible": ({"num_visible": 0}, "num_visible 0 of num_patches 4"),
    "more-visible-than-patches": ({"num_visible": 5}, "num_visible 5 of num_patches 4"),
    "too-many-patches": ({"num_patches": 2**20 + 1}, f"num_patches {2**20 + 1}"),
    "int32": ({"place_B": torch.zeros(2, dtype=torch.int32)}, r"int32 \(2,\)"),
    "two-dimensional": ({"place_B": torch.zeros(2, 1, dtype=torch.int64)}, r"int64 \(2, 1\)"),
    "not-contiguous": ({"place_B": torch.zeros(4, dtype=torch.int64)[::2]}, "contiguous"),
    "key-of-65-bits": ({"key": 2**63}, f"key {2**63} is no int64"),
}


@pytest.mark.parametrize(("change", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_named(change: dict[str, Any], message: str) -> None:
    good = {"place_B": torch.zeros(2, dtype=torch.int64), "num_patches": 4, "num_visible": 2, "key": 0}
    with pytest.raises(ValueError, match=message):
        random_patch_ids(**(good | change))


@pytest.mark.gpu
@pytest.mark.parametrize(("L", "K"), SIZES)
def test_cuda_path_draws_the_ids_of_the_cpu(L: int, K: int) -> None:
    places = torch.arange(512) + 2**33
    before = launch_counts["random_patch_ids"]
    drawn = random_patch_ids(places.cuda(), L, K, key=KEY)
    assert launch_counts["random_patch_ids"] == before + 1
    expected = random_patch_ids_reference(places, L, K, KEY)
    assert all(ours.cpu().equal(ids) for ours, ids in zip(drawn, expected, strict=True))
