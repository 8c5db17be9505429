"""Build shards from real files: ``python -m mnemos.sharding.build MODALITY INPUT --out DIR``."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mnemos.sharding.building.build_set import BuildOptions, BuildReport, build_set
from mnemos.sharding.command import Parser, run_command
from mnemos.sharding.modalities import MODALITIES, STORED_SIZES
from mnemos.sharding.sources.registry import NAMES

if TYPE_CHECKING:
    from mnemos.sharding.manifest import Split

EXAMPLES = """\
examples:
  X-rays, one JPEG or PNG (or DICOM) each, labels.csv beside them:
    python -m mnemos.sharding.build xray ~/films --out data/xray
  CT volumes at the paper's size, NIfTI files and DICOM series mixed:
    python -m mnemos.sharding.build ct ~/scans --out data/ct --preset base
  reports from a table whose column of texts is called findings:
    python -m mnemos.sharding.build report ~/reports.csv --out data/report --text-column findings
then look before you train:
    python -m mnemos.sharding.show data/xray

A build that was stopped, even killed, goes on when the same command is given again; the set is the same to the byte.

labels.csv (in the input folder, or --labels FILE) has the columns file, label, group: file relative to the
input folder (a DICOM series by its folder), group the patient or the original tile. Splits never cut through
a group.
"""


MOST_CLASSES = 20  # that a summary lists


def summary(report: BuildReport, out: Path) -> str:
    """Tell in a few lines what was built and what to do next."""
    manifest = report.manifest
    assert manifest is not None, "a report is summed up after the build"
    size = "x".join(map(str, manifest.shape))
    unit = {"text": "tokens", "image": "pixels", "volume": "voxels"}[manifest.kind]
    at_most = " at most" if manifest.kind == "text" else ""
    spacing = f" of {' x '.join(f'{mm:g}' for mm in manifest.spacing_mm)} mm" if manifest.spacing_mm else ""
    total = sum(split.samples for split in manifest.splits.values())
    found = f"{manifest.title} from {manifest.source}: {total} samples of {report.units} found"
    lines = [f"{found}, {size} {unit}{at_most}{spacing}"]
    for name, split in manifest.splits.items():
        values = f"{report.values[name]:,} {unit}"
        lines.append(
            f"  {name:<5} {split.samples} samples of {split.groups} groups, {split.bytes / 1e6:.1f} MB, {values}"
            + _classes(split)
        )
    if manifest.tokenizer:
        lines.append(f"  tokenizer of {manifest.tokenizer.vocab_size} entries")
    lines += [f"  broken  {name}: {reason}" for name, reason in report.broken]
    lines += [f"  left out  {number}: {reason}" for reason, number in manifest.skipped.items()]
    lines += [f"  note  {note}" for note in report.notes]
    earlier = f" ({report.resumed} samples were there from a stopped run)" if report.resumed else ""
    lines += [
        f"written to {out} in {_duration(report.seconds)}{earlier}, fingerprint {manifest.fingerprint[:16]}",
        "look at it, and check it wherever you copy it:",
        f"  python -m mnemos.sharding.show {out}",
        f"  python -m mnemos.sharding.verify {out}",
    ]
    return "\n".join(lines)


def _classes(split: "Split") -> str:
    """List a split's classes with their samples, the largest ones where there are many."""
    present = [(label, number) for label, number in split.labels.items() if number]
    if not present:
        return ""
    shown = [f"{label} {number}" for label, number in present]
    if len(present) > MOST_CLASSES:
        largest = sorted(present, key=lambda one: -one[1])[:MOST_CLASSES]
        shown = [f"{label} {number}" for label, number in largest]
        shown.append(f"{len(present) - MOST_CLASSES} smaller classes")
    if unlabelled := split.samples - sum(split.labels.values()):
        shown.append(f"without a class {unlabelled}")
    return f" ({', '.join(shown)})"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (
        f"{hours}:{minutes:02d}:{rest:02d} h"
        if hours
        else f"{minutes}:{rest:02d} min"
        if minutes
        else f"{seconds:.1f} s"
    )


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    result = Parser(
        prog="python -m mnemos.sharding.build",
        description="Turn a folder of medical files into shards to train on.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = result.add_argument
    add("modality", metavar="MODALITY", help=f"one of {', '.join(MODALITIES)}")
    add("input", metavar="INPUT", type=Path, help="folder (searched with its sub-folders) or a single file")
    add(
        "--out",
        metavar="DIR",
        type=Path,
        required=True,
        help="where the shard set appears; a new or empty folder",
    )
    add(
        "--source",
        default="",
        metavar="NAME",
        help="where the input comes from: files of any folder (default), or a published data set as it unpacks: "
        f"{', '.join(NAMES)}",
    )
    add(
        "--preset",
        default="sample",
        help=f"fixes size and spacing: {', '.join(STORED_SIZES)} (default: sample)",
    )
    add(
        "--labels",
        metavar="FILE",
        type=Path,
        help="label file (default: labels.csv in the input folder, if any)",
    )
    add("--text-column", default="text", metavar="NAME", help="reports: column of the texts (default: text)")
    add(
        "--label-column",
        default="label",
        metavar="NAME",
        help="reports: column of the labels (default: label)",
    )
    add(
        "--group-column",
        default="group",
        metavar="NAME",
        help="reports: column of the groups (default: group, then id)",
    )
    add(
        "--axes",
        default="",
        metavar="XYZ",
        help="NIfTI: where the voxel axes run, if the headers are wrong (LPS ...)",
    )
    add(
        "--centre",
        default="volume",
        metavar="WHERE",
        help="what the cut of a volume is centred on: volume, as in the paper, or body (default: volume)",
    )
    add(
        "--scrubber",
        default="",
        metavar="NAME",
        help="what hides names, dates and numbers in reports: basic, none, or your own module:function (default: "
        "basic; none for texts their authors published)",
    )
    add(
        "--rare-words",
        type=int,
        metavar="N",
        help="reports: mask words of fewer than N patients (default: 5; 0: none)",
    )
    add(
        "--key-file",
        metavar="FILE",
        type=Path,
        help="secret that hides source names; made where it does not exist, kept private (default: one per user)",
    )
    add(
        "--val-fraction",
        type=float,
        default=0.15,
        metavar="SHARE",
        help="of the groups whose split is not published, to validate (default: 0.15)",
    )
    add(
        "--max-broken",
        type=float,
        default=0.01,
        metavar="SHARE",
        help="of the files that may be broken (default: 0.01; from ten files on one always may)",
    )
    add(
        "--keep-duplicates",
        action="store_true",
        help="store samples of the same content, too (default: the first one alone)",
    )
    add(
        "--shard-mb",
        type=float,
        default=64,
        metavar="MB",
        help="most mebibytes of a shard (default: 64); a stopped build goes on from its last whole shards",
    )
    add("--fresh", action="store_true", help="throw away what a stopped build left, and begin again")
    add("--workers", type=int, default=0, metavar="N", help="reading processes (default: 0, one per core)")
    return result


def command(argv: Sequence[str] | None) -> None:
    """Parse, build, print the summary."""
    given: dict[str, Any] = vars(parser().parse_args(argv))
    options = BuildOptions(**given)
    print(summary(build_set(options), options.out))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    return run_command(command, argv)


if __name__ == "__main__":
    sys.exit(main())
