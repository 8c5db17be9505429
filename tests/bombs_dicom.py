"""DICOM files that lie, written byte by byte, because no library would write them."""

import struct
from collections.abc import Callable
from pathlib import Path

import pydicom
from bombs import GIB, Hostile, deflated, hole
from bombs_pictures import JPEG, jpeg_2000, jpeg_ls, jpeg_of_size
from pydicom.fileset import FileSet
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLSLossless,
    RLELossless,
)
from sample_files import grey_film, head, write_dicom, write_series

SIDE = 64
FILM = grey_film(0, (SIDE, SIDE)).tobytes()
PIXELS, UNDEFINED = 0x7FE00010, 0xFFFFFFFF
_LONG = (b"OB", b"OW", b"SQ", b"UN", b"UT", b"OF")
RADIOGRAPH = b"1.2.840.10008.5.1.4.1.1.1.1"


def element(tag: int, kind: bytes, value: bytes = b"", length: int | None = None) -> bytes:
    """Return one explicit little-endian element, of the length it is said to have."""
    length = len(value) if length is None else length
    head = struct.pack("<HH", tag >> 16, tag & 0xFFFF) + kind
    return head + (struct.pack("<HI", 0, length) if kind in _LONG else struct.pack("<H", length)) + value


def item(value: bytes = b"", length: int | None = None, tag: int = 0xE000) -> bytes:
    """Return one item of a sequence or of encapsulated pixels."""
    return struct.pack("<HHI", 0xFFFE, tag, len(value) if length is None else length) + value


def us(tag: int, value: int) -> bytes:
    """Return an element of one unsigned short."""
    return element(tag, b"US", struct.pack("<H", value))


def encapsulated(*frames: bytes, end: bytes = item(tag=0xE0DD)) -> bytes:
    """Return pixels as fragments behind an empty offset table."""
    return element(PIXELS, b"OB", item() + b"".join(map(item, frames)) + end, UNDEFINED)


def body(**changes: bytes) -> bytes:
    """Return a sound picture's elements; ``changes`` replaces (or, empty, drops) or adds some: t00280010=b"..."."""
    elements = {
        0x00080016: element(0x00080016, b"UI", RADIOGRAPH + b"\0"),
        0x00080018: element(0x00080018, b"UI", b"1.2.3\0"),
        0x00080060: element(0x00080060, b"CS", b"DX"),
        0x00280002: us(0x00280002, 1),
        0x00280004: element(0x00280004, b"CS", b"MONOCHROME2 "),
        0x00280010: us(0x00280010, SIDE),
        0x00280011: us(0x00280011, SIDE),
        0x00280100: us(0x00280100, 8),
        0x00280101: us(0x00280101, 8),
        0x00280102: us(0x00280102, 7),
        0x00280103: us(0x00280103, 0),
        PIXELS: element(PIXELS, b"OB", FILM),
    }
    elements.update({int(name[1:], 16): value for name, value in changes.items()})
    return b"".join(elements[tag] for tag in sorted(elements))


def enclosed(content: bytes, syntax: str = ExplicitVRLittleEndian, preamble: bytes = bytes(128)) -> bytes:
    """Put the preamble and the file meta before a body."""
    meta = element(0x00020001, b"OB", b"\0\1") + element(0x00020002, b"UI", RADIOGRAPH + b"\0")
    meta += element(0x00020003, b"UI", b"1.2.3\0") + element(
        0x00020010, b"UI", syntax.encode().ljust(len(syntax) + len(syntax) % 2, b"\0")
    )
    return preamble + b"DICM" + element(0x00020000, b"UL", struct.pack("<I", len(meta))) + meta + content


def dicom(
    says: str,
    content: bytes | Callable[[], bytes],
    syntax: str = ExplicitVRLittleEndian,
    *,
    modality: str = "xray",
    verdict: str = "broken",
    preamble: bytes = bytes(128),
) -> Hostile:
    """Return a case of one DICOM file."""

    def write(folder: Path) -> None:
        data = content if isinstance(content, bytes) else content()
        (folder / "a.dcm").write_bytes(enclosed(data, syntax, preamble))

    return Hostile(modality=modality, write=write, says=says, verdict=verdict)


def picture(
    says: str, syntax: str = ExplicitVRLittleEndian, verdict: str = "broken", **changes: bytes
) -> Hostile:
    """Return a case of one DICOM picture with some elements changed."""
    return dicom(says, body(**changes), syntax, verdict=verdict)


