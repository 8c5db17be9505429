"""Write a shard set: tars any WebDataset reader opens, an index per split, one manifest.

Everything goes into a hidden sibling folder that is renamed at the end: a set is there whole or not at all.
The same samples in the same order give the same bytes.
"""

import json
import os
import shutil
import zlib
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self, cast

import numpy as np

from mnemos.sharding.codecs import encode_ids, encode_image, encode_volume
from mnemos.sharding.errors import DataError, UserError
from mnemos.sharding.keys import hashed_name
from mnemos.sharding.manifest import (
    INDEX_FILE,
    SPLITS,
    Manifest,
    Shard,
    Split,
    TokenizerFile,
    file_sha256,
    write_manifest,
)
from mnemos.sharding.modalities import Modality
from mnemos.sharding.sample import Sample
from mnemos.sharding.tokenizer import load_tokenizer

TOKENIZER_FILE = "tokenizer.json"
_BLOCK = 512  # tar's unit: a header is one block, data are padded to blocks
COLUMNS: dict[str, Any] = {
    "key": "S16",
    "shard": np.int32,
    "offset": np.int64,
    "size": np.int32,
    "crc": np.uint32,
    "label": np.int32,
    "group": "S16",
    "scale": np.float32,
    "shift": np.float32,
}


def check_new_folder(directory: Path) -> None:
    """Raise UserError unless the folder is absent or empty and can be made."""
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(
            f"--out {directory} exists and is not empty; a new or empty folder is needed: "
            "name another one, or move this one away first"
        )


class ShardSetWriter:
    """Write one shard set; use as a context manager.

    Args:
        directory: where the set will appear; absent or empty.
        modality: its record; ``kind`` decides the payload.
        shape: stored size, as in the manifest.
        spacing_mm: (Z, Y, X) millimetres a voxel; None for images and texts.
        preset: name of the size preset.
        classes: every class name a sample's label may have.
        recipe: preprocessing steps, a readable sentence each.
        tokenizer_file: a stored tokenizer, texts only; copied into the set.
        key: secret bytes for the keyed hashes of sources and groups.
        shard_bytes: a shard is closed before it would grow beyond this size.
        lossless: store images as PNG instead of JPEG.

    Raises:
        UserError: the folder is not empty or cannot be made.
    """

    def __init__(
        self,
        directory: Path | str,
        *,
        modality: Modality,
        shape: tuple[int, ...],
        spacing_mm: tuple[float, ...] | None,
        preset: str,
        classes: tuple[str, ...],
        recipe: dict[str, str],
        key: bytes,
        tokenizer_file: Path | None = None,
        shard_bytes: int = 64 << 20,
        lossless: bool = False,
    ) -> None:
        if (modality.kind == "text") != (tokenizer_file is not None):
            raise ValueError(
                f"a tokenizer belongs to texts only; modality {modality.name} has {tokenizer_file}"
            )
        self.directory = Path(directory)
        check_new_folder(self.directory)
        self.partial = self.directory.parent / f".{self.directory.name}.partial-{os.getpid()}"
        self.skipped: dict[str, int] = {}
        self._key = key
        self._seen: set[bytes] = set()
        self._splits = {name: _SplitWriter(self.partial / name, shard_bytes) for name in SPLITS}
        payload = {"text": "ids", "image": "png" if lossless else "jpg", "volume": "vol"}[modality.kind]
        self._manifest = Manifest(
            modality=modality,
            payload=payload,
            shape=tuple(shape),
            spacing_mm=spacing_mm,
            classes=tuple(classes),
            preset=preset,
            recipe=recipe,
            splits={},
            version=version("mnemos"),
        )
        self._labels = {name: number for number, name in enumerate(classes)}
        try:
            for name in SPLITS:
                (self.partial / name).mkdir(parents=True)
            if tokenizer_file is not None:
                self._tokenizer = load_tokenizer(tokenizer_file)
                target = self.partial / TOKENIZER_FILE
                shutil.copyfile(tokenizer_file, target)
                record = TokenizerFile(
                    file=TOKENIZER_FILE,
                    sha256=file_sha256(target),
                    vocab_size=self._tokenizer.get_vocab_size(),
                )
                self._manifest = replace(self._manifest, tokenizer=record)
        except OSError as error:
            self._discard()
            raise UserError(
                f"--out {self.directory} cannot be made ({error.strerror}); name another one"
            ) from error
        except UserError:
            self._discard()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._discard()

    def add(self, split: str, sample: Sample, **extra: Any) -> None:
        """Encode and append one sample.

        Args:
            split: "train" or "val".
            sample: texts are tokenised here; ids beyond the stored size are cut.
            extra: further index columns; the same names for every sample of a set.

        Raises:
            DataError: the sample cannot be stored (wrong size or type, empty text, a second one of the same
                name).
        """
        manifest, text = self._manifest, ""
        try:
            if isinstance(sample.array, str):
                text = sample.array
                payload = encode_ids(np.array(self._encode_text(text)))
            else:
                payload = self._encode_array(sample.array)
        except ValueError as error:
            raise DataError(str(error), source=sample.source) from error
        if sample.label and sample.label not in self._labels:
            raise DataError(
                f"label {sample.label!r} is not among the classes {manifest.classes}", source=sample.source
            )
        row = {
            "key": hashed_name(self._key, sample.source).encode(),
            "group": hashed_name(self._key, sample.group or sample.source).encode(),
            "label": self._labels.get(sample.label, -1),
            "scale": sample.scale,
            "shift": sample.shift,
        }
        self.add_encoded(split, payload, text, row, **extra)

    def add_encoded(self, split: str, payload: bytes, text: str, row: dict[str, Any], **extra: Any) -> None:
        """Append a sample whose payload is encoded already, as a buffer does with samples of an earlier set.

        Args:
            split: "train" or "val".
            payload: encoded bytes of this set's payload kind.
            text: the text itself, stored beside the ids; "" for images and volumes.
            row: index values ``key``, ``group`` (already hashed, bytes), ``label``, ``scale``, ``shift``;
                others are ignored, so a row of another set's index can be given as it is.
            extra: further index columns.
        """
        key = bytes(row["key"])
        if key in self._seen:
            raise DataError("a second sample of the same name", key=key.decode())
        self._seen.add(key)
        manifest = self._manifest
        label = int(row["label"])
        described = {
            "label": manifest.classes[label] if label >= 0 else "",
            "group": bytes(row["group"]).decode(),
            "shape": list(manifest.shape),
            "spacing_mm": manifest.spacing_mm,
            "scale": float(row["scale"]),
            "shift": float(row["shift"]),
        }
        members = {manifest.payload: payload, "json": json.dumps(described).encode()}
        if text:
            members["txt"] = text.encode("utf-8")
        kept = {name: row[name] for name in ("key", "group", "label", "scale", "shift")}
        self._splits[split].add(members, manifest.payload, {**kept, **extra})

    def close(self) -> Manifest:
        """Finish the set, let it appear, and return its manifest; a second call only returns it."""
        if self._manifest.fingerprint:
            return self._manifest
        try:
            splits = {name: writer.close() for name, writer in self._splits.items()}
            manifest = replace(self._manifest, splits=splits, skipped=dict(sorted(self.skipped.items())))
            manifest = replace(manifest, fingerprint=manifest.content_fingerprint())
            write_manifest(self.partial, manifest)
            check_new_folder(self.directory)  # nobody else finished there meanwhile
            self.partial.replace(self.directory)
        except BaseException:
            self._discard()
            raise
        self._manifest = manifest
        return manifest

    def _encode_text(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text).ids[: self._manifest.shape[0]]
        if not ids:
            raise ValueError("the text is empty")
        return ids

    def _encode_array(self, array: np.ndarray) -> bytes:
        manifest = self._manifest
        image = manifest.kind == "image"
        shape = (manifest.channels, *manifest.shape) if image else manifest.shape
        if array.shape != shape:
            raise ValueError(f"a sample of shape {array.shape} in a set of {shape}")
        return encode_image(array, manifest.payload) if image else encode_volume(array)

    def _discard(self) -> None:
        for writer in self._splits.values():
            writer.abandon()
        shutil.rmtree(self.partial, ignore_errors=True)


