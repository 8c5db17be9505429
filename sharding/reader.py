"""Read a shard set by its index: memory-mapped, checked sample by sample, in any order.

Tar headers are never scanned: one flipped header bit makes a scanning reader lose the rest of a shard without
a word. Here a sample is a span of bytes with a checksum over all of it, headers and padding included.

Shape suffixes: N samples of the set, B samples of a batch, C channels.
"""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mnemos.sharding.codecs import BROKEN, DECODERS, decode_ids, decode_text, span_checksum
from mnemos.sharding.errors import DataError, UserError
from mnemos.sharding.manifest import SPLITS, Manifest, Shard, load_manifest
from mnemos.sharding.sample_index import load_index
from mnemos.sharding.stores.storage import Store, StoreOptions, default_cache_dir, open_store
from mnemos.sharding.tar_members import walk_tar

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MOST_VIEWS = 64  # shards from afar that stay mapped
TOKENIZER_BYTES = 64 << 20
TEXT_BYTES = 1 << 20
MOST_IN_A_ROW = 100  # broken samples one behind the other: then it is the set that is broken


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """A sample that could not be read: its number in the set and why, with shard and key."""

    place: int
    reason: str


class ShardSet:
    """One split of a shard set.

    Args:
        directory: the set's folder, or its URL in an object store.
        split: "train" or "val".
        options: of the store; None for the defaults.

    Attributes:
        manifest: of the whole set.
        index: column name -> array with one row per sample (see ``writer.COLUMNS``; a set may carry more).

    Raises:
        UserError: no such split, or the set is missing or damaged.
        StoreError: the store cannot be reached.
    """

    def __init__(self, directory: Path | str, split: str, options: StoreOptions | None = None) -> None:
        if split not in SPLITS:
            raise UserError(f"split {split!r} is unknown; a shard set has {' and '.join(SPLITS)}")
        self.split = split
        self.store = open_store(directory, options or StoreOptions())
        self.manifest = load_manifest(self.store)
        self.index = load_index(self.store, self.manifest, split)
        self._views: dict[int, memoryview] = {}
        self._tokenizer: Tokenizer | None = None

    def __len__(self) -> int:
        return len(self.index["key"])

    @property
    def labels(self) -> np.ndarray:
        """int32 [N]: position in ``manifest.classes``, -1 where a sample has none."""
        return self.index["label"]

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Return the shape a sample is decoded to: (Y, X, C), or (Z, Y, X); texts: (most ids,)."""
        manifest = self.manifest
        return (*manifest.shape, manifest.channels) if manifest.kind == "image" else manifest.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """Return the type of stored values."""
        return np.dtype({"image": np.uint8, "volume": np.int16, "text": np.uint16}[self.manifest.kind])

    def payload(self, place: int) -> bytes:
        """Return the encoded bytes of one sample.

        Raises:
            DataError: the shard is shorter than the index says, or the sample's bytes do not have their checksum.
            StoreError: the shard cannot be had.
        """
        return bytes(self._payload(place))

    def read(self, place: int) -> np.ndarray:
        """Return one sample: uint8 [C, Y, X], int16 [Z, Y, X] or uint16 ids [n].

        Raises:
            DataError: as ``payload``, or the bytes do not decode to a sample of the set's size.
        """
        if self.manifest.kind == "text":
            return self._ids(place)
        out = np.empty(self.stored_shape, self.dtype)
        self._decode(place, out)
        return np.ascontiguousarray(out.transpose(2, 0, 1)) if self.manifest.kind == "image" else out

    def read_into(
        self, places: Sequence[int] | np.ndarray, out: np.ndarray | list[np.ndarray]
    ) -> tuple[np.ndarray, list[Skipped]]:
        """Decode samples where they are wanted; a broken one is skipped and its follower in the set stands in.

        Args:
            places: numbers of the samples.
            out: images uint8 [B, Y, X, C], volumes int16 [B, Z, Y, X], or an empty list that gets the texts' ids.

        Returns:
            The numbers of the samples that were read, int64 [B], and what was skipped.

        Raises:
            DataError: a hundred samples in a row are broken.
            StoreError: a shard cannot be had.
        """
        taken, skipped = np.array(places, dtype=np.int64), list[Skipped]()
        for row in range(len(taken)):
            for _ in range(min(MOST_IN_A_ROW, len(self))):
                place = int(taken[row])
                try:
                    if isinstance(out, list):
                        out.append(self._ids(place))
                    else:
                        self._decode(place, out[row])
                    break
                except DataError as error:
                    skipped.append(Skipped(place=place, reason=str(error)))
                    taken[row] = (place + 1) % len(self)
            else:
                raise DataError(
                    f"{len(skipped)} broken samples in a row, the last: {skipped[-1].reason}",
                    source=f"{self.store.root}/{self.split}",
                )
        return taken, skipped

    def text(self, place: int) -> str:
        """Return the stored text of a sample ("" for images and volumes)."""
        if self.manifest.kind != "text":
            return ""
        span = self._span(place)
        try:
            for member in walk_tar(span, 0, len(span)):
                if member.extension == "txt":  # a user's own tars have names of their own
                    return bytes(span[member.offset : member.offset + member.size]).decode("utf-8")
        except ValueError as error:  # a damaged header, or no UTF-8
            raise self._broken(place, f"its text cannot be read ({error})") from error
        raise self._broken(place, "its text is missing")

    def row(self, place: int) -> dict[str, Any]:
        """Return one sample's index row, as ``ShardSetWriter.add_encoded`` takes it."""
        return {name: column[place] for name, column in self.index.items()}

    def tokenizer_file(self) -> Path:
        """Return the tokenizer's file, as `tokenizer_file`."""
        return tokenizer_file(self.store, self.manifest)

    def fetch(self, places: np.ndarray) -> None:
        """Begin to fetch the shards of samples that will be read soon; nothing to do for local files."""
        if self.store.local is None:
            shards = self.manifest.splits[self.split].shards
            wanted = [shards[number] for number in np.unique(self.index["shard"][places])]
            self.store.prefetch([(shard.name, shard.bytes, shard.sha256) for shard in wanted])

    def address(self, place: int) -> str:
        """Return where a sample lies, for messages: shard and key."""
        return str(self._broken(place, "")).removesuffix(": ")

    def __getstate__(self) -> dict[str, Any]:
        # a mapping belongs to its process: workers open their own
        return {**self.__dict__, "_views": {}, "_tokenizer": None}

    def _span(self, place: int) -> memoryview:
        index = self.index
        shard, start, span = int(index["shard"][place]), int(index["start"][place]), int(index["span"][place])
        view = self._views.get(shard)
        if view is None:
            if self.store.local is None and len(self._views) >= MOST_VIEWS:
                del self._views[
                    next(iter(self._views))
                ]  # a copy that the cache has removed keeps its disk until then
            view = self._views[shard] = self._view(self.manifest.splits[self.split].shards[shard])
        found = view[start : start + span]
        if len(found) != span:
            raise self._broken(place, f"the shard ends before byte {start + span}")
        if span_checksum(found) != int(index["checksum"][place]):
            raise self._broken(place, "the stored bytes do not have their checksum")
        return found

    def _view(self, shard: Shard) -> memoryview:
        try:
            return self.store.view(shard.name, shard.bytes, shard.sha256)
        except (
            DataError
        ):  # it is damaged where it lies, not on its way: most of its samples may still be sound
            return self.store.view(shard.name, shard.bytes)

    def _payload(self, place: int) -> memoryview:
        offset = int(self.index["offset"][place]) - int(self.index["start"][place])
        return self._span(place)[offset : offset + int(self.index["size"][place])]

    def _decode(self, place: int, out: np.ndarray) -> None:
        data = self._payload(place)
        try:
            DECODERS[self.manifest.payload](data, out)
        except BROKEN as error:
            raise self._broken(place, f"it does not decode ({error})") from error

    def _ids(self, place: int) -> np.ndarray:
        data, most = self._payload(place), self.manifest.shape[0]
        if len(data) > TEXT_BYTES:
            raise self._broken(place, f"a text of {len(data)} bytes; at most {TEXT_BYTES} are read")
        # before the attempt: a damaged tokenizer is the set's fault, not the sample's
        tokenizer = None if self.manifest.payload == "ids" else self._load_tokenizer()
        try:
            return decode_ids(data, most) if tokenizer is None else decode_text(data, most, tokenizer)
        except BROKEN as error:
            raise self._broken(place, f"it does not decode ({error})") from error

    def _load_tokenizer(self) -> "Tokenizer":
        from mnemos.sharding.tokenizer import load_tokenizer

        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.tokenizer_file())
        return self._tokenizer

    def _broken(self, place: int, reason: str) -> DataError:
        shards = self.manifest.splits[self.split].shards
        name = shards[int(self.index["shard"][place])].name
        return DataError(reason, source=f"{self.store.root}/{name}", key=self.index["key"][place].decode())


def tokenizer_file(store: Store, manifest: Manifest) -> Path:
    """Return the file of a text set's tokenizer; of a remote set, a copy in the cache.

    Raises:
        UserError: it is not the one the manifest knows.
        StoreError: the store cannot be reached.
    """
    assert manifest.tokenizer is not None, "texts come with a tokenizer"
    name, sha256 = manifest.tokenizer.file, manifest.tokenizer.sha256
    content = store.read_small(name, TOKENIZER_BYTES)
    if hashlib.sha256(content).hexdigest() != sha256:
        raise UserError(
            f"{store.root}/{name} is damaged: its hash is not the manifest's; restore it or build the set again"
        )
    if store.local is not None:
        return store.local / name
    copy = (store.options.cache_dir or default_cache_dir()) / f"tokenizer-{sha256}.json"
    if not copy.exists():
        copy.parent.mkdir(parents=True, exist_ok=True)
        partial = copy.with_suffix(f".partial-{os.getpid()}")
        partial.write_bytes(content)
        partial.replace(copy)
    return copy
