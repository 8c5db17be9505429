"""Files that lie about their size, unpack to far more than they are, or name what is not theirs: NIfTI.

Every entry of ``NIFTI`` (and of the tables in the files beside) fills a folder in milliseconds; a bomb of 2 GB is a few
megabytes, or a hole on the disk.
"""

import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np
from sample_files import head

GIB = 1 << 30
ZEROS = bytes(16 << 20)


@dataclass(frozen=True, kw_only=True)
class Hostile:
    """One hostile input.

    Attributes:
        modality: what it is read as.
        write: fills a folder.
        says: what the refusal must say (a regular expression).
        verdict: "broken", "left out", "refused" (the whole input, by a sentence to the user) or "read": a trap that
            is harmless, because what is hostile in it is never touched.
    """

    modality: str
    write: Callable[[Path], object]
    says: str
    verdict: str = "broken"


def deflated(plain: bytes, zeros: int, wbits: int = -zlib.MAX_WBITS, more: bytes = b"") -> bytes:
    """Pack bytes and then gigabytes of zeros, without packing these one by one: every 16 MiB packs alike."""
    packer = zlib.compressobj(9, zlib.DEFLATED, wbits)
    start = packer.compress(plain) + packer.flush(zlib.Z_FULL_FLUSH)
    block = packer.compress(ZEROS) + packer.flush(zlib.Z_FULL_FLUSH)
    again = packer.compress(ZEROS) + packer.flush(zlib.Z_FULL_FLUSH)
    count = zeros // len(ZEROS)
    return start + block + again * (count - 1) + packer.compress(more) + packer.flush()


def gzipped(plain: bytes) -> bytes:
    """Return one gzip member."""
    packer = zlib.compressobj(6, zlib.DEFLATED, zlib.MAX_WBITS | 16)
    return packer.compress(plain) + packer.flush()


def hole(name: str, start: bytes, size: int, end: bytes = b"") -> Callable[[Path], None]:
    """Return a writer of a file of gigabytes that takes no room on the disk, with something before and behind them."""

    def write(folder: Path) -> None:
        with (folder / name).open("wb") as file:
            file.write(start)
            file.truncate(size)
            file.seek(0, 2)
            file.write(end)

    return write


def nifti_header(shape: tuple[int, ...], dtype: type = np.int16, **fields: object) -> bytes:
    """Return the 352 bytes before the voxels of a NIfTI file, with fields overwritten."""
    header = nibabel.Nifti1Header()
    header.set_data_dtype(dtype)
    header.set_data_shape(shape)
    header.set_sform(np.diag([-3.0, -3.0, 4.0, 1.0]), 1)
    header["vox_offset"], header["magic"], header["scl_slope"], header["scl_inter"] = 352, b"n+1", 1, 0
    for name, value in fields.items():
        header[name] = value
    return bytes(header.binaryblock) + bytes(4)


VOXELS = head().tobytes()  # of a 40 x 40 x 24 volume
SHAPE = (40, 40, 24)


def nifti(
    says: str, content: bytes | Callable[[], bytes], name: str = "a.nii", verdict: str = "broken"
) -> Hostile:
    """Return a case of one NIfTI file."""
    return Hostile(
        modality="mri",
        write=lambda folder: (folder / name).write_bytes(
            content if isinstance(content, bytes) else content()
        ),
        says=says,
        verdict=verdict,
    )


def _nifti2(shape: tuple[int, ...]) -> bytes:
    header = nibabel.Nifti2Header()
    header.set_data_dtype(np.int16)
    header["dim"][: len(shape) + 1] = [len(shape), *shape]
    header["vox_offset"], header["scl_slope"] = 544, 1
    header.set_sform(np.diag([-1.0, -1.0, 1.0, 1.0]), 1)
    return bytes(header.binaryblock) + bytes(4)


def _extended(size: int) -> bytes:
    """Return a NIfTI file with a header extension that says it has this many bytes."""
    header = nifti_header(SHAPE, vox_offset=352 + 32)[:348]
    return header + b"\1\0\0\0" + struct.pack("<ii", size, 6) + bytes(24) + VOXELS


