"""The loaders that bench/loader.py compares: ours, webdataset's, and one that does what the MedCoSS authors' does.

The authors' (yeerwen/MedCoSS at 4ddc58f): a Dataset whose every item is a whole batch, drawn with replacement, behind a
DataLoader of batch_size 1. Images: cv2.imread as grey, PIL RGB, random resized crop (scale 0.2 to 1, bicubic), flip,
ToTensor, into a float32 batch of three channels. Volumes: nibabel's get_fdata (float64), divided by 1024, mirrored in
half of the cases, into a float64 batch. Crop, flip, mirror and ToTensor are written here, as torchvision and
batchgenerators do them. In two points it is better off than theirs, whose rate was measured without them: the memory of
a batch is allocated once (fresh pages cost a third of an image's time), and a batch is handed over as it is, where
their default collation copies it.

Shape suffixes: B samples, C channels; Z, Y, X depth, height, width.
"""

import math
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mnemos.bench.loader_data import Data
from mnemos.sharding.stream import Request, stream

ENDLESS = 1 << 30  # batches an open loader could deliver


@dataclass(frozen=True, kw_only=True)
class Loader:
    """One way to read the samples.

    Attributes:
        name: in the table.
        open: data, and whether plain (stored order, no augmentation), to an endless iterator of batches.
        stored: a batch of it, plain, as stored values [B, C, Y, X] or [B, 1, Z, Y, X].
        processes: it reads with processes of its own, which would go on while others are timed.
    """

    name: str
    open: Callable[[Data, bool], Iterator[Any]]
    stored: Callable[[Any], np.ndarray]
    processes: bool = False


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Endless requests for batches: epoch after epoch, shuffled anew each time, or in the stored order."""

    num: int
    batch: int
    plain: bool

    def __call__(self) -> Iterable[Request]:
        """Yield the requests."""
        order, places = np.empty(0, np.int64), np.arange(self.batch)
        epoch = 0
        for step in range(ENDLESS):
            while len(order) < self.batch:
                rng = np.random.default_rng(epoch)
                more = np.arange(self.num) if self.plain else rng.permutation(self.num)
                order, epoch = np.concatenate([order, more]), epoch + 1
            yield Request(step=step, member=0, samples=order[: self.batch], places=places)
            order, places = order[self.batch :], places + self.batch


def ours(workers: int) -> Loader:
    """Return the stream of mnemos, read in this process (0) or by so many others."""

    def open_stream(data: Data, plain: bool) -> Iterator[Any]:
        plan = Plan(num=len(data.files), batch=data.batch, plain=plain)
        return stream([data.open()], plan, workers=workers, pin=False)

    return Loader(
        name="ours" if not workers else f"ours, {workers} worker{'s' * (workers > 1)}",
        open=open_stream,
        stored=lambda batch: batch.data.numpy().copy(),
        processes=workers > 0,
    )


def webdataset_images(imagespec: str) -> Loader:
    """Return webdataset with its own decoder; "pil" makes RGB of grey, "pill" grey."""

    def open_pipeline(data: Data, plain: bool) -> Iterator[Any]:
        pipeline: Any = _tars(data).decode(imagespec).map(lambda sample: np.array(sample["jpg"]))
        return iter(pipeline.batched(data.batch, collation_fn=np.stack, partial=False))

    def stored(batch_BYXC: np.ndarray) -> np.ndarray:
        return batch_BYXC[:, None] if batch_BYXC.ndim == 3 else batch_BYXC.transpose(0, 3, 1, 2)

    return Loader(name=f"webdataset {imagespec}", open=open_pipeline, stored=stored)


def webdataset_volumes() -> Loader:
    """Return webdataset with the payload's own decoder in a map."""

    def open_pipeline(data: Data, plain: bool) -> Iterator[Any]:
        import blosc2

        shape_ZYX = data.sort.shape

        def decode(sample: dict[str, Any]) -> np.ndarray:
            return np.frombuffer(blosc2.decompress(sample["vol"]), dtype=np.int16).reshape(shape_ZYX)

        return iter(_tars(data).map(decode).batched(data.batch, collation_fn=np.stack, partial=False))

    return Loader(name="webdataset blosc2", open=open_pipeline, stored=lambda batch_BZYX: batch_BZYX[:, None])


def _tars(data: Data) -> Any:
    return webdataset.WebDataset(data.urls, shardshuffle=False).repeat()


