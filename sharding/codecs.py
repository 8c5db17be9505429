"""Payloads: one array to bytes and back, as the payload kind in the manifest says, never by a look at them.

``jpg`` (quality 95, no chroma subsampling) and ``png`` hold uint8 [C, Y, X], C = 1 or 3; ``vol`` holds int16
[Z, Y, X] as blosc2 (LZ4, byte shuffle), about 17 times faster to open than .nii.gz of the same size; ``ids``
holds little-endian uint16 token ids. A decoder is told the size it must find and checks it before anything is
allocated.
"""

import io

import numpy as np

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


def decode_image(data: bytes, payload: str, shape_CYX: tuple[int, int, int]) -> np.ndarray:
    """Decode to uint8 [C, Y, X] of exactly this shape; ValueError where the bytes hold anything else."""
    channels, height, width = shape_CYX
    if payload == "jpg":
        import simplejpeg

        found = simplejpeg.decode_jpeg_header(data)[:2]
        if found != (height, width):
            raise ValueError(f"the image is {found[0]}x{found[1]}, not {height}x{width}")
        image_YXC = simplejpeg.decode_jpeg(data, colorspace="GRAY" if channels == 1 else "RGB")
    else:
        from PIL import Image

        with Image.open(io.BytesIO(data), formats=["PNG"]) as picture:
            if (picture.height, picture.width) != (height, width):
                raise ValueError(f"the image is {picture.height}x{picture.width}, not {height}x{width}")
            image_YXC = np.array(picture.convert("L" if channels == 1 else "RGB")).reshape(
                height, width, channels
            )
    return np.ascontiguousarray(image_YXC.transpose(2, 0, 1))


def encode_volume(volume_ZYX: np.ndarray) -> bytes:
    """Encode int16 [Z, Y, X]."""
    if volume_ZYX.dtype != np.int16 or volume_ZYX.ndim != 3:
        raise ValueError(f"a volume payload takes int16 [Z, Y, X], not {volume_ZYX.dtype} {volume_ZYX.shape}")
    import blosc2

    blosc2.set_nthreads(1)  # several threads write blocks as they finish: other bytes every time
    raw = np.ascontiguousarray(volume_ZYX, dtype="<i2").tobytes()
    return bytes(
        blosc2.compress(raw, typesize=2, clevel=5, filter=blosc2.Filter.SHUFFLE, codec=blosc2.Codec.LZ4)
    )


def decode_volume(data: bytes, shape_ZYX: tuple[int, int, int]) -> np.ndarray:
    """Decode to int16 [Z, Y, X] of exactly this shape; ValueError where the bytes hold anything else."""
    import blosc2

    blosc2.set_nthreads(1)  # the loader's workers are the parallelism
    expected = 2 * int(np.prod(shape_ZYX))
    found = blosc2.get_cbuffer_sizes(data)[0]
    if found != expected:
        raise ValueError(f"the volume holds {found} bytes, not the {expected} of {shape_ZYX} int16 voxels")
    return np.frombuffer(blosc2.decompress(data), dtype="<i2").reshape(shape_ZYX).astype(np.int16)


def encode_ids(ids: np.ndarray) -> bytes:
    """Encode token ids [n], each below 65,536."""
    if len(ids) and (int(np.min(ids)) < 0 or int(np.max(ids)) > 0xFFFF):
        raise ValueError("token ids must lie in 0..65535")
    return np.asarray(ids, dtype="<u2").tobytes()


def decode_ids(data: bytes, most: int) -> np.ndarray:
    """Decode to uint16 [n], 1 <= n <= most; ValueError where the bytes hold anything else."""
    if len(data) % 2 or not 2 <= len(data) <= 2 * most:
        raise ValueError(f"{len(data)} bytes are not between 1 and {most} token ids")
    return np.frombuffer(data, dtype="<u2").astype(np.uint16)
