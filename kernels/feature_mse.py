"""Squared difference of student and teacher features, for distillation on rehearsal data.

Source: the feature distillation of MedCoSS (Ye et al., CVPR 2024, arXiv 2311.17597), section 3.3.
Plain PyTorch on every device.

Shape suffixes: B = samples, N = tokens per sample, D = width.
"""

import torch
from torch import Tensor


def feature_mse(student_BND: Tensor, teacher_BND: Tensor, valid_BN: Tensor | None = None) -> Tensor:
    """Return the sum over valid rows of mean_D (student - teacher)^2.

    Args:
        student_BND: features that take the gradient, any floating type.
        teacher_BND: frozen features of the same shape; take none.
        valid_BN: bool, False at padding; whatever stands there (NaN too) counts for nothing. None: all rows.

    Returns:
        Scalar, fp32 (fp64 for fp64 features); divide by the number of valid rows.

    Raises:
        ValueError: the shapes do not fit each other, or the teacher needs a gradient.
    """
    if student_BND.shape != teacher_BND.shape or (
        valid_BN is not None and valid_BN.shape != student_BND.shape[:-1]
    ):
        raise ValueError(
            f"student {tuple(student_BND.shape)}, teacher {tuple(teacher_BND.shape)} and valid "
            f"{None if valid_BN is None else tuple(valid_BN.shape)} must be [B, N, D], [B, N, D] and [B, N]"
        )
    if teacher_BND.requires_grad:
        raise ValueError("teacher takes no gradient; compute it under torch.no_grad() or detach it")
    inside = torch.promote_types(student_BND.dtype, torch.float32)
    diff_BND = student_BND.to(inside) - teacher_BND
    if valid_BN is not None:
        diff_BND = diff_BND.masked_fill(~valid_BN[..., None], 0.0)
    return diff_BND.square().sum() / student_BND.shape[-1]
