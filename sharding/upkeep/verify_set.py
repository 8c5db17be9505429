"""What is wrong with a shard set: its manifest, indexes and tokenizer here, every shard by `check_shard`."""

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from mnemos.sharding.errors import DataError, UserError
from mnemos.sharding.in_processes import map_in_processes, num_workers
from mnemos.sharding.manifest import INDEX_FILE, MANIFEST_FILE, SPLITS, Manifest, read_manifest
from mnemos.sharding.reader import tokenizer_file
from mnemos.sharding.sample_index import COLUMNS, load_index
from mnemos.sharding.stores.storage import Store, StoreOptions, open_store
from mnemos.sharding.tokenizer import load_tokenizer
from mnemos.sharding.upkeep.check_shard import Fault, ShardChecker, ShardJob

Index = dict[str, np.ndarray]


@dataclass(kw_only=True)
class Verdict:
    """What a set was found to be.

    Attributes:
        manifest: None where it is damaged; nothing else can be judged then.
        faults: at most so many of one shard as were asked for; num_faults counts all.
        notes: what is no fault, such as files the manifest does not know.
        whole: number of samples that were read and are as they should be.
        unreached: shards that could not be had, in sentences.
    """

    manifest: Manifest | None = None
    faults: list[Fault] = field(default_factory=list)
    num_faults: int = 0
    notes: list[str] = field(default_factory=list)
    whole: int = 0
    unreached: list[str] = field(default_factory=list)

    @property
    def sound(self) -> bool:
        """Return whether all of the set was read and nothing is wrong."""
        return not self.num_faults and not self.unreached

    def add(self, file: str, what: str, key: str = "") -> None:
        """Count and keep a fault."""
        self.faults.append(Fault(file=file, what=what, key=key))
        self.num_faults += 1


def verify_set(root: Path | str, *, workers: int = 0, most: int = 100) -> Verdict:
    """Read a whole shard set.

    Args:
        root: its folder or URL; a remote one is fetched anew, whatever the cache holds.
        workers: reading processes; 0: one per core.
        most: faults to keep of one shard; all are counted.

    Raises:
        UserError: there is no shard set.
        StoreError: manifest, index or tokenizer cannot be had.
    """
    store, verdict = open_store(root), Verdict()
    try:
        verdict.manifest = manifest = read_manifest(store)
    except (UserError, DataError) as error:
        if not store.exists(MANIFEST_FILE):
            raise
        verdict.add(MANIFEST_FILE, str(error))
        return verdict
    indexes = {split: _read_index(store, manifest, split, verdict) for split in SPLITS}
    for split, index in indexes.items():
        if index is not None:
            _count_again(manifest, split, index, verdict)
    _compare_splits([index for index in indexes.values() if index is not None], verdict)
    texts = manifest.tokenizer is not None and _read_tokenizer(store, manifest, verdict)
    if store.local is not None:
        _name_unknown(store.local, manifest, verdict)
    jobs = list(_jobs(manifest, indexes))
    size_bytes = sum(job.shard.bytes for job in jobs)
    workers = num_workers(workers, len(jobs), size_bytes)
    with ExitStack() as stack:
        if store.local is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mnemos-verify-")))
            room = 2 * max(1, workers) * max((job.shard.bytes for job in jobs), default=1)
            store = open_store(root, StoreOptions(cache_dir=folder, cache_bytes=max(room, 1)))
        checker = ShardChecker(store=store, manifest=manifest, most=most, texts=texts)
        progress = stack.enter_context(
            tqdm(total=size_bytes, desc="verify", unit="B", unit_scale=True, disable=None)
        )
        for job, found in zip(jobs, map_in_processes(checker, jobs, workers), strict=True):
            verdict.faults += found.faults
            verdict.num_faults += found.num_faults
            verdict.whole += found.whole
            if found.unreached:
                verdict.unreached.append(found.unreached)
            progress.update(job.shard.bytes)
    return verdict


