"""Read a shard set by its index: memory-mapped, checked sample by sample, in any order.

Tar headers are never scanned: one flipped header bit makes a scanning reader lose the rest of a shard without
a word.
"""

import mmap
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from mnemos.sharding.codecs import decode_ids, decode_image, decode_volume
from mnemos.sharding.errors import DataError, UserError
from mnemos.sharding.manifest import INDEX_FILE, SPLITS, file_sha256, load_manifest


class ShardSet:
    """One split of a shard set.

    Args:
        directory: the set's folder.
        split: "train" or "val".

    Attributes:
        manifest: of the whole set.
        index: column name -> array with one row per sample (see ``writer.COLUMNS``; a set may carry more).

    Raises:
        UserError: no such split, or the set is missing or damaged.
    """

    def __init__(self, directory: Path | str, split: str) -> None:
        if split not in SPLITS:
            raise UserError(f"split {split!r} is unknown; a shard set has {' and '.join(SPLITS)}")
        self.directory = Path(directory)
        self.split = split
        self.manifest = load_manifest(self.directory)
        described = self.manifest.splits[split]
        file = self.directory / split / INDEX_FILE
        if file_sha256(file) != described.index_sha256:
            raise UserError(
                f"{file} is damaged: its hash is not the manifest's; restore it or build the set again"
            )
        with np.load(file, allow_pickle=False) as archive:
            self.index: dict[str, np.ndarray] = {name: archive[name] for name in archive.files}
        self._maps: dict[int, mmap.mmap] = {}

    def __len__(self) -> int:
        return len(self.index["key"])

    @property
    def labels(self) -> np.ndarray:
        """int32 [N]: position in ``manifest.classes``, -1 where a sample has none."""
        return self.index["label"]

    def payload(self, place: int) -> bytes:
        """Return the encoded bytes of one sample.

        Raises:
            DataError: the shard is missing or shorter than the index says, or the bytes do not have their
                checksum.
        """
        row = {name: self.index[name][place] for name in ("shard", "offset", "size", "crc")}
        start, size = int(row["offset"]), int(row["size"])
        data = self._map(place)[start : start + size]
        if len(data) != size:
            raise self._broken(place, f"the shard ends before byte {start + size}")
        if zlib.crc32(data) != int(row["crc"]):
            raise self._broken(place, "the stored bytes do not have their checksum")
        return data

    def read(self, place: int) -> np.ndarray:
        """Return one sample: uint8 [C, Y, X], int16 [Z, Y, X] or uint16 ids [n].

        Raises:
            DataError: as ``payload``, or the bytes do not decode to a sample of the set's size.
        """
        data = self.payload(place)
        manifest = self.manifest
        try:
            if manifest.kind == "text":
                return decode_ids(data, manifest.shape[0])
            if manifest.kind == "volume":
                depth, height, width = manifest.shape
                return decode_volume(data, (depth, height, width))
            height, width = manifest.shape
            return decode_image(data, manifest.payload, (manifest.channels, height, width))
        except (ValueError, OSError, RuntimeError) as error:
            raise self._broken(place, f"it does not decode ({error})") from error

    def text(self, place: int) -> str:
        """Return the stored text beside a sample's ids ("" for images and volumes)."""
        if self.manifest.kind != "text":
            return ""
        import io
        import tarfile

        # A sample's members lie one behind the other, ids first: open the tar at this sample's first header.
        start = int(self.index["offset"][place]) - tarfile.BLOCKSIZE
        window = self._map(place)[start : start + (1 << 20)]
        name = self.index["key"][place].decode() + ".txt"
        with tarfile.open(fileobj=io.BytesIO(window), mode="r:") as tar:
            for member in tar:
                if member.name == name and (file := tar.extractfile(member)):
                    return file.read().decode("utf-8")
        raise self._broken(place, "its text is missing")

    def row(self, place: int) -> dict[str, Any]:
        """Return one sample's index row, as ``ShardSetWriter.add_encoded`` takes it."""
        return {name: column[place] for name, column in self.index.items()}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}  # a mapping belongs to its process: workers open their own

    def _map(self, place: int) -> mmap.mmap:
        number = int(self.index["shard"][place])
        if number not in self._maps:
            path = self._shard_path(place)
            try:
                with path.open("rb") as file:
                    self._maps[number] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except (OSError, ValueError) as error:  # ValueError: the file is empty
                raise self._broken(place, f"the shard cannot be opened ({error})") from error
        return self._maps[number]

    def _shard_path(self, place: int) -> Path:
        shards = self.manifest.splits[self.split].shards
        return self.directory / self.split / shards[int(self.index["shard"][place])].name

    def _broken(self, place: int, reason: str) -> DataError:
        return DataError(reason, source=self._shard_path(place), key=self.index["key"][place].decode())
