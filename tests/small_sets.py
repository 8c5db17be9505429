"""A shard set of every payload kind, of eight small samples each, and ways to damage one; a set takes milliseconds."""

import io
import json
import shutil
import tarfile
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from sample_files import KEY, grey_film

from mnemos.sharding.codecs import encode_image, span_checksum
from mnemos.sharding.manifest import SPLITS, file_sha256, load_manifest, write_manifest
from mnemos.sharding.modalities import MODALITIES, STORED_SIZES, StoredSize
from mnemos.sharding.reader import ShardSet
from mnemos.sharding.sample import Sample
from mnemos.sharding.tokenizer import train_tokenizer
from mnemos.sharding.upkeep.index_set import IndexOptions, index_set
from mnemos.sharding.writer import ShardSetWriter

SIZE = StoredSize(image=(16, 24), volume=(4, 8, 8), spacing_mm=(4.0, 3.0, 3.0), stride={}, text=48, vocab=400)
MODALITY_OF = {
    "jpg": "xray",
    "png": "pathology",
    "vol": "ct",
    "ids": "report",
    "npy": "mri",
    "txt": "report",
}
PAYLOADS = tuple(MODALITY_OF)
SAMPLES, VALIDATING = 8, (3, 7)


def text(number: int) -> str:
    return f"The heart is normal in size. Pneumothorax is absent, lungs are clear: case {number}."


def array(payload: str, number: int) -> Any:
    """Return what sample `number` of a set holds."""
    random = np.random.default_rng(number)
    modality = MODALITIES[MODALITY_OF[payload]]
    if modality.kind == "text":
        return text(number)
    if modality.kind == "volume":
        smooth = np.add.outer(np.arange(32) * 9, np.arange(8) * number).reshape(SIZE.volume)
        return (smooth + random.integers(-20, 20, SIZE.volume)).astype(np.int16)
    return np.stack([np.roll(grey_film(number, SIZE.image), c, axis=1) for c in range(modality.channels)])


def shape_of(payload: str) -> tuple[int, ...]:
    kind = MODALITIES[MODALITY_OF[payload]].kind
    return {"text": (SIZE.text,), "image": SIZE.image, "volume": SIZE.volume}[kind]


