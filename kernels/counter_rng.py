"""Counter-based random numbers: a value depends on (key, place, index) alone.

Masks, crops, mixing weights and DropPath are drawn from here, so that a sample meets the same chance on one rank or
on eight, in one micro-batch or in four, in a first and in a resumed run, on a CPU and on a GPU.

Source: the finaliser of splitmix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA
2014), stated in wrapping int64 operations, which torch and Triton compute alike. The device functions at the end state
the same numbers inside a kernel, bit for bit.

Shape suffixes: B = samples, N = numbers per sample.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mnemos.kernels.stream_key import GOLDEN, MUL_1, MUL_2, signed, stream_key

__all__ = ["device_random_bits", "random_bits", "stream_key", "uniform"]

_GOLDEN = tl.constexpr(signed(GOLDEN))
_MUL_1 = tl.constexpr(signed(MUL_1))
_MUL_2 = tl.constexpr(signed(MUL_2))


def _mix(word: Tensor) -> Tensor:
    """Apply the splitmix64 finaliser; int64 shifts are arithmetic, so the sign bits are masked off."""
    word = (word >> 30).bitwise_and_(0x3FFFFFFFF).bitwise_xor_(word).mul_(signed(MUL_1))
    word = (word >> 27).bitwise_and_(0x1FFFFFFFFF).bitwise_xor_(word).mul_(signed(MUL_2))
    return (word >> 31).bitwise_and_(0x1FFFFFFFF).bitwise_xor_(word)


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


@triton.jit
def _device_mix(word):
    """State `_mix` on the device."""
    word = (word ^ ((word >> 30) & 0x3FFFFFFFF)) * _MUL_1
    word = (word ^ ((word >> 27) & 0x1FFFFFFFFF)) * _MUL_2
    return word ^ ((word >> 31) & 0x1FFFFFFFF)


@triton.jit
def device_random_bits(key, place, index):
    """Return `random_bits(key, place, ...)` at an index, or at a block of them; key and place are int64."""
    state = _device_mix(place * _GOLDEN + key)
    return _device_mix(state + (index + 1).to(tl.int64) * _GOLDEN)
