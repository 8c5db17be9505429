"""JPEG, PNG, TIFF and BMP files, 8 or 16 bits, and what all pictures go through on their way to a stored sample."""

import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from mnemos.sharding.errors import DataError
from mnemos.sharding.modalities import Modality, StoredSize
from mnemos.sharding.sources.bounds import MAX_PIXELS, refusing
from mnemos.sharding.sources.picture_file import check_picture
from mnemos.sharding.sources.source import FindOptions, Outcome, Source, image_outcome
from mnemos.sharding.sources.units import Unit, files_below, relative_name, root_of, suffix

ENDINGS = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp")
MOST_LONG = 100  # times as long as wide: brought to the stored width, a longer one would have no end
PERCENTILES = (0.5, 99.5)  # black and white of a picture of more than 8 bits, whose white point nobody states
MAX_TIFF_PIXELS = 16 << 20  # of a TIFF and of its tiles: its decoder holds both, and up to 16 bytes a pixel
_TIFF_CODECS = ("raw", "packbits", "tiff_lzw", "tiff_adobe_deflate", "tiff_deflate", "jpeg")
_TILE_SIDES = (322, 323)  # tags
_BLOCK = 1 << 20  # pixels stretched at a time
_DEEP_MODES = ("I;16", "I;16L", "I;16B", "I", "F")


def find_images(source: Path, modality: Modality, options: FindOptions) -> list[Unit]:
    """Return one unit for every picture file."""
    return [
        Unit(name=relative_name(path, root_of(source)), reader="image", files=(path,))
        for path in files_below(source)
        if suffix(path) in ENDINGS
    ]


def read_unit(unit: Unit, modality: Modality, size: StoredSize) -> Outcome:
    """Read a unit that is one picture file."""
    return image_outcome(unit, read_image(unit.files[0], modality.channels, size.image))


def read_image(path: Path, channels: int, size_YX: tuple[int, int]) -> np.ndarray:
    """Read a picture file as a stored sample: uint8 [C, Y, X]; DataError where it cannot be."""
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS
    check_picture(path)
    with refusing("it cannot be decoded"):
        # Pillow only warns between its limit and twice its limit: refuse both.
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with Image.open(path, formats=["JPEG", "PNG", "TIFF", "BMP"]) as picture:
                _check_form(picture)
                # A JPEG can be opened at a half, quarter or eighth: still twice the size kept, many times
                # faster.
                picture.draft(None, (2 * size_YX[1], 2 * size_YX[0]))
                picture.load()
                ImageOps.exif_transpose(picture, in_place=True)
                return stored_image(picture, channels, size_YX)
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise DataError(
                f"it has more than {MAX_PIXELS >> 20} million pixels, the most allowed"
            ) from error
        except UnidentifiedImageError as error:
            raise DataError("it is not a JPEG, PNG, TIFF or BMP file") from error


def _check_form(picture: Image.Image) -> None:
    """Refuse the forms of TIFF and BMP that cost far more to decode than they look, before any of it is decoded."""
    if picture.format == "TIFF":
        tags = getattr(picture, "tag_v2", {})
        sides = [tags.get(side, 0) for side in _TILE_SIDES]
        if not all(isinstance(side, int) for side in sides) or sides[0] * sides[1] > MAX_TIFF_PIXELS:
            raise DataError(
                f"its tiles have {sides} pixels; at most {MAX_TIFF_PIXELS >> 20} million are allowed"
            )
        if picture.width * picture.height > MAX_TIFF_PIXELS:
            raise DataError(
                f"it is a TIFF of more than {MAX_TIFF_PIXELS >> 20} million pixels; cut it into patches"
            )
        if picture.info.get("compression") not in _TIFF_CODECS:
            raise DataError(
                f"it is a TIFF packed as {picture.info.get('compression')}; {', '.join(_TIFF_CODECS)} are read"
            )
        if getattr(tags, "next", 0):
            raise DataError("it is a TIFF of several pictures; store one a file")
    elif picture.format == "BMP" and picture.info.get("compression"):
        raise DataError("it is a compressed BMP; save it as PNG")


def stored_image(picture: Image.Image, channels: int, size_YX: tuple[int, int]) -> np.ndarray:
    """Bring a decoded picture to its stored form.

    Colour becomes luminance where one channel is stored; more than 8 bits are stretched between two
    percentiles; the shortest side is resized (bicubic, antialiased) and the centre cut out.

    Args:
        picture: any Pillow mode, upright.
        channels: 1 or 3.
        size_YX: stored size in pixels.

    Returns:
        uint8 [C, Y, X].

    Raises:
        DataError: more than a hundred times as long as wide, or all of one value.
    """
    if max(picture.size) > MOST_LONG * min(picture.size):
        raise DataError(
            f"it is {picture.height}x{picture.width}, more than {MOST_LONG} times as long as wide"
        )
    if picture.mode in _DEEP_MODES:
        picture = Image.fromarray(stretch(np.asarray(picture)))
    picture = picture.convert("L" if channels == 1 else "RGB")
    height, width = size_YX
    factor = max(height / picture.height, width / picture.width)
    resized = (max(width, round(picture.width * factor)), max(height, round(picture.height * factor)))
    picture = picture.resize(resized, Image.Resampling.BICUBIC)
    left, top = (resized[0] - width) // 2, (resized[1] - height) // 2
    image_YXC = np.asarray(picture.crop((left, top, left + width, top + height))).reshape(
        height, width, channels
    )
    return np.ascontiguousarray(image_YXC.transpose(2, 0, 1))


def stretch(values_YX: np.ndarray, window: tuple[float, float] | None = None) -> np.ndarray:
    """Map grey values to uint8, black at the window's lower and white at its upper end.

    Args:
        values_YX: any real type.
        window: (lower, upper) in the values' unit; None: the 0.5 and 99.5 percentiles.

    Raises:
        DataError: nothing lies between the ends, so the picture would be one flat grey.
    """
    lower, upper = window if window is not None else np.percentile(values_YX, PERCENTILES)
    grey_YX = np.empty(values_YX.shape, dtype=np.uint8)
    darkest, brightest = 1.0, 0.0
    rows = max(1, _BLOCK // max(1, values_YX.shape[1]))
    for first in range(0, len(values_YX), rows):  # in float32, a whole picture may be too large
        block = values_YX[first : first + rows].astype(np.float32)
        scaled = np.clip((block - lower) / max(upper - lower, 1e-12), 0, 1)
        if np.isnan(scaled.max()):
            raise DataError("some of its pixels are no numbers")
        darkest, brightest = min(darkest, float(scaled.min())), max(brightest, float(scaled.max()))
        grey_YX[first : first + rows] = np.round(255 * scaled)
    if not darkest < brightest:
        raise DataError("all its pixels have one value")
    return grey_YX


SOURCE = Source(
    name="images",
    about="JPEG, PNG, TIFF and BMP pictures in any folders",
    kinds=("image",),
    find=find_images,
    readers={"image": read_unit},
)
