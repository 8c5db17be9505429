"""What a picture file holds, piece by piece, before Pillow opens it.

Pillow bounds the pixels that it decodes, but reads what lies beside them as it comes, follows every scan of a JPEG, and
never looks at a PNG's checksums. Here nothing is decoded: pieces are counted, added up and compared with the file.
"""

import os
import struct
import zlib
from pathlib import Path
from typing import BinaryIO

from mnemos.sharding.errors import DataError
from mnemos.sharding.sources.bounds import BESIDE_BYTES, MAX_PIXELS, check_pixels, check_shrunk
from mnemos.sharding.sources.codestreams import jpeg_declares

_PNG, _JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"
_TIFF = {b"II*\0": "<", b"MM\0*": ">"}
_MOST_CHUNKS = 100_000  # writers make them of 8 KiB or more
_PNG_SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by colour type
_TIFF_ENTRY, _MOST_ENTRIES = 12, 1_000
_TIFF_BYTES = {
    1: 1,
    2: 1,
    3: 2,
    4: 4,
    5: 8,
    6: 1,
    7: 1,
    8: 2,
    9: 4,
    10: 8,
    11: 4,
    12: 8,
    13: 4,
}  # by type of a value
_PIECE = 1 << 20


def check_picture(path: Path) -> None:
    """Refuse a JPEG, PNG or TIFF file that would cost far more to open than its picture; others pass.

    Raises:
        DataError: it ends early, declares more than 64 million pixels, would unpack to more than 200 times its size,
            is animated, holds too much beside its pixels, or a checksum in it is wrong.
    """
    with path.open("rb") as file:
        start = file.read(len(_PNG))
        file_bytes = file.seek(0, os.SEEK_END)
        if start == _PNG:
            _check_png(file, file_bytes)
        elif start.startswith(_JPEG):
            if file_bytes > 3 * MAX_PIXELS + BESIDE_BYTES:
                raise DataError(
                    f"it has {file_bytes:,} bytes, more than any JPEG of {MAX_PIXELS >> 20} million pixels"
                )
            file.seek(0)
            declared = jpeg_declares(file.read())
            check_shrunk(declared.height * declared.width * declared.components, file_bytes)
        elif start[:4] in _TIFF:
            _check_tiff(file, file_bytes, _TIFF[start[:4]])


def _check_png(file: BinaryIO, file_bytes: int) -> None:
    """Walk over the chunks (ISO/IEC 15948, section 5) and compare their checksums."""
    at, chunks, beside, stored, kind = len(_PNG), 0, 0, 0, b""
    while kind != b"IEND":
        file.seek(at)
        length, kind = struct.unpack(">I4s", file.read(8).ljust(8, b"\0"))
        at, chunks = at + 12 + length, chunks + 1
        if not kind.isalpha() or at > file_bytes:
            raise DataError("it ends early or is damaged: a PNG chunk is longer than what is left")
        if chunks > _MOST_CHUNKS:
            raise DataError(f"its PNG is cut into more than {_MOST_CHUNKS} chunks")
        stored, beside = (stored + length, beside) if kind == b"IDAT" else (stored, beside + length)
        if beside > BESIDE_BYTES:
            raise DataError(f"its PNG holds more than {BESIDE_BYTES >> 20} MiB beside its pixels")
        content = _checked(file, kind, length)
        if (kind == b"IHDR") != (chunks == 1) or (kind == b"IHDR" and length != 13):
            raise DataError("its PNG does not begin with one header")
        if kind == b"IHDR":
            width, height, depth, colour = struct.unpack(">IIBB3x", content)
            check_pixels(height, width)
            declared = height * -(-width * depth * _PNG_SAMPLES.get(colour, 4) // 8)
        if kind == b"acTL" and content[:4] not in (b"\0\0\0\0", b"\0\0\0\1"):
            raise DataError("it holds several pictures (an animated PNG); store one a file")
    check_shrunk(declared, stored)


def _checked(file: BinaryIO, kind: bytes, length: int) -> bytes:
    """Read over a chunk's content and compare its checksum; return its first piece."""
    first, checksum = b"", zlib.crc32(kind)
    for left in range(length, 0, -_PIECE):
        piece = file.read(min(left, _PIECE))
        checksum, first = zlib.crc32(piece, checksum), first or piece
    if file.read(4) != checksum.to_bytes(4):
        raise DataError(f"it is damaged: the checksum of its PNG chunk {kind.decode('ascii')} is wrong")
    return first


def _check_tiff(file: BinaryIO, file_bytes: int, order: str) -> None:
    """Add up what the fields of the first directory hold (TIFF 6.0, section 2)."""
    file.seek(4)
    (at,) = struct.unpack(f"{order}I", file.read(4).ljust(4, b"\0"))
    file.seek(at)
    (entries,) = struct.unpack(f"{order}H", file.read(2).ljust(2, b"\0"))
    table = file.read(entries * _TIFF_ENTRY)
    if not 0 < entries <= _MOST_ENTRIES or len(table) < entries * _TIFF_ENTRY:
        raise DataError(
            f"its TIFF directory has {entries} fields or ends early; 1 to {_MOST_ENTRIES} are allowed"
        )
    beside = 0
    for number, kind, count, place in struct.iter_unpack(f"{order}HHII", table):
        field_bytes = count * _TIFF_BYTES.get(kind, 8)
        beside += field_bytes
        if beside > BESIDE_BYTES or (field_bytes > 4 and place + field_bytes > file_bytes):
            raise DataError(
                f"its TIFF field {number} is said to have {field_bytes:,} bytes, more than it can have"
            )
