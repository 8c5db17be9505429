"""Pictures that lie, and codestreams that lie inside a DICOM file."""

import io
import struct
import zlib
from collections.abc import Callable

from bombs import GIB, ZEROS, Hostile, deflated, hole
from PIL import Image
from sample_files import grey_film


def picture(
    says: str, content: bytes | Callable[[], bytes], name: str = "a.png", verdict: str = "broken"
) -> Hostile:
    """Return a case of one picture file."""
    return Hostile(
        modality="xray",
        write=lambda folder: (folder / name).write_bytes(
            content if isinstance(content, bytes) else content()
        ),
        says=says,
        verdict=verdict,
    )


def chunk(kind: bytes, data: bytes) -> bytes:
    """Return one PNG chunk."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(
    width: int, height: int, *before: bytes, data: bytes | None = None, depth: int = 8, colour: int = 0
) -> bytes:
    """Return a PNG; ``before`` are chunks ahead of its pixels."""
    if data is None:
        data = zlib.compress(b"".join(b"\0" + bytes(row) for row in grey_film(0, (height, width))))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(before) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def saved(image: Image.Image, format: str, **options: object) -> bytes:
    """Return the bytes Pillow writes."""
    buffer = io.BytesIO()
    image.save(buffer, format=format, **options)
    return buffer.getvalue()


FILM = Image.fromarray(grey_film(0))
JPEG = saved(FILM, "JPEG", quality=90)


def jpeg_of_size(
    width: int, height: int, scans: int = 1, *, progressive: bool = True, colours: int = 1
) -> bytes:
    """Return a JPEG that declares a size, with hardly any data: every scan is a few blocks' worth of bits."""
    tables = segment(0xDB, b"\0" + b"\1" * 64) + segment(0xC4, b"\0" + b"\1" + bytes(15) + b"\0")
    tables += segment(0xC4, b"\x10" + b"\1" + bytes(15) + b"\0")
    frame = struct.pack(">BHHB", 8, height, width, colours)
    frame += b"".join(bytes([number, 0x11, 0]) for number in range(1, colours + 1))
    dc = segment(0xDA, b"\1\1\0" + (b"\0\0\0" if progressive else b"\0\x3f\0")) + b"\0" * 16
    ac = segment(0xDA, b"\1\1\0" + b"\1\x3f\0") + b"\0" * 16
    start = b"\xff\xd8" + tables + segment(0xC2 if progressive else 0xC0, frame)
    return start + dc + ac * (scans - 1) + b"\xff\xd9"


def segment(marker: int, data: bytes) -> bytes:
    """Return one JPEG segment."""
    return bytes([0xFF, marker]) + struct.pack(">H", len(data) + 2) + data


def jpeg_2000(
    width: int,
    height: int,
    components: int = 1,
    *,
    tile: tuple[int, int] | None = None,
    precincts: bytes = b"",
    layers: int = 1,
) -> bytes:
    """Return a JPEG 2000 codestream that declares a size and holds no packet."""
    across, down = tile or (width, height)
    values = (
        struct.pack(">HIIIIIIIIH", 0, width, height, 0, 0, across, down, 0, 0, components)
        + b"\7\1\1" * components
    )
    size = b"\xff\x51" + struct.pack(">H", len(values) + 2) + values
    levels = len(precincts) - 1 if precincts else 0
    style = struct.pack(">BBHBBBBBB", bool(precincts), 0, layers, 0, levels, 4, 4, 0, 1) + precincts
    coding = b"\xff\x52" + struct.pack(">H", len(style) + 2) + style
    steps = b"\x40" + b"\x40" * (3 * levels + 1)
    quantised = b"\xff\x5c" + struct.pack(">H", len(steps) + 2) + steps
    start = b"\xff\x90" + struct.pack(">HHIBB", 10, 0, 14, 0, 1) + b"\xff\x93"
    return b"\xff\x4f" + size + coding + quantised + start + b"\xff\xd9"


def jpeg_ls(width: int, height: int) -> bytes:
    """Return a JPEG-LS codestream that declares a size, with hardly any data."""
    frame = struct.pack(">BHHB", 8, height, width, 1) + b"\1\x11\0"
    return (
        b"\xff\xd8\xff\xf7"
        + struct.pack(">H", len(frame) + 2)
        + frame
        + b"\xff\xda\0\x08\1\1\0\0\0\0"
        + bytes(64)
        + b"\xff\xd9"
    )


def tiff(*fields: tuple[int, int, int, int], width: int = 64, height: int = 64) -> bytes:
    """Return a TIFF of one directory, with fields of (number, type, count, value or place) added."""
    size = (
        (256, 4, 1, width),
        (257, 4, 1, height),
        (258, 3, 1, 8),
        (259, 3, 1, 1),
        (262, 3, 1, 1),
        (277, 3, 1, 1),
    )
    table = b"".join(struct.pack("<HHII", *entry) for entry in sorted((*size, *fields)))
    return b"II*\0" + struct.pack("<IH", 8, len(size) + len(fields)) + table + bytes(4 + 64 * 64)


def _after_start(jpeg: bytes, segments: bytes) -> bytes:
    return jpeg[:2] + segments + jpeg[2:]


