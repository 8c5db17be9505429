"""Visible and masked patch ids of every sample, drawn by (key, place) alone, in one launch.

Source: the uniform masking without replacement of He et al., "Masked Autoencoders Are Scalable Vision Learners"
(2021), section 3, on the counter-based numbers of `counter_rng`.

Shape suffixes: B = samples, L = patches of a sample, K = visible, M = L - K masked.
"""

# Launch keywords such as num_warps are not in a kernel's signature.
# pyright: reportCallIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from mnemos.kernels._common.launch import launch_counts
from mnemos.kernels.counter_rng import device_random_bits, random_bits

MAX_PATCHES = 1 << 20  # the index takes the low bits of a 64-bit key; 44 random bits stay at the least
KEYS_PER_WARP = 256  # eight a thread: enough independent work to hide the latency of a 64-bit product
MAX_BLOCK = 2048  # keys one program holds in registers; of more patches it makes the keys again in every step

_LOWEST = tl.constexpr(-(2**63))
_HIGHEST = tl.constexpr(2**63 - 1)


# ---- reference: the definition. Any device; CPU runs use it.
def random_patch_ids_reference(
    place_B: Tensor, num_patches: int, num_visible: int, key: int
) -> tuple[Tensor, Tensor]:
    """Return what `random_patch_ids` defines, in plain PyTorch."""
    index_L = torch.arange(num_patches, device=place_B.device)
    # The index in the low bits makes the keys distinct, so that every device has the same K smallest ones.
    low_bits = (num_patches - 1).bit_length()
    keys_BL = (random_bits(key, place_B, num_patches) & -(1 << low_bits)) | index_L
    masked_BL = keys_BL > keys_BL.kthvalue(num_visible, 1, keepdim=True).values
    ids_BL = masked_BL.argsort(stable=True, dim=1)  # the visible first, both kinds ascending
    rows = torch.contiguous_format  # copies: the results of an op must not share memory
    visible_BK, masked_BM = ids_BL.tensor_split([num_visible], 1)
    return visible_BK.clone(memory_format=rows), masked_BM.clone(memory_format=rows)


# ---- device code: one program per sample. The keys are distinct, so some bound has exactly K of them at or below it,
# and halving the int64 range finds one in about log2(L) + 1 steps; no key is moved.
@triton.jit
def _keys(key, place, index, L, POWER: tl.constexpr):
    """Return the keys of a block of patches, and the highest int64 past the last patch.

    No bound is that high: a patch has such a key only where its index fills the low bits, so that nothing is past it.
    """
    keys = (device_random_bits(key, place, index) & -POWER) | index
    return tl.where(index < L, keys, _HIGHEST)


@triton.jit(do_not_specialize=["key"])
def _random_patch_ids_kernel(
    place_ptr,  # [B] int64
    visible_ptr,  # [B, K] int64 out
    masked_ptr,  # [B, L - K] int64 out
    key: tl.int64,  # annotated: a small key must not become another type, and with it another kernel
    L,
    K,
    POWER: tl.constexpr,  # the power of two that gives the index its low bits, at least L
    BLOCK: tl.constexpr,  # keys at once; where that is all of them, they are made once and stay in registers
):
    sample = tl.program_id(0).to(tl.int64)
    place = tl.load(place_ptr + sample)
    key = key.to(tl.int64)
    low = tl.full((), _LOWEST, tl.int64)
    high = tl.full((), _HIGHEST, tl.int64)
    bound = high
    num_below = 0
    while num_below != K:
        bound = (low & high) + ((low ^ high) >> 1)  # their mean, rounded down, without overflow
        num_below = 0
        for start in range(0, POWER, BLOCK):
            below = _keys(key, place, start + tl.arange(0, BLOCK), L, POWER) <= bound
            num_below += tl.sum(below.to(tl.int32), 0)
        low = tl.where(num_below < K, bound + 1, low)
        high = tl.where(num_below > K, bound, high)
    visible_ptr += sample * K
    masked_ptr += sample * (L - K)
    num_before = 0
    for start in range(0, POWER, BLOCK):
        index = start + tl.arange(0, BLOCK)
        visible = _keys(key, place, index, L, POWER) <= bound
        num_seen = num_before + tl.cumsum(visible.to(tl.int32), 0)  # visible ids up to and including this one
        tl.store(visible_ptr + (num_seen - 1), index.to(tl.int64), mask=visible)
        tl.store(masked_ptr + (index - num_seen), index.to(tl.int64), mask=(index < L) & ~visible)
        num_before += tl.sum(visible.to(tl.int32), 0)


