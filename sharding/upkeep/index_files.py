"""Write what makes a shard set of a user's own tars: the manifest and the indexes, beside them."""

import os
import shutil
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np

from mnemos.sharding.building.scrubbing import scrub_texts
from mnemos.sharding.durable import sync_path, write_durably
from mnemos.sharding.errors import UserError
from mnemos.sharding.keys import hashed_name
from mnemos.sharding.manifest import (
    IN_PLACE,
    INDEX_FILE,
    MANIFEST_FILE,
    SPLITS,
    Manifest,
    Shard,
    TokenizerFile,
    file_sha256,
    load_manifest,
    write_manifest,
)
from mnemos.sharding.modalities import StoredSize
from mnemos.sharding.sample_index import COLUMNS
from mnemos.sharding.split_writer import FinishedShard, SplitWriter
from mnemos.sharding.tokenizer import load_tokenizer, train_tokenizer
from mnemos.sharding.upkeep.index_tar import TarScan, TarScanner, open_tar
from mnemos.sharding.writer import TOKENIZER_FILE


def write_index(
    folder: Path,
    scans: list[TarScan],
    scanner: TarScanner,
    *,
    preset: str,
    size: StoredSize,
    key: bytes,
    tokenizer_file: Path | None,
) -> Manifest:
    """Write manifest.json, the index.npz of both splits and, for texts, tokenizer.json into a folder of tars.

    Everything is written into a hidden folder below and moved into place, the manifest last: it makes a set of it.

    Args:
        folder: of the tars.
        scans: every tar, each sample with its split.
        scanner: what the tars were read with.
        preset, size: what was asked for, and its sizes.
        key: secret bytes for the keyed hashes of keys and groups.
        tokenizer_file: of texts; None to train one on the training texts.

    Returns:
        The manifest.

    Raises:
        UserError: the folder cannot be written to; nothing is left behind.
    """
    partial = folder / f".index.partial-{os.getpid()}"
    classes = _classes(scans)
    moved, made = list[Path](), list[Path]()
    try:
        described = {}
        for split in SPLITS:
            (partial / split).mkdir(parents=True)
            holding = [scan for scan in scans if split in scan.splits]
            shards = [
                _shard(folder, scan, split, number, classes, key) for number, scan in enumerate(holding)
            ]
            described[split] = SplitWriter(partial / split, 0, shards).close(classes)
        unfit = sum(scan.unfit for scan in scans)
        manifest = Manifest(
            modality=scanner.modality,
            payload=scanner.payload,
            shape=scanner.shape,
            spacing_mm=size.spacing_mm if scanner.modality.kind == "volume" else None,
            classes=classes,
            preset=preset,
            source=IN_PLACE,
            recipe=_recipe(scanner),
            splits=described,
            skipped={"sample that does not fit": unfit} if unfit else {},
            tokenizer=_put_tokenizer(partial, scanner, size, scans, tokenizer_file),
            version=version("mnemos"),
        )
        write_manifest(partial, replace(manifest, fingerprint=manifest.content_fingerprint()))
        names = [f"{split}/{INDEX_FILE}" for split in SPLITS] + [TOKENIZER_FILE] * bool(manifest.tokenizer)
        for name in (*names, MANIFEST_FILE):
            path = folder / name
            if not path.parent.exists():
                path.parent.mkdir()
                made.append(path.parent)
            (partial / name).replace(path)
            moved.append(path)
            sync_path(path.parent)
    except BaseException as error:
        for path in moved:
            path.unlink(missing_ok=True)
        for path in made:
            with suppress(OSError):
                path.rmdir()
        if isinstance(error, OSError):
            why = error.strerror or error
            raise UserError(f"{folder} cannot be written to ({why}); permit it, or free space") from error
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return load_manifest(folder)


def _shard(
    folder: Path, scan: TarScan, split: str, number: int, classes: tuple[str, ...], key: bytes
) -> FinishedShard:
    """Return a tar as a split's shard of this number: the samples of that split, column by column."""
    samples = [one for one, its in zip(scan.samples, scan.splits, strict=True) if its == split]
    labels = {name: place for place, name in enumerate(classes)}
    values = {
        "key": [hashed_name(key, sample.key) for sample in samples],
        "group": [hashed_name(key, sample.group or sample.key) for sample in samples],
        "label": [labels.get(sample.label, -1) for sample in samples],
        "shard": [number] * len(samples),
    }
    columns = {
        name: np.array(
            values[name] if name in values else [getattr(one, name) for one in samples], dtype=kind
        )
        for name, kind in COLUMNS.items()
    }
    name = scan.path.relative_to(folder).as_posix()
    shard = Shard(name=name, samples=len(samples), bytes=scan.bytes, sha256=scan.sha256)
    return FinishedShard(shard=shard, columns=columns)


def _put_tokenizer(
    partial: Path, scanner: TarScanner, size: StoredSize, scans: list[TarScan], given: Path | None
) -> TokenizerFile | None:
    """Store the given tokenizer of texts, or train one on the training texts, identifiers taken out.

    The texts stay as they are in the user's tars; the vocabulary travels with every encoder, so it learns no names.
    """
    if scanner.modality.kind != "text":
        return None
    target = partial / TOKENIZER_FILE
    if given is not None:
        write_durably(target, given.read_bytes())
    else:
        texts = []  # with their groups
        for scan in scans:
            tar = open_tar(scan.path)
            for sample, split in zip(scan.samples, scan.splits, strict=True):
                if split == SPLITS[0]:
                    text = bytes(tar[sample.offset : sample.offset + sample.size]).decode("utf-8")
                    texts.append((text, sample.group or sample.key))
        tokenizer = train_tokenizer(sorted(scrub_texts(texts).texts), size.vocab)
        write_durably(target, tokenizer.to_str(pretty=True).encode())
    vocab_size = load_tokenizer(target).get_vocab_size()
    return TokenizerFile(file=TOKENIZER_FILE, sha256=file_sha256(target), vocab_size=vocab_size)


def _recipe(scanner: TarScanner) -> dict[str, str]:
    steps = {"made": "elsewhere: the tars are the user's own, found and indexed as they were"}
    if scanner.payload == "txt":
        steps["tokens"] = f"tokenised on reading; the first {scanner.shape[0]} ids are used"
    if scanner.modality.values == "zscore":
        steps["values"] = (
            "scale and shift as the sample's .json says, else those that make z-scores of the sample"
        )
    return steps


def _classes(scans: list[TarScan]) -> tuple[str, ...]:
    """Return the class names in order, those that are numbers as numbers and before the others."""
    names = {sample.label for scan in scans for sample in scan.samples} - {""}

    def order(name: str) -> tuple[bool, int, str]:
        number = name.isascii() and name.isdigit()
        return not number, int(name) if number else 0, name

    return tuple(sorted(names, key=order))