class _SplitWriter:
    """The tars and the index of one split."""

    def __init__(self, folder: Path, shard_bytes: int) -> None:
        self._folder = folder
        self._shard_bytes = shard_bytes
        self._rows: list[dict[str, Any]] = []
        self._shards: list[Shard] = []
        self._file: BinaryIO | None = None
        self._tar: Any = None
        self._samples = 0

    def add(self, members: dict[str, bytes], payload: str, row: dict[str, Any]) -> None:
        """Append one sample's members (extension -> bytes) and its index row."""
        sizes = {
            name: len(data.encode() if isinstance(data, str) else data) for name, data in members.items()
        }
        padded = {name: _BLOCK + -(-size // _BLOCK) * _BLOCK for name, size in sizes.items()}
        if self._tar is not None and self._tar.tarstream.offset + sum(padded.values()) > self._shard_bytes:
            self._finish_shard()
        if self._tar is None:
            self._open_shard()
        # TarWriter writes the members of a sample in alphabetical order, each behind one header block.
        before = sum(padded[name] for name in padded if name < payload)
        offset = self._tar.tarstream.offset + before + _BLOCK
        self._tar.write({"__key__": row["key"].decode(), **members})
        place = {"shard": len(self._shards), "offset": offset, "size": len(members[payload])}
        self._rows.append({**row, **place, "crc": zlib.crc32(members[payload])})
        self._samples += 1

    def close(self) -> Split:
        """Close the last shard, write index.npz and describe the split."""
        if self._tar is not None:
            self._finish_shard()
        extra = [name for name in (self._rows[0] if self._rows else {}) if name not in COLUMNS]
        columns = {
            name: np.array([row[name] for row in self._rows], dtype=kind) for name, kind in COLUMNS.items()
        }
        for name in extra:
            columns[name] = np.stack([np.asarray(row[name]) for row in self._rows])
        file = self._folder / INDEX_FILE
        np.savez(
            file, **cast(Any, columns)
        )  # numpy stamps every member 1980-01-01: the bytes are reproducible
        return Split(
            samples=len(self._rows),
            groups=len(np.unique(columns["group"])),
            index_sha256=file_sha256(file),
            shards=tuple(self._shards),
        )

    def abandon(self) -> None:
        """Let go of an open shard; it is about to be removed, so a full disk does not matter any more."""
        with suppress(OSError):
            if self._tar is not None:
                self._tar.close()
        with suppress(OSError):
            if self._file is not None:
                self._file.close()
        self._tar = self._file = None

    def _open_shard(self) -> None:
        from webdataset import TarWriter

        self._file = (self._folder / f"{len(self._shards):06d}.tar").open("wb")
        self._tar = TarWriter(self._file, user="", group="", mtime=0, encoder=False)
        self._samples = 0

    def _finish_shard(self) -> None:
        assert self._file is not None, "a shard is open while it is being finished"
        self._tar.close()
        self._file.close()
        self._tar = self._file = None
        path = self._folder / f"{len(self._shards):06d}.tar"
        size = path.stat().st_size
        self._shards.append(
            Shard(name=path.name, samples=self._samples, bytes=size, sha256=file_sha256(path))
        )