class WholeBatches(Dataset[Any], ABC):
    """Every item is a batch, as in the authors' loader; plain ones hold the files in order, without augmentation."""

    def __init__(self, files: Sequence[Path], batch: int, shape: tuple[int, ...], plain: bool) -> None:
        self.files = [str(file) for file in files]
        self.batch, self.shape, self.plain = batch, shape, plain
        self.memory = self.allocate()

    def __len__(self) -> int:
        return 1 << 16

    def __getitem__(self, number: int) -> Any:
        """Return one batch."""
        if self.plain:
            first = number * self.batch
            return self.make([self.files[(first + row) % len(self.files)] for row in range(self.batch)])
        return self.make(np.random.choice(self.files, self.batch).tolist())

    @abstractmethod
    def allocate(self) -> Any:
        """Return the memory of a batch."""

    @abstractmethod
    def make(self, files: list[str]) -> Any:
        """Read the files of one batch."""


class AuthorsImages(WholeBatches):
    """float32 [B, 3, Y, X] in 0..1."""

    def allocate(self) -> Tensor:
        """Return the memory of a batch."""
        return torch.zeros(self.batch, 3, *self.shape)

    def make(self, files: list[str]) -> Tensor:
        """Read, crop, flip and convert every image."""
        import cv2
        from PIL import Image

        batch_BCYX: Tensor = self.memory
        for row, file in enumerate(files):
            pixels: Any = cv2.imread(file, cv2.IMREAD_GRAYSCALE)
            picture = Image.fromarray(pixels).convert("RGB")
            if not self.plain:
                picture = random_resized_crop(picture, self.shape)
                if torch.rand(1) < 0.5:
                    picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            batch_BCYX[row] = to_tensor(picture)
        return batch_BCYX


class AuthorsVolumes(WholeBatches):
    """float64 [B, 1, Z, X, Y], in HU / 1024: the plane is transposed, as theirs is."""

    def allocate(self) -> np.ndarray:
        """Return the memory of a batch."""
        depth, height, width = self.shape
        return np.zeros((self.batch, 1, depth, width, height))

    def make(self, files: list[str]) -> np.ndarray:
        """Read, scale and mirror every volume."""
        import nibabel

        batch_BCZXY: np.ndarray = self.memory
        for row, file in enumerate(files):
            volume_XYZ = nibabel.load(file).get_fdata() / 1024.0
            volume_ZXY = volume_XYZ.transpose(2, 0, 1)
            if not self.plain and random.random() < 0.5:
                volume_ZXY = mirrored(volume_ZXY)
            batch_BCZXY[row, 0] = volume_ZXY
        return batch_BCZXY


def authors_images() -> Loader:
    """Return the authors' way with images."""
    return Loader(
        name="authors'",
        open=lambda data, plain: _whole(
            AuthorsImages(data.files, data.batch, data.sort.shape, plain), shuffle=not plain
        ),
        stored=lambda batch_BCYX: (batch_BCYX * 255).round().numpy(),
    )


def authors_volumes() -> Loader:
    """Return the authors' way with volumes."""
    return Loader(
        name="authors'",
        open=lambda data, plain: _whole(
            AuthorsVolumes(data.files, data.batch, data.sort.shape, plain), shuffle=not plain
        ),
        stored=lambda batch_BCZXY: (batch_BCZXY * 1024).transpose(0, 1, 2, 4, 3),
    )


def _whole(batches: WholeBatches, shuffle: bool) -> Iterator[Any]:
    return iter(
        DataLoader(batches, batch_size=1, shuffle=shuffle, num_workers=0, collate_fn=lambda one: one[0])
    )


def random_resized_crop(picture: Any, size_YX: tuple[int, ...]) -> Any:
    """Cut a random part of a PIL image, 0.2 to 1 of its area, 3:4 to 4:3, and resize it, bicubic."""
    from PIL import Image

    width, height = picture.size
    left, top, right, bottom = 0, 0, width, height
    for _ in range(10):
        area = width * height * torch.empty(1).uniform_(0.2, 1.0).item()
        aspect = math.exp(torch.empty(1).uniform_(math.log(3 / 4), math.log(4 / 3)).item())
        across, down = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < across <= width and 0 < down <= height:
            top = int(torch.randint(0, height - down + 1, (1,)).item())
            left = int(torch.randint(0, width - across + 1, (1,)).item())
            right, bottom = left + across, top + down
            break
    part = picture.crop((left, top, right, bottom))
    return part.resize((size_YX[1], size_YX[0]), Image.Resampling.BICUBIC)


def to_tensor(picture: Any) -> Tensor:
    """Return a PIL RGB image as float32 [C, Y, X] in 0..1, contiguous."""
    image_YXC = torch.from_numpy(np.array(picture, np.uint8, copy=True))
    return image_YXC.permute(2, 0, 1).contiguous().to(torch.float32).div(255)


def mirrored(volume_ZYX: np.ndarray) -> np.ndarray:
    """Return a copy with each axis mirrored with probability one half."""
    axes = tuple(axis for axis in range(volume_ZYX.ndim) if random.random() < 0.5)
    return np.flip(volume_ZYX, axes).copy(order="K")
