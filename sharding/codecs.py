"""Payloads: one array to bytes and back, as the payload kind in the manifest says, never by a look at them.

``jpg`` (quality 95, no chroma subsampling) and ``png`` hold uint8 [C, Y, X], C = 1 or 3; ``vol`` holds int16
[Z, Y, X] as blosc2 (byte shuffle, LZ4HC: slower to write than LZ4, smaller, and mostly faster to read), about 17
times faster to open than .nii.gz of the same size; ``ids`` holds little-endian uint16 token ids. Two more are read
from a user's own tars, never written: ``npy`` (int16 volume) and ``txt`` (UTF-8). A decoder writes into an array of
the size it must find and refuses anything else before it allocates. A pickle is never decoded.
"""

import io
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import xxhash

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Buffer = bytes | memoryview
JPEG_QUALITY = 95


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
    """Decode a PNG as `decode_jpeg` does a JPEG."""
    from PIL import Image

    height, width, channels = out_YXC.shape
    with Image.open(io.BytesIO(data), formats=["PNG"]) as picture:
        if (picture.height, picture.width) != (height, width):
            raise ValueError(f"the image is {picture.height}x{picture.width}, not {height}x{width}")
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

    found = blosc2.get_cbuffer_sizes(data)
    if found[0] != out_ZYX.nbytes or found[1] != len(data):
        expected = f"{out_ZYX.nbytes} of {out_ZYX.shape} int16 voxels"
        raise ValueError(f"the volume holds {found[0]} bytes in {found[1]}, not {expected} in {len(data)}")
    blosc2.set_nthreads(1)  # the reading processes are the parallelism
    blosc2.decompress(data, dst=out_ZYX)


def decode_npy(data: Buffer, out_ZYX: np.ndarray) -> None:
    """Copy an ``npy`` payload into int16 [Z, Y, X] of exactly its size; ValueError otherwise."""
    stream = io.BytesIO(data)
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(stream)
    if shape != out_ZYX.shape or dtype != np.dtype("<i2") or fortran:
        raise ValueError(f"the array is {dtype} {shape}, not int16 {out_ZYX.shape} in C order")
    if len(data) - stream.tell() != out_ZYX.nbytes:
        raise ValueError(f"the array has {len(data) - stream.tell()} bytes, not {out_ZYX.nbytes}")
    out_ZYX[...] = np.frombuffer(data, dtype=dtype, offset=stream.tell()).reshape(shape)


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