def write_small_set(
    folder: Path, payload: str, numbers: Iterable[int] = range(SAMPLES), **options: Any
) -> Path:
    """Write a set of samples with these numbers; two in a row share a group, 3 and 7 validate with theirs.

    The payloads "npy" and "txt" are those of a user's own tars: these are written and indexed.
    """
    if payload in ("npy", "txt"):
        write_own_tars(folder, payload, numbers)
        with small_preset():
            index_set(own_options(folder, MODALITY_OF[payload]))
        return folder
    modality, tokenizer_file = MODALITIES[MODALITY_OF[payload]], None
    if modality.kind == "text":
        tokenizer_file = folder.parent / "tokenizer.json"
        write_tokenizer(tokenizer_file)
    settings = {
        "modality": modality,
        "source": "synthetic",
        "shape": shape_of(payload),
        "spacing_mm": SIZE.spacing_mm if modality.kind == "volume" else None,
        "preset": "sample",
        "classes": ("a", "b"),
        "recipe": {"made": "by a test"},
        "key": KEY,
        "tokenizer_file": tokenizer_file,
        "shard_bytes": 6000,
        "lossless": payload == "png",
    }
    with ShardSetWriter(folder, **{**settings, **options}) as writer:
        for number in numbers:
            sample = Sample(
                array=array(payload, number),
                source=f"secret_{number}",
                group=f"patient_{number // 2}",
                label=("a", "b", "")[number % 3],
                scale=0.5 + number,
                shift=-float(number),
            )
            writer.add("val" if number // 2 in [n // 2 for n in VALIDATING] else "train", sample)
    return folder


def write_tokenizer(file: Path) -> Path:
    train_tokenizer([text(number) for number in range(12)], SIZE.vocab).save(str(file))
    return file


def small_preset() -> Any:
    """Let `preset="small"` mean the sizes of these sets, as a context."""
    return patch.dict(STORED_SIZES, small=SIZE)


def own_options(folder: Path, modality: str, **options: Any) -> IndexOptions:
    key_file = folder.parent / "key"
    key_file.write_bytes(KEY)
    return IndexOptions(
        **{"modality": modality, "directory": folder, "preset": "small", "key_file": key_file, **options}
    )


def own_payload(payload: str, number: int) -> bytes:
    """Return a sample as a user might have written it."""
    value = array(payload, number)
    if payload == "txt":
        return value.encode()
    if payload in ("jpg", "png"):
        return encode_image(value, payload)
    buffer = io.BytesIO()
    np.save(buffer, value)
    return buffer.getvalue()


def write_own_tars(folder: Path, payload: str, numbers: Iterable[int] = range(SAMPLES)) -> list[Path]:
    """Write two tars in different dialects, with members beside the payload that say more or nothing of it."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for turn, dialect in enumerate((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT)):
        paths.append(folder / f"own-{turn}.tar")
        with tarfile.open(paths[-1], "w", format=dialect) as tar:
            for number in [number for number in numbers if number % 2 == turn]:
                key = f"clinic/{'long' * 30}/secret_{number}"
                described = json.dumps({"group": f"patient_{number // 4}", "label": "ab"[number // 4 % 2]})
                add_member(tar, f"{key}.{payload}", own_payload(payload, number), mtime=1.5 + number)
                add_member(tar, f"{key}.json", described.encode())
                add_member(tar, f"{key}.note", b"nothing that is read")
    return paths


def add_member(tar: tarfile.TarFile, name: str, data: bytes, **fields: Any) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    for field, value in fields.items():
        setattr(member, field, value)
    tar.addfile(member, io.BytesIO(data))


def contents(folder: Path) -> dict[str, list[Any]]:
    """Return key -> [array, label, scale, shift] of every sample of a set."""
    found = {}
    for split in SPLITS:
        shards = ShardSet(folder, split)
        for place in range(len(shards)):
            row = shards.row(place)
            found[row["key"].decode()] = [shards.read(place), row["label"], row["scale"], row["shift"]]
    return found


def files(folder: Path) -> dict[str, bytes]:
    """Return path -> bytes of every file below a folder."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def copied(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    return to


def change_index(folder: Path, split: str, change: Callable[[dict[str, np.ndarray]], None]) -> None:
    """Change a split's index as one would who can compute every hash of a set."""
    columns = dict(ShardSet(folder, split).index)
    change(columns)
    np.savez(folder / split / "index.npz", **columns)
    seal(folder, split)


def change_shard(folder: Path, name: str, change: Callable[[bytearray], Any]) -> None:
    """Change a shard likewise, its samples' checksums included."""
    content = bytearray((folder / name).read_bytes())
    change(content)
    (folder / name).write_bytes(content)
    split = name.split("/")[0]
    with np.load(folder / split / "index.npz") as stored:
        columns = {column: stored[column] for column in stored.files}
    names = [shard.name for shard in load_manifest(folder).splits[split].shards]
    for place in np.flatnonzero(columns["shard"] == names.index(name)):
        start = int(columns["start"][place])
        columns["checksum"][place] = span_checksum(bytes(content[start : start + columns["span"][place]]))
    np.savez(folder / split / "index.npz", **columns)
    seal(folder, split)


def seal(folder: Path, split: str, **fields: Any) -> None:
    """Write the manifest anew: right hashes of a split's files, a right fingerprint; `fields` of the split."""
    manifest = load_manifest(folder)
    described = manifest.splits[split]
    shards = tuple(
        replace(shard, bytes=(folder / shard.name).stat().st_size, sha256=file_sha256(folder / shard.name))
        for shard in described.shards
    )
    changed = replace(
        described, index_sha256=file_sha256(folder / split / "index.npz"), shards=shards, **fields
    )
    manifest = replace(manifest, splits={**manifest.splits, split: changed})
    write_manifest(folder, replace(manifest, fingerprint=manifest.content_fingerprint()))
