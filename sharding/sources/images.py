"""JPEG and PNG files, 8 or 16 bits, and what all pictures go through on their way to a stored sample."""

import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from mnemos.sharding.errors import DataError
from mnemos.sharding.sources.units import Unit, relative_name, suffix

ENDINGS = (".jpg", ".jpeg", ".png")
MAX_PIXELS = 64 << 20  # a larger picture is refused before it is decoded
PERCENTILES = (0.5, 99.5)  # black and white of a picture of more than 8 bits, whose white point nobody states
_DEEP_MODES = ("I;16", "I;16L", "I;16B", "I", "F")


def find_images(files: list[Path], root: Path) -> list[Unit]:
    """Return one unit for every JPEG and PNG file."""
    return [
        Unit(name=relative_name(path, root), reader="image", files=(path,))
        for path in files
        if suffix(path) in ENDINGS
    ]


def read_image(path: Path, channels: int, size_YX: tuple[int, int]) -> np.ndarray:
    """Read a picture file as a stored sample: uint8 [C, Y, X]; DataError where it cannot be."""
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Pillow only warns between its limit and twice its limit: refuse both.
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with Image.open(path, formats=["JPEG", "PNG"]) as picture:
                # A JPEG can be opened at a half, quarter or eighth: still twice the size kept, many times
                # faster.
                picture.draft(None, (2 * size_YX[1], 2 * size_YX[0]))
                picture.load()
                return stored_image(ImageOps.exif_transpose(picture), channels, size_YX)
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise DataError(
                f"it has more than {MAX_PIXELS >> 20} million pixels, the most allowed"
            ) from error
        except UnidentifiedImageError as error:
            raise DataError("it is not a JPEG or PNG file") from error
        except OSError as error:
            raise DataError(f"it cannot be decoded ({error})") from error


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
    """
    if picture.mode in _DEEP_MODES:
        picture = Image.fromarray(stretch(np.asarray(picture, dtype=np.float32)))
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
    scaled = np.clip((values_YX.astype(np.float32) - lower) / max(upper - lower, 1e-12), 0, 1)
    if not scaled.min() < scaled.max():
        raise DataError("all its pixels have one value")
    return np.round(255 * scaled).astype(np.uint8)
