"""Masked patch reconstruction loss against targets normalised per patch, read from the raw image.

Source: He et al., "Masked Autoencoders Are Scalable Vision Learners" (2021), section 4.1, "normalized pixels".
Forward reads prediction and image once, forms the target in registers, and leaves the loss and its gradient together.

Shape suffixes: B = samples, M = masked patches, P = values per patch, A = 2 or 3 spatial axes, R = B * M rows.
"""

# Launch keywords such as num_warps are not in a kernel's signature.
# pyright: reportCallIssue=false

from collections.abc import Sequence
from math import prod, sqrt
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import layer_norm

from mnemos.kernels._common.launch import launch_counts, row_launch
from mnemos.kernels._common.loss_gradient import differentiate_loss
from mnemos.kernels._common.patches import check_patches, geometry, patch_offsets, raw_patches

EPS = 1e-6  # added to the patch variance, in squared model units


# ---- reference: the definition. Any device, any dtype; CPU runs use it.
def difference_reference(
    pred_BMP: Tensor,
    images: Tensor,
    ids_BM: Tensor,
    patch: Sequence[int],
    channels: int,
    scale_B: Tensor,
    flip_BA: Tensor | None,
) -> Tensor:
    """Return prediction - target in plain PyTorch, fp32 (fp64 throughout for an fp64 prediction)."""
    inside = torch.promote_types(pred_BMP.dtype, torch.float32)
    values_BMP = raw_patches(images, ids_BM, patch, channels, flip_BA).to(inside)
    # Counted from its first value a constant patch is exactly 0, and a nearly constant one keeps its digits.
    values_BMP.sub_(values_BMP[..., :1].clone()).mul_(scale_B.to(inside)[:, None, None])
    P = values_BMP.shape[-1]
    shrink = (P - 1) / P  # layer_norm's variance divides by P, the target's by P - 1
    gain_P = values_BMP.new_full((P,), sqrt(shrink))
    return pred_BMP - layer_norm(values_BMP, (P,), gain_P, eps=EPS * shrink)


def masked_patch_mse_reference(pred_BMP: Tensor, *args: Any, factor: Tensor | None = None) -> Tensor:
    """Return the loss `masked_patch_mse` defines, in plain PyTorch; other arguments as `difference_reference`."""
    loss = difference_reference(pred_BMP, *args).square().mean(-1).sum()
    return loss if factor is None else loss * factor