def _read_index(store: Store, manifest: Manifest, split: str, verdict: Verdict) -> Index | None:
    """Return a split's index, or None where it is damaged."""
    name = f"{split}/{INDEX_FILE}"
    try:
        if store.exists(name):
            return load_index(store, manifest, split)
        what = "the index is missing"
    except (UserError, DataError) as error:
        what = str(error)
    verdict.add(name, what)
    verdict.notes.append(f"the samples of {split} were not read one by one, for want of their index")
    return None


def _count_again(manifest: Manifest, split: str, index: Index, verdict: Verdict) -> None:
    """Compare an index with the manifest's counts; those of the shards are checked on loading."""
    name, described = f"{split}/{INDEX_FILE}", manifest.splits[split]
    groups, labels = len(np.unique(index["group"])), index["label"]
    if groups != described.groups:
        verdict.add(name, f"it has {groups} groups where the manifest counts {described.groups}")
    if len(labels) and (labels.min() < -1 or labels.max() >= len(manifest.classes)):
        verdict.add(name, f"a label is none of the {len(manifest.classes)} classes")
    for number, label in enumerate(manifest.classes):
        count, expected = int((labels == number).sum()), described.labels[label]
        if count != expected:
            verdict.add(name, f"it has {count} samples of {label} where the manifest counts {expected}")


def _compare_splits(indexes: list[Index], verdict: Verdict) -> None:
    """Look for keys that come twice and groups that both splits have."""
    none = np.zeros(0, COLUMNS["key"])
    for column, what in (("key", "a second sample of this key"), ("group", "both splits have this group")):
        parts = [index[column] for index in indexes]
        if column == "group":
            parts = [np.unique(part) for part in parts]
        values, counts = np.unique(np.concatenate([none, *parts]), return_counts=True)
        for value in values[counts > 1]:
            verdict.add(INDEX_FILE, what, value.decode())


def _read_tokenizer(store: Store, manifest: Manifest, verdict: Verdict) -> bool:
    """Return whether the tokenizer can be used."""
    described = manifest.tokenizer
    assert described is not None, "texts come with a tokenizer"
    try:
        if not store.exists(described.file):
            raise UserError("the tokenizer is missing")
        found = load_tokenizer(tokenizer_file(store, manifest)).get_vocab_size()
        if found != described.vocab_size:
            raise UserError(f"it has {found} ids where the manifest counts {described.vocab_size}")
    except (UserError, DataError) as error:
        verdict.add(described.file, str(error))
        verdict.notes.append("the texts were not compared with their ids, for want of their tokenizer")
        return False
    return True


def _name_unknown(folder: Path, manifest: Manifest, verdict: Verdict) -> None:
    """Note the files the manifest does not know: nobody reads or verifies them."""
    known = {MANIFEST_FILE, *(f"{split}/{INDEX_FILE}" for split in SPLITS)}
    known |= {shard.name for split in manifest.splits.values() for shard in split.shards}
    known |= {manifest.tokenizer.file} if manifest.tokenizer else set()
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if name not in known and not path.is_dir():
            verdict.notes.append(f"the manifest does not know {name}")


def _jobs(manifest: Manifest, indexes: dict[str, Index | None]) -> Iterator[ShardJob]:
    """Yield every tar once, with the rows of all samples in it: two splits may share one."""
    found: dict[str, list[Index | None]] = {}
    for split, index in indexes.items():
        order = None if index is None else np.argsort(index["shard"], kind="stable")
        begin = 0
        for shard in manifest.splits[split].shards:
            rows = None
            if index is not None and order is not None:
                mine, begin = order[begin : begin + shard.samples], begin + shard.samples
                rows = {column: index[column][mine] for column in COLUMNS}
            found.setdefault(shard.name, []).append(rows)
    shards = {shard.name: shard for split in manifest.splits.values() for shard in split.shards}
    for name, shard in shards.items():
        parts = [rows for rows in found[name] if rows is not None]
        joined = {
            column: np.concatenate([np.zeros(0, kind), *(rows[column] for rows in parts)])
            for column, kind in COLUMNS.items()
        }
        order = np.argsort(joined["start"], kind="stable")
        rows = {column: values[order] for column, values in joined.items()}
        yield ShardJob(shard=shard, rows=rows, complete=len(parts) == len(found[name]))
