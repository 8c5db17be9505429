"""Turn a folder of files into a shard set: find, label, scrub, order, split, then read and write what is missing."""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mnemos.sharding.command import check_ranges
from mnemos.sharding.errors import UserError
from mnemos.sharding.modalities import MODALITIES, STORED_SIZES, Modality, StoredSize

# Everything heavy (numpy, Pillow, nibabel, pydicom) is imported where it is used: --help answers at once.
if TYPE_CHECKING:
    from mnemos.sharding.building.journal import Journal
    from mnemos.sharding.manifest import Manifest
    from mnemos.sharding.sources.units import Unit

MANY_CLASSES = 100  # with more, and a tenth as many as units, labels look like names
_NO_SAY = ("input", "out", "labels", "key_file", "max_broken", "workers", "fresh")  # in the bytes of a set


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """What a build is told; see --help for each.

    Raises:
        UserError: a number out of range.
    """

    modality: str
    input: Path
    out: Path
    source: str = ""
    preset: str = "sample"
    labels: Path | None = None
    text_column: str = "text"
    label_column: str = "label"
    group_column: str = "group"
    axes: str = ""
    centre: str = "volume"
    scrubber: str = ""
    rare_words: int | None = None
    key_file: Path | None = None
    val_fraction: float = 0.15
    max_broken: float = 0.01
    keep_duplicates: bool = False
    shard_mb: float = 64
    fresh: bool = False
    workers: int = 0

    def __post_init__(self) -> None:
        check_ranges({"--val-fraction": self.val_fraction, "--max-broken": self.max_broken}, self.workers)
        if not 0 < self.shard_mb <= 1 << 20:
            raise UserError(f"--shard-mb is {self.shard_mb:g}; more than 0 and at most {1 << 20} is allowed")

    def deciding(self) -> dict[str, Any]:
        """Return the flags that have a say in the bytes of the set, with their values."""
        return {
            "MODALITY" if name == "modality" else f"--{name.replace('_', '-')}": value
            for name, value in vars(self).items()
            if name not in _NO_SAY
        }


@dataclass(kw_only=True)
class BuildReport:
    """What a build did.

    Attributes:
        manifest: of the set written.
        units: number of files, series or texts found.
        values: by split, number of tokens, pixels or voxels stored.
        broken: (name, reason) of the files that could not be read.
        resumed: number of samples that an earlier, stopped run had stored.
        seconds: that this run took.
        notes: sentences the user should read.
    """

    manifest: "Manifest | None" = None
    units: int = 0
    values: dict[str, int] = field(default_factory=dict)
    broken: list[tuple[str, str]] = field(default_factory=list)
    resumed: int = 0
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)


def build_set(options: BuildOptions) -> BuildReport:
    """Turn a folder of files into a shard set, going on where a stopped build of it had got to.

    Raises:
        UserError: anything the user can put right. What is raised once shards are finished, this or another error,
            has a note that says how much is kept; before that nothing is left behind.
    """
    modality, size = chosen(options.modality, options.preset)
    from mnemos.sharding.building.build_head import head_of
    from mnemos.sharding.building.journal import Journal
    from mnemos.sharding.building.preprocess import CENTRES, recipe
    from mnemos.sharding.building.splits import assign_splits
    from mnemos.sharding.keys import hashed_name, open_key
    from mnemos.sharding.manifest import load_manifest
    from mnemos.sharding.sources.registry import sources
    from mnemos.sharding.writer import check_new_folder

    if options.centre not in CENTRES:
        raise UserError(f"--centre is {options.centre!r}; choose one of {', '.join(CENTRES)}")
    report, began = BuildReport(), time.monotonic()
    with Journal(options.out) as journal:
        if not journal.is_done():
            check_new_folder(options.out)
        units = _found(options, modality, report)
        opened = open_key(options.key_file, options.out)
        report.notes += [*opened.notes, *journal.notes]
        given = sources()[options.source].steps if options.source else {}
        steps = {**given, **recipe(modality, size, options.centre)}
        if modality.kind == "text":
            units, scrubbed = _scrubbed(options, units, report)
            steps |= scrubbed
        # In the order of keyed hashes: a stream read front to back is mixed, and tells nothing of the source.
        units.sort(key=lambda unit: hashed_name(opened.key, f"order:{unit.name}"))
        splits = assign_splits(units, options.val_fraction, opened.key)
        if options.val_fraction and len({unit.group or unit.name for unit in units}) == 1:
            report.notes.append(
                "there is only one group: validation is its tail and not independent of training"
            )
        journal.open(head_of(options.deciding(), units, opened.key), fresh=options.fresh)
        if journal.is_done():
            report.notes.append("the set was finished already, when its build was stopped")
            report.manifest = load_manifest(options.out)
        else:
            report.resumed = sum(one.shard.samples for found in journal.finished.values() for one in found)
            _write(options, journal, units, splits, steps, opened.key, report)
    report.values = _values(options.out, report.manifest)
    report.seconds = time.monotonic() - began
    return report


def chosen(modality: str, preset: str) -> tuple[Modality, StoredSize]:
    """Look up a modality and a size preset; UserError with the choices where one is unknown."""
    if modality not in MODALITIES:
        raise UserError(f"modality {modality!r} is unknown; choose one of {', '.join(MODALITIES)}")
    if preset not in STORED_SIZES:
        raise UserError(f"preset {preset!r} is unknown; choose one of {', '.join(STORED_SIZES)}")
    return MODALITIES[modality], STORED_SIZES[preset]


