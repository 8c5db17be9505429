"""What a JPEG, JPEG-LS or JPEG 2000 codestream says of itself, read before a decoder believes it.

A decoder takes its sizes from the codestream, not from the DICOM header around it, and JPEG 2000 may ask for gigabytes
of book-keeping in a hundred bytes: so many tiles, precincts and code-blocks are counted here, too. Marker names as in
ITU-T T.81 (JPEG), T.87 (JPEG-LS) and T.800 (JPEG 2000).
"""

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from mnemos.sharding.errors import DataError
from mnemos.sharding.sources.bounds import BESIDE_BYTES, check_pixels

MOST_SCANS = 100  # of a JPEG: libjpeg's own script has ten; each passes over the whole picture
_MOST_SEGMENTS = 4_096
_MARKER = re.compile(b"\xff[\x80-\xcf\xd8-\xfe]")  # in coded data: a byte 0xFF of data is followed by less
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC} | {0xF7}  # SOF0 .. SOF15, JPEG-LS's SOF55
_ALONE = frozenset(range(0xD0, 0xD8)) | {0x01}  # without a length: RST, TEM
_START, _END, _SCAN = 0xD8, 0xD9, 0xDA
_MOST_LAYERS = 256
_TILE_PIXELS = 64 * 64  # least of a tile on average
_MOST_PRECINCTS, _MOST_BLOCKS = 1 << 18, 1 << 19  # 600 and 150 bytes of OpenJPEG's memory each


@dataclass(frozen=True, kw_only=True)
class Declared:
    """Size in pixels and number of colours that a codestream declares."""

    height: int
    width: int
    components: int


def jpeg_declares(data: bytes) -> Declared:
    """Walk through a JPEG or JPEG-LS codestream.

    Raises:
        DataError: no such codestream, no frame or two, more than 64 million pixels, more than a hundred scans, or
            more than 16 MiB beside the pixels.
    """
    if data[:2] != bytes([0xFF, _START]):
        raise DataError("it holds no JPEG codestream")
    declared, scans, segments, beside = None, 0, 0, 0
    for marker, start, end in _segments(data):
        segments, beside = segments + 1, beside + end - start
        if segments > _MOST_SEGMENTS or beside > BESIDE_BYTES:
            raise DataError(
                f"its JPEG holds more than {_MOST_SEGMENTS} segments or {BESIDE_BYTES >> 20} MiB beside its pixels"
            )
        if marker in _FRAMES:
            if declared is not None or end - start < 6:
                raise DataError("its JPEG declares two frames, or half a one")
            height, width, components = struct.unpack_from(">xHHB", data, start)
            check_pixels(height, width)
            declared = Declared(height=height, width=width, components=components)
        scans += marker == _SCAN
        if scans > MOST_SCANS:
            raise DataError(f"its JPEG is made of more than {MOST_SCANS} scans")
    if declared is None:
        raise DataError("its JPEG declares no frame")
    return declared


def _segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield (marker, first byte, end) of each segment's content, up to the end of the (first) picture."""
    at = 2
    while at + 4 <= len(data):
        if data[at] != 0xFF:
            raise DataError("its JPEG is damaged: a marker is missing")
        marker = data[at + 1]
        if marker == _END:
            return
        if marker in _ALONE or marker == 0xFF:  # 0xFF before a marker fills up
            at += 1 if marker == 0xFF else 2
            continue
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4])
        if end > len(data) or end < at + 4:
            raise DataError("its JPEG ends early")
        yield marker, at + 4, end
        at = end
        if marker == _SCAN:
            found = _MARKER.search(data, at)
            if found is None:
                return
            at = found.start()


