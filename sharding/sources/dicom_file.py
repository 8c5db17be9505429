"""One DICOM file, read without trusting it: sizes are checked before anything is decoded or inflated."""

import io
import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from mnemos.sharding.errors import DataError
from mnemos.sharding.sources.bounds import BESIDE_BYTES, check_pixels, check_shrunk, refusing
from mnemos.sharding.sources.codestreams import jpeg2000_declares, jpeg_declares
from mnemos.sharding.sources.dicom_layout import HEADER_BYTES, LONG_KINDS, PIXEL_TAGS, Layout, layout

if TYPE_CHECKING:
    from pydicom import Dataset
    from pydicom.tag import BaseTag
    from pydicom.uid import UID

_UNREADABLE = "it is not a readable DICOM file"
_META_START = 132  # 128 free bytes, which nobody reads, and "DICM"
_META_BYTES = 1 << 20
_SYNTAX = 0x0010
_FIRST_BYTES = 1 << 20  # inflated first of a deflated file; nearly every header is shorter
_STORED_BYTES = 64 << 10  # read at a time
_BEHIND_BYTES = 16 << 20  # what may lie behind the pixels
_MOST_RLE = 64  # a run of 128 bytes is stored in 2: PS3.5, annex G
_MEANINGS = ("MONOCHROME1", "MONOCHROME2", "RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")
_FORMS = ((1, 8), (1, 16), (1, 32), (3, 8))  # samples a pixel, bits a sample
# All that is read of a header, and all of it stays here: geometry, values, and what must not be stored.
_FIELDS: list["BaseTag | int"] = [
    0x00080008,  # ImageType
    0x00080016,  # SOPClassUID
    0x00080060,  # Modality
    0x00100020,  # PatientID, which a keyed hash is made of
    0x00180050,  # SliceThickness
    0x0020000E,  # SeriesInstanceUID
    0x00200032,  # ImagePositionPatient
    0x00200037,  # ImageOrientationPatient
    0x00280002,  # SamplesPerPixel
    0x00280004,  # PhotometricInterpretation
    0x00280006,  # PlanarConfiguration
    0x00280008,  # NumberOfFrames
    0x00280010,  # Rows
    0x00280011,  # Columns
    0x00280030,  # PixelSpacing
    0x00280100,  # BitsAllocated
    0x00280101,  # BitsStored
    0x00280102,  # HighBit
    0x00280103,  # PixelRepresentation
    0x00280301,  # BurnedInAnnotation
    0x00281050,  # WindowCenter
    0x00281051,  # WindowWidth
    0x00281052,  # RescaleIntercept
    0x00281053,  # RescaleSlope
    0x00281054,  # RescaleType
    0x00281056,  # VOILUTFunction
    0x00283000,  # ModalityLUTSequence
    0x00283010,  # VOILUTSequence
]


def read_header(path: Path) -> "Dataset":
    """Read the fields before the pixels that a picture or a volume needs, and no other.

    Raises:
        DataError: the file is not readable DICOM, has no picture, or one of more than 64 million pixels.
    """
    with refusing(_UNREADABLE, explain=False), path.open("rb") as file:
        return _open(file).header


def read_pixels(path: Path) -> tuple["Dataset", np.ndarray]:
    """Read a file and decode its picture.

    Returns:
        The header, and the pixels as stored: [Y, X], or [Y, X, 3] with YBR turned into RGB.

    Raises:
        DataError: as ``read_header``, several frames, or pixels that cannot be decoded.
    """
    from pydicom.encaps import encapsulate
    from pydicom.pixels.decoders.base import get_decoder
    from pydicom.pixels.utils import pixel_array

    with refusing(_UNREADABLE, explain=False), path.open("rb") as file:
        opened = _open(file)
        declared_bytes = _declared_bytes(opened)
        stored = _stored_pixels(file, opened, declared_bytes)
    header, syntax = opened.header, opened.syntax
    with refusing(f"it is compressed as {syntax.name}, which is not read", explain=False):
        available = get_decoder(syntax).is_available
    if not available:
        raise DataError(f"it is compressed as {syntax.name}, which needs `pip install python-gdcm`")
    if opened.layout.encapsulated:
        _check_codestream(stored, opened, declared_bytes)
    with refusing("its pixels cannot be decoded", explain=False):
        kind = opened.layout.kind.decode()
        header.add_new(opened.layout.tag, kind if kind in ("OB", "OF") else "OW", stored)
        if opened.layout.encapsulated:
            header.PixelData = encapsulate([stored])
        pixels = pixel_array(header)
        del header[opened.layout.tag]
    if pixels.shape[:2] != (header.Rows, header.Columns):
        raise DataError(f"its pixels are {pixels.shape}, but it declares {header.Rows}x{header.Columns}")
    return header, pixels


