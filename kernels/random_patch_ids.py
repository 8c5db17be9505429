"""Visible and masked patch ids of every sample, drawn by (key, place) alone.

Source: the uniform masking without replacement of He et al., "Masked Autoencoders Are Scalable Vision Learners"
(2021), section 3, on the counter-based numbers of `counter_rng`. Plain PyTorch on every device.

Shape suffixes: B = samples, L = patches of a sample, K = visible, M = L - K masked.
"""

import torch
from torch import Tensor

from mnemos.kernels.counter_rng import random_bits

MAX_PATCHES = 1 << 20  # the index takes the low bits of a 64-bit key; 44 random bits stay at the least


def random_patch_ids(
    place_B: Tensor, num_patches: int, num_visible: int, *, key: int
) -> tuple[Tensor, Tensor]:
    """Return the visible and the masked patch ids of every sample.

    A sample's visible ids are the K indices with the smallest of L random numbers, so every K-subset is equally
    likely. Its ids depend on `key` and its own place only: not on the batch around it, the rank or the device.

    Args:
        place_B: int64, the samples' places in the global order, at least 0.
        num_patches: L, at most 2**20.
        num_visible: K, from 1 to L.
        key: from `counter_rng.stream_key`.

    Returns:
        int64 [B, K] and int64 [B, L - K], each ascending along a row.

    Raises:
        ValueError: place_B is not one-dimensional int64, or K or L is out of range.
    """
    if place_B.dim() != 1 or place_B.dtype != torch.int64:
        raise ValueError(f"place_B is {place_B.dtype} {tuple(place_B.shape)}; pass int64 [B]")
    if not 1 <= num_visible <= num_patches <= MAX_PATCHES:
        raise ValueError(
            f"num_visible {num_visible} of num_patches {num_patches}; "
            f"need 1 <= num_visible <= num_patches <= {MAX_PATCHES}"
        )
    index_L = torch.arange(num_patches, device=place_B.device)
    # The index in the low bits makes the keys distinct, so that every device sorts them into the same order.
    low_bits = (num_patches - 1).bit_length()
    keys_BL = (random_bits(key, place_B, num_patches) & -(1 << low_bits)) | index_L
    last_visible_B1 = keys_BL.sort(1).values[:, num_visible - 1 : num_visible]
    ordered_BL = torch.where(keys_BL <= last_visible_B1, index_L, index_L + num_patches).sort(1).values
    return ordered_BL[:, :num_visible].contiguous(), ordered_BL[:, num_visible:] - num_patches