def jpeg2000_declares(data: bytes) -> Declared:
    """Walk through the headers of a JPEG 2000 codestream, bare or in JP2 boxes.

    Raises:
        DataError: no such codestream, or one that declares more pixels, tiles, layers, precincts or code-blocks
            than a picture has.
    """
    at = _codestream_at(data)
    try:
        size_at = at + 4
        if data[at:size_at] != b"\xff\x4f\xff\x51":
            raise DataError("it holds no JPEG 2000 codestream")
        right, below, left, top, across, down, tile_left, tile_top, components = struct.unpack_from(
            ">4x8IH", data, size_at
        )
        width, height = right - left, below - top
        check_pixels(max(0, height), max(0, width))
        if not (across and down and tile_left <= left and tile_top <= top):
            raise DataError("its JPEG 2000 declares tiles of no size")
        tiles = -(-(right - tile_left) // across) * -(-(below - tile_top) // down)
        if tiles > 16 + height * width // _TILE_PIXELS:
            raise DataError(f"its JPEG 2000 declares {tiles} tiles for {height}x{width} pixels")
        grid = _Grid(
            width=min(across, width),
            height=min(down, height),
            planes=tiles * components,
            many=components > 256,
        )
        at = _check_styles(data, at + 2, grid)
        for _ in range(_MOST_SEGMENTS + tiles):  # the headers of tile-parts may change the style
            if data[at : at + 2] != b"\xff\x90":
                break
            tile_bytes = int.from_bytes(data[at + 6 : at + 10])
            _check_styles(data, at + 2 + int.from_bytes(data[at + 2 : at + 4]), grid)
            if tile_bytes < 14:  # 0: the last one
                break
            at += tile_bytes
        else:
            raise DataError("its JPEG 2000 is cut into ever so many parts")
    except (struct.error, IndexError) as error:
        raise DataError("its JPEG 2000 ends early") from error
    return Declared(height=height, width=width, components=components)


@dataclass(frozen=True, kw_only=True)
class _Grid:
    """A tile's size, the number of tiles times components, and whether component numbers take two bytes."""

    width: int
    height: int
    planes: int
    many: bool


def _codestream_at(data: bytes) -> int:
    """Return where the codestream begins; JP2 puts it into the box ``jp2c``."""
    at = 0
    while data[4:8] == b"jP  " and at + 8 <= len(data):
        box_bytes, kind = int.from_bytes(data[at : at + 4]), data[at + 4 : at + 8]
        if kind == b"jp2c":
            return at + 8 * (1 + (box_bytes == 1))
        if box_bytes < 8:
            break
        at += box_bytes
    return 0


def _check_styles(data: bytes, at: int, grid: _Grid) -> int:
    """Check the coding styles (COD, COC) of a header; return where its last segment (SOT, SOD or another end) is."""
    for _ in range(_MOST_SEGMENTS):
        if data[at] != 0xFF or data[at + 1] in (0x90, 0x93, 0xD9):
            return at
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4])
        if end < at + 4:
            raise DataError("its JPEG 2000 is damaged: a segment of no length")
        if data[at + 1] == 0x52:  # COD: the style, progression, layers, colour transform, then as in COC
            if int.from_bytes(data[at + 6 : at + 8]) > _MOST_LAYERS:
                raise DataError(f"its JPEG 2000 declares more than {_MOST_LAYERS} layers")
            _check_style(data, at + 9, bool(data[at + 4] & 1), grid)
        elif data[at + 1] == 0x53:
            style_at = at + 5 + grid.many
            _check_style(data, style_at + 1, bool(data[style_at] & 1), grid)
        at = end
    raise DataError(f"its JPEG 2000 has more than {_MOST_SEGMENTS} segments in one header")


def _check_style(data: bytes, at: int, own_precincts: bool, grid: _Grid) -> None:
    """Count the precincts and code-blocks of one coding style."""
    levels, block_x, block_y = data[at], (data[at + 1] & 15) + 2, (data[at + 2] & 15) + 2
    precincts = blocks = 0
    for resolution in range(min(levels, 32) + 1):
        smaller = levels - resolution
        width, height = -(-grid.width >> smaller) or 1, -(-grid.height >> smaller) or 1
        exponents = data[at + 5 + resolution] if own_precincts else 0xFF
        across, down = ((width >> (exponents & 15)) + 1, (height >> (exponents >> 4)) + 1)
        precincts += grid.planes * across * down
        # A code-block is never larger than its precinct.
        blocks += grid.planes * max(across, (width >> block_x) + 1) * max(down, (height >> block_y) + 1)
    if precincts > _MOST_PRECINCTS or blocks > _MOST_BLOCKS:
        raise DataError(
            f"its JPEG 2000 declares {precincts} precincts and {blocks} code-blocks, more than a picture has"
        )