GZ_NAME = b"\x1f\x8b\x08\x08" + bytes(6) + b"a" * (64 << 20)  # a member whose file name does not end
NIFTI = {
    "gz bomb, declared": nifti(
        "shrunk", lambda: deflated(nifti_header((800, 800, 800), np.float32), 2 * GIB, 31), "a.nii.gz"
    ),
    "gz bomb, undeclared": nifti(
        "goes on", lambda: deflated(nifti_header(SHAPE) + VOXELS, 2 * GIB, 31), "a.nii.gz"
    ),
    "gz bomb in a second member": nifti(
        "goes on",
        lambda: gzipped(nifti_header(SHAPE) + VOXELS) + deflated(b"", 2 * GIB, 31),
        "a.nii.gz",
    ),
    "gz bomb in the extensions": nifti(
        "352 to", lambda: deflated(nifti_header(SHAPE, vox_offset=1.9e9), 2 * GIB, 31, VOXELS), "a.nii.gz"
    ),
    "gz of 300,000 empty members": nifti(
        "members", lambda: gzipped(nifti_header(SHAPE) + VOXELS) + 300_000 * gzipped(b""), "a.nii.gz"
    ),
    "gz name without an end": nifti("ends early|larger", GZ_NAME, "a.nii.gz"),
    "gz cut": nifti("ends early", gzipped(nifti_header(SHAPE) + VOXELS)[:-2000], "a.nii.gz"),
    "gz checksum wrong": nifti(
        "incorrect data check", gzipped(nifti_header(SHAPE) + VOXELS)[:-8] + bytes(8), "a.nii.gz"
    ),
    "gz of garbage": nifti("damaged", b"\x1f\x8b\x08\0" + bytes(range(256)) * 9, "a.nii.gz"),
    "32767^3 float64": nifti("2 GiB", nifti_header((32767, 32767, 32767), np.float64) + bytes(4096)),
    "8 GiB of float64 in a hole": Hostile(
        modality="mri",
        write=hole("a.nii", nifti_header((1024, 1024, 1024), np.float64), 352 + 8 * GIB),
        says="2 GiB",
    ),
    "NIfTI-2 of 2^62 voxels": nifti("2 GiB", _nifti2((1 << 31, 1 << 31, 1)) + bytes(4096)),
    "NIfTI-2 of a negative size": nifti("dimension", _nifti2((-5, 40, 24)) + VOXELS),
    "negative dimensions": nifti("dimension", nifti_header(SHAPE, dim=[3, -40, 40, 24, 1, 1, 1, 1]) + VOXELS),
    "no size": nifti("dimension", nifti_header(SHAPE, dim=[3, 40, 0, 24, 1, 1, 1, 1]) + VOXELS),
    "200 dimensions": nifti("dimension", nifti_header(SHAPE, dim=[200, 40, 40, 24, 1, 1, 1, 1]) + VOXELS),
    "time points": nifti("frames", nifti_header(SHAPE, dim=[4, 40, 40, 24, 30000, 1, 1, 1]) + VOXELS),
    "voxels behind the end": nifti("ends early", nifti_header(SHAPE, vox_offset=1e6) + VOXELS),
    "voxels at 3e38": nifti("352 to", nifti_header(SHAPE, vox_offset=3e38) + VOXELS),
    "voxels nowhere": nifti("352 to", nifti_header(SHAPE, vox_offset=np.nan) + VOXELS),
    "voxels before the file": nifti("352 to", nifti_header(SHAPE, vox_offset=-352) + VOXELS),
    "extension of 2 GB": nifti("", _extended(0x7FFFFFF0), verdict="read"),
    "extension of a negative size": nifti("", _extended(-16), verdict="read"),
    "slope infinite": nifti("slope", nifti_header(SHAPE, scl_slope=np.inf) + VOXELS),
    "intercept no number": nifti("slope", nifti_header(SHAPE, scl_inter=np.nan) + VOXELS),
    "slope beyond float32": nifti("no finite|finite number", nifti_header(SHAPE, scl_slope=3e38) + VOXELS),
    "unknown type": nifti("type", nifti_header(SHAPE, datatype=9999) + VOXELS),
    "complex values": nifti("type", nifti_header(SHAPE, datatype=32) + VOXELS * 4),
    "colours": nifti("type", nifti_header(SHAPE, datatype=128) + VOXELS * 2),
    "header of another size": nifti("NIfTI", nifti_header(SHAPE, sizeof_hdr=4096) + VOXELS),
    "spacing no number": nifti("mm", nifti_header(SHAPE, srow_x=[np.nan, 0, 0, 0]) + VOXELS),
    "voxels of 29 mm": nifti(
        "times as large",
        nifti_header((100, 100, 100), srow_x=[29, 0, 0, 0], srow_y=[0, 29, 0, 0], srow_z=[0, 0, 29, 0])
        + bytes(2_000_000),
    ),
    "voxels of 49 mm": nifti("m long", nifti_header((100, 4, 4), srow_x=[49, 0, 0, 0]) + bytes(3200)),
    "axes in one plane": nifti(
        "one plane", nifti_header(SHAPE, srow_x=[-3, -3, 0, 0], srow_y=[0, 0, 0, 0]) + VOXELS
    ),
    "quaternion of no rotation": nifti(
        "orientation", nifti_header(SHAPE, sform_code=0, qform_code=1, quatern_b=1e30) + VOXELS
    ),
    "content beyond the header": nifti("goes on", nifti_header((4, 4, 4)) + VOXELS * 40),
    "half a header": nifti("ends early", nifti_header(SHAPE)[:200]),
}