def whole(header: "Dataset", name: str, default: int | None = None) -> int:
    """Return a field that holds one whole number; ``DataError`` where it holds anything else."""
    with refusing(f"its header's {name} is no whole number", explain=False):
        value = header.get(name)
        return default if value in (None, "") and default is not None else int(value)


@dataclass(frozen=True, kw_only=True)
class _Opened:
    """A file up to its pixels: its header, its transfer syntax and where the pixels lie.

    Attributes:
        header: the fields of ``_FIELDS``, converted when they are asked for.
        syntax: what the pixels are written in; of a deflated file, once it is inflated.
        layout: places within the data set, which begins at `start` of the file.
        deflated: the data set is inflated before it is read.
    """

    header: "Dataset"
    syntax: "UID"
    layout: Layout
    start: int
    deflated: bool


def _open(file: BinaryIO) -> _Opened:
    from pydicom.dataset import FileMetaDataset
    from pydicom.filereader import read_dataset
    from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian

    syntax, start = _meta(file)
    deflated = syntax == DeflatedExplicitVRLittleEndian
    explicit, little = not syntax.is_implicit_VR, syntax.is_little_endian
    content, begin = file, start
    for most in (_FIRST_BYTES, HEADER_BYTES):
        cut = False
        if deflated:
            file.seek(start)
            inflated, ended = _inflated(file, most)
            content, begin, cut, syntax = io.BytesIO(inflated), 0, not ended, ExplicitVRLittleEndian
        content.seek(begin)
        found = layout(content, explicit=explicit, little=little, cut=cut)
        if found.tag or not cut:
            break
    else:
        raise DataError(f"its header is longer than {HEADER_BYTES >> 20} MB")
    content.seek(begin)
    header = read_dataset(
        content,
        not explicit,
        little,
        stop_when=lambda tag, kind, length: tag in PIXEL_TAGS,
        specific_tags=_FIELDS,
    )
    header.file_meta = FileMetaDataset()
    header.file_meta.TransferSyntaxUID = syntax
    if "Rows" not in header or "Columns" not in header:
        raise DataError("it holds no picture")
    rows, columns = whole(header, "Rows"), whole(header, "Columns")
    if rows < 1 or columns < 1:
        raise DataError("it holds no picture")
    check_pixels(rows, columns)
    return _Opened(header=header, syntax=syntax, layout=found, start=start, deflated=deflated)


def _meta(file: BinaryIO) -> tuple["UID", int]:
    """Return the transfer syntax and where the data set begins, from the fields of group 2 (PS3.10, 7.1)."""
    from pydicom.uid import UID, ImplicitVRLittleEndian

    start = file.read(_META_START + _META_BYTES)
    if start[_META_START - 4 : _META_START] != b"DICM":
        raise DataError(_UNREADABLE)
    at, syntax = _META_START, ImplicitVRLittleEndian
    while start[at : at + 2] == b"\2\0":
        number, kind, length = struct.unpack_from("<2xH2sH", start, at)
        at += 8
        if kind in LONG_KINDS:
            (length,) = struct.unpack_from("<I", start, at)
            at += 4
        if at + length > len(start):
            raise DataError(
                f"{_UNREADABLE}: it ends early, or its first fields are longer than {_META_BYTES >> 20} MB"
            )
        if number == _SYNTAX:
            syntax = UID(start[at : at + length].rstrip(b"\0 ").decode("ascii"))
        at += length
    return syntax, at