# ---- device code: one program per patch, statistics in fp32.
@triton.jit
def _masked_patch_mse_kernel(
    pred_ptr,  # [R, P]
    images_ptr,  # [B, STORED, Z, Y, X] uint8, int16 or floating
    ids_ptr,  # [R] int64
    scale_ptr,  # [B] fp32
    flip_ptr,  # [B, AXES] bool, or None
    factor_ptr,  # [] fp32, or None
    loss_ptr,  # [R] fp32 out
    grad_ptr,  # [R, P] out, or None
    M,
    Z,
    Y,
    X,
    eps,
    P: tl.constexpr,
    STORED: tl.constexpr,
    CHANNELS: tl.constexpr,
    SIDE_Z: tl.constexpr,
    SIDE_Y: tl.constexpr,
    SIDE_X: tl.constexpr,
    AXES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # R * P passes 2**31 for a large batch of volumes
    sample = row // M
    if flip_ptr is not None:
        flip_ptr += sample * AXES
    images_ptr += sample * (Z * Y * X * STORED)
    patch_id = tl.load(ids_ptr + row)
    value = tl.arange(0, BLOCK)
    inside = value < P
    offset = patch_offsets(value, patch_id, flip_ptr, Z, Y, X, STORED, CHANNELS, SIDE_Z, SIDE_Y, SIDE_X, AXES)
    first = patch_offsets(0, patch_id, flip_ptr, Z, Y, X, STORED, CHANNELS, SIDE_Z, SIDE_Y, SIDE_X, AXES)
    pred = tl.load(pred_ptr + row * P + value, mask=inside, other=0.0).to(tl.float32)
    raw = tl.load(images_ptr + offset, mask=inside, other=0).to(tl.float32)
    raw = tl.where(inside, raw - tl.load(images_ptr + first).to(tl.float32), 0.0)
    centred = tl.where(inside, raw - tl.sum(raw, 0) / P, 0.0)
    scale = tl.load(scale_ptr + sample)
    variance = scale * scale * (tl.sum(centred * centred, 0) / (P - 1))
    diff = pred - centred * (scale / tl.sqrt(variance + eps))  # 0 past the end of the patch
    factor = 1.0
    if factor_ptr is not None:
        factor *= tl.load(factor_ptr)
    tl.store(loss_ptr + row, tl.sum(diff * diff, 0) / P * factor)
    if grad_ptr is not None:
        grad = diff * (2.0 * factor / P)
        tl.store(grad_ptr + row * P + value, grad.to(grad_ptr.dtype.element_ty), mask=inside)


def launch_masked_patch_mse(
    pred_BMP: Tensor,
    images: Tensor,
    ids_BM: Tensor,
    patch: Sequence[int],
    channels: int,
    scale_B: Tensor,
    flip_BA: Tensor | None,
    factor: Tensor | None,
    with_grad: bool,
) -> tuple[Tensor, Tensor]:
    """Run the device code; shapes were checked by the public function.

    Returns:
        The loss and, where asked for, its gradient in the type of the prediction; else an empty tensor.
    """
    launch_counts["masked_patch_mse"] += 1
    num_rows = ids_BM.numel()
    loss_R = pred_BMP.new_empty(num_rows, dtype=torch.float32)
    grad_BMP = torch.empty_like(pred_BMP) if with_grad else None
    block, num_warps = row_launch(pred_BMP.shape[-1])
    _masked_patch_mse_kernel[(num_rows,)](
        pred_BMP, images, ids_BM, scale_B, flip_BA, factor, loss_R, grad_BMP, ids_BM.shape[1], eps=EPS,
        **geometry(images, patch, channels), BLOCK=block, num_warps=num_warps,
    )  # fmt: skip
    return loss_R.sum(), pred_BMP.new_empty(0) if grad_BMP is None else grad_BMP


# ---- custom op: the second result is the gradient for an upstream of 1, empty where none is wanted.
@torch.library.custom_op("mnemos::masked_patch_mse", mutates_args=(), device_types="cuda")
def _masked_patch_mse(
    pred: Tensor,
    images: Tensor,
    ids: Tensor,
    patch: Sequence[int],
    channels: int,
    scale: Tensor,
    flip: Tensor | None,
    factor: Tensor | None,
    with_grad: bool,
) -> tuple[Tensor, Tensor]:
    return launch_masked_patch_mse(pred, images, ids, patch, channels, scale, flip, factor, with_grad)


@_masked_patch_mse.register_kernel("cpu")
def _(pred, images, ids, patch, channels, scale, flip, factor, with_grad):
    diff = difference_reference(pred, images, ids, patch, channels, scale, flip)
    P = pred.shape[-1]
    loss = diff.square().mean(-1).sum() * (1.0 if factor is None else factor)
    if not with_grad:
        return loss, pred.new_empty(0)
    return loss, diff.mul_(2.0 / P if factor is None else factor * (2.0 / P)).to(pred.dtype)


@_masked_patch_mse.register_fake
def _(pred, images, ids, patch, channels, scale, flip, factor, with_grad):
    loss = pred.new_empty((), dtype=torch.promote_types(pred.dtype, torch.float32))
    return loss, torch.empty_like(pred) if with_grad else pred.new_empty(0)


differentiate_loss(_masked_patch_mse)


# ---- public function: checks, then one call. The only name engine/ imports.
def masked_patch_mse(
    pred_BMP: Tensor,
    images: Tensor,
    ids_BM: Tensor,
    *,
    patch: Sequence[int],
    channels: int,
    scale_B: Tensor,
    shift_B: Tensor,
    flip_BA: Tensor | None = None,
    factor: Tensor | None = None,
) -> Tensor:
    """Return factor * the sum over patches of mean_P (prediction - target)^2.

    The target of a patch p of model values is (p - mean(p)) / sqrt(var(p) + 1e-6), with the unbiased variance.

    Args:
        pred_BMP: decoder output at the masked patches, fp32/bf16/fp16, contiguous; takes the gradient.
        images: [B, C, Y, X] or [B, C, Z, Y, X], uint8, int16 or floating, contiguous; takes no gradient.
        ids_BM: int64, row-major in the grid of the mirrored sample; 0 to patches - 1, which is not checked.
        patch: sides (y, x) or (z, y, x) in pixels; they divide the image.
        channels: channels of a patch; images have as many, or one that is repeated.
        scale_B: fp32, model units per stored unit.
        shift_B: fp32, model units; a target does not depend on it, so it is only checked.
        flip_BA: bool, the axes (in the order of `patch`) along which a sample is mirrored.
        factor: fp32 scalar the loss is weighted with; None is 1.

    Returns:
        Scalar fp32, dimensionless (fp64 for an fp64 prediction on a CPU); with factor 1, divide by the number of
        masked patches.

    Raises:
        ValueError: shapes do not fit each other, or an input is not contiguous.
    """
    check_patches(images, ids_BM, patch, channels, flip_BA, (scale_B, shift_B))
    P = prod(patch) * channels
    if pred_BMP.shape != (*ids_BM.shape, P) or P < 2:
        raise ValueError(
            f"prediction {tuple(pred_BMP.shape)} must be {(*ids_BM.shape, P)}, at least 2 values a patch"
        )
    if not pred_BMP.is_contiguous():
        raise ValueError("prediction must be contiguous; call .contiguous() where you made it")
    with_grad = pred_BMP.requires_grad and torch.is_grad_enabled()
    args = (pred_BMP, images, ids_BM, patch, channels, scale_B, flip_BA, factor, with_grad)
    return _masked_patch_mse(*args)[0]
