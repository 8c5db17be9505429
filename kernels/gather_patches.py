"""Patches of raw images or volumes at given ids: dequantised, mirrored and mixed on the way.

Sources: the visible patches of He et al., "Masked Autoencoders Are Scalable Vision Learners" (2021), section 3; the
mixing of two samples is IMM of MedCoSS (Ye et al., CVPR 2024, arXiv 2311.17597), section 3.3. Reads each patch once, in its
stored type; a quarter of the image is read where a quarter is visible.

Shape suffixes: B = samples, K = patches asked for, P = values per patch, A = 2 or 3 spatial axes.
"""

# Launch keywords such as num_warps are not in a kernel's signature.
# pyright: reportCallIssue=false

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mnemos.kernels._common.launch import launch_counts, row_launch
from mnemos.kernels._common.patches import check_patches, geometry, patch_offsets, raw_patches


# ---- reference: the definition. Any device, any dtype; CPU runs use it.
def gather_patches_reference(
    images: Tensor,
    ids_BK: Tensor,
    patch: Sequence[int],
    channels: int,
    scale_B: Tensor,
    shift_B: Tensor,
    flip_BA: Tensor | None,
    partner_B: Tensor | None,
    weight_B: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Return what `gather_patches` defines, in plain PyTorch; fp64 throughout when dtype is fp64."""
    inside = torch.promote_types(dtype, torch.float32)
    scale_B11, shift_B11 = scale_B.to(inside)[:, None, None], shift_B.to(inside)[:, None, None]
    x_BKP = raw_patches(images, ids_BK, patch, channels, flip_BA).to(inside)
    if partner_B is None or weight_B is None:
        return torch.addcmul(shift_B11, x_BKP, scale_B11).to(dtype)
    other_BKP = raw_patches(images, ids_BK, patch, channels, flip_BA, partner_B).to(inside)
    weight_B11 = weight_B.to(inside)[:, None, None]
    rest_B11 = 1.0 - weight_B11
    offset_B11 = weight_B11 * shift_B11 + rest_B11 * shift_B11[partner_B]
    mixed_BKP = torch.addcmul(offset_B11, x_BKP, weight_B11 * scale_B11)
    return mixed_BKP.addcmul_(other_BKP, rest_B11 * scale_B11[partner_B]).to(dtype)


# ---- device code: one program per patch, fp32 inside, one cast at the store.
@triton.jit
def _gather_patches_kernel(
    images_ptr,  # [B, STORED, Z, Y, X] uint8, int16 or floating
    ids_ptr,  # [B, K] int64
    scale_ptr,  # [B] fp32
    shift_ptr,  # [B] fp32
    flip_ptr,  # [B, AXES] bool, or None
    partner_ptr,  # [B] int64, or None
    weight_ptr,  # [B] fp32, or None
    out_ptr,  # [B, K, P] out
    K,
    Z,
    Y,
    X,
    P: tl.constexpr,
    STORED: tl.constexpr,
    CHANNELS: tl.constexpr,
    SIDE_Z: tl.constexpr,
    SIDE_Y: tl.constexpr,
    SIDE_X: tl.constexpr,
    AXES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(
        tl.int64
    )  # B * image size and B * K * P pass 2**31 for a large batch of volumes
    sample = row // K
    if flip_ptr is not None:
        flip_ptr += sample * AXES
    value = tl.arange(0, BLOCK)
    inside = value < P
    offset = patch_offsets(
        value, tl.load(ids_ptr + row), flip_ptr, Z, Y, X, STORED, CHANNELS, SIDE_Z, SIDE_Y, SIDE_X, AXES
    )
    image_size = Z * Y * X * STORED
    x = tl.load(images_ptr + sample * image_size + offset, mask=inside, other=0).to(tl.float32)
    x = x * tl.load(scale_ptr + sample) + tl.load(shift_ptr + sample)
    if partner_ptr is not None:
        partner = tl.load(partner_ptr + sample)
        weight = tl.load(weight_ptr + sample)
        other = tl.load(images_ptr + partner * image_size + offset, mask=inside, other=0).to(tl.float32)
        other = other * tl.load(scale_ptr + partner) + tl.load(shift_ptr + partner)
        x = weight * x + (1.0 - weight) * other
    tl.store(out_ptr + row * P + value, x.to(out_ptr.dtype.element_ty), mask=inside)


def launch_gather_patches(
    images: Tensor,
    ids_BK: Tensor,
    patch: Sequence[int],
    channels: int,
    scale_B: Tensor,
    shift_B: Tensor,
    flip_BA: Tensor | None,
    partner_B: Tensor | None,
    weight_B: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Run the device code; shapes were checked by the public function."""
    launch_counts["gather_patches"] += 1
    B, K = ids_BK.shape
    shape = geometry(images, patch, channels)
    out_BKP = images.new_empty(B, K, shape["P"], dtype=dtype)
    block, num_warps = row_launch(shape["P"])
    _gather_patches_kernel[(B * K,)](
        images, ids_BK, scale_B, shift_B, flip_BA, partner_B, weight_B, out_BKP, K,
        **shape, BLOCK=block, num_warps=num_warps,
    )  # fmt: skip
    return out_BKP


# ---- custom op: nothing to differentiate, raw images take no gradient.
@torch.library.custom_op("mnemos::gather_patches", mutates_args=(), device_types="cuda")
def _gather_patches(
    images: Tensor,
    ids: Tensor,
    patch: Sequence[int],
    channels: int,
    scale: Tensor,
    shift: Tensor,
    flip: Tensor | None,
    partner: Tensor | None,
    weight: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    return launch_gather_patches(images, ids, patch, channels, scale, shift, flip, partner, weight, dtype)


_gather_patches.register_kernel("cpu")(gather_patches_reference)


@_gather_patches.register_fake
def _(images, ids, patch, channels, scale, shift, flip, partner, weight, dtype):
    return images.new_empty(*ids.shape, geometry(images, patch, channels)["P"], dtype=dtype)


# ---- public function: checks, then one call. The only name engine/ imports.
def gather_patches(
    images: Tensor,
    ids_BK: Tensor,
    *,
    patch: Sequence[int],
    channels: int,
    scale_B: Tensor,
    shift_B: Tensor,
    flip_BA: Tensor | None = None,
    partner_B: Tensor | None = None,
    weight_B: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return the patches asked for as model values, optionally mixed with another sample's.

    Model value = stored value * scale + shift, each sample with its own. With a partner the result is
    weight * sample + (1 - weight) * partner, at the sample's ids and with the sample's flip for both.

    Args:
        images: [B, C, Y, X] or [B, C, Z, Y, X], uint8, int16 or floating, contiguous; takes no gradient.
        ids_BK: int64, row-major in the grid of the mirrored sample; 0 to patches - 1, which is not checked.
        patch: sides (y, x) or (z, y, x) in pixels; they divide the image.
        channels: channels of a patch; images have as many, or one that is repeated.
        scale_B: fp32, model units per stored unit.
        shift_B: fp32, model units.
        flip_BA: bool, the axes (in the order of `patch`) along which a sample is mirrored.
        partner_B: int64, the sample each one is mixed with; comes with weight_B.
        weight_B: fp32 in [0, 1], the part of the sample itself.
        dtype: of the result; the arithmetic is fp32.

    Returns:
        [B, K, P]; inside a patch the order is (row, column, channel) or (z, y, x).

    Raises:
        ValueError: shapes do not fit each other, an input is not contiguous, or one of partner and weight is missing.
    """
    check_patches(images, ids_BK, patch, channels, flip_BA, (scale_B, shift_B, partner_B, weight_B))
    if (partner_B is None) != (weight_B is None):
        raise ValueError("partner and weight come together or not at all; pass both or neither")
    return _gather_patches(
        images, ids_BK, patch, channels, scale_B, shift_B, flip_BA, partner_B, weight_B, dtype
    )
