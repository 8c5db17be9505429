"""How far a raw file is believed: what it may declare, unpack to and carry beside its picture.

A size is taken from the header, and compared with the bytes that are really there, before anything of that size is
allocated. Whatever a decoder of others raises becomes one sentence about one broken file.
"""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from mnemos.sharding.errors import DataError, LeftOut, UserError

MAX_PIXELS = 64 << 20  # of one picture
MOST_SHRUNK = 200  # unpacked bytes per stored byte: scans shrink 2- to 50-fold, a deflate bomb 1,000-fold
FREE_BYTES = 64 << 20  # up to here any shrinking is believed: an empty picture does shrink without limit
BESIDE_BYTES = 16 << 20  # most that may lie beside the pixels of a picture: profiles, texts, thumbnails
_PANIC = "PanicException"  # of a decoder written in Rust (pylibjpeg-rle); it calls itself no Exception
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def check_pixels(height: int, width: int) -> None:
    """Refuse a picture of no size, or of more than 64 million pixels."""
    if height < 1 or width < 1:
        raise DataError(f"it declares {height}x{width} pixels, which is no size")
    if height * width > MAX_PIXELS:
        raise DataError(
            f"it declares {height}x{width} pixels; at most {MAX_PIXELS >> 20} million are allowed"
        )


def check_shrunk(declared_bytes: int, stored_bytes: int) -> None:
    """Refuse content that would unpack to far more than scans ever shrink."""
    if declared_bytes > max(FREE_BYTES, MOST_SHRUNK * stored_bytes):
        raise DataError(
            f"it declares {declared_bytes / 1e6:,.0f} MB and holds {stored_bytes / 1e6:,.3g}: "
            f"shrunk more than {MOST_SHRUNK}-fold, which a scan never is"
        )


@contextmanager
def refusing(what: str, *, explain: bool = True) -> Iterator[None]:
    """Turn whatever a decoder raises into a ``DataError``, and keep its warnings to itself.

    Args:
        what: the sentence's start: "it is not a readable DICOM file".
        explain: add what the decoder said; not where it may quote values of the file, which may name a patient.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # odd but readable values, of which real files are full
        try:
            yield
        except (DataError, LeftOut, UserError):
            raise
        except BaseException as error:  # decoders raise their own classes, and struct's, zlib's, Unicode's
            if not isinstance(error, Exception) and type(error).__name__ != _PANIC:
                raise
            raise DataError(f"{what} ({_said(error, explain)})") from error


def printable(text: str) -> str:
    """Write what would break a line, steer a terminal or not encode (a file's name may) as an escape."""
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def _said(error: BaseException, explain: bool) -> str:
    """Return an error in a few words; of the file system without the file's name."""
    lines = str(error).strip().splitlines() if explain else []
    words = getattr(error, "strerror", None) or (lines[0].rstrip(".") if lines else "")
    name = type(error).__name__
    return printable(words or (f"{type(error).__module__}.error" if name == "error" else name))
