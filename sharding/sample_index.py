"""The index of a split: where each sample lies, its checksum, class and group; trusted only after it was checked."""

import hashlib
import io
import math
import struct
import tokenize
import zipfile
from typing import Any

import numpy as np

from mnemos.sharding.errors import UserError
from mnemos.sharding.manifest import INDEX_FILE, Manifest, Split
from mnemos.sharding.stores.storage import Store

INDEX_BYTES = 8 << 30  # most that is read of it
COLUMNS: dict[str, Any] = {  # of an index; a set may carry more
    "key": "S16",
    "shard": np.int32,
    "start": np.int64,
    "span": np.int32,
    "checksum": np.uint64,
    "offset": np.int64,
    "size": np.int32,
    "label": np.int32,
    "group": "S16",
    "scale": np.float32,
    "shift": np.float32,
}
_UNREADABLE = (  # what zipfile and NumPy raise for a file that was made to confuse them
    *(ValueError, OSError, RuntimeError, LookupError, TypeError, EOFError, SyntaxError, MemoryError),
    *(struct.error, tokenize.TokenError, zipfile.BadZipFile),
)


def load_index(store: Store, manifest: Manifest, split: str) -> dict[str, np.ndarray]:
    """Read one split's index: column name -> array with a row for each sample.

    Raises:
        UserError: it is not the one the manifest knows, or names bytes outside its shards.
        StoreError: the store cannot be reached.
    """
    described, name = manifest.splits[split], f"{split}/{INDEX_FILE}"
    content = store.read_small(name, INDEX_BYTES)
    where = f"{store.root}/{name}"
    if hashlib.sha256(content).hexdigest() != described.index_sha256:
        raise UserError(
            f"{where} is damaged: its hash is not the manifest's; restore it or build the set again"
        )
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            for member in archive.infolist():
                _check_member(archive, member)
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            index = {column: arrays[column] for column in arrays.files}
        _check_index(index, described)
    except _UNREADABLE as error:
        raise UserError(f"{where} is damaged: {error}; restore it or build the set again") from error
    return index


def _check_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> None:
    """Raise ValueError unless a column takes the room it has: no more comes out of the file than is in it."""
    if member.compress_type != zipfile.ZIP_STORED:
        raise ValueError("it is compressed")
    with archive.open(member) as stream:
        version = np.lib.format.read_magic(stream)
        read = (
            np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        )
        shape, _, dtype = read(stream)
        declared = dtype.itemsize * math.prod(shape)
        if not dtype.hasobject and declared != member.file_size - stream.tell():
            raise ValueError(f"its column {member.filename} declares {declared} bytes and has others")


def _check_index(index: dict[str, np.ndarray], split: Split) -> None:
    """Raise ValueError (or KeyError) unless every row lies inside a shard of the split."""
    for name, kind in COLUMNS.items():
        if index[name].dtype != kind or index[name].ndim != 1:
            raise ValueError(f"its column {name} holds {index[name].dtype} {index[name].shape}")
        if index[name].dtype.kind == "S" and (np.ascontiguousarray(index[name]).view(np.uint8) > 127).any():
            raise ValueError(f"its column {name} holds more than ASCII")
    if {column.shape[:1] for column in index.values()} != {(split.samples,)}:
        raise ValueError(f"its columns do not have the {split.samples} rows of the manifest")
    columns = ("shard", "start", "span", "offset", "size")
    shard, start, span, offset, size = (index[name].astype(np.int64) for name in columns)
    if not split.samples:
        return
    if shard.min() < 0 or shard.max() >= len(split.shards):
        raise ValueError("a row names a shard that is not there")
    ends = np.array([described.bytes for described in split.shards])[shard]
    sound = (start >= 0) & (start + span <= ends) & (offset >= start) & (size >= 0)
    if not (sound & (offset + size <= start + span)).all():
        raise ValueError("a row names bytes outside its shard")
    if (np.bincount(shard, minlength=len(split.shards)) != [one.samples for one in split.shards]).any():
        raise ValueError("its rows are dealt to the shards otherwise than the manifest says")