def launch_random_patch_ids(
    place_B: Tensor, num_patches: int, num_visible: int, key: int
) -> tuple[Tensor, Tensor]:
    """Run the device code; shapes were checked by the public function."""
    launch_counts["random_patch_ids"] += 1
    visible_BK = place_B.new_empty(len(place_B), num_visible)
    masked_BM = place_B.new_empty(len(place_B), num_patches - num_visible)
    power = triton.next_power_of_2(num_patches)
    block = min(power, MAX_BLOCK)
    _random_patch_ids_kernel[(len(place_B),)](
        place_B, visible_BK, masked_BM, key, num_patches, num_visible,
        POWER=power, BLOCK=block, num_warps=max(1, block // KEYS_PER_WARP),
    )  # fmt: skip
    return visible_BK, masked_BM


# ---- custom op: nothing to differentiate.
@torch.library.custom_op("mnemos::random_patch_ids", mutates_args=(), device_types="cuda")
def _random_patch_ids(place: Tensor, num_patches: int, num_visible: int, key: int) -> tuple[Tensor, Tensor]:
    return launch_random_patch_ids(place, num_patches, num_visible, key)


_random_patch_ids.register_kernel("cpu")(random_patch_ids_reference)


@_random_patch_ids.register_fake
def _(place, num_patches, num_visible, key):
    B = place.shape[0]
    return place.new_empty(B, num_visible), place.new_empty(B, num_patches - num_visible)


# ---- public function: checks, then one call. The only name engine/ imports.
def random_patch_ids(
    place_B: Tensor, num_patches: int, num_visible: int, *, key: int
) -> tuple[Tensor, Tensor]:
    """Return the visible and the masked patch ids of every sample.

    A sample's visible ids are the K indices with the smallest of L random numbers, so every K-subset is equally
    likely. Its ids depend on `key` and its own place only: not on the batch around it, the rank or the device.

    Args:
        place_B: int64, contiguous, the samples' places in the global order, at least 0.
        num_patches: L, at most 2**20.
        num_visible: K, from 1 to L.
        key: int64, from `counter_rng.stream_key`.

    Returns:
        int64 [B, K] and int64 [B, L - K], each ascending along a row.

    Raises:
        ValueError: place_B is not a contiguous row of int64, or K, L or the key is out of range.
    """
    if place_B.dim() != 1 or place_B.dtype != torch.int64:
        raise ValueError(f"place_B is {place_B.dtype} {tuple(place_B.shape)}; pass int64 [B]")
    if not place_B.is_contiguous():
        raise ValueError("place_B must be contiguous; call .contiguous() where you made it")
    if not 1 <= num_visible <= num_patches <= MAX_PATCHES:
        raise ValueError(
            f"num_visible {num_visible} of num_patches {num_patches}; "
            f"need 1 <= num_visible <= num_patches <= {MAX_PATCHES}"
        )
    if not -(2**63) <= key < 2**63:
        raise ValueError(f"key {key} is no int64; make it with counter_rng.stream_key")
    # On a CPU the op's own Python costs more than it is worth, but for a compiler, which must not look inside.
    direct = place_B.is_cpu and not torch.compiler.is_compiling()
    compute = random_patch_ids_reference if direct else _random_patch_ids
    return compute(place_B, num_patches, num_visible, key)
