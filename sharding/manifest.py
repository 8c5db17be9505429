"""The manifest: what a shard set is, read before anything else and trusted only after it was checked.

``DIR/manifest.json`` holds the whole modality record, the size and spacing of the stored samples, the recipe
that made them, and size and hash of every file of the set. It names no source file, no patient and no path.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args

from mnemos.sharding.errors import UserError
from mnemos.sharding.modalities import Kind, Modality

FORMAT = "mnemos-shards-1"
MANIFEST_FILE = "manifest.json"
INDEX_FILE = "index.npz"
SPLITS = ("train", "val")
BUILD_HINT = "make one with `python -m mnemos.sharding.build MODALITY INPUT --out DIR`"


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One tar file: its name inside the split's folder, samples held, size and SHA-256."""

    name: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Split:
    """One half of a set: number of samples and of groups, SHA-256 of its index.npz, shards in order."""

    samples: int
    groups: int
    index_sha256: str
    shards: tuple[Shard, ...]

    @property
    def bytes(self) -> int:
        """Total size of the shards."""
        return sum(shard.bytes for shard in self.shards)


@dataclass(frozen=True, kw_only=True)
class TokenizerFile:
    """The byte-pair tokenizer stored with texts: file name inside the set, SHA-256, number of ids."""

    file: str
    sha256: str
    vocab_size: int


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a shard set holds.

    Attributes:
        modality: the whole record; its fields are also readable as ``.name .title .kind .channels .values
            .augment``.
        payload: extension of the samples' payload: "jpg" or "png" (image), "vol" (volume), "ids" (text).
        shape: stored size: image (Y, X), volume (Z, Y, X), text (most ids,). Channels are in the modality.
        spacing_mm: (Z, Y, X) millimetres a voxel; None for images and texts.
        classes: class names; the index column ``label`` counts into them, -1 is "no label".
        preset: the size preset the set was built for.
        recipe: how a source file became a stored sample: one readable sentence per step.
        skipped: number of source files left out, by reason.
        tokenizer: texts only.
        splits: "train" and "val".
        version: of the tool that wrote the set.
        fingerprint: SHA-256 over modality, shape, spacing, classes, tokenizer and the hashes of shards and
            indexes: the same data built twice has the same one.
    """

    modality: Modality
    payload: str
    shape: tuple[int, ...]
    spacing_mm: tuple[float, ...] | None
    classes: tuple[str, ...]
    preset: str
    recipe: dict[str, str]
    splits: dict[str, Split]
    skipped: dict[str, int] = field(default_factory=dict)
    tokenizer: TokenizerFile | None = None
    version: str = ""
    fingerprint: str = ""

    name = property(lambda self: self.modality.name)
    title = property(lambda self: self.modality.title)
    kind = property(lambda self: self.modality.kind)
    channels = property(lambda self: self.modality.channels)
    values = property(lambda self: self.modality.values)
    augment = property(lambda self: self.modality.augment)

    def content_fingerprint(self) -> str:
        """Return the SHA-256 (hex) of what the set stores, whoever built it, when and from where."""
        record = asdict(self)
        for name in ("preset", "recipe", "skipped", "version", "fingerprint"):
            del record[name]
        record["format"] = FORMAT
        return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """Return the SHA-256 (hex) of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write ``manifest.json`` into an existing folder, replacing an older one in one step."""
    text = json.dumps({"format": FORMAT, **asdict(manifest)}, indent=1, ensure_ascii=False)
    partial = directory / f".{MANIFEST_FILE}.partial"
    partial.write_text(text + "\n", encoding="utf-8")
    partial.replace(directory / MANIFEST_FILE)


def load_manifest(directory: Path | str) -> Manifest:
    """Read and check a shard set's manifest.

    Returns:
        The manifest; every file it names exists and has the size it says (contents are checked on reading).

    Raises:
        UserError: the folder is missing, empty, no shard set, or damaged; the sentence says which.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise UserError(
            f"data folder {directory} does not exist; a shard set is expected there: {BUILD_HINT}"
        )
    file = directory / MANIFEST_FILE
    if not file.is_file():
        state = "holds no manifest.json" if any(directory.iterdir()) else "is empty"
        raise UserError(f"data folder {directory} {state}; a shard set is expected there: {BUILD_HINT}")
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        if record.pop("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT}")
        manifest = _from_record(record)
        _check(manifest)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = f"the field {error} is missing" if isinstance(error, KeyError) else str(error)
        raise UserError(f"{file} is damaged or of another version: {reason}; build the set again") from error
    _check_files(directory, manifest)
    return manifest


def _from_record(record: dict[str, Any]) -> Manifest:
    """Build the dataclasses back from JSON; unknown and missing fields raise TypeError or KeyError."""
    splits = {
        name: Split(**{**split, "shards": tuple(Shard(**shard) for shard in split["shards"])})
        for name, split in record.pop("splits").items()
    }
    tokenizer = record.pop("tokenizer")
    spacing = record.pop("spacing_mm")
    return Manifest(
        modality=Modality(**record.pop("modality")),
        shape=tuple(int(size) for size in record.pop("shape")),
        spacing_mm=None if spacing is None else tuple(float(mm) for mm in spacing),
        classes=tuple(record.pop("classes")),
        splits=splits,
        tokenizer=None if tokenizer is None else TokenizerFile(**tokenizer),
        **record,
    )


def _check(manifest: Manifest) -> None:
    """Raise ValueError where the fields contradict each other."""
    ranks = dict(zip(get_args(Kind), (1, 2, 3), strict=True))
    if ranks.get(manifest.kind) != len(manifest.shape) or min(manifest.shape) < 1:
        raise ValueError(f"shape {manifest.shape} does not fit kind {manifest.kind!r}")
    if set(manifest.splits) != set(SPLITS):
        raise ValueError(f"splits are {sorted(manifest.splits)}, not {sorted(SPLITS)}")
    for name, split in manifest.splits.items():
        if split.samples != sum(shard.samples for shard in split.shards):
            raise ValueError(f"the shards of split {name!r} do not add up to its {split.samples} samples")
        if any(Path(shard.name).name != shard.name for shard in split.shards):
            raise ValueError(f"split {name!r} names a shard outside its folder")
    if (manifest.kind == "text") != (manifest.tokenizer is not None):
        raise ValueError("a tokenizer belongs to texts, and to nothing else")
    if manifest.tokenizer is not None and Path(manifest.tokenizer.file).name != manifest.tokenizer.file:
        raise ValueError("the tokenizer lies outside the set")
    if manifest.fingerprint != manifest.content_fingerprint():
        raise ValueError("its fingerprint does not match its fields")


def _check_files(directory: Path, manifest: Manifest) -> None:
    """Raise UserError unless every file the manifest names is there with the size it says."""
    for name, split in manifest.splits.items():
        for shard in split.shards:
            path = directory / name / shard.name
            size = path.stat().st_size if path.is_file() else -1
            if size != shard.bytes:
                found = "is missing" if size < 0 else f"has {size} bytes instead of {shard.bytes}"
                raise UserError(f"shard {path} {found}; restore the file or build the set again")
        if not (directory / name / INDEX_FILE).is_file():
            raise UserError(f"{directory / name / INDEX_FILE} is missing; restore it or build the set again")
