"""Payloads: one array to bytes and back, as the payload kind in the manifest says, never by a look at them.

``jpg`` (quality 95, no chroma subsampling) and ``png`` hold uint8 [C, Y, X], C = 1 or 3; ``vol`` holds int16
[Z, Y, X] as blosc2 (byte shuffle, LZ4HC: slower to write than LZ4, smaller, and mostly faster to read), about 17
times faster to open than .nii.gz of the same size; ``ids`` holds little-endian uint16 token ids. Two more are read
from a user's own tars, never written: ``npy`` (int16 volume) and ``txt`` (UTF-8). A decoder writes into an array of
the size it must find and refuses anything else before it allocates. A pickle is never decoded.
"""

import io
import struct
import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import xxhash

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Buffer = bytes | memoryview
JPEG_QUALITY = 95
# What decoders raise for bad bytes, Pillow's own among them.
BROKEN = (
    *(ValueError, OSError, RuntimeError, SyntaxError, ArithmeticError, LookupError, TypeError, EOFError),
    *(struct.error, zlib.error),
)
# Of a blosc2 chunk: version, LZ4's version, flags, type size; bytes unpacked, of a block, packed.
_CHUNK = struct.Struct("<4B3i")
_CHUNK_BYTES = 32
_CODECS = [bytes([0, 0, 0, 0, 0, 1, codec]) + bytes(8) for codec in (1, 2)]  # shuffle last; LZ4 or LZ4HC
_UNSPLIT, _COPIED, _LZ4, _EXTENDED = 0x10, 0x02, 0x20, 0x05  # flags
_ZEROS = 0x10  # a chunk that is nothing but its header


def encode_image(image_CYX: np.ndarray, payload: str = "jpg") -> bytes:
    """Encode uint8 [C, Y, X], C = 1 (grey) or 3 (RGB), as "jpg" or "png"; no metadata is written."""
    if image_CYX.dtype != np.uint8 or image_CYX.ndim != 3 or image_CYX.shape[0] not in (1, 3):
        found = f"{image_CYX.dtype} {image_CYX.shape}"
        raise ValueError(f"an image payload takes uint8 [1 or 3, Y, X], not {found}")
    image_YXC = np.ascontiguousarray(image_CYX.transpose(1, 2, 0))
    grey = image_CYX.shape[0] == 1
    if payload == "jpg":
        import simplejpeg

        return bytes(
            simplejpeg.encode_jpeg(
                image_YXC,
                quality=JPEG_QUALITY,
                colorspace="GRAY" if grey else "RGB",
                colorsubsampling="Gray" if grey else "444",
            )
        )
    if payload != "png":
        raise ValueError(f"image payload {payload!r} is unknown; known: jpg, png")
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image_YXC[:, :, 0] if grey else image_YXC).save(buffer, format="PNG")
    return buffer.getvalue()


def decode_jpeg(data: Buffer, out_YXC: np.ndarray) -> None:
    """Decode a JPEG into uint8 [Y, X, C], C = 1 (grey) or 3 (RGB), of exactly its size; ValueError otherwise."""
    import simplejpeg

    height, width, channels = out_YXC.shape
    found = simplejpeg.decode_jpeg_header(data)[:2]
    if found != (height, width):
        raise ValueError(f"the image is {found[0]}x{found[1]}, not {height}x{width}")
    simplejpeg.decode_jpeg(data, colorspace="GRAY" if channels == 1 else "RGB", buffer=out_YXC)


def decode_png(data: Buffer, out_YXC: np.ndarray) -> None:
    """Decode an 8-bit PNG, grey, RGB or with a palette, as `decode_jpeg` does a JPEG."""
    from PIL import Image

    height, width, channels = out_YXC.shape
    found = tuple(int.from_bytes(data[at : at + 4], "big") for at in (20, 16))
    if found != (height, width):  # before Pillow sees it, which has a limit of its own
        raise ValueError(f"the image is {found[0]}x{found[1]}, not {height}x{width}")
    with Image.open(io.BytesIO(data), formats=["PNG"]) as picture:
        if picture.mode not in ("L", "RGB", "P") or picture.size != (width, height):
            raise ValueError(f"the image is {picture.mode} of {picture.size}, not 8-bit grey or RGB")
        image = np.asarray(picture.convert("L" if channels == 1 else "RGB"))
    out_YXC[...] = image.reshape(out_YXC.shape)


def encode_volume(volume_ZYX: np.ndarray) -> bytes:
    """Encode int16 [Z, Y, X]."""
    if volume_ZYX.dtype != np.int16 or volume_ZYX.ndim != 3:
        raise ValueError(f"a volume payload takes int16 [Z, Y, X], not {volume_ZYX.dtype} {volume_ZYX.shape}")
    import blosc2

    blosc2.set_nthreads(1)  # several threads write blocks as they finish: other bytes every time
    raw = np.ascontiguousarray(volume_ZYX, dtype="<i2").tobytes()
    return bytes(
        blosc2.compress(raw, typesize=2, clevel=5, filter=blosc2.Filter.SHUFFLE, codec=blosc2.Codec.LZ4HC)
    )


