"""Draw samples of a shard set side by side, class by class.

Shape suffixes: C channels; Z foot to head, Y front to back, X the patient's right to left.
"""

import textwrap

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mnemos.sharding.manifest import Manifest
from mnemos.sharding.reader import ShardSet

TILE = 160  # edge of a sample's main picture in screen pixels; larger stored samples keep their size
GAP, LINE = 8, 18
TEXT_WIDTH, TEXT_LINES = 190, 6  # characters and lines of a text shown
PAPER, INK, FRAME = (250, 250, 248), (30, 30, 30), (120, 120, 120)
HOUNSFIELD_WINDOW = (-450, 550)  # one window in which lung, soft tissue and bone can be told apart
VOLUME_PERCENTILES = (0.5, 99.5)


def choose_samples(labels: np.ndarray, num: int) -> dict[int, list[int]]:
    """Choose about ``num`` samples, evenly over the classes and evenly spaced within each.

    Returns:
        label -> places in the index, ascending; the same for the same set.
    """
    classes = [int(label) for label in np.unique(labels)]
    chosen = {}
    for number, label in enumerate(classes):
        places = np.flatnonzero(labels == label)
        share = min(len(places), max(1, (num + len(classes) - 1 - number) // len(classes)))
        chosen[label] = [int(places[i * len(places) // share]) for i in range(share)]
    return chosen


def draw_sheet(shards: ShardSet, num: int) -> Image.Image:
    """Draw a contact sheet of about ``num`` samples of one split."""
    manifest = shards.manifest
    rows: list[Image.Image] = []
    for label, places in choose_samples(shards.labels, num).items():
        name = manifest.classes[label] if label >= 0 else "no label"
        total = int((shards.labels == label).sum())
        rows.append(_heading(f"{manifest.title}, {shards.split}: {name}, {len(places)} of {total}"))
        if manifest.kind == "text":
            rows += [_text_block(shards, place) for place in places]
            continue
        tiles = [
            _picture(shards.read(place), manifest)
            if manifest.kind == "image"
            else _views(shards.read(place), manifest)
            for place in places
        ]
        captions = [shards.index["key"][place].decode()[:8] for place in places]
        across = max(1, min(len(tiles), 1400 // (tiles[0].width + GAP)))
        for start in range(0, len(tiles), across):
            rows.append(_row(tiles[start : start + across], captions[start : start + across]))
    width = max(row.width for row in rows) + 2 * GAP
    sheet = Image.new("RGB", (width, sum(row.height + GAP for row in rows) + GAP), PAPER)
    top = GAP
    for row in rows:
        sheet.paste(row, (GAP, top))
        top += row.height + GAP
    return sheet


def volume_slices(volume_ZYX: np.ndarray) -> dict[str, np.ndarray]:
    """Return the middle slices as a doctor sees them: right (or front) on the left, front or head on top."""
    z, y, x = (size // 2 for size in volume_ZYX.shape)
    return {"axial": volume_ZYX[z], "coronal": volume_ZYX[::-1, y], "sagittal": volume_ZYX[::-1, :, x]}


def _picture(image_CYX: np.ndarray, manifest: Manifest) -> Image.Image:
    """Show an image, small ones enlarged by a whole factor."""
    image_YXC = image_CYX.transpose(1, 2, 0)
    picture = Image.fromarray(
        image_YXC[:, :, 0] if manifest.channels == 1 else np.ascontiguousarray(image_YXC)
    )
    factor = max(1, TILE // max(picture.size))
    return picture.convert("RGB").resize(
        (picture.width * factor, picture.height * factor), Image.Resampling.NEAREST
    )


def _views(volume_ZYX: np.ndarray, manifest: Manifest) -> Image.Image:
    """Show a volume: the axial slice, below it the coronal and the sagittal one, all to one scale."""
    assert manifest.spacing_mm is not None, "a set of volumes has a spacing"
    low, high = HOUNSFIELD_WINDOW
    if manifest.values != "hounsfield":
        low, high = np.percentile(volume_ZYX, VOLUME_PERCENTILES)
    grey_ZYX = np.round(255 * np.clip((volume_ZYX - float(low)) / max(float(high - low), 1e-6), 0, 1)).astype(
        np.uint8
    )
    across_mm = manifest.spacing_mm[2] * manifest.shape[2]
    scale = max(TILE, manifest.shape[2]) / across_mm  # screen pixels a millimetre
    mm = {"axial": (1, 2), "coronal": (0, 2), "sagittal": (0, 1)}
    views = []
    for name, slice_ in volume_slices(grey_ZYX).items():
        rows_mm, columns_mm = (manifest.spacing_mm[axis] for axis in mm[name])
        size = (round(slice_.shape[1] * columns_mm * scale), round(slice_.shape[0] * rows_mm * scale))
        views.append(Image.fromarray(np.ascontiguousarray(slice_)).resize(size, Image.Resampling.BILINEAR))
    tile = Image.new(
        "RGB", (max(view.width for view in views), sum(view.height + 2 for view in views) - 2), FRAME
    )
    top = 0
    for view in views:
        tile.paste(view, (0, top))
        top += view.height + 2
    return tile


def _row(tiles: list[Image.Image], captions: list[str]) -> Image.Image:
    width, height = tiles[0].width, max(tile.height for tile in tiles)
    row = Image.new("RGB", ((width + GAP) * len(tiles), height + LINE), PAPER)
    pen = ImageDraw.Draw(row)
    for number, (tile, caption) in enumerate(zip(tiles, captions, strict=True)):
        row.paste(tile, (number * (width + GAP), 0))
        pen.text((number * (width + GAP), height + 2), caption, fill=FRAME, font=ImageFont.load_default(11))
    return row


def _heading(words: str) -> Image.Image:
    heading = Image.new("RGB", (1400, LINE + 6), PAPER)
    ImageDraw.Draw(heading).text((0, 2), words, fill=INK, font=ImageFont.load_default(16))
    return heading


def _text_block(shards: ShardSet, place: int) -> Image.Image:
    """Show a text as stored, and how many of its tokens are kept."""
    lines = textwrap.wrap(shards.text(place), TEXT_WIDTH, max_lines=TEXT_LINES, placeholder=" ...")
    key = shards.index["key"][place].decode()[:8]
    lines.append(f"[{key}, {len(shards.read(place))} tokens]")
    block = Image.new("RGB", (1400, LINE * len(lines)), PAPER)
    pen = ImageDraw.Draw(block)
    for number, line in enumerate(lines):
        colour = FRAME if number == len(lines) - 1 else INK
        pen.text((0, LINE * number), line, fill=colour, font=ImageFont.load_default(13))
    return block