def _animated() -> bytes:
    return saved(FILM, "PNG", save_all=True, append_images=[Image.fromarray(grey_film(1))])


def _text_bomb() -> bytes:
    return png(80, 96, chunk(b"iTXt", b"Comment\0\1\0\0\0" + deflated(b"", 128 << 20, zlib.MAX_WBITS)))


_PROFILE = b"icc\0\0" + zlib.compress(ZEROS * 4)
_EXIF = b"Exif\0\0II*\0\x08\0\0\0" + b"\xff\xff" + b"\x12\1\x03\0\xff\xff\xff\x7f\xff\xff\xff\x7f" * 3
PICTURES = {
    "PNG of 60,000^2": picture("64 million", png(60_000, 60_000, data=b"")),
    "PNG of 13,000^2 in colour": picture(
        "64 million", lambda: png(13_000, 13_000, data=deflated(b"", GIB // 2, 15), colour=2)
    ),
    "PNG of 8,000^2 of 16 bits in few bytes": picture(
        "shrunk", lambda: png(8000, 8000, data=deflated(b"", 128 << 20, 15), depth=16)
    ),
    "PNG of 5 x 10 million": picture("as long", lambda: png(10_000_000, 5, data=deflated(b"", 64 << 20, 15))),
    "PNG of 5 x 2 billion": picture("64 million", png(5, 0x7FFFFFFF, data=b"")),
    "PNG of no size": picture("no size", png(0, 5, data=b"")),
    "PNG with 2 GB behind its pixels": picture(
        "",
        lambda: png(80, 96, data=deflated(zlib.decompress(png(80, 96)[41:-16]), 2 * GIB, 15)),
        verdict="read",
    ),
    "PNG text bomb": picture("too large", _text_bomb),
    "PNG profile bomb": picture("too large", png(80, 96, chunk(b"iCCP", _PROFILE))),
    "PNG of 400,000 empty chunks": picture("chunks", lambda: png(80, 96, chunk(b"IDAT", b"") * 400_000)),
    "PNG chunk of 2 GB": picture("ends early", png(80, 96)[:33] + struct.pack(">I", 0x7FFFFFF0) + b"IDATxx"),
    "PNG cut": picture("ends early", png(80, 96)[:-900]),
    "PNG checksum wrong": picture("checksum", png(80, 96).replace(b"IEND\xaeB`\x82", b"IEND\xaeB`\x83")),
    "PNG animated": picture("pictures", _animated),
    "PNG palette too short": picture(
        "decoded|palette",
        png(80, 96, chunk(b"PLTE", b"\1\2\3"), data=zlib.compress(bytes([9]) * 8000), colour=3),
    ),
    "PNG private chunk of 24 MB": picture("beside", lambda: png(80, 96, chunk(b"prVt", bytes(24 << 20)))),
    "JPEG of 65,500^2": picture("64 million", jpeg_of_size(65_500, 65_500), "a.jpg"),
    "JPEG of 8,000^2 in colour in few bytes": picture(
        "shrunk", jpeg_of_size(8000, 8000, 2, colours=3), "a.jpg"
    ),
    "JPEG of 20,000 scans": picture("scans", lambda: jpeg_of_size(2048, 2048, 20_000), "a.jpg"),
    "JPEG of no height": picture("no size", jpeg_of_size(64, 0, progressive=False), "a.jpg"),
    "JPEG of two frames": picture(
        "frames",
        _after_start(JPEG, segment(0xC0, struct.pack(">BHHB", 8, 9, 9, 1) + b"\1\x11\0")),
        "a.jpg",
    ),
    "JPEG of 32 MB of comments": picture(
        "beside|segments", lambda: _after_start(JPEG, segment(0xFE, bytes(65_000)) * 500), "a.jpg"
    ),
    "JPEG of 500,000 segments": picture(
        "segments", lambda: _after_start(JPEG, b"\xff\xef\0\2" * 500_000), "a.jpg"
    ),
    "JPEG cut": picture("truncated", JPEG[: len(JPEG) // 2], "a.jpg"),
    "JPEG with broken EXIF": picture("", _after_start(JPEG, segment(0xE1, _EXIF)), "a.jpg", "read"),
    "TIFF field of 4 billion values": picture("TIFF field", tiff((273, 4, 0xFFFFFFF0, 8)), "a.tif"),
    "TIFF field of 1 GB": Hostile(
        modality="xray", write=hole("a.tif", tiff((700, 1, GIB, 8)), 2 * GIB), says="TIFF field"
    ),
    "TIFF field behind the end": picture("TIFF field", tiff((700, 1, 1000, 0x7FFFFFFF)), "a.tif"),
    "TIFF of 65,535 fields": picture("65535 fields", b"II*\0\x08\0\0\0\xff\xff" + bytes(1 << 20), "a.tif"),
    "TIFF tile of 65,000^2": picture(
        "tiles", tiff((322, 4, 1, 65_000), (323, 4, 1, 65_000), (324, 4, 1, 8), (325, 4, 1, 99)), "a.tif"
    ),
    "TIFF of two pages": picture(
        "several", lambda: saved(FILM, "TIFF", save_all=True, append_images=[FILM]), "a.tif"
    ),
    "GIF called PNG": picture("not a", saved(FILM, "GIF")),
}