def decode_volume(data: Buffer, out_ZYX: np.ndarray) -> None:
    """Decode a ``vol`` payload into int16 [Z, Y, X] of exactly its size; ValueError otherwise."""
    import blosc2

    _check_chunk(data, out_ZYX.nbytes)
    blosc2.set_nthreads(1)  # the reading processes are the parallelism
    blosc2.decompress(data, dst=out_ZYX)


def _check_chunk(data: Buffer, num_bytes: int) -> None:
    """Raise ValueError unless bytes are a chunk as `encode_volume` makes it, every block inside.

    blosc2 believes a chunk's flags and the places of its blocks: others make it read and write where it must not.
    """
    if len(data) < _CHUNK_BYTES:
        raise ValueError(f"the volume has {len(data)} bytes, fewer than a chunk's header")
    version, lz4_version, flags, type_size, found, block, size = _CHUNK.unpack_from(data)
    if found != num_bytes or size != len(data):
        raise ValueError(
            f"the volume holds {found} bytes in {size}, not {num_bytes} of int16 voxels in {len(data)}"
        )
    rest = flags & ~(_UNSPLIT | _COPIED | _LZ4)
    if (version, lz4_version, type_size, rest) != (5, 1, 2, _EXTENDED) or bytes(data[16:31]) not in _CODECS:
        raise ValueError("the volume is not byte-shuffled int16 in LZ4")
    special = data[31]
    if special == _ZEROS and size == _CHUNK_BYTES:
        return
    blocks = -(-num_bytes // block) if 0 < block <= num_bytes else 0
    first = _CHUNK_BYTES + (0 if flags & _COPIED else 4 * blocks)
    if special or not blocks or size < first or (flags & _COPIED and size != first + num_bytes):
        raise ValueError("the volume's blocks do not fit its size")
    if not flags & _COPIED:
        starts = np.frombuffer(data, "<i4", blocks, _CHUNK_BYTES)
        if not flags & _LZ4 or starts.min() < first or starts.max() >= size:
            raise ValueError("a block of the volume lies outside")


def decode_npy(data: Buffer, out_ZYX: np.ndarray) -> None:
    """Copy an ``npy`` payload into int16 [Z, Y, X] of exactly its size; ValueError otherwise."""
    # Compared with the one header it may have: NumPy evaluates a header as Python.
    version, wide = bytes(data[:8]), bytes(data[6:7]) != b"\x01"
    begin = 12 if wide else 10
    end = begin + int.from_bytes(data[8:begin], "little")
    wanted = f"{{'descr': '<i2', 'fortran_order': False, 'shape': {out_ZYX.shape}, }}"
    header = bytes(data[begin : min(end, begin + 1024)]).decode("latin-1").strip()
    if version[:6] != b"\x93NUMPY" or header != wanted:
        raise ValueError(f"the array is {header[:100]!r}, not {wanted!r}")
    if len(data) - end != out_ZYX.nbytes:
        raise ValueError(f"the array has {len(data) - end} bytes, not {out_ZYX.nbytes}")
    out_ZYX[...] = np.frombuffer(data, "<i2", offset=end).reshape(out_ZYX.shape)


DECODERS: dict[str, Callable[[Buffer, np.ndarray], None]] = {
    "jpg": decode_jpeg,
    "png": decode_png,
    "vol": decode_volume,
    "npy": decode_npy,
}


def encode_ids(ids: np.ndarray) -> bytes:
    """Encode token ids [n], each below 65,536."""
    if len(ids) and (int(np.min(ids)) < 0 or int(np.max(ids)) > 0xFFFF):
        raise ValueError("token ids must lie in 0..65535")
    return np.asarray(ids, dtype="<u2").tobytes()


def decode_ids(data: Buffer, most: int) -> np.ndarray:
    """Decode to uint16 [n], 1 <= n <= most; ValueError where the bytes hold anything else."""
    if len(data) % 2 or not 2 <= len(data) <= 2 * most:
        raise ValueError(f"{len(data)} bytes are not between 1 and {most} token ids")
    return np.frombuffer(data, dtype="<u2").astype(np.uint16)


def decode_text(data: Buffer, most: int, tokenizer: "Tokenizer") -> np.ndarray:
    """Tokenise a ``txt`` payload: uint16 [n], 1 <= n <= most; ValueError where no token comes of it."""
    ids: list[int] = tokenizer.encode(bytes(data).decode("utf-8")).ids[:most]
    if not ids:
        raise ValueError("the text is empty")
    return np.array(ids, dtype=np.uint16)


def span_checksum(span: Buffer) -> int:
    """Return the checksum of a sample's whole span in its tar, headers and padding included: XXH3, 64 bits."""
    return xxhash.xxh3_64_intdigest(span)
