"""Strips for people: what the model was shown, what it made of the rest, and the truth beside it.

Pillow alone draws them. Every strip says in its caption (and in the PNG's metadata) how predictions were
brought back to grey values, because a patch's own mean and contrast are given away that way.

Shape suffixes: B = samples, L = patches of a sample, K = visible, M = masked, P = values per patch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin
from torch import Tensor

from mnemos.engine.patches import all_patches, join_patches, patch_statistics

COLUMNS = ("original", "masked", "reconstructed", "prediction only")
IMAGE_CAPTION = "masked patches de-normalised with the patch's own statistics"
TEXT_CAPTION = "only masked words are predicted: green right, red wrong; blue: what stood in their place"
WINDOWS = {  # model values shown as black and white, by a manifest's `values`
    "unit": (0.0, 1.0),
    "hounsfield": (-160 / 1024, 240 / 1024),  # the soft-tissue window, level 40, width 400 HU
    "zscore": (-2.0, 3.0),
}

Colour = tuple[int, int, int]
_PAPER: Colour = (255, 255, 255)
_INK: Colour = (20, 20, 20)
_FAINT: Colour = (150, 150, 150)
_HIDDEN: Colour = (58, 66, 92)  # blue-grey, so that it is no grey of a picture
_RIGHT: Colour = (0, 125, 50)
_WRONG: Colour = (200, 25, 25)
_SHOWN: Colour = (30, 70, 190)

_LEAST_EDGE = 160  # pixels on screen; smaller samples are enlarged by a whole number
_GAP = 8
_LINE = 22
_FONT_SIZE = 15
_TEXT_WIDTH = 1_100
_LABEL_WIDTH = 84


def reconstruction_strip(
    path: Path,
    images: ArrayLike | Tensor,
    predictions_BMP: ArrayLike | Tensor,
    *,
    visible_BK: ArrayLike | Tensor,
    masked_BM: ArrayLike | Tensor,
    scale_B: ArrayLike | Tensor,
    shift_B: ArrayLike | Tensor,
    patch: Sequence[int],
    channels: int,
    window: tuple[float, float],
    title: str = "",
) -> None:
    """Write a PNG, one row a sample: original, visible patches, reconstruction, prediction alone.

    Volumes show their middle axial slice; a grey image the mean of what was predicted for its repeated
    channels. All arrays lie on the host, numpy or torch.

    Args:
        path: the PNG; replaced whole or not at all.
        images: as stored, uint8 [B, C, Y, X] or int16 [B, 1, Z, Y, X].
        predictions_BMP: [B, M, P], the decoder's predictions in normalised patch units.
        visible_BK, masked_BM: int, patch ids; together every patch of the sample.
        scale_B, shift_B: [B], model value = stored * scale + shift.
        patch: (y, x) or (z, y, x).
        channels: channels of a patch, 1 or 3; one stored channel is repeated.
        window: model values shown as black and as white, such as `WINDOWS[manifest.values]`.
        title: a line above the columns.
    """
    stored, predicted = torch.as_tensor(images), torch.as_tensor(predictions_BMP).float()
    masked_BM1 = torch.as_tensor(masked_BM)[:, :, None]
    visible_BK1 = torch.as_tensor(visible_BK)[:, :, None]
    values_BLP = all_patches(
        stored,
        patch=patch,
        channels=channels,
        scale_B=torch.as_tensor(scale_B).float(),
        shift_B=torch.as_tensor(shift_B).float(),
    )
    num_values = values_BLP.shape[2]
    mean, deviation = patch_statistics(values_BLP.gather(1, masked_BM1.expand(-1, -1, num_values)))
    restored_BMP = predicted * deviation + mean

    unseen_BLP = torch.full_like(values_BLP, torch.nan)  # NaN is painted as hidden
    at_masked = masked_BM1.expand(-1, -1, num_values)
    at_visible = visible_BK1.expand(-1, -1, num_values)
    panels = (
        values_BLP,
        unseen_BLP.scatter(1, at_visible, values_BLP.gather(1, at_visible)),
        values_BLP.scatter(1, at_masked, restored_BMP),
        unseen_BLP.scatter(1, at_masked, restored_BMP),
    )
    size = stored.shape[2:]
    columns = [join_patches(panel, size=size, patch=patch, channels=channels) for panel in panels]
    if stored.shape[1] == 1:
        columns = [column.mean(dim=1, keepdim=True) for column in columns]
    picture = _arrange([_paint(column, window) for column in columns], title)
    _save(picture, path, {"Title": title, "Description": IMAGE_CAPTION, "Columns": ", ".join(COLUMNS)})


def _paint(values: Tensor, window: tuple[float, float]) -> list[NDArray[np.uint8]]:
    """Return each sample as uint8 [Y, X, 3] through the window; NaN in the colour of hidden patches."""
    if values.dim() == 5:
        values = values[:, :, values.shape[2] // 2]  # the middle axial slice
    grey = ((values - window[0]) / (window[1] - window[0])).clamp(0, 1) * 255
    rgb = grey.expand(-1, 3, -1, -1) if grey.shape[1] == 1 else grey
    rgb = torch.where(rgb.isnan(), torch.tensor(_HIDDEN)[:, None, None], rgb).round()
    return list(rgb.permute(0, 2, 3, 1).to(torch.uint8).numpy())


def _arrange(columns: Sequence[Sequence[NDArray[np.uint8]]], title: str) -> Image.Image:
    """Lay the panels out under their headings, enlarged without smoothing, the caption below."""
    height, width = columns[0][0].shape[:2]
    factor = max(1, -(-_LEAST_EDGE // min(height, width)))
    height, width, num_rows = height * factor, width * factor, len(columns[0])
    top = _GAP + _LINE * (2 if title else 1)
    canvas = Image.new(
        "RGB",
        (_GAP + len(columns) * (width + _GAP), top + num_rows * (height + _GAP) + _LINE + _GAP),
        _PAPER,
    )
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(_FONT_SIZE)
    draw.text((_GAP, _GAP // 2), title, _INK, font)
    for column, (heading, panels) in enumerate(zip(COLUMNS, columns, strict=True)):
        left = _GAP + column * (width + _GAP)
        draw.text((left, top - _LINE), heading, _INK, font)
        for row, panel in enumerate(panels):
            enlarged = Image.fromarray(panel).resize((width, height), Image.Resampling.NEAREST)
            canvas.paste(enlarged, (left, top + row * (height + _GAP)))
    draw.text((_GAP, canvas.height - _LINE - _GAP // 2), IMAGE_CAPTION, _INK, font)
    return canvas


@dataclass(frozen=True, kw_only=True)
class TextExample:
    """One text as the model met it.

    Attributes:
        original: its tokens, decoded one by one; a leading space where a word starts.
        masked: the tokens the model saw, as many.
        predicted: by position, the token predicted there; only the positions asked for.
    """

    original: Sequence[str]
    masked: Sequence[str]
    predicted: Mapping[int, str]


def text_strip(path: Path, examples: Sequence[TextExample], *, title: str = "") -> None:
    """Write a PNG with three aligned lines a text: original, masked, predicted (green right, red wrong).

    Args:
        path: the PNG; replaced whole or not at all.
        examples: the texts.
        title: a line above them.
    """
    font = ImageFont.load_default(_FONT_SIZE)
    blocks = [(example, block) for example in examples for block in _wrap(example, font)]
    top = _GAP + (_LINE if title else 0)
    canvas = Image.new(
        "RGB", (_TEXT_WIDTH, top + len(blocks) * (3 * _LINE + 2 * _GAP) + _LINE + _GAP), _PAPER
    )
    draw = ImageDraw.Draw(canvas)
    draw.text((_GAP, _GAP // 2), title, _INK, font)
    for number, (example, block) in enumerate(blocks):
        y = top + number * (3 * _LINE + 2 * _GAP)
        if number and example is not blocks[number - 1][0]:
            draw.line((_GAP, y - _GAP, _TEXT_WIDTH - _GAP, y - _GAP), _FAINT)
        for line, label in enumerate(("original", "masked", "predicted")):
            draw.text((_GAP, y + line * _LINE), label, _FAINT, font)
        for position, x in block:
            for line, (token, colour) in enumerate(_cells(example, position)):
                draw.text((x, y + line * _LINE), token, colour, font)
    draw.text((_GAP, canvas.height - _LINE - _GAP // 2), TEXT_CAPTION, _INK, font)
    _save(canvas, path, {"Title": title, "Description": TEXT_CAPTION})


def _cells(example: TextExample, position: int) -> list[tuple[str, Colour]]:
    """Return the three words above each other at a position, with their colours."""
    original, shown = example.original[position].strip(), example.masked[position].strip()
    if position not in example.predicted:
        return [(original, _INK), (shown, _INK), (original, _FAINT)]
    predicted = example.predicted[position]
    colour = _RIGHT if predicted == example.original[position] else _WRONG
    return [(original, _INK), (shown, _SHOWN), (predicted.strip() or "(space)", colour)]


def _wrap(
    example: TextExample, font: "ImageFont.FreeTypeFont | ImageFont.ImageFont"
) -> list[list[tuple[int, float]]]:
    """Return blocks of (position, x): a token's column is as wide as its widest word."""
    start = _GAP + _LABEL_WIDTH
    blocks: list[list[tuple[int, float]]] = [[]]
    x = float(start)
    for position, token in enumerate(example.original):
        width = max(font.getlength(word) for word, _ in _cells(example, position))
        x += _GAP if token.startswith(" ") and x > start else 2
        if x + width > _TEXT_WIDTH - _GAP and blocks[-1]:
            blocks.append([])
            x = float(start)
        blocks[-1].append((position, x))
        x += width
    return blocks


def _save(picture: Image.Image, path: Path, notes: Mapping[str, str]) -> None:
    """Write the PNG under another name first, so that no reader meets half a picture."""
    info = PngImagePlugin.PngInfo()
    for name, text in notes.items():
        info.add_text(name, text)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    picture.save(partial, format="PNG", pnginfo=info)
    partial.replace(path)