def nested(depth: int, length: int = UNDEFINED) -> bytes:
    """Return sequences within sequences that end nowhere, or each of which claims to hold all the others."""
    return (element(0x00081140, b"SQ", length=length) + item(length=length)) * depth


def _directory(folder: Path, name: str) -> None:
    write_dicom(folder.parent / f"{folder.name} secret.dcm", grey_film(1), dicom_type="DX")
    files = FileSet()
    source = write_dicom(
        folder / "b.dcm", grey_film(0), dicom_type="DX", PatientID="7", PatientName="A", StudyID="1", SeriesNumber=1, InstanceNumber=1,
        StudyDate="20200101", StudyTime="1200", StudyInstanceUID="1.2", SeriesInstanceUID="1.3", AccessionNumber="",
    )  # fmt: skip
    files.add(source)
    files.write(folder / "set")
    index = pydicom.dcmread(folder / "set" / "DICOMDIR")
    for record in index.DirectoryRecordSequence:
        if "ReferencedFileID" in record:
            record.ReferencedFileID = ["..", "..", f"{folder.name} secret.dcm"]
    index.save_as(folder / name)
    for path in (folder / "set").rglob("*"):
        if path.is_file():
            path.unlink()


def _series(says: str, verdict: str, **fields: object) -> Hostile:
    def write(folder: Path) -> None:
        for path in write_series(folder / "s", head(shape_ZYX=(12, 40, 40))):
            dataset = pydicom.dcmread(path)
            for name, value in fields.items():
                setattr(dataset, name, value)
            dataset.save_as(path)

    return Hostile(modality="mri", write=write, says=says, verdict=verdict)


def text(tag: int, kind: bytes, value: bytes) -> bytes:
    """Return an element of text, padded to an even length."""
    return element(tag, kind, value + b" " * (len(value) % 2))


