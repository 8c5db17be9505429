"""Squared difference of student and teacher features, for distillation on rehearsal data.

Source: the feature distillation of MedCoSS (Ye et al., CVPR 2024, arXiv 2311.17597), section 3.3. Forward reads both
once and forms the loss and its gradient together.

Shape suffixes: D = width.
"""

# Launch keywords such as num_warps are not in a kernel's signature.
# pyright: reportCallIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from mnemos.kernels._common.launch import launch_counts
from mnemos.kernels._common.loss_gradient import differentiate_loss

BLOCK = 4096  # values of one program: 32 of each tensor a thread


# ---- reference: the definition. Any device, any dtype.
def feature_mse_reference(student: Tensor, teacher: Tensor, factor: Tensor | None = None) -> Tensor:
    """Return the loss `feature_mse` defines, in plain PyTorch; fp64 throughout for fp64 features."""
    inside = torch.promote_types(student.dtype, torch.float32)
    loss = (student.to(inside) - teacher.to(inside)).square().sum() / student.shape[-1]
    return loss if factor is None else loss * factor


# ---- device code: one program per BLOCK values, wherever the rows end.
@triton.jit
def _feature_mse_kernel(
    student_ptr,  # [NUM]
    teacher_ptr,  # [NUM]
    factor_ptr,  # [] fp32, or None
    partial_ptr,  # [programs] fp32 out, parts of the loss
    grad_ptr,  # [NUM] out, or None
    num,
    D,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    place = program * BLOCK + tl.arange(0, BLOCK)
    inside = place < num
    diff = tl.load(student_ptr + place, mask=inside, other=0.0).to(tl.float32)
    diff -= tl.load(teacher_ptr + place, mask=inside, other=0.0).to(tl.float32)
    factor = 1.0
    if factor_ptr is not None:
        factor *= tl.load(factor_ptr)
    tl.store(partial_ptr + program, tl.sum(diff * diff, 0) / D * factor)
    if grad_ptr is not None:
        grad = diff * (2.0 * factor / D)
        tl.store(grad_ptr + place, grad.to(grad_ptr.dtype.element_ty), mask=inside)


def launch_feature_mse(
    student: Tensor, teacher: Tensor, factor: Tensor | None, with_grad: bool
) -> tuple[Tensor, Tensor]:
    """Run the device code; shapes were checked by the public function.

    Returns:
        The loss and, where asked for, its gradient in the type of the student; else an empty tensor.
    """
    launch_counts["feature_mse"] += 1
    num = student.numel()
    partial = student.new_empty(triton.cdiv(num, BLOCK), dtype=torch.float32)
    grad = torch.empty_like(student) if with_grad else None
    _feature_mse_kernel[(partial.numel(),)](
        student, teacher, factor, partial, grad, num, student.shape[-1], BLOCK=BLOCK, num_warps=4
    )
    return partial.sum(), student.new_empty(0) if grad is None else grad


# ---- custom op: the second result is the gradient for an upstream of 1, empty where none is wanted.
@torch.library.custom_op("mnemos::feature_mse", mutates_args=(), device_types="cuda")
def _feature_mse(
    student: Tensor, teacher: Tensor, factor: Tensor | None, with_grad: bool
) -> tuple[Tensor, Tensor]:
    return launch_feature_mse(student, teacher, factor, with_grad)


@_feature_mse.register_kernel("cpu")
def _(student, teacher, factor, with_grad):
    inside = torch.promote_types(student.dtype, torch.float32)
    diff = student.to(inside) - teacher.to(inside)
    D = student.shape[-1]
    loss = diff.square().sum() / D * (1.0 if factor is None else factor)
    if not with_grad:
        return loss, student.new_empty(0)
    return loss, diff.mul_(2.0 / D if factor is None else factor * (2.0 / D)).to(student.dtype)


@_feature_mse.register_fake
def _(student, teacher, factor, with_grad):
    loss = student.new_empty((), dtype=torch.promote_types(student.dtype, torch.float32))
    return loss, torch.empty_like(student) if with_grad else student.new_empty(0)


differentiate_loss(_feature_mse)


# ---- public function: checks, then one call. The only name engine/ imports.
def feature_mse(student: Tensor, teacher: Tensor, factor: Tensor | None = None) -> Tensor:
    """Return factor * the sum over rows of mean_D (student - teacher)^2.

    Args:
        student: features [..., D] that take the gradient, any floating type, contiguous.
        teacher: frozen features of the same shape, contiguous; take none.
        factor: fp32 scalar the loss is weighted with; None is 1.

    Returns:
        Scalar, fp32 (fp64 for fp64 features on a CPU); with factor 1, divide by the number of rows.

    Raises:
        ValueError: the shapes do not fit each other, the teacher needs a gradient, or an input is not contiguous.
    """
    if student.shape != teacher.shape or student.dim() < 1:
        raise ValueError(
            f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} must be the same [..., D]"
        )
    if teacher.requires_grad:
        raise ValueError("teacher takes no gradient; compute it under torch.no_grad() or detach it")
    if not (student.is_contiguous() and teacher.is_contiguous()):
        raise ValueError("student and teacher must be contiguous; call .contiguous() where you made them")
    with_grad = student.requires_grad and torch.is_grad_enabled()
    return _feature_mse(student, teacher, factor, with_grad)[0]
