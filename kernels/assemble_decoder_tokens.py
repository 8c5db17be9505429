"""Decoder input: visible tokens at their places, the mask token elsewhere, plus positions.

Source: He et al., "Masked Autoencoders Are Scalable Vision Learners" (2021), section 3, "MAE decoder".
Plain PyTorch on every device.

Shape suffixes: B = samples, N = prefix + K tokens from the encoder, K = visible, L = prefix + patches, D = width.
"""

import torch
from torch import Tensor


def assemble_decoder_tokens(
    tokens_BND: Tensor, mask_token_D: Tensor, positions_LD: Tensor, visible_BK: Tensor, *, num_prefix: int = 1
) -> Tensor:
    """Return the full sequence the decoder sees.

    Args:
        tokens_BND: `num_prefix` class tokens, then the K visible tokens in the order of `visible_BK`.
        mask_token_D: stands at every patch that is not visible.
        positions_LD: `num_prefix` rows for the class tokens, then one per patch; added everywhere.
        visible_BK: int64 patch ids (the prefix not counted), unique within a sample.
        num_prefix: class tokens in front, at least 0.

    Returns:
        [B, L, D] in the type of the tokens.

    Raises:
        ValueError: the shapes do not fit each other.
    """
    B, N, D = tokens_BND.shape
    L = positions_LD.shape[0]
    if (
        visible_BK.shape != (B, N - num_prefix)
        or positions_LD.shape != (L, D)
        or mask_token_D.shape != (D,)
        or L < N
    ):
        raise ValueError(
            f"tokens {tuple(tokens_BND.shape)}, mask token {tuple(mask_token_D.shape)}, positions "
            f"{tuple(positions_LD.shape)} and visible {tuple(visible_BK.shape)} must be [B, {num_prefix} + K, D], "
            f"[D], [{num_prefix} + patches, D] and [B, K]"
        )
    index_B1 = torch.arange(B, device=visible_BK.device)[:, None]
    prefix_BN = torch.arange(num_prefix, device=visible_BK.device).expand(B, num_prefix)
    places_BN = torch.cat([prefix_BN, visible_BK + num_prefix], 1)
    masked_BLD = mask_token_D.to(tokens_BND.dtype).expand(B, L, D)
    x_BLD = masked_BLD.index_put((index_B1, places_BN), tokens_BND)
    return (x_BLD + positions_LD).to(tokens_BND.dtype)
