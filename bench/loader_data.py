"""What bench/loader.py reads: seeded samples, stored for every loader in the form it wants.

Sizes are those of the figures the bench compares with: grey 224 x 224 JPEGs of quality 75 take about 6.6 kB, RGB ones
about 9.9 kB, volumes of 16 x 192 x 192 int16 about 379 kB as LZ4 and 408 kB as .nii.gz.

Shape suffixes: N samples, C channels; Z, Y, X depth, height, width.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mnemos.sharding.codecs import encode_volume
from mnemos.sharding.modalities import MODALITIES, Modality
from mnemos.sharding.reader import ShardSet
from mnemos.sharding.writer import ShardSetWriter

IMAGE, VOLUME = (224, 224), (16, 192, 192)
JPEG_QUALITY = 75  # what the authors' data are stored with


@dataclass(frozen=True, kw_only=True)
class Sort:
    """One sort of sample.

    Attributes:
        name: in the table and on the command line.
        modality: the record its shard set carries.
        noise: standard deviation of the noise, in stored units; it decides the size of the JPEGs.
        num: samples of a set; so few that one pass over them takes all of their pages into memory.
        batch: samples of a batch.
    """

    name: str
    modality: Modality
    noise: float
    num: int
    batch: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Stored size of a sample: (Y, X) or (Z, Y, X)."""
        return IMAGE if self.modality.kind == "image" else VOLUME


def _modality(kind: str, channels: int) -> Modality:
    return next(one for one in MODALITIES.values() if (one.kind, one.channels) == (kind, channels))


SORTS = {
    sort.name: sort
    for sort in (
        Sort(name="grey", modality=_modality("image", 1), noise=5.0, num=2048, batch=128),
        Sort(name="rgb", modality=_modality("image", 3), noise=11.5, num=1024, batch=128),
        Sort(name="volume", modality=_modality("volume", 1), noise=20.0, num=64, batch=16),
    )
}


@dataclass(frozen=True, kw_only=True)
class Data:
    """The stored samples of one sort, in one order everywhere.

    Attributes:
        sort: what they are.
        shards: folder of our shard set; all of them are in its split "train".
        batch: samples of a batch.
        files: the same samples as single files: .jpg (the shards' very bytes) or .nii.gz.
        truth_NCYX: the first batch as it must come out: images uint8 [N, C, Y, X] (by Pillow, which none of our code
            uses for JPEGs), volumes int16 [N, 1, Z, Y, X] (as drawn).
    """

    sort: Sort
    batch: int
    shards: Path
    files: tuple[Path, ...]
    truth_NCYX: np.ndarray

    def open(self) -> ShardSet:
        """Return the shard set, opened anew."""
        return ShardSet(self.shards, "train")

    @property
    def urls(self) -> list[str]:
        """Paths of the tars, as webdataset takes them."""
        return [str(path) for path in sorted((self.shards / "train").glob("*.tar"))]

    def payloads(self, most: int) -> list[bytes]:
        """Return the encoded bytes of the first samples of the set."""
        opened = self.open()
        return [bytes(opened.payload(place)) for place in range(min(most, len(opened)))]


def draw_image(rng: np.random.Generator, channels: int, noise: float) -> np.ndarray:
    """Return uint8 [Y, X, C]: smooth shapes common to the channels, a tint of each, and noise."""
    image_YXC = 128 + 40 * _smooth(rng, (14, 14), IMAGE)[..., None] + rng.normal(0, noise, (*IMAGE, channels))
    for channel in range(channels if channels > 1 else 0):
        image_YXC[..., channel] += 15 * _smooth(rng, (7, 7), IMAGE)
    return np.clip(image_YXC, 0, 255).astype(np.uint8)


def draw_volume(rng: np.random.Generator, noise: float) -> np.ndarray:
    """Return int16 [Z, Y, X] like a CT slab: soft tissue with noise inside an ellipse, air outside."""
    height, width = np.mgrid[-1:1:192j, -1:1:192j]
    radius = (width / 0.98) ** 2 + (height / 0.75) ** 2
    body = radius < np.quantile(
        radius, 0.575
    )  # this share of the voxels holds noise, which no codec shortens
    tissue_ZYX = 50 + 28 * _smooth(rng, (4, 12, 12), VOLUME) + rng.normal(0, noise, VOLUME)
    return np.where(body, np.clip(np.round(tissue_ZYX), -1024, 1024), -1024).astype(np.int16)


def _smooth(rng: np.random.Generator, coarse: tuple[int, ...], size: tuple[int, ...]) -> np.ndarray:
    points = torch.from_numpy(rng.standard_normal(coarse))[None, None]
    mode = "bicubic" if len(size) == 2 else "trilinear"
    drawn: np.ndarray = torch.nn.functional.interpolate(points, size=size, mode=mode)[0, 0].numpy()
    return drawn


def make(sort: Sort, folder: Path, num: int, batch: int, seed: int = 0) -> Iterator[Data | None]:
    """Write samples of a sort into a new folder; yields None for each one written, and the data at the end."""
    files, truth = [], []
    folder.mkdir()
    recipe = {"drawn": "smooth shapes and noise, see bench/loader_data.py"}
    with ShardSetWriter(
        folder / "shards",
        modality=sort.modality,
        source="synthetic",
        shape=sort.shape,
        spacing_mm=(1.0, 1.0, 1.0) if sort.modality.kind == "volume" else None,
        preset="base",
        classes=(),
        recipe=recipe,
        key=b"bench",
        shard_bytes=8 << 20,  # several tars even of these few samples
    ) as writer:
        for number in range(num):
            rng = np.random.default_rng((seed, number))
            payload, stem = b"", folder / f"{number:06d}"
            if sort.modality.kind == "volume":
                volume_ZYX = draw_volume(rng, sort.noise)
                payload = encode_volume(volume_ZYX)
                files.append(_write_nifti(stem, volume_ZYX))
            else:
                payload = _jpeg(draw_image(rng, sort.modality.channels, sort.noise))
                files.append(stem.with_suffix(".jpg"))
                files[-1].write_bytes(payload)
            if number < batch:
                truth.append(volume_ZYX[None] if sort.modality.kind == "volume" else _by_pillow(files[-1]))
            name = f"{number:016x}".encode()
            row: dict[str, Any] = {"key": name, "group": name, "label": -1, "scale": 1.0, "shift": 0.0}
            writer.add_encoded("train", payload, "", row)
            yield None
    yield Data(
        sort=sort, batch=batch, shards=folder / "shards", files=tuple(files), truth_NCYX=np.stack(truth)
    )


def _jpeg(image_YXC: np.ndarray) -> bytes:
    import simplejpeg

    grey = image_YXC.shape[2] == 1
    return bytes(
        simplejpeg.encode_jpeg(
            np.ascontiguousarray(image_YXC),
            quality=JPEG_QUALITY,
            colorspace="GRAY" if grey else "RGB",
            colorsubsampling="Gray" if grey else "420",  # what OpenCV and Pillow write unless told otherwise
        )
    )


def _by_pillow(file: Path) -> np.ndarray:
    from PIL import Image

    with Image.open(file) as picture:
        image = np.array(picture)
    return image[None] if image.ndim == 2 else np.ascontiguousarray(image.transpose(2, 0, 1))


def _write_nifti(stem: Path, volume_ZYX: np.ndarray) -> Path:
    import nibabel

    file = stem.with_suffix(".nii.gz")
    # NIfTI counts X first and stores it fastest: the bytes are those of the C-ordered [Z, Y, X]
    nibabel.save(nibabel.Nifti1Image(volume_ZYX.T, np.eye(4)), file)
    return file