def _found(options: BuildOptions, modality: Modality, report: BuildReport) -> "list[Unit]":
    """List the units and give them their labels."""
    from mnemos.sharding.sources.samples import find_units
    from mnemos.sharding.sources.source import FindOptions

    find_options = FindOptions(
        text_column=options.text_column,
        label_column=options.label_column,
        group_column=options.group_column,
        axes=options.axes,
        centre=options.centre,
    )
    units = _labelled(options, find_units(options.input, modality, find_options, options.source), report)
    report.units = len(units)
    classes = {unit.label for unit in units if unit.label}
    if len(classes) > max(MANY_CLASSES, len(units) / 10):
        raise UserError(
            f"there are {len(classes)} different labels for {len(units)} files, and labels are stored in clear: these "
            "look like names; name another column (--label-column) or label file (--labels), or join rare classes"
        )
    return units


def _labelled(options: BuildOptions, units: "list[Unit]", report: BuildReport) -> "list[Unit]":
    from mnemos.sharding.sources.units import LABELS_FILE, attach_labels

    root = options.input if options.input.is_dir() else options.input.parent
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


def _scrubbed(
    options: BuildOptions, units: "list[Unit]", report: BuildReport
) -> "tuple[list[Unit], dict[str, str]]":
    """Take identifiers out of texts; return the units and what was done, for the recipe."""
    from mnemos.sharding.building.scrubbing import scrub_units
    from mnemos.sharding.sources.registry import sources

    public = sources()[options.source].public if options.source else False
    scrubbed = scrub_units(units, scrubber=options.scrubber, least_groups=options.rare_words, public=public)
    report.notes += scrubbed.notes
    return scrubbed.units, scrubbed.recipe


def _write(
    options: BuildOptions,
    journal: "Journal",
    units: "list[Unit]",
    splits: list[str],
    steps: dict[str, str],
    key: bytes,
    report: BuildReport,
) -> None:
    """Write what is missing of the set, and let it appear."""
    from mnemos.sharding.building.build_fill import SetFiller
    from mnemos.sharding.writer import ShardSetWriter

    modality, size = chosen(options.modality, options.preset)
    shape = {"text": (size.text,), "image": size.image, "volume": size.volume}[modality.kind]
    tokenizer_file = None
    if modality.kind == "text":
        tokenizer_file = journal.folder / "tokenizer.json"
        _train_tokenizer(units, splits, size.vocab, tokenizer_file)
    with ShardSetWriter(
        options.out,
        modality=modality,
        source=_source_names(options, units),
        shape=shape,
        spacing_mm=size.spacing_mm if modality.kind == "volume" else None,
        preset=options.preset,
        classes=tuple(sorted({unit.label for unit in units if unit.label})),
        recipe=steps,
        tokenizer_file=tokenizer_file,
        key=key,
        shard_bytes=round(options.shard_mb * (1 << 20)),
        journal=journal,
    ) as writer:
        filled = SetFiller(
            writer=writer,
            journal=journal,
            units=units,
            splits=splits,
            size=size,
            fraction=options.val_fraction,
            max_broken=options.max_broken,
            keep_duplicates=options.keep_duplicates,
        ).fill(options.workers, modality.title)
        writer.skipped = filled.skipped
        report.broken = filled.broken
        report.manifest = writer.close()
    if filled.doubtful:
        report.notes.append(
            f"{filled.doubtful} NIfTI headers state no position in the scanner, so that their orientation may "
            "be made up: look at the sheet, and where it is turned name the true axes (--axes LPS)"
        )
    if options.val_fraction and not report.manifest.splits["val"].samples:
        report.notes.append(
            "the validation split is empty: its files were broken, left out or copies of others"
        )


def _train_tokenizer(units: "list[Unit]", splits: list[str], vocab: int, file: Path) -> None:
    """Train the tokenizer on the training split, unless a stopped build did."""
    from mnemos.sharding.durable import write_durably
    from mnemos.sharding.tokenizer import train_tokenizer

    if file.exists():
        return
    texts = [unit.text for unit, split in zip(units, splits, strict=True) if split != "val" and unit.text]
    if not texts:
        raise UserError(f"none of the {len(units)} rows holds a text; check --text-column")
    write_durably(file, train_tokenizer(sorted(texts), vocab).to_str(pretty=True).encode())


def _source_names(options: BuildOptions, units: "list[Unit]") -> str:
    """Return the source's name; of several general ones those that gave a unit, joined."""
    from mnemos.sharding.sources.registry import GENERAL, sources

    if options.source:
        return options.source
    used = {unit.reader for unit in units}
    return "+".join(name for name in GENERAL if used & set(sources()[name].readers))


def _values(out: Path, manifest: "Manifest | None") -> dict[str, int]:
    """Count what is stored in each split: tokens, pixels or voxels."""
    from math import prod

    from mnemos.sharding.sample_index import load_index
    from mnemos.sharding.stores.storage import open_store

    assert manifest is not None, "values are counted after the build"
    if manifest.kind != "text":
        return {name: split.samples * prod(manifest.shape) for name, split in manifest.splits.items()}
    store = open_store(out)
    return {name: int(load_index(store, manifest, name)["size"].sum()) // 2 for name in manifest.splits}
