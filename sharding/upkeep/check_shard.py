"""Everything that can be wrong with one shard, found by reading all of it."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from mnemos.sharding.codecs import BROKEN, DECODERS, decode_ids, decode_text, span_checksum
from mnemos.sharding.descriptions import describe, payload_members
from mnemos.sharding.errors import StoreError
from mnemos.sharding.manifest import IN_PLACE, Manifest, Shard
from mnemos.sharding.reader import TEXT_BYTES, tokenizer_file
from mnemos.sharding.stores.storage import Store
from mnemos.sharding.tar_members import Member, Sample, TarFault, group_members, walk_tar

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """One thing that is wrong: in which file, of which sample, at which byte (-1: of the whole file)."""

    file: str
    what: str
    key: str = ""
    byte: int = -1

    def __str__(self) -> str:
        place = f"{self.file}:{self.key}" if self.key else self.file
        return f"{place}: {f'byte {self.byte}: ' if self.byte >= 0 else ''}{self.what}"


@dataclass(frozen=True, kw_only=True)
class ShardJob:
    """One shard to read, with its samples' rows of the index in the order they lie in.

    `complete` says that the rows are all: what lies between them then belongs to no sample.
    """

    shard: Shard
    rows: dict[str, np.ndarray]
    complete: bool


@dataclass(kw_only=True)
class Findings:
    """What was found in one shard: the first `most` faults, the number of all, and how many samples are whole.

    `unreached` says why the shard could not be had, if so.
    """

    most: int
    faults: list[Fault] = field(default_factory=list)
    num_faults: int = 0
    whole: int = 0
    unreached: str = ""

    def add(self, fault: Fault) -> None:
        """Count a fault, and keep it where it is among the first."""
        self.num_faults += 1
        if len(self.faults) < self.most:
            self.faults.append(fault)


@dataclass(frozen=True, kw_only=True)
class ShardChecker:
    """Reads shards of one set; picklable, for other processes.

    Args:
        store, manifest: of the set.
        most: faults to keep of a shard.
        texts: whether the set's tokenizer can be used.
    """

    store: Store
    manifest: Manifest
    most: int
    texts: bool

    def __call__(self, job: ShardJob) -> Findings:
        """Read one shard, all of its bytes and every sample, and tell what is wrong."""
        found, name = Findings(most=self.most), job.shard.name
        try:
            if not self.store.exists(name):
                found.add(Fault(file=name, what="the shard is missing"))
                return found
            tar = memoryview(self.store.view(name, job.shard.bytes))
        except StoreError as error:
            found.unreached = str(error)
            return found
        if len(tar) != job.shard.bytes:
            what = f"the shard has {len(tar)} bytes instead of {job.shard.bytes}"
            found.add(Fault(file=name, what=what))
        if hashlib.sha256(tar).hexdigest() != job.shard.sha256:
            found.add(Fault(file=name, what="its SHA-256 is not the manifest's"))
        self._check_samples(job, tar, found)
        return found

    @cached_property
    def _tokenizer(self) -> "Tokenizer":
        from mnemos.sharding.tokenizer import load_tokenizer

        return load_tokenizer(tokenizer_file(self.store, self.manifest))

    @cached_property
    def _out(self) -> np.ndarray:
        manifest = self.manifest
        if manifest.kind == "image":
            return np.empty((*manifest.shape, manifest.channels), np.uint8)
        return np.empty(manifest.shape, np.int16)

    def _check_samples(self, job: ShardJob, tar: memoryview, found: Findings) -> None:
        """Go from sample to sample, and over what lies between them."""
        name, at = job.shard.name, 0
        columns = {name: column.tolist() for name, column in job.rows.items()}
        for values in zip(*columns.values(), strict=True):
            row = dict(zip(columns, values, strict=True))
            key, start, end = row["key"].decode(), row["start"], row["start"] + row["span"]
            if start < at:
                found.add(Fault(file=name, key=key, byte=start, what="its bytes are another sample's, too"))
            elif job.complete:
                self._check_between(name, tar, at, start, found)
            faults = [
                Fault(file=name, key=key, byte=byte, what=what) for byte, what in self._sample(tar, row)
            ]
            for fault in faults:
                found.add(fault)
            found.whole += not faults
            at = max(at, end)
        if job.complete:
            self._check_between(name, tar, at, None, found)

    def _check_between(
        self, name: str, tar: memoryview, start: int, end: int | None, found: Findings
    ) -> None:
        """Check what belongs to no sample: nothing in a shard of ours, sound members in a user's own tar."""
        if start == end:
            return
        try:
            others = list(walk_tar(tar, start, end))
        except TarFault as fault:
            found.add(Fault(file=name, byte=fault.byte, what=fault.reason))
            return
        if others and self.manifest.source != IN_PLACE:
            what = f"the index does not know {len(others)} members, the first {others[0].name!r}"
            found.add(Fault(file=name, byte=start, what=what))

    def _sample(self, tar: memoryview, row: Mapping[str, Any]) -> list[tuple[int, str]]:
        """Return (byte, what) of everything that is wrong with one sample."""
        start, end = row["start"], row["start"] + row["span"]
        if end > len(tar):
            return [(len(tar), f"the shard ends before the sample's last byte, {end}")]
        faults = list(self._faults(tar, row))
        if span_checksum(tar[start:end]) != row["checksum"]:
            # What else is wrong follows from it, and tells where.
            byte, why = faults[0] if faults else (start, "")
            return [(byte, "the stored bytes do not have their checksum" + (f" ({why})" if why else ""))]
        return faults

    def _faults(self, tar: memoryview, row: Mapping[str, Any]) -> Iterator[tuple[int, str]]:
        """Check a sample as a part of a tar, then as what the index says of it, then as the reader decodes it."""
        start, loose, sample = row["start"], list[Member](), None
        try:
            samples = list(group_members(walk_tar(tar, start, start + row["span"]), loose))
        except TarFault as fault:
            yield fault.byte, fault.reason + (f" in {fault.member!r}" if fault.member else "")
        else:
            if len(samples) == 1:
                sample = samples[0]
                yield from self._member_faults(sample, loose, row)
                yield from self._description_faults(tar, sample, row)
            else:
                yield start, f"the members of {len(samples)} samples lie in the place of one"
        yield from self._decoding_faults(tar, row, sample)

    def _member_faults(
        self, sample: Sample, loose: list[Member], row: Mapping[str, Any]
    ) -> Iterator[tuple[int, str]]:
        """Check a sample's members: their names, and the payload's place."""
        payload, key = self.manifest.payload, row["key"].decode()
        if self.manifest.source != IN_PLACE:
            wanted = {payload, "json"} | ({"txt"} if self.manifest.kind == "text" else set())
            strange = [member.name for member in loose]
            for member in sample.members.values():
                if member.key != key or member.extension not in wanted:
                    strange.append(member.name)
            if strange:
                yield sample.start, f"members that are not the sample's: {', '.join(map(repr, strange[:3]))}"
            for extension in sorted(wanted - set(sample.members)):
                yield sample.start, f"its .{extension} is missing"
        stored = payload_members(sample, payload)
        if (row["offset"], row["size"]) not in [(one.offset, one.size) for one in stored]:
            yield row["offset"], "its payload is not where the index says"

    def _description_faults(
        self, tar: memoryview, sample: Sample, row: Mapping[str, Any]
    ) -> Iterator[tuple[int, str]]:
        """Compare what a sample's .json and .cls say with the index."""
        manifest, label, own = self.manifest, row["label"], self.manifest.source != IN_PLACE
        byte = sample.members["json"].offset if "json" in sample.members else sample.start
        try:
            said = describe(tar, sample)
        except ValueError as error:
            yield byte, str(error)
            return
        expected = {"label": manifest.classes[label] if 0 <= label < len(manifest.classes) else ""}
        found: dict[str, Any] = {"label": said.label}
        for name in ("scale", "shift"):
            value = getattr(said, name)
            if own or value is not None:
                expected[name], found[name] = row[name], None if value is None else float(np.float32(value))
        if own:
            record = {name: said.record.get(name) for name in ("group", "shape", "spacing_mm")}
            spacing = None if manifest.spacing_mm is None else list(manifest.spacing_mm)
            group = row["group"].decode()
            expected |= {"group": group, "shape": list(manifest.shape), "spacing_mm": spacing}
            found |= record
        wrong = [name for name in expected if expected[name] != found[name]]
        if wrong:
            yield byte, f"its description and the index disagree on {', '.join(wrong)}"

    def _decoding_faults(
        self, tar: memoryview, row: Mapping[str, Any], sample: Sample | None
    ) -> Iterator[tuple[int, str]]:
        """Decode the payload as the reader does; a text must also give the ids stored beside it."""
        manifest, offset = self.manifest, row["offset"]
        data = tar[offset : offset + row["size"]]
        try:
            if manifest.kind != "text":
                DECODERS[manifest.payload](data, self._out)
            elif manifest.payload == "ids":
                ids = decode_ids(data, manifest.shape[0])
                text = sample.members.get("txt") if sample else None
                assert manifest.tokenizer is not None, "texts come with a tokenizer"
                if int(ids.max()) >= manifest.tokenizer.vocab_size:
                    yield offset, f"its id {ids.max()} is not in the tokenizer's vocabulary"
                if text is not None and self.texts:
                    offset = text.offset
                    if self._tokenise(tar[offset : offset + text.size]) != ids.tolist():
                        yield offset, "its ids are not its text's"
            elif self.texts:
                self._tokenise(data)
        except BROKEN as error:
            yield offset, f"it does not decode ({error})"

    def _tokenise(self, data: memoryview) -> list[int]:
        if len(data) > TEXT_BYTES:
            raise ValueError(f"its text has {len(data)} bytes, where {TEXT_BYTES} are allowed")
        ids: list[int] = decode_text(data, self.manifest.shape[0], self._tokenizer).tolist()
        return ids
