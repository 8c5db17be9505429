"""Counter-based random numbers: a value depends on (key, place, index) alone.

Masks, crops, mixing weights and DropPath are drawn from here, so that a sample meets the same chance on one rank or
on eight, in one micro-batch or in four, in a first and in a resumed run, on a CPU and on a GPU.

Source: the finaliser of splitmix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA
2014), stated in wrapping int64 operations, which torch and Triton compute alike.

Shape suffixes: B = samples, N = numbers per sample.
"""

import torch
from torch import Tensor

from mnemos.kernels.stream_key import GOLDEN, MUL_1, MUL_2, signed, stream_key

__all__ = ["random_bits", "stream_key", "uniform"]


def _mix(word: Tensor) -> Tensor:
    """Apply the splitmix64 finaliser; int64 shifts are arithmetic, so the sign bits are masked off."""
    word = (word ^ ((word >> 30) & 0x3FFFFFFFF)) * signed(MUL_1)
    word = (word ^ ((word >> 27) & 0x1FFFFFFFFF)) * signed(MUL_2)
    return word ^ ((word >> 31) & 0x1FFFFFFFF)


def random_bits(key: int, place_B: Tensor, num: int) -> Tensor:
    """Return int64 [B, num]: 64 random bits for each index of each place.

    Args:
        key: from `stream_key`.
        place_B: int64, the samples' places in the global order, at least 0.
        num: numbers per sample.
    """
    index_N = torch.arange(1, num + 1, device=place_B.device, dtype=torch.int64)
    state_B = _mix(place_B * signed(GOLDEN) + key)
    return _mix(state_B[:, None] + index_N * signed(GOLDEN))


def uniform(key: int, place_B: Tensor, num: int) -> Tensor:
    """Return fp32 [B, num], uniform in [0, 1) on a grid of 2**-24; arguments as `random_bits`."""
    return ((random_bits(key, place_B, num) >> 40) & 0xFFFFFF).to(torch.float32) * 2.0**-24
