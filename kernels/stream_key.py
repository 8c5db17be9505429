"""Keys of random streams, made on the host; needs no torch, so that a plan is checked before torch is imported.

Source: the finaliser of splitmix64, as in `counter_rng`.
"""

import zlib

_WORD = 1 << 64
GOLDEN = 0x9E3779B97F4A7C15
MUL_1 = 0xBF58476D1CE4E5B9
MUL_2 = 0x94D049BB133111EB


def signed(word: int) -> int:
    """Return the int64 with the bits of an unsigned 64-bit word."""
    word %= _WORD
    return word - _WORD if word >= _WORD // 2 else word


def stream_key(seed: int, *parts: int | str) -> int:
    """Return the int64 key of one stream of random numbers, such as (seed, "mask", stage, epoch)."""
    word = _mix(seed + GOLDEN)
    for part in parts:
        number = zlib.crc32(part.encode()) if isinstance(part, str) else part
        word = _mix(word + GOLDEN * (number + 1))
    return signed(word)


def _mix(word: int) -> int:
    word %= _WORD
    word = (word ^ (word >> 30)) * MUL_1 % _WORD
    word = (word ^ (word >> 27)) * MUL_2 % _WORD
    return word ^ (word >> 31)
