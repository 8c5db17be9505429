"""Turn a folder of a user's own WebDataset tars into a shard set; they stay as and where they are."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from mnemos.sharding.building.build_set import chosen
from mnemos.sharding.building.splits import num_validating
from mnemos.sharding.command import check_ranges
from mnemos.sharding.errors import DataError, UserError, num_allowed_broken
from mnemos.sharding.in_processes import map_in_processes, num_workers
from mnemos.sharding.keys import hashed_name, open_key
from mnemos.sharding.manifest import MANIFEST_FILE, PAYLOADS, SPLITS, Manifest, check_name
from mnemos.sharding.modalities import Modality
from mnemos.sharding.tokenizer import load_tokenizer
from mnemos.sharding.upkeep.index_files import write_index
from mnemos.sharding.upkeep.index_tar import PLAIN_HINT, TarScan, TarScanner, find_payload
from mnemos.sharding.writer import TOKENIZER_FILE

_COMPRESSED_NAMES = ("*.tar.gz", "*.tgz", "*.tar.bz2", "*.tar.xz", "*.tar.zst")


@dataclass(frozen=True, kw_only=True)
class IndexOptions:
    """What an indexing is told; see --help for each.

    Raises:
        UserError: a number out of range.
    """

    modality: str
    directory: Path
    preset: str = "sample"
    tokenizer: Path | None = None
    key_file: Path | None = None
    val_fraction: float = 0.15
    max_broken: float = 0.0
    workers: int = 0

    def __post_init__(self) -> None:
        check_ranges({"--val-fraction": self.val_fraction, "--max-broken": self.max_broken}, self.workers)


@dataclass(frozen=True, kw_only=True)
class IndexReport:
    """What was indexed: the manifest, what each tar holds, and sentences the user should read."""

    manifest: Manifest
    scans: list[TarScan]
    notes: list[str]

    @property
    def unfit(self) -> int:
        """Return the number of samples left out."""
        return sum(scan.unfit for scan in self.scans)

    @property
    def others(self) -> Counter[str]:
        """Return the number of members not used, by extension."""
        return sum((scan.others for scan in self.scans), Counter())


def index_set(options: IndexOptions) -> IndexReport:
    """Write manifest.json and the two index.npz into a folder of tars (texts: the tokenizer, too).

    Raises:
        UserError: anything the user can put right.
        DataError: a tar or too many of its samples cannot be used. Nothing is left behind in both cases.
    """
    modality, size = chosen(options.modality, options.preset)
    folder = options.directory
    tars, shared = _find_tars(folder)
    opened = open_key(options.key_file, folder)
    paths = [path for found in tars.values() for path in found]
    payload = find_payload(paths, modality.kind)
    if not payload:
        wanted = " or ".join(f".{name}" for name in PAYLOADS[modality.kind])
        raise UserError(f"the tars of {folder} hold no {wanted}, which {modality.name} is indexed from")
    tokenizer_file = _stored_tokenizer(options, payload)
    scanner = TarScanner(
        modality=modality,
        payload=payload,
        shape={"text": (size.text,), "image": size.image, "volume": size.volume}[modality.kind],
        vocab_size=load_tokenizer(tokenizer_file).get_vocab_size() if tokenizer_file else 0,
    )
    scans = list(_scan(scanner, paths, options.workers))
    _check_fit(scans, modality, options)
    rest = iter(scans)
    _assign({split: [next(rest) for _ in found] for split, found in tars.items()})
    if shared:
        _choose_validation(scans, opened.key, options.val_fraction)
    manifest = write_index(
        folder,
        scans,
        scanner,
        preset=options.preset,
        size=size,
        key=opened.key,
        tokenizer_file=tokenizer_file,
    )
    return IndexReport(manifest=manifest, scans=scans, notes=[*opened.notes, *_notes(scans)])


def _find_tars(folder: Path) -> tuple[dict[str, list[Path]], bool]:
    """Return the tars by split, and whether the splits are still to be chosen; UserError where something is amiss."""
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; name the folder that holds the tars")
    if (folder / MANIFEST_FILE).exists():
        raise UserError(
            f"{folder} has a {MANIFEST_FILE} already; `python -m mnemos.sharding.verify {folder}` says whether it is "
            "right: remove it to index the tars anew"
        )
    found = {}
    for name in (".", *SPLITS):
        for path in sorted(path for pattern in _COMPRESSED_NAMES for path in (folder / name).glob(pattern)):
            raise UserError(f"{path} is compressed; {PLAIN_HINT}")
        found[name] = sorted(path for path in (folder / name).glob("*.tar") if not path.name.startswith("."))
    shared = found.pop(".")
    if shared and any(found.values()):
        raise UserError(
            f"{folder} holds tars and so do its folders {' and '.join(SPLITS)}; keep them in one way"
        )
    if not shared and not found[SPLITS[0]]:
        raise UserError(
            f"{folder} holds no *.tar; tars lie in it, or in its folders {' and '.join(SPLITS)}, the first not empty"
        )
    tars = {SPLITS[0]: shared} if shared else found
    for path in (path for paths in tars.values() for path in paths):
        try:
            check_name(path.relative_to(folder).as_posix())
        except ValueError as error:
            raise UserError(
                f"{path} cannot be named in a manifest; rename it without ':' and '\\'"
            ) from error
    return tars, bool(shared)


def _stored_tokenizer(options: IndexOptions, payload: str) -> Path | None:
    """Return the tokenizer to use; None where there is none to be used, or it is to be trained."""
    there = options.directory / TOKENIZER_FILE
    if payload not in PAYLOADS["text"]:
        if options.tokenizer is not None:
            raise UserError("--tokenizer is given, but only texts have one; leave it out")
        return None
    if options.tokenizer is not None:
        load_tokenizer(options.tokenizer)  # UserError where it is none
        if there.exists() and there.read_bytes() != options.tokenizer.read_bytes():
            raise UserError(f"--tokenizer {options.tokenizer} is not the one in {there}; remove one of them")
        return options.tokenizer
    if there.is_file():
        return there
    if payload == "ids":
        raise UserError(
            "the tars hold token ids; name the tokenizer that made them with --tokenizer FILE (the tokenizer.json "
            "of a shard set)"
        )
    return None


def _scan(scanner: TarScanner, paths: list[Path], workers: int) -> Iterator[TarScan]:
    size_bytes = sum(path.stat().st_size for path in paths)
    with tqdm(total=size_bytes, desc="index", unit="B", unit_scale=True, disable=None) as progress:
        for scan in map_in_processes(scanner, paths, num_workers(workers, len(paths), size_bytes)):
            progress.update(scan.bytes)
            yield scan


def _check_fit(scans: list[TarScan], modality: Modality, options: IndexOptions) -> None:
    """Raise DataError where too many samples would be left out."""
    unfit = sum(scan.unfit for scan in scans)
    total = unfit + sum(len(scan.samples) for scan in scans)
    if unfit > num_allowed_broken(total, options.max_broken) or unfit == total:
        reasons = [reason for scan in scans for reason in scan.reasons][:5]
        raise DataError(
            f"{unfit} of {total} samples do not fit preset {options.preset} ({'; '.join(reasons)}); samples of another "
            f"size are brought to it by `python -m mnemos.sharding.build {modality.name} FILES --out DIR`, and broken "
            "ones are left out with --max-broken SHARE",
            source=options.directory,
        )


def _assign(tars: dict[str, list[TarScan]]) -> None:
    """Give every sample the split of its tar.

    Raises:
        DataError: a key comes twice, or a group lies in the tars of both splits.
    """
    first, groups = dict[str, Path](), dict[str, str]()
    for split, scans in tars.items():
        for scan in scans:
            for sample in scan.samples:
                if sample.key in first:
                    what = (
                        f"a second sample of this key, the first lies in {first[sample.key].name}; rename one"
                    )
                    raise DataError(what, source=scan.path, key=sample.key)
                first[sample.key] = scan.path
                if groups.setdefault(sample.group or sample.key, split) != split:
                    what = (
                        f"its group lies in {' and '.join(SPLITS)}; keep all samples of a group in one of them, or "
                        "nothing measured on the second is true"
                    )
                    raise DataError(what, source=scan.path, key=sample.key)
            scan.splits = [split] * len(scan.samples)


def _choose_validation(scans: list[TarScan], key: bytes, fraction: float) -> None:
    """Let a share of the groups validate: the first by their keyed hashes, at least one of two."""
    groups = {sample.group or sample.key for scan in scans for sample in scan.samples}
    if not fraction or len(groups) < 2:
        return
    ranked = sorted(groups, key=lambda group: hashed_name(key, f"split:{group}"))
    validating = set(ranked[: num_validating(len(ranked), fraction)])
    for scan in scans:
        scan.splits = [SPLITS[(one.group or one.key) in validating] for one in scan.samples]


def _notes(scans: list[TarScan]) -> list[str]:
    notes = [
        "names inside the tars are not hidden: rename members and drop names from .json before the tars are passed on"
    ]
    empty = [scan.path.name for scan in scans if not scan.samples]
    if empty:
        notes.append(f"{len(empty)} tars hold no sample and are left out: {', '.join(empty[:5])}")
    if not any(SPLITS[1] in scan.splits for scan in scans):
        notes.append("no sample validates: there is one group only, or no share was asked for")
    return notes
