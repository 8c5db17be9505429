"""Join shard sets: ``python -m mnemos.sharding.merge SET SET... --out DIR``."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mnemos.sharding.command import Parser, run_command
from mnemos.sharding.errors import UserError

if TYPE_CHECKING:
    from mnemos.sharding.upkeep.merge_sets import Merged

EXAMPLES = """\
examples:
  python -m mnemos.sharding.merge data/xray-2023 data/xray-2024 --out data/xray
  python -m mnemos.sharding.merge s3://bucket/ct-one ct-two ct-three --out data/ct

The sets have one modality, size, spacing and payload, and texts one tokenizer. No sample is encoded again. Classes
are united by name. A sample that two sets hold (one key, the same bytes) is kept once. A group that trains in one set
and validates in another trains. Samples and groups are known by their keyed hashes, so build the sets with one
--key-file: with two, nobody can tell that a patient is in both.
"""


def summary(merged: "Merged", out: Path) -> str:
    """Tell in a few lines what was joined."""
    manifest = merged.manifest
    lines = [f"{manifest.title}: {manifest.recipe['joined']}"]
    for name, split in manifest.splits.items():
        classes = ", ".join(f"{label} {count}" for label, count in split.labels.items() if count)
        lines.append(
            f"  {name:<5} {split.samples} samples of {split.groups} groups, {split.bytes / 1e6:.1f} MB"
            + (f" ({classes})" if classes else "")
        )
    if merged.dropped:
        lines.append(f"  kept once  {merged.dropped} samples that two sets hold")
    if merged.moved:
        lines.append(
            f"  moved  {merged.moved} samples of {merged.moved_groups} groups from val to train, where their groups "
            "train in another set"
        )
    if merged.left_columns:
        lines.append(f"  left out  index columns that not all sets have: {', '.join(merged.left_columns)}")
    lines.append(f"written to {out} (fingerprint {manifest.fingerprint[:16]})")
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    result = Parser(
        prog="python -m mnemos.sharding.merge",
        description="Join shard sets into a new one.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument("sets", metavar="SET", nargs="+", help="shard sets, folders or URLs; two or more")
    result.add_argument(
        "--out", metavar="DIR", type=Path, required=True, help="where the new set appears; absent or empty"
    )
    return result


def command(argv: Sequence[str] | None) -> None:
    """Parse, merge, print the summary."""
    options = parser().parse_args(argv)
    if len(options.sets) < 2:
        raise UserError("one set is given; name two or more to join")
    from mnemos.sharding.upkeep.merge_sets import merge_sets

    print(summary(merge_sets(options.sets, options.out), options.out))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    return run_command(command, argv)


if __name__ == "__main__":
    sys.exit(main())
