"""Find the samples of one of a user's own WebDataset tars; the tar is read, never changed or unpacked."""

import hashlib
import mmap
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mnemos.sharding.building.preprocess import HOUNSFIELD_SCALE
from mnemos.sharding.codecs import BROKEN, DECODERS, decode_ids, span_checksum
from mnemos.sharding.descriptions import describe, payload_members
from mnemos.sharding.errors import DataError, UserError
from mnemos.sharding.manifest import PAYLOADS
from mnemos.sharding.modalities import Kind, Modality
from mnemos.sharding.reader import TEXT_BYTES
from mnemos.sharding.tar_members import Member, Sample, TarFault, group_members, walk_tar

_SCALES = {"unit": 1 / 255, "hounsfield": HOUNSFIELD_SCALE, "tokens": 1.0}
_SPAN_BYTES = 256 << 20  # most of a sample with everything that lies beside its payload
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"(\xb5/\xfd": "zstd"}
PLAIN_HINT = "shards are read by byte places, so plain tars are needed: unpack it with gunzip or the like"
_KEPT_REASONS = 5  # of a tar


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """One sample: its key and group as the user wrote them ("" where there is no group), and its row of the index."""

    key: str
    group: str
    label: str
    start: int
    span: int
    checksum: int
    offset: int
    size: int
    scale: float
    shift: float


@dataclass(kw_only=True)
class TarScan:
    """What one tar holds.

    Attributes:
        samples: in the order they lie in; splits: of each of them, once they are chosen.
        others: number of members that are not used, by extension.
        unfit: number of samples that cannot be used; reasons: of the first few, with tar and key.
    """

    path: Path
    bytes: int
    sha256: str
    samples: list[Found] = field(default_factory=list)
    splits: list[str] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)
    unfit: int = 0
    reasons: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class TarScanner:
    """Reads tars of one set; picklable, for other processes.

    Args:
        modality: its kind, channels and values decide.
        payload: of every sample.
        shape: stored size, as in the manifest.
        vocab_size: ids of the tokenizer, for stored ids.
    """

    modality: Modality
    payload: str
    shape: tuple[int, ...]
    vocab_size: int = 0

    def __call__(self, path: Path) -> TarScan:
        """Read one tar from end to end and decode every sample once.

        Raises:
            DataError: it cannot be walked; names tar and member.
            UserError: it is compressed.
        """
        tar = open_tar(path)
        scan = TarScan(path=path, bytes=len(tar), sha256=hashlib.sha256(tar).hexdigest())
        loose = list[Member]()
        try:
            for sample in group_members(walk_tar(tar), loose):
                self._add(tar, sample, scan)
        except TarFault as fault:
            raise _address(fault, path) from fault
        scan.others.update(member.name.rpartition(".")[2][:10] for member in loose)
        return scan

    def _add(self, tar: memoryview, sample: Sample, scan: TarScan) -> None:
        used = {"json", "cls"} | ({"txt"} if self.modality.kind == "text" else set())
        payloads = payload_members(sample, self.payload)
        used |= {member.extension for member in payloads}
        scan.others.update(extension[-10:] for extension in sample.members if extension not in used)
        try:
            if len(payloads) == 1 and sample.end - sample.start <= _SPAN_BYTES:
                scan.samples.append(self._read(tar, sample, payloads[0]))
                return
            if len(payloads) == 1:
                raise ValueError(f"its members have {sample.end - sample.start} bytes together")
            if payloads:
                raise ValueError(f"it has {len(payloads)} payloads")
            wrong = [kind for kind in PAYLOADS[self.modality.kind] if payload_members(sample, kind)]
            if wrong:
                raise ValueError(f"it has .{wrong[0]} in a set of .{self.payload}; a set has one of them")
        except BROKEN as error:
            scan.unfit += 1
            if len(scan.reasons) < _KEPT_REASONS:
                scan.reasons.append(f"{scan.path.name}:{sample.key}: {error}")

    def _read(self, tar: memoryview, sample: Sample, payload: Member) -> Found:
        """Decode a sample; ValueError and the like where it does not hold what the set holds."""
        said = describe(tar, sample)
        data = tar[payload.offset : payload.offset + payload.size]
        scale, shift = _SCALES.get(self.modality.values), 0.0
        if self.modality.kind == "text":
            self._read_text(data)
        else:
            channels = (self.modality.channels,) if self.modality.kind == "image" else ()
            out = np.empty((*self.shape, *channels), np.uint8 if channels else np.int16)
            DECODERS[self.payload](data, out)
            if scale is None and said.scale is None:
                scale, shift = _standardised(out)
        if (said.scale is None) != (said.shift is None):
            raise ValueError("its JSON has one of scale and shift; both belong together")
        return Found(
            key=sample.key,
            group=said.group,
            label=said.label,
            start=sample.start,
            span=sample.end - sample.start,
            checksum=span_checksum(tar[sample.start : sample.end]),
            offset=payload.offset,
            size=payload.size,
            scale=said.scale if said.scale is not None else float(scale or 1.0),
            shift=said.shift if said.shift is not None else shift,
        )

    def _read_text(self, data: memoryview) -> None:
        if self.payload == "ids":
            highest = int(decode_ids(data, self.shape[0]).max())
            if highest >= self.vocab_size:
                raise ValueError(f"its id {highest} is not in the tokenizer's {self.vocab_size}")
        elif len(data) > TEXT_BYTES:
            raise ValueError(f"its text has {len(data)} bytes, where {TEXT_BYTES} are allowed")
        elif not bytes(data).decode("utf-8").strip():
            raise ValueError("the text is empty")


def open_tar(path: Path) -> memoryview:
    """Map a tar into memory; UserError where it is compressed or empty."""
    with path.open("rb") as file:
        begin = file.read(8)
        if not begin:
            raise UserError(f"{path} is empty; remove it, or put the whole tar in its place")
        for magic, name in _COMPRESSED.items():
            if begin.startswith(magic):
                raise UserError(f"{path} is compressed ({name}); {PLAIN_HINT}")
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def find_payload(paths: Iterable[Path], kind: Kind) -> str:
    """Return the payload of the first sample in the tars; "" where none has one.

    Raises:
        DataError: a tar cannot be walked as far as its first sample.
    """
    for path in paths:
        try:
            for sample in group_members(walk_tar(open_tar(path)), []):
                for payload in PAYLOADS[kind]:
                    if payload_members(sample, payload):
                        return payload
        except TarFault as fault:
            raise _address(fault, path) from fault
    return ""


def _address(fault: TarFault, path: Path) -> DataError:
    what = f"byte {fault.byte}: {fault.reason}; the tar is not changed, mend it or leave it out"
    return DataError(what, source=path, key=fault.member)


def _standardised(stored: np.ndarray) -> tuple[float, float]:
    """Return scale and shift that make z-scores of a sample's stored values."""
    mean, deviation = float(stored.mean(dtype=np.float64)), float(stored.std(dtype=np.float64))
    if not deviation > 0:
        raise ValueError("all its voxels have one value")
    return 1 / deviation, -mean / deviation
