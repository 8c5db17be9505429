"""Train on WebDataset tars of your own, as they are: ``python -m mnemos.sharding.index MODALITY DIR``."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mnemos.sharding.command import Parser, run_command
from mnemos.sharding.modalities import MODALITIES, STORED_SIZES

if TYPE_CHECKING:
    from mnemos.sharding.upkeep.index_set import IndexReport

EXAMPLES = """\
examples:
  python -m mnemos.sharding.index xray data/films                  # data/films/*.tar, 15 % of the groups validate
  python -m mnemos.sharding.index ct data/scans --preset base      # data/scans/train/*.tar and data/scans/val/*.tar
  python -m mnemos.sharding.index report data/texts --tokenizer data/report/tokenizer.json

What a sample holds, by the extension of its members:
  images    .jpg .jpeg or .png of exactly the preset's size
  volumes   .npy (int16, C order) or .vol of exactly the preset's size
  texts     .txt (UTF-8; tokenised on reading) or .ids (with --tokenizer)
  all       .json with label, group, scale, shift; or .cls with a label; each may be missing

Manifest and index are written into DIR; the tars are only read. Every sample is read once and must fit: pictures of
another size are brought to it by `python -m mnemos.sharding.build` from the files. Members of other kinds are left
alone. A tar that is compressed or damaged, or holds links or names that lead out of it, is refused.
"""


def summary(report: "IndexReport", directory: Path) -> str:
    """Tell in a few lines what was indexed and what to do next."""
    manifest = report.manifest
    size = "x".join(map(str, manifest.shape))
    unit = {"text": "tokens at most", "image": "pixels", "volume": "voxels"}[manifest.kind]
    total = sum(split.samples for split in manifest.splits.values())
    lines = [f"{manifest.title}: {total} samples of .{manifest.payload}, {size} {unit}"]
    for name, split in manifest.splits.items():
        classes = ", ".join(f"{label} {count}" for label, count in split.labels.items() if count)
        lines.append(
            f"  {name:<5} {split.samples} samples of {split.groups} groups in {len(split.shards)} tars"
            + (f" ({classes})" if classes else "")
        )
    lines += [f"  broken  {reason}" for scan in report.scans for reason in scan.reasons]
    if report.unfit:
        lines.append(f"  left out  {report.unfit} samples that do not fit")
    others = ", ".join(f"{count} .{name}" for name, count in report.others.most_common(10))
    lines += [f"  not used  {others}"] if others else []
    lines += [f"  note  {note}" for note in report.notes]
    lines.append(
        f"manifest written into {directory} (fingerprint {manifest.fingerprint[:16]}); look at it with:"
    )
    lines.append(f"  python -m mnemos.sharding.show {directory}")
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    result = Parser(
        prog="python -m mnemos.sharding.index",
        description="Make a shard set of WebDataset tars of your own, which stay as they are.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = result.add_argument
    add("modality", metavar="MODALITY", help=f"one of {', '.join(MODALITIES)}")
    add("directory", metavar="DIR", type=Path, help="folder with *.tar, or with train/*.tar and val/*.tar")
    add(
        "--preset",
        default="sample",
        help=f"fixes size and spacing: {', '.join(STORED_SIZES)} (default: sample)",
    )
    add(
        "--tokenizer",
        metavar="FILE",
        type=Path,
        help="texts: tokenizer.json of a shard set (default: the one in DIR, else one is trained on the .txt)",
    )
    add(
        "--key-file",
        metavar="FILE",
        type=Path,
        help="secret that hides keys and groups in the index (default: made once, kept private)",
    )
    add(
        "--val-fraction",
        type=float,
        default=0.15,
        metavar="SHARE",
        help="of the groups, to validate, where DIR has no train and val (default: 0.15)",
    )
    add(
        "--max-broken",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="of the samples that may be left out because they do not fit (default: 0)",
    )
    add("--workers", type=int, default=0, metavar="N", help="reading processes (default: 0, one per core)")
    return result


def command(argv: Sequence[str] | None) -> None:
    """Parse, index, print the summary."""
    given: dict[str, Any] = vars(parser().parse_args(argv))
    from mnemos.sharding.upkeep.index_set import IndexOptions, index_set

    options = IndexOptions(**given)
    print(summary(index_set(options), options.directory))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    return run_command(command, argv)


if __name__ == "__main__":
    sys.exit(main())
