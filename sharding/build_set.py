"""Turn a folder of files into a shard set: find, label, split, read, write."""

import os
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from mnemos.sharding.errors import UserError
from mnemos.sharding.modalities import MODALITIES, STORED_SIZES, Modality, StoredSize

# Everything heavy (numpy, Pillow, nibabel, pydicom) is imported where it is used: --help answers at once.
if TYPE_CHECKING:
    from mnemos.sharding.manifest import Manifest
    from mnemos.sharding.sources.samples import Outcome
    from mnemos.sharding.sources.units import Unit
    from mnemos.sharding.writer import ShardSetWriter

FEW_UNITS = 10  # below this number of files none may be broken; from it on, one always may


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """What a build is told; see --help for each.

    Raises:
        UserError: a number out of range.
    """

    modality: str
    source: Path
    out: Path
    preset: str = "sample"
    labels: Path | None = None
    text_column: str = "text"
    label_column: str = "label"
    group_column: str = "group"
    axes: str = ""
    key_file: Path | None = None
    val_fraction: float = 0.15
    max_broken: float = 0.01
    workers: int = 0

    def __post_init__(self) -> None:
        for name, value in (("--val-fraction", self.val_fraction), ("--max-broken", self.max_broken)):
            if not 0 <= value < 1:
                raise UserError(f"{name} is {value:g}; a share from 0 to below 1 is allowed")
        if self.workers < 0:
            raise UserError(f"--workers is {self.workers}; 0 (one per core) or more is allowed")


@dataclass(kw_only=True)
class BuildReport:
    """What a build did.

    Attributes:
        manifest: of the set written.
        units: number of files, series or texts found.
        broken: (name, reason) of the files that could not be read.
        left_out: number of sound files not kept, by reason.
        dropped: number of nearly empty sub-volumes.
        doubtful: number of volumes whose header looks made up.
        kept: samples by (split, label).
        notes: sentences the user should read.
    """

    manifest: "Manifest | None" = None
    units: int = 0
    broken: list[tuple[str, str]] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    dropped: int = 0
    doubtful: int = 0
    kept: Counter[tuple[str, str]] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)


def build_set(options: BuildOptions) -> BuildReport:
    """Turn a folder of files into a shard set.

    Raises:
        UserError: anything the user can put right; nothing is left behind.
    """
    modality, size = chosen(options.modality, options.preset)
    from mnemos.sharding.keys import default_key_file, hashed_name, load_key
    from mnemos.sharding.preprocess import recipe
    from mnemos.sharding.sources.samples import find_units
    from mnemos.sharding.splits import assign_splits
    from mnemos.sharding.writer import ShardSetWriter, check_new_folder

    check_new_folder(options.out)
    report = BuildReport()
    columns = {
        name: getattr(options, name) for name in ("text_column", "label_column", "group_column", "axes")
    }
    units = _labelled(options, find_units(options.source, modality, **columns), report)
    report.units = len(units)
    if options.key_file is None and not default_key_file().exists():
        report.notes.append(
            f"a new secret key was made at {default_key_file()}; the same key gives the same shards"
        )
    key = load_key(options.key_file)
    # In the order of keyed hashes: a stream read front to back is mixed, and tells nothing of the source.
    units.sort(key=lambda unit: hashed_name(key, f"order:{unit.name}"))
    splits = assign_splits(units, options.val_fraction, key)
    if options.val_fraction and len({unit.group or unit.name for unit in units}) == 1:
        report.notes.append("there is only one group: validation is its tail and not independent of training")
    kind_shape = {"text": (size.text,), "image": size.image, "volume": size.volume}
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer_file = None
        if modality.kind == "text":
            tokenizer_file = Path(scratch) / "tokenizer.json"
            _train_tokenizer(units, splits, size.vocab, tokenizer_file)
        with ShardSetWriter(
            options.out,
            modality=modality,
            shape=kind_shape[modality.kind],
            spacing_mm=size.spacing_mm if modality.kind == "volume" else None,
            preset=options.preset,
            classes=tuple(sorted({unit.label for unit in units if unit.label})),
            recipe=recipe(modality, size),
            tokenizer_file=tokenizer_file,
            key=key,
        ) as writer:
            _fill(writer, units, splits, modality, size, options, report)
            report.manifest = writer.close()
    if report.doubtful:
        report.notes.append(
            f"{report.doubtful} NIfTI headers state no position in the scanner, so that their orientation may "
            "be made up: look at the sheet, and where it is turned name the true axes (--axes LPS)"
        )
    if options.val_fraction and not report.manifest.splits["val"].samples:
        report.notes.append("the validation split is empty: its files were broken or left out")
    return report


