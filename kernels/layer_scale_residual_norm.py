"""Residual with DropPath and LayerScale, then LayerNorm: the memory-bound half of a block.

Sources: Touvron et al., "Going deeper with Image Transformers" (2021), section 2.2 (LayerScale); Huang et al., "Deep
Networks with Stochastic Depth" (2016); Ba et al., "Layer Normalization" (2016). Plain PyTorch on every device.

Shape suffixes: B = samples, L = tokens, D = width.
"""

import torch
from torch import Tensor
from torch.nn.functional import layer_norm


def layer_scale_residual_norm(
    x_BLD: Tensor,
    branch_BLD: Tensor,
    scale_D: Tensor,
    keep_B: Tensor | None,
    weight_D: Tensor,
    bias_D: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Return x + keep * scale * branch, and its LayerNorm.

    Args:
        x_BLD: the residual stream.
        branch_BLD: output of attention or MLP, same shape and type.
        scale_D: LayerScale.
        keep_B: DropPath factor per sample, 0 or 1 / (1 - p); None keeps every branch as it is.
        weight_D: LayerNorm gain.
        bias_D: LayerNorm offset.
        eps: added to the variance, above 0.

    Returns:
        The new residual stream and the normalised stream, both [B, L, D] in the type of x. The statistics are fp32
        whatever that type is, in backward too.

    Raises:
        ValueError: the shapes do not fit each other.
    """
    D = x_BLD.shape[-1]
    if x_BLD.shape != branch_BLD.shape or not scale_D.shape == weight_D.shape == bias_D.shape == (D,):
        raise ValueError(
            f"x {tuple(x_BLD.shape)}, branch {tuple(branch_BLD.shape)}, scale {tuple(scale_D.shape)}, weight "
            f"{tuple(weight_D.shape)} and bias {tuple(bias_D.shape)} must be [B, L, D] twice and [D] three times"
        )
    if keep_B is None:
        factor = scale_D
    elif keep_B.shape == x_BLD.shape[:1]:
        factor = scale_D * keep_B[:, None, None]
    else:
        raise ValueError(f"keep {tuple(keep_B.shape)} must be [{x_BLD.shape[0]}], one factor per sample")
    x_new_BLD = torch.addcmul(x_BLD, branch_BLD, factor.to(x_BLD.dtype))
    inside = torch.promote_types(x_BLD.dtype, torch.float32)
    normed_BLD = layer_norm(x_new_BLD.to(inside), (D,), weight_D.to(inside), bias_D.to(inside), eps)
    return x_new_BLD, normed_BLD.to(x_BLD.dtype)
