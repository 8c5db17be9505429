"""One DICOM file, read without trusting it: sizes are checked before anything is decoded or inflated."""

import io
import warnings
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mnemos.sharding.errors import DataError
from mnemos.sharding.sources.images import MAX_PIXELS

if TYPE_CHECKING:
    from pydicom import Dataset
    from pydicom.dataset import FileMetaDataset

_PIXEL_TAGS = (0x7FE00008, 0x7FE00009, 0x7FE00010)  # float, double and integer pixels
_META_START = 144  # 128 free bytes, "DICM", and the element that says how long the rest of the file meta is
_HEADER_BYTES = 8 << 20  # most that is inflated to find a deflated file's header
_MARGIN_BYTES = 16 << 20  # what a deflated file may hold beside its pixels


def read_header(path: Path) -> "Dataset":
    """Read everything before the pixels.

    Raises:
        DataError: the file is not readable DICOM, has no picture, or one of more than 64 million pixels.
    """
    header = _read(path, pixels=False)
    rows, columns = int(header.get("Rows", 0) or 0), int(header.get("Columns", 0) or 0)
    if rows < 1 or columns < 1:
        raise DataError("it holds no picture")
    if rows * columns > MAX_PIXELS:
        raise DataError(
            f"it declares {rows}x{columns} pixels; at most {MAX_PIXELS >> 20} million are allowed"
        )
    return header


def read_pixels(path: Path) -> tuple["Dataset", np.ndarray]:
    """Read a file and decode its picture.

    Returns:
        The data set, and its pixels as stored: [Y, X], or [Y, X, 3] with YBR turned into RGB.

    Raises:
        DataError: as ``read_header``, several frames, or pixels that cannot be decoded.
    """
    from pydicom.pixels.decoders.base import get_decoder
    from pydicom.pixels.utils import pixel_array

    header = read_header(path)
    frames = int(header.get("NumberOfFrames", 1) or 1)
    if frames != 1:
        raise DataError(f"it holds {frames} frames; store one a file, or convert it to NIfTI")
    dataset = _read(path, pixels=True)
    syntax = dataset.file_meta.TransferSyntaxUID
    try:
        if not get_decoder(syntax).is_available:
            raise DataError(f"it is compressed as {syntax.name}, which needs `pip install python-gdcm`")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pixels = pixel_array(dataset)
    except DataError:
        raise
    except Exception as error:  # every plug-in raises its own classes
        raise DataError(f"its pixels cannot be decoded ({_first_line(error)})") from error
    if pixels.shape[:2] != (header.Rows, header.Columns):
        raise DataError(f"its pixels are {pixels.shape}, but it declares {header.Rows}x{header.Columns}")
    return dataset, pixels


def _read(path: Path, *, pixels: bool) -> "Dataset":
    import pydicom
    from pydicom.filereader import read_file_meta_info
    from pydicom.uid import DeflatedExplicitVRLittleEndian

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd but readable values, of which real files are full
            meta = read_file_meta_info(path)
            if meta.get("TransferSyntaxUID") == DeflatedExplicitVRLittleEndian:
                return _read_deflated(path, meta, pixels=pixels)
            return pydicom.dcmread(path, stop_before_pixels=not pixels)
    except DataError:
        raise
    except Exception as error:  # pydicom lets struct, zlib, Unicode and its own errors through
        raise DataError(f"it is not a readable DICOM file ({_first_line(error)})") from error


def _read_deflated(path: Path, meta: "FileMetaDataset", *, pixels: bool) -> "Dataset":
    """Inflate no more than the header declares: pydicom itself would inflate without a limit."""
    body = path.read_bytes()[_META_START + int(meta.FileMetaInformationGroupLength) :]
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    data = inflater.decompress(body, _HEADER_BYTES)
    header = _parse(data, meta, pixels=False)
    if not pixels:
        return header
    declared = int(header.Rows) * int(header.Columns) * int(header.get("SamplesPerPixel", 1))
    limit = declared * (int(header.BitsAllocated) + 7) // 8 + _MARGIN_BYTES
    if not inflater.eof:
        data += inflater.decompress(inflater.unconsumed_tail, max(1, limit - len(data)))
    if not inflater.eof:
        reason = "grows far beyond the picture it declares" if inflater.unconsumed_tail else "ends early"
        raise DataError(f"its deflated content {reason}")
    return _parse(data, meta, pixels=True)


def _parse(data: bytes, meta: "FileMetaDataset", *, pixels: bool) -> "Dataset":
    from pydicom.dataset import FileDataset
    from pydicom.filereader import read_dataset
    from pydicom.uid import ExplicitVRLittleEndian

    stop = None if pixels else (lambda tag, vr, length: tag in _PIXEL_TAGS)
    stream = io.BytesIO(data)
    dataset = read_dataset(stream, False, True, stop_when=stop)
    plain = FileDataset(stream, dataset, file_meta=meta, is_implicit_VR=False, is_little_endian=True)
    plain.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian  # which it is, once inflated
    return plain


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
