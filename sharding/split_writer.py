"""The tars and the index of one split.

A shard is written under a temporary name and renamed when it is whole and on the disk. Its rows of the index are
kept as columns from then on, so that a set of ten million samples fits in memory while it is written.
"""

import hashlib
import mmap
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from mnemos.sharding.codecs import span_checksum
from mnemos.sharding.durable import sync_file, sync_path
from mnemos.sharding.manifest import INDEX_FILE, Shard, Split, file_sha256
from mnemos.sharding.sample_index import COLUMNS

_BLOCK = 512  # tar's unit: a header is one block, data are padded to blocks


@dataclass(frozen=True, kw_only=True)
class FinishedShard:
    """A shard that is whole and on the disk, with its rows of the index, column by column."""

    shard: Shard
    columns: dict[str, np.ndarray]


class SplitWriter:
    """Write the shards of one split, then its index.

    Args:
        folder: of the split; it exists.
        shard_bytes: a shard is closed before it would grow beyond this size.
        finished: the shards an earlier, stopped run left in the folder; writing goes on behind them and whatever
            else lies there is removed.
        on_finish: told of every shard that is whole and on the disk.
    """

    def __init__(
        self,
        folder: Path,
        shard_bytes: int,
        finished: Sequence[FinishedShard] = (),
        on_finish: Callable[[FinishedShard], None] | None = None,
    ) -> None:
        self._folder = folder
        self._shard_bytes = shard_bytes
        self._finished = list(finished)
        self._on_finish = on_finish
        self._rows: list[dict[str, Any]] = []
        self._file: BinaryIO | None = None
        self._tar: Any = None
        whole = {Path(one.shard.name).name for one in finished}
        for path in folder.iterdir():
            if path.name not in whole:
                path.unlink()

    @property
    def samples(self) -> int:
        """Number of samples written so far."""
        return sum(one.shard.samples for one in self._finished) + len(self._rows)

    def add(self, members: dict[str, bytes], payload: str, row: dict[str, Any]) -> None:
        """Append one sample's members (extension -> bytes), one of them its payload, and its index row."""
        padded = {name: _BLOCK + -(-len(data) // _BLOCK) * _BLOCK for name, data in members.items()}
        if self._tar is not None and self._tar.tarstream.offset + sum(padded.values()) > self._shard_bytes:
            self._finish_shard()
        if self._tar is None:
            self._open_shard()
        # TarWriter writes the members of a sample in alphabetical order, each behind one header block.
        before = sum(padded[name] for name in padded if name < payload)
        start = self._tar.tarstream.offset
        self._tar.write({"__key__": row["key"].decode(), **members})
        place = {
            "shard": len(self._finished),
            "start": start,
            "span": self._tar.tarstream.offset - start,
            "offset": start + before + _BLOCK,
            "size": len(members[payload]),
        }
        self._rows.append({**row, **place})

    def finish(self) -> None:
        """Close the last shard."""
        if self._tar is not None:
            self._finish_shard()

    def close(self, classes: tuple[str, ...]) -> Split:
        """Close the last shard, write index.npz and describe the split."""
        self.finish()
        parts = [one.columns for one in self._finished] or [_columns([])]
        columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        file = self._folder / INDEX_FILE
        with file.open("wb") as out:
            # numpy stamps every member 1980-01-01: the bytes are reproducible
            np.savez(out, **cast(Any, columns))
            sync_file(out)
        counts = np.bincount(columns["label"] + 1, minlength=len(classes) + 1)
        return Split(
            samples=len(columns["key"]),
            groups=len(np.unique(columns["group"])),
            labels={name: int(counts[number + 1]) for number, name in enumerate(classes)},
            index_sha256=file_sha256(file),
            shards=tuple(one.shard for one in self._finished),
        )

    def abandon(self) -> None:
        """Let go of an open shard; it is worth nothing any more, so a full disk does not matter."""
        with suppress(OSError):
            if self._tar is not None:
                self._tar.close()
        with suppress(OSError):
            if self._file is not None:
                self._file.close()
        self._tar = self._file = None

    def _open_shard(self) -> None:
        from webdataset import TarWriter

        self._file = self._partial().open("wb")
        self._tar = TarWriter(self._file, user="", group="", mtime=0, encoder=False)

    def _partial(self) -> Path:
        return self._folder / f"{len(self._finished):06d}.tar.partial"

    def _finish_shard(self) -> None:
        assert self._file is not None, "a shard is open while it is being finished"
        self._tar.close()
        sync_file(self._file)
        self._file.close()
        self._tar = self._file = None
        partial, path = self._partial(), self._partial().with_suffix("")
        with (
            partial.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
            memoryview(mapped) as content,
        ):
            for row in self._rows:
                row["checksum"] = span_checksum(content[row["start"] : row["start"] + row["span"]])
            shard = Shard(
                name=f"{self._folder.name}/{path.name}",
                samples=len(self._rows),
                bytes=len(content),
                sha256=hashlib.sha256(content).hexdigest(),
            )
        partial.replace(path)
        sync_path(self._folder)
        finished = FinishedShard(shard=shard, columns=_columns(self._rows))
        if self._on_finish is not None:
            self._on_finish(finished)
        self._finished.append(finished)
        self._rows = []


def _columns(rows: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Turn rows into columns: the fixed ones with their types, then the extra ones of this set."""
    columns = {name: np.array([row[name] for row in rows], dtype=kind) for name, kind in COLUMNS.items()}
    extra = [name for name in (rows[0] if rows else {}) if name not in COLUMNS]
    return columns | {name: np.stack([np.asarray(row[name]) for row in rows]) for name in extra}
