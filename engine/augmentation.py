"""Draw what happens to a sample before it is encoded: crop, flip, mirror and the partner it is mixed with.

Every number comes from `counter_rng`, keyed by the sample's place in the global order, so that a sample meets
the same chance in any micro-batch, on any rank and after a resume. Nothing waits for the device and no shape
depends on a draw. Give every function (and every epoch) its own key from `stream_key`: equal keys give equal
numbers.

Sources: the law of the crop, torchvision's RandomResizedCrop; the resampling, Pillow's (Keys' cubic).

Shape suffixes: B = samples, C = channels, Y, X = rows and columns, O = output positions along one axis,
I = input positions, T = tries, A = axes, G = groups.
"""

import math

import torch
from torch import Tensor

from mnemos.kernels.counter_rng import random_bits, uniform

_TRIES = 10  # torchvision's; with its default scale and ratio all ten fail once in 10**10 samples
_FAR = 1e6  # a tap at this distance from every output position weighs nothing


def crop_boxes(
    place_B: Tensor,
    size: tuple[int, int],
    *,
    key: int,
    scale: tuple[float, float] = (0.2, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> tuple[Tensor, Tensor]:
    """Draw one crop for each sample, whole pixels, and whether it is flipped.

    The law is torchvision's without its loop: ten pairs (area, ratio) are drawn at once and the first that
    fits the image is taken. Where none fits, the first is cut to the image (torchvision: the largest centre
    crop).

    Args:
        place_B: int64, the samples' places in the global order.
        size: (Y, X) of the images.
        key: from `stream_key`.
        scale: least and most share of the image's area, uniform.
        ratio: least and most width / height, uniform in the logarithm.

    Returns:
        box_B4: fp32 whole numbers (top, left, height, width) in pixels, inside the image.
        flip_B: bool, True with probability one half.
    """
    rows, columns = size
    draw = uniform(key, place_B, 2 * _TRIES + 3)
    area_BT = (draw[:, :_TRIES] * (scale[1] - scale[0]) + scale[0]) * (rows * columns)
    low, high = math.log(ratio[0]), math.log(ratio[1])
    ratio_BT = (draw[:, _TRIES : 2 * _TRIES] * (high - low) + low).exp()
    width_BT = (area_BT * ratio_BT).sqrt().round()
    height_BT = (area_BT / ratio_BT).sqrt().round()

    fits_BT = (width_BT <= columns) & (height_BT <= rows) & (width_BT > 0) & (height_BT > 0)
    first_B1 = fits_BT.int().argmax(dim=1, keepdim=True)  # 0 where no try fits
    width_B = width_BT.gather(1, first_B1)[:, 0].clamp(1, columns)
    height_B = height_BT.gather(1, first_B1)[:, 0].clamp(1, rows)

    # fp32 may round u * n up to n, one past the last place
    top_B = torch.minimum((draw[:, -3] * (rows - height_B + 1)).floor(), rows - height_B)
    left_B = torch.minimum((draw[:, -2] * (columns - width_B + 1)).floor(), columns - width_B)
    return torch.stack((top_B, left_B, height_B, width_B), dim=1), draw[:, -1] < 0.5


def _resize_weights(
    start_B: Tensor, length_B: Tensor, flip_B: Tensor | None, num_in: int, num_out: int
) -> Tensor:
    """Return fp32 [B, O, I]: how much each input position weighs in each output position of one axis.

    The cubic is widened by length / num_out when it shrinks (antialias), its taps outside the crop are
    dropped and the rest sum to 1: Pillow's `resize(box=...)`. A flip counts the output from the far end.
    """
    step_B1 = (length_B / num_out)[:, None]
    widen_B1 = step_B1.clamp(min=1.0)
    centre_BO = torch.arange(num_out, device=start_B.device, dtype=torch.float32) + 0.5
    centre_BO = centre_BO if flip_B is None else torch.where(flip_B[:, None], num_out - centre_BO, centre_BO)
    centre_BO = centre_BO * (step_B1 / widen_B1)

    tap_BI = torch.arange(num_in, device=start_B.device, dtype=torch.float32) + 0.5 - start_B[:, None]
    outside_BI = (tap_BI < 0) | (tap_BI > length_B[:, None])
    tap_BI = (tap_BI / widen_B1).masked_fill(outside_BI, _FAR)

    # Keys' cubic with a = -1/2 at distance t, without branches: s^2 (s - 1) / 2 + r^2 (3 - 2 s),
    # where s = max(2 - t, 0) and r = max(s - 1, 0)
    s = (tap_BI[:, None, :] - centre_BO[:, :, None]).abs_().neg_().add_(2.0).clamp_(min=0.0)
    below = s - 1.0
    weight_BOI = torch.addcmul(
        below.clamp(min=0.0).square_().mul_(3.0 - 2.0 * s), s.square_(), below, value=0.5
    )
    return weight_BOI.div_(weight_BOI.sum(dim=2, keepdim=True))


def random_resized_crop(
    images: Tensor,
    place_B: Tensor,
    *,
    key: int,
    scale: tuple[float, float] = (0.2, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    out: tuple[int, int] | None = None,
) -> Tensor:
    """Cut a random box out of every image, resize it, flip half of them: two small matrix products, no loop.

    Args:
        images: uint8 [B, C, Y, X].
        place_B: int64, the samples' places in the global order, on the images' device.
        key: from `stream_key`.
        scale, ratio: as `crop_boxes`.
        out: (rows, columns) of the result; the images' own by default.

    Returns:
        uint8 [B, C, *out]; within one grey level of Pillow's bicubic resize of the box, columns first.

    Raises:
        ValueError: the images are not uint8 of four dimensions.
    """
    if images.dtype != torch.uint8 or images.dim() != 4:
        raise ValueError(
            f"random_resized_crop: got {images.dtype} {tuple(images.shape)}; images are uint8 [B, C, Y, X]; "
            "crop them before they are scaled, and mirror volumes instead (mirror_flags)"
        )
    batch, channels, rows, columns = images.shape
    box_B4, flip_B = crop_boxes(place_B, (rows, columns), key=key, scale=scale, ratio=ratio)
    out_rows, out_columns = out or (rows, columns)
    down_BOI = _resize_weights(box_B4[:, 0], box_B4[:, 2], None, rows, out_rows)
    along_BOI = _resize_weights(box_B4[:, 1], box_B4[:, 3], flip_B, columns, out_columns)

    # cut to the grey range in between, as Pillow does: a cubic overshoots at edges
    values = images.float().view(batch, channels * rows, columns)
    narrow = torch.bmm(values, along_BOI.transpose(1, 2)).clamp_(0, 255)
    narrow = narrow.view(batch, channels, rows, out_columns)
    resized = torch.matmul(down_BOI[:, None], narrow)
    return resized.clamp_(0, 255).round_().to(torch.uint8)


def mirror_flags(place_B: Tensor, *, key: int, num_axes: int) -> Tensor:
    """Return bool [B, A], the axes to mirror: none in half of the samples, else each with chance one half.

    Args:
        place_B: int64, the samples' places in the global order.
        key: from `stream_key`.
        num_axes: 3 for volumes (Z, Y, X).
    """
    draw = uniform(key, place_B, 1 + num_axes)
    return (draw[:, :1] < 0.5) & (draw[:, 1:] < 0.5)


def mixing_partner(place_B: Tensor, *, key: int, group: int) -> Tensor:
    """Return int64 [B], the row each row is mixed with: a random permutation of each run of `group` rows.

    A run's permutation depends on the place of its first row alone, so a batch cut at multiples of `group`,
    over micro-batches or ranks, mixes the same pairs. A row may be its own partner, as in any permutation.

    Args:
        place_B: int64, the rows' places in the global order.
        key: from `stream_key`.
        group: rows in a run; B is a multiple of it.

    Raises:
        ValueError: B is no multiple of `group`.
    """
    rows = place_B.shape[0]
    if group < 1 or rows % group:
        raise ValueError(
            f"mixing_partner: {rows} rows in runs of {group}; the rows must be a multiple of the run; "
            "choose a run that divides the micro-batch"
        )
    order = random_bits(key, place_B[::group].contiguous(), group).argsort(dim=1)  # [G, group]
    first = torch.arange(0, rows, group, device=place_B.device)
    return (order + first[:, None]).view(rows)


def mixing_weight(place_B: Tensor, *, key: int) -> Tensor:
    """Return fp32 [B], uniform in [0, 1): the sample's own share of its mixture; its partner has the rest."""
    return uniform(key, place_B, 1)[:, 0]