_BIG = {"t00280010": us(0x00280010, 65535), "t00280011": us(0x00280011, 65535)}
_WIDE = {"t00280010": us(0x00280010, 8000), "t00280011": us(0x00280011, 8000)}
_FOUR = {"t00280010": us(0x00280010, 4096), "t00280011": us(0x00280011, 4096)}
_RLE = struct.pack("<16I", 1, 64, *[0] * 14) + b"\x81\0" * 3
_SC, _US, _XA = (b"1.2.840.10008.5.1.4.1.1." + end for end in (b"7\0", b"6.1", b"12.1"))
_LONG_HEADER = len(enclosed(body(t7fe00010=b"") + element(0x00290010, b"OB")))
DICOM = {
    "deflated bomb": dicom(
        "beyond|shrunk", lambda: deflated(body(), 2 * GIB), DeflatedExplicitVRLittleEndian
    ),
    "deflated bomb in the header": dicom(
        "header|beyond",
        lambda: deflated(body()[:200] + element(0x00290010, b"OB", length=0x7FFFFFF0), 2 * GIB),
        DeflatedExplicitVRLittleEndian,
    ),
    "deflated garbage": dicom("damaged", b"\xff" * 4096, DeflatedExplicitVRLittleEndian),
    "RLE of 65,535^2": picture("64 million", RLELossless, **_BIG, t7fe00010=encapsulated(_RLE)),
    "RLE of 8,000^2 in few bytes": picture("shrunk|hold", RLELossless, **_WIDE, t7fe00010=encapsulated(_RLE)),
    "RLE segments behind the end": picture(
        "RLE|decoded",
        RLELossless,
        t7fe00010=encapsulated(struct.pack("<16I", 15, *range(0x7FFFFF00, 0x7FFFFF0F))),
    ),
    "pixels of 0xFFFFFFF0 bytes": picture(
        "ends early", t7fe00010=element(PIXELS, b"OB", FILM[:900], 0xFFFFFFF0)
    ),
    "header field of 0xFFFFFFF0 bytes": picture(
        "ends early", t00290010=element(0x00290010, b"OB", b"", 0xFFFFFFF0)
    ),
    "header field of 1 GB": Hostile(
        modality="xray",
        write=hole(
            "a.dcm",
            enclosed(body(t7fe00010=b"") + element(0x00290010, b"OB", b"", GIB)),
            _LONG_HEADER + GIB,
            element(PIXELS, b"OB", FILM),
        ),
        says="header is longer",
    ),
    "pixels of 1 GB for 64^2": Hostile(
        modality="xray",
        write=hole("a.dcm", enclosed(body(t7fe00010=element(PIXELS, b"OB", b"", GIB))), 2 * GIB),
        says="they take",
    ),
    "pixels too few": picture("they take 10", t7fe00010=element(PIXELS, b"OB", FILM[:10])),
    "cut in the header": dicom("no pixels", body()[:150]),
    "cut in the pixels": dicom("ends early", body()[:-1000]),
    "sequences 1,000 deep": picture("deep", t00081140=nested(1000)),
    "sequences 100,000 deep": picture("deep", t00081140=nested(100_000)),
    "sequences 1,000 deep of 2 GB each": picture("deep|ends early", t00081140=nested(1000, 0x7FFFFFF0)),
    "a million empty fields": dicom(
        "fields",
        lambda: (
            body(t7fe00010=b"")
            + b"".join(element(0x60000000 + tag, b"LO") for tag in range(1 << 12)) * (1 << 8)
        ),
    ),
    "a million items": dicom(
        "fields",
        lambda: body(t00081140=element(0x00081140, b"SQ", item() * 1_000_000 + item(tag=0xE0DD), UNDEFINED)),
    ),
    "fragment behind the end": picture(
        "ends early",
        JPEGBaseline8Bit,
        t7fe00010=element(PIXELS, b"OB", item() + item(JPEG, 0x7FFFFFF0), UNDEFINED),
    ),
    "fragments without an end": picture(
        "ends early", JPEGBaseline8Bit, t7fe00010=encapsulated(JPEG, end=b"")
    ),
    "no fragment": picture("fragment|pixels", JPEGBaseline8Bit, t7fe00010=encapsulated()),
    "fragments that are none": picture(
        "fragment", JPEGBaseline8Bit, t7fe00010=element(PIXELS, b"OB", b"\x20" * 64, UNDEFINED)
    ),
    "JPEG of 65,500^2 inside": picture(
        "65500", JPEGBaseline8Bit, t7fe00010=encapsulated(jpeg_of_size(65_500, 65_500, progressive=False))
    ),
    "JPEG of 20,000 scans inside": picture(
        "scans", JPEGBaseline8Bit, t7fe00010=encapsulated(jpeg_of_size(SIDE, SIDE, 20_000))
    ),
    "JPEG 2000 of 2^31 inside": picture(
        "2147483647", JPEG2000Lossless, t7fe00010=encapsulated(jpeg_2000(0x7FFFFFFF, 0x7FFFFFFF))
    ),
    "JPEG 2000 of 16,384 colours": picture(
        "16384", JPEG2000Lossless, t7fe00010=encapsulated(jpeg_2000(SIDE, SIDE, 16_384))
    ),
    "JPEG 2000 of 8,000^2 in few bytes": picture(
        "shrunk",
        JPEG2000Lossless,
        **_WIDE,
        t00280100=us(0x00280100, 16),
        t7fe00010=encapsulated(jpeg_2000(8000, 8000)),
    ),
    "JPEG 2000 of 16 million tiles": picture(
        "tiles", JPEG2000Lossless, **_FOUR, t7fe00010=encapsulated(jpeg_2000(4096, 4096, tile=(1, 1)))
    ),
    "JPEG 2000 of 16 million precincts": picture(
        "precincts", JPEG2000Lossless, **_FOUR, t7fe00010=encapsulated(jpeg_2000(4096, 4096, precincts=b"\0"))
    ),
    "JPEG 2000 of 65,535 layers": picture(
        "layers", JPEG2000Lossless, t7fe00010=encapsulated(jpeg_2000(SIDE, SIDE, layers=65_535))
    ),
    "JPEG of another size inside": picture(
        "codestream declares 96x80", JPEGBaseline8Bit, t7fe00010=encapsulated(JPEG)
    ),
    "JPEG-LS of 65,535^2 inside": picture(
        "65535", JPEGLSLossless, t7fe00010=encapsulated(jpeg_ls(65_535, 65_535))
    ),
    "JPEG-LS of 8,000^2 in few bytes": picture(
        "shrunk",
        JPEGLSLossless,
        **_WIDE,
        t00280100=us(0x00280100, 16),
        t7fe00010=encapsulated(jpeg_ls(8000, 8000)),
    ),
    "garbage instead of a codestream": picture(
        "JPEG|decoded", JPEG2000Lossless, t7fe00010=encapsulated(b"\xff\x4f" + bytes(64))
    ),
    "-1 frames": picture("-1 frames", t00280008=text(0x00280008, b"IS", b"-1")),
    "2 billion frames": picture("2147483647 frames", t00280008=text(0x00280008, b"IS", b"2147483647")),
    "frames of 400 digits": picture("NumberOfFrames", t00280008=text(0x00280008, b"IS", b"9" * 400)),
    "frames that are no number": picture("NumberOfFrames", t00280008=text(0x00280008, b"IS", b"many")),
    "no bits": picture("BitsAllocated|bits", t00280100=us(0x00280100, 0)),
    "65,535 bits": picture("BitsAllocated|bits", t00280100=us(0x00280100, 65535)),
    "more bits stored than allocated": picture("BitsStored|bits", t00280101=us(0x00280101, 40)),
    "65,535 samples": picture("SamplesPerPixel|samples", t00280002=us(0x00280002, 65535)),
    "no rows": picture("no picture|Rows", t00280010=b""),
    "two numbers of rows": picture("Rows", t00280010=element(0x00280010, b"US", b"\x40\0\x40\0")),
    "rows of three bytes": picture("Rows", t00280010=element(0x00280010, b"US", b"\x40\0\0")),
    "rows that are text": picture("Rows", t00280010=text(0x00280010, b"LO", b"many")),
    "no photometric interpretation": picture("PhotometricInterpretation", t00280004=b""),
    "unknown photometric interpretation": picture(
        "PhotometricInterpretation", t00280004=text(0x00280004, b"CS", b"DOE^JOHN")
    ),
    "no pixels": picture("no pixels", t7fe00010=b""),
    "kind of field unknown": picture("", verdict="read", t00290010=element(0x00290010, b"ZZ", b"abcd")),
    "slope no number": picture(
        "no numbers",
        t00281052=text(0x00281052, b"DS", b"0"),
        t00281053=text(0x00281053, b"DS", b"nan"),
    ),
    "slope that is text": picture(
        "used|number|RescaleSlope",
        t00281052=text(0x00281052, b"DS", b"0"),
        t00281053=text(0x00281053, b"DS", b"DOE^JOHN"),
    ),
    "lookup table of nothing": picture(
        "table|LUT",
        t00283000=element(
            0x00283000,
            b"SQ",
            item(
                element(0x00283002, b"US", struct.pack("<3H", 0, 0, 16)) + element(0x00283006, b"OW", b"\1\0")
            ),
        ),
    ),
    "window of no width": picture(
        "window has",
        t00281050=text(0x00281050, b"DS", b"nan"),
        t00281051=text(0x00281051, b"DS", b"nan"),
    ),
    "implicit fields of 2 GB": dicom(
        "ends early", b"\x08\0\x16\0" + b"\xf0\xff\xff\x7f" + bytes(99), ImplicitVRLittleEndian
    ),
    "a preamble that is a program": dicom("", body(), verdict="read", preamble=b"MZ" + b"\x90" * 126),
    "secondary capture": picture(
        "secondary capture", t00080016=element(0x00080016, b"UI", _SC), verdict="left out"
    ),
    "screen shot": picture(
        "screen", t00080008=text(0x00080008, b"CS", b"DERIVED\\SECONDARY\\SCREEN SAVE"), verdict="left out"
    ),
    "ultrasound": picture("ultrasound", t00080016=text(0x00080016, b"UI", _US), verdict="left out"),
    "angiogram": picture("angiogra", t00080016=text(0x00080016, b"UI", _XA), verdict="left out"),
    "text burned in": picture("burned", t00280301=text(0x00280301, b"CS", b"YES"), verdict="left out"),
    "overlay": picture(
        "",
        verdict="read",
        t60000010=us(0x60000010, SIDE),
        t60000011=us(0x60000011, SIDE),
        t60000100=us(0x60000100, 1),
        t60003000=element(0x60003000, b"OW", b"\xff" * 512),
    ),
    "DICOMDIR": Hostile(
        modality="xray", write=lambda folder: _directory(folder, "DICOMDIR"), says="", verdict="read"
    ),
    "DICOMDIR by another name": Hostile(
        modality="xray", write=lambda folder: _directory(folder, "c.dcm"), says="no picture|index"
    ),
    "series of secondary captures": _series(
        "secondary capture", "left out", SOPClassUID=_SC.decode().strip("\0")
    ),
    "series of 2 billion frames a slice": _series("frames", "broken", NumberOfFrames=2147483647),
    "series without PixelSpacing": _series("PixelSpacing", "broken", PixelSpacing=None),
    "series of PixelSpacing no number": _series("PixelSpacing", "broken", PixelSpacing=["nan", "nan"]),
    "series at 1e300 mm": _series(
        "mm|number|uneven|position", "broken", ImagePositionPatient=[1e300, 1e300, 1e300]
    ),
}