def _inflated(file: BinaryIO, most: int) -> tuple[bytes, bool]:
    """Inflate up to so many bytes from the place the file is at; tell whether that was all."""
    inflater, parts, left = zlib.decompressobj(-zlib.MAX_WBITS), [], most
    stored = b""
    while left and not inflater.eof:
        stored = stored or file.read(_STORED_BYTES)
        if not stored:
            raise DataError("its deflated content ends early")
        try:
            parts.append(inflater.decompress(stored, left))
        except zlib.error as error:
            raise DataError(f"its deflated content is damaged ({error})") from error
        left -= len(parts[-1])
        stored = inflater.unconsumed_tail
    return b"".join(parts), inflater.eof


def _declared_bytes(opened: _Opened) -> int:
    """Return how many bytes the decoded picture has, once everything that says so makes sense."""
    header = opened.header
    frames = whole(header, "NumberOfFrames", 1) or 1
    if frames != 1:
        raise DataError(f"it holds {frames} frames; store one a file, or convert it to NIfTI")
    if not opened.layout.tag:
        raise DataError("it holds no pixels")
    meaning = header.get("PhotometricInterpretation")
    if meaning not in _MEANINGS:
        raise DataError(f"its PhotometricInterpretation is missing or none of {', '.join(_MEANINGS)}")
    samples, bits = whole(header, "SamplesPerPixel", 1), whole(header, "BitsAllocated")
    used = whole(header, "BitsStored", bits)
    if (samples, bits) not in _FORMS or not 1 <= used <= bits:
        raise DataError(
            f"it declares {samples} samples a pixel of {bits} bits, {used} of them used (SamplesPerPixel, BitsAllocated, "
            "BitsStored); grey of 8, 16 or 32 bits and colour of 8 is read"
        )
    return whole(header, "Rows") * whole(header, "Columns") * samples * bits // 8


def _stored_pixels(file: BinaryIO, opened: _Opened, declared_bytes: int) -> bytes:
    """Read the pixels as they are stored, or the fragments of their codestream as one."""
    found = opened.layout
    check_shrunk(declared_bytes, os.fstat(file.fileno()).st_size if opened.deflated else found.stored_bytes)
    if not found.encapsulated:
        # A quarter of the colour may be left out (YBR_FULL_422), and zeros may fill up what lies behind.
        if not declared_bytes * 2 // 3 <= found.stored_bytes <= 2 * declared_bytes + _BEHIND_BYTES:
            raise DataError(
                f"its pixels cannot be decoded: they take {found.stored_bytes:,} bytes, and {declared_bytes:,} are declared"
            )
    elif not found.stored_bytes or found.stored_bytes > declared_bytes + BESIDE_BYTES:
        raise DataError(f"its compressed pixels take {found.stored_bytes:,} bytes for {declared_bytes:,}")
    if opened.deflated:
        end = found.pixels[-1][0] + found.stored_bytes
        file.seek(opened.start)
        inflated, ended = _inflated(file, end + _BEHIND_BYTES)
        if not ended:
            raise DataError("its deflated content grows far beyond the picture it declares")
        file = io.BytesIO(inflated)
    parts = []
    for start, length in found.pixels:
        file.seek(start)
        parts.append(file.read(length))
    return b"".join(parts)


def _check_codestream(stored: bytes, opened: _Opened, declared_bytes: int) -> None:
    """Compare what a codestream says of itself with what the header around it says."""
    from pydicom.uid import (
        JPEG2000TransferSyntaxes,
        JPEGLSTransferSyntaxes,
        JPEGTransferSyntaxes,
        RLELossless,
    )

    if opened.syntax == RLELossless:
        if declared_bytes > _MOST_RLE * len(stored):
            raise DataError(
                f"its {len(stored):,} bytes of RLE cannot hold the {declared_bytes:,} that it declares"
            )
        return
    if opened.syntax in JPEG2000TransferSyntaxes:
        found = jpeg2000_declares(stored)
    elif opened.syntax in (*JPEGTransferSyntaxes, *JPEGLSTransferSyntaxes):
        found = jpeg_declares(stored)
    else:
        raise DataError(f"it is compressed as {opened.syntax.name}, which is not read")
    rows, columns = whole(opened.header, "Rows"), whole(opened.header, "Columns")
    if (found.height, found.width, found.components) != (
        rows,
        columns,
        whole(opened.header, "SamplesPerPixel", 1),
    ):
        raise DataError(
            f"its codestream declares {found.height}x{found.width} pixels of {found.components} samples, the header "
            f"{rows}x{columns}"
        )
