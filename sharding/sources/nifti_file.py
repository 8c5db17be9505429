"""One NIfTI file, read without trusting it: sizes first, voxels a piece at a time, extensions never.

A volume of 4 GiB in double precision takes the 2 GiB of its float32 and a few megabytes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mnemos.sharding.errors import DataError
from mnemos.sharding.sources.bounds import check_shrunk, refusing
from mnemos.sharding.sources.gunzip import MAGIC, Gunzip, Stream
from mnemos.sharding.sources.units import MAX_VOXELS

_MILLIMETRES = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}  # unknown, metre, millimetre, micron
_UNIT_BITS = 7
_EXTENSION_BYTES = 64 << 20  # most that may lie between the header and the voxels
_BEHIND_BYTES = 1 << 20  # most that may lie behind them: some writers fill up a block
_PIECE = 1 << 20  # voxels converted at a time


@dataclass(frozen=True, kw_only=True)
class _Layout:
    """What a header declares: sizes of the voxel axes, the voxels' type, first byte and scale, and the affine."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    start: int
    slope: float
    inter: float
    affine: np.ndarray
    unit_mm: float


def read_nifti_file(path: Path) -> tuple[np.ndarray, np.ndarray, float]:
    """Read a NIfTI-1 or NIfTI-2 file, packed or not, whatever its name says.

    Returns:
        float32 [X, Y, Z] in the file's own axes with slope and intercept applied; the affine [4, 4] from voxel
        indices towards right, front and head; and the millimetres one unit of it has.

    Raises:
        DataError: no NIfTI, not of three dimensions (further ones of size 1 are allowed), more than 2 GiB as
            float32, no real number a voxel, or a header and a content that contradict each other.
        OSError: as the file system says.
    """
    stored_bytes = path.stat().st_size
    with _opened(path) as (stream, packed):
        layout = _layout(stream)
        num_voxels = int(np.prod(layout.shape, dtype=object))
        declared_bytes = layout.start + num_voxels * layout.dtype.itemsize
        if packed:
            check_shrunk(declared_bytes, stored_bytes)
        elif stored_bytes < declared_bytes:
            raise DataError(f"it ends early: {stored_bytes:,} of {declared_bytes:,} bytes are there")
        voxels = np.empty(num_voxels, dtype=np.float32)
        for first in range(0, num_voxels, _PIECE):
            piece = voxels[first : first + _PIECE]
            content = _exactly(stream, len(piece) * layout.dtype.itemsize, "its voxels end early")
            _convert(np.frombuffer(content, layout.dtype), layout, piece)
        behind = 0
        while content := stream.read(_PIECE):  # up to the end, where a packed file's checksum is
            behind += len(content)
            if behind > _BEHIND_BYTES:
                raise DataError(
                    f"its content goes on beyond the {declared_bytes:,} bytes that its header declares"
                )
    return voxels.reshape(layout.shape[2::-1]).transpose(2, 1, 0), layout.affine, layout.unit_mm


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Stream, bool]]:
    """Open a file for reading its content, and tell whether it is packed, by its first two bytes."""
    with path.open("rb") as file:
        packed = file.read(len(MAGIC)) == MAGIC
        file.seek(0)
        yield (Gunzip(file) if packed else file), packed


def _layout(stream: Stream) -> _Layout:
    """Read and check a header; leaves the stream at the first voxel."""
    import nibabel

    block = _exactly(
        stream, nibabel.Nifti1Header.sizeof_hdr, "it is not a readable NIfTI file: it ends early"
    )
    own_size = block[:4]
    for kind in (nibabel.Nifti1Header, nibabel.Nifti2Header):
        for order in "<>":
            if own_size == np.array(kind.sizeof_hdr, f"{order}i4").tobytes():
                more = _exactly(
                    stream, kind.sizeof_hdr - len(block), "it is not a readable NIfTI file: it ends early"
                )
                return _declared(kind(block + more, endianness=order, check=False), stream)
    raise DataError("it is not a NIfTI file")


def _declared(header: Any, stream: Stream) -> _Layout:
    """Return what a header says, once that makes sense."""
    if bytes(header["magic"])[:3] not in (b"n+1", b"n+2"):
        raise DataError("it is not a NIfTI file that holds its own voxels (.nii); convert it to one")
    sizes = [int(size) for size in header["dim"]]
    num_axes = sizes[0]
    if not 1 <= num_axes <= 7 or min(sizes[1 : num_axes + 1]) < 1:
        raise DataError(f"its header declares the dimensions {sizes}, which no volume has")
    shape, named = tuple(sizes[1 : num_axes + 1]), "x".join(map(str, sizes[1 : num_axes + 1]))
    if num_axes < 3:
        raise DataError(f"it has {num_axes} dimensions ({named}); a volume needs three")
    if any(size != 1 for size in shape[3:]):
        raise DataError(
            f"it holds {int(np.prod(shape[3:], dtype=object))} frames ({named}); store one per file"
        )
    if int(np.prod(shape, dtype=object)) > MAX_VOXELS:
        raise DataError(f"its header declares {named} voxels, more than 2 GiB; cut it into parts")
    with refusing("its voxels are of an unknown type"):
        dtype = header.get_data_dtype()
    if dtype.kind not in "iuf" or dtype.itemsize > 8:
        raise DataError(f"its voxels are of type {dtype}; one real number a voxel is needed")
    start, least = float(header["vox_offset"]), header.sizeof_hdr + 4
    if not least <= start <= least + _EXTENSION_BYTES:  # no number fails, too
        raise DataError(
            f"its voxels are said to start at byte {start:g}; {least} to {least + _EXTENSION_BYTES} is allowed"
        )
    _skip(stream, int(start) - header.sizeof_hdr)
    slope, inter = float(header["scl_slope"]), float(header["scl_inter"])
    if np.isnan(slope) or slope == 0:  # how writers say that nothing is scaled
        slope, inter = 1.0, 0.0
    if not np.isfinite([slope, inter]).all():
        raise DataError(f"its header has the slope {slope:g} and the intercept {inter:g}")
    unit_mm = _MILLIMETRES.get(int(header["xyzt_units"]) & _UNIT_BITS)
    if unit_mm is None:
        raise DataError("its header counts in an unknown unit of length")
    with refusing("its header describes no orientation"):
        affine = np.asarray(header.get_best_affine(), dtype=np.float64)
    return _Layout(
        shape=shape, dtype=dtype, start=int(start), slope=slope, inter=inter, affine=affine, unit_mm=unit_mm
    )


def _convert(values: np.ndarray, layout: _Layout, into: np.ndarray) -> None:
    if (layout.slope, layout.inter) == (1.0, 0.0):
        into[:] = values
        return
    with np.errstate(over="ignore"):  # what float32 does not hold is found later, as not finite
        into[:] = values.astype(np.float64) * layout.slope + layout.inter


def _exactly(stream: Stream, num_bytes: int, otherwise: str) -> bytes:
    """Read so many bytes; ``DataError`` where there are fewer."""
    parts, left = [], num_bytes
    while left:
        part = stream.read(left)
        if not part:
            raise DataError(otherwise)
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


def _skip(stream: Stream, num_bytes: int) -> None:
    while num_bytes:
        num_bytes -= len(_exactly(stream, min(num_bytes, _PIECE), "it ends early, before its voxels"))