def chosen(modality: str, preset: str) -> tuple[Modality, StoredSize]:
    """Look up a modality and a size preset; UserError with the choices where one is unknown."""
    if modality not in MODALITIES:
        raise UserError(f"modality {modality!r} is unknown; choose one of {', '.join(MODALITIES)}")
    if preset not in STORED_SIZES:
        raise UserError(f"preset {preset!r} is unknown; choose one of {', '.join(STORED_SIZES)}")
    return MODALITIES[modality], STORED_SIZES[preset]


def num_allowed_broken(total: int, fraction: float) -> int:
    """Return how many of ``total`` files may be broken: the share, at least one; none of fewer than ten."""
    return max(1, int(total * fraction)) if fraction and total >= FEW_UNITS else 0


def _labelled(options: BuildOptions, units: "list[Unit]", report: BuildReport) -> "list[Unit]":
    from mnemos.sharding.sources.units import LABELS_FILE, attach_labels

    root = options.source if options.source.is_dir() else options.source.parent
    file = options.labels or root / LABELS_FILE
    if options.labels is None and not file.is_file():
        return units
    if not file.is_file():
        raise UserError(f"label file {file} does not exist; it is a CSV with the columns file, label, group")
    units = attach_labels(units, file, root)
    unnamed = sum(not (unit.label or unit.group) for unit in units)
    if unnamed:
        report.notes.append(f"{unnamed} of {len(units)} have neither label nor group in {file.name}")
    return units


def _train_tokenizer(units: "list[Unit]", splits: list[str], vocab: int, file: Path) -> None:
    from mnemos.sharding.tokenizer import train_tokenizer

    texts = [unit.text for unit, split in zip(units, splits, strict=True) if split != "val" and unit.text]
    if not texts:
        raise UserError(f"none of the {len(units)} rows holds a text; check --text-column")
    train_tokenizer(sorted(texts), vocab).save(str(file))


def _fill(
    writer: "ShardSetWriter",
    units: "list[Unit]",
    splits: list[str],
    modality: Modality,
    size: StoredSize,
    options: BuildOptions,
    report: BuildReport,
) -> None:
    """Read every unit and write its samples; stop as soon as too many are broken."""
    from concurrent.futures.process import BrokenProcessPool

    from tqdm import tqdm

    from mnemos.sharding.sources.samples import read_units

    allowed = num_allowed_broken(len(units), options.max_broken)
    outcomes = read_units(units, modality, size, options.workers or len(os.sched_getaffinity(0)))
    try:
        progress = tqdm(outcomes, total=len(units), desc=modality.title, unit="file", disable=None)
        for unit, split, outcome in zip(units, splits, progress, strict=True):
            if outcome.broken:
                report.broken.append((unit.name, outcome.broken))
                if len(report.broken) > allowed:
                    raise UserError(_too_many_broken(report.broken, len(units), allowed))
            if outcome.left_out:
                report.left_out[outcome.left_out] += 1
            report.dropped += outcome.dropped
            report.doubtful += outcome.doubtful
            _write(writer, split, outcome, options.val_fraction, report)
    except BrokenProcessPool as error:
        raise OSError("a reading process was killed (out of memory?); --workers 1 needs the least") from error
    if not report.kept:
        reasons = ", ".join(f"{number} {reason}" for reason, number in report.left_out.items())
        raise UserError(
            f"no sample could be made of {len(units)} files ({reasons}); check the modality and the preset"
        )
    writer.skipped = {**report.left_out}
    if report.broken:
        writer.skipped["broken file"] = len(report.broken)
    if report.dropped:
        writer.skipped["nearly empty sub-volume"] = report.dropped


def _write(
    writer: "ShardSetWriter", split: str, outcome: "Outcome", fraction: float, report: BuildReport
) -> None:
    from mnemos.sharding.splits import TAIL, num_validating

    total = len(outcome.samples)
    first_val = total - num_validating(total, fraction) if split == TAIL and total > 1 else total
    for number, sample in enumerate(outcome.samples):
        target = split if split != TAIL else "train" if number < first_val else "val"
        writer.add(target, sample)
        report.kept[target, sample.label] += 1


def _too_many_broken(broken: list[tuple[str, str]], total: int, allowed: int) -> str:
    listed = "; ".join(f"{name}: {reason}" for name, reason in broken[:5])
    more = f"; and {len(broken) - 5} more" if len(broken) > 5 else ""
    files = "file" if total == 1 else "files"
    return (
        f"{len(broken)} of {total} {files} cannot be read where {allowed} may be broken ({listed}{more}); "
        "mend or remove them, or allow a larger share with --max-broken"
    )
