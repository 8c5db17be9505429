"""Build shards from real files: ``python -m mnemos.sharding.build MODALITY INPUT --out DIR``."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mnemos.sharding.build_set import BuildOptions, BuildReport, build_set
from mnemos.sharding.command import Parser, run_command
from mnemos.sharding.modalities import MODALITIES, STORED_SIZES

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

labels.csv (in the input folder, or --labels FILE) has the columns file, label, group: file relative to the
input folder (a DICOM series by its folder), group the patient or the original tile. Splits never cut through
a group.
"""


def summary(report: BuildReport, out: Path) -> str:
    """Tell in a few lines what was built and what to do next."""
    manifest = report.manifest
    assert manifest is not None, "a report is summed up after the build"
    size = "x".join(map(str, manifest.shape))
    unit = {"text": "tokens at most", "image": "pixels", "volume": "voxels"}[manifest.kind]
    spacing = f" of {' x '.join(f'{mm:g}' for mm in manifest.spacing_mm)} mm" if manifest.spacing_mm else ""
    total = sum(report.kept.values())
    lines = [f"{manifest.title}: {total} samples of {report.units} found, {size} {unit}{spacing}"]
    for name, split in manifest.splits.items():
        classes = ", ".join(
            f"{label} {report.kept[name, label]}" for label in manifest.classes if report.kept[name, label]
        )
        lines.append(
            f"  {name:<5} {split.samples} samples of {split.groups} groups, {split.bytes / 1e6:.1f} MB"
            + (f" ({classes})" if classes else "")
        )
    if manifest.tokenizer:
        lines.append(f"  tokenizer of {manifest.tokenizer.vocab_size} entries")
    lines += [f"  broken  {name}: {reason}" for name, reason in report.broken]
    lines += [f"  left out  {number}: {reason}" for reason, number in sorted(report.left_out.items())]
    if report.dropped:
        lines.append(f"  left out  {report.dropped} nearly empty sub-volumes")
    lines += [f"  note  {note}" for note in report.notes]
    lines.append(f"written to {out} (fingerprint {manifest.fingerprint[:16]}); look at it with:")
    lines.append(f"  python -m mnemos.sharding.show {out}")
    return "\n".join(lines)


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
    add("source", metavar="INPUT", type=Path, help="folder (searched with its sub-folders) or a single file")
    add(
        "--out",
        metavar="DIR",
        type=Path,
        required=True,
        help="where the shard set appears; a new or empty folder",
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
        "--key-file",
        metavar="FILE",
        type=Path,
        help="secret that hides source names (default: made once, kept private)",
    )
    add(
        "--val-fraction",
        type=float,
        default=0.15,
        metavar="SHARE",
        help="of the groups, to validate (default: 0.15)",
    )
    add(
        "--max-broken",
        type=float,
        default=0.01,
        metavar="SHARE",
        help="of the files that may be broken (default: 0.01; from ten files on one always may)",
    )
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
