"""Read a whole shard set and name every fault: ``python -m mnemos.sharding.verify DIR``."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from mnemos.sharding.command import Parser, run_command
from mnemos.sharding.errors import DataError, StoreError, UserError

if TYPE_CHECKING:
    from mnemos.sharding.upkeep.verify_set import Verdict

EXAMPLES = """\
examples:
  python -m mnemos.sharding.verify data/xray
  python -m mnemos.sharding.verify s3://bucket/sets/ct --workers 8 --json > ct.json

Reads all of every file: hashes against the manifest, tar headers, and every sample's checksum, description and
payload. Exit code 0: the set is whole; 65: it has faults, each named with file, sample and byte where that is known;
75: a shard could not be had, try again. A remote set is fetched anew, whatever the cache holds.
"""


def report(verdict: "Verdict", root: str, most: int) -> str:
    """Tell in lines what was found."""
    lines = [str(fault) for fault in verdict.faults[:most]]
    if verdict.num_faults > len(lines):
        lines.append(f"and {verdict.num_faults - len(lines)} more; --most N prints N of them")
    lines += [f"not verified: {sentence}" for sentence in verdict.unreached]
    lines += [f"note: {note}" for note in verdict.notes]
    manifest = verdict.manifest
    if manifest is not None:
        for name, split in manifest.splits.items():
            lines.append(
                f"{name:<5} {split.samples} samples of {split.groups} groups in {len(split.shards)} shards, "
                f"{split.bytes / 1e6:.1f} MB"
            )
        total = sum(split.samples for split in manifest.splits.values())
        lines.append(f"{verdict.whole} of {total} samples are whole; fingerprint {manifest.fingerprint}")
    if verdict.sound:
        lines.append(f"{root} is whole")
    return "\n".join(lines)


def as_json(verdict: "Verdict", root: str, most: int) -> str:
    """Return what was found as one JSON object."""
    manifest = verdict.manifest
    record = {
        "set": root,
        "whole": verdict.sound,
        "fingerprint": manifest and manifest.fingerprint,
        "samples": manifest and {name: split.samples for name, split in manifest.splits.items()},
        "whole_samples": verdict.whole,
        "num_faults": verdict.num_faults,
        "faults": [asdict(fault) for fault in verdict.faults[:most]],
        "not_verified": verdict.unreached,
        "notes": verdict.notes,
    }
    return json.dumps(record, indent=1)


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    result = Parser(
        prog="python -m mnemos.sharding.verify",
        description="Read a whole shard set and name every fault.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = result.add_argument
    add("data", metavar="DIR", help="a shard set: its folder or URL")
    add("--workers", type=int, default=0, metavar="N", help="reading processes (default: 0, one per core)")
    add("--most", type=int, default=100, metavar="N", help="faults to print; all are counted (default: 100)")
    add("--json", action="store_true", help="print one JSON object instead of lines")
    return result


def command(argv: Sequence[str] | None) -> None:
    """Parse, verify, print; DataError where the set has a fault."""
    options = parser().parse_args(argv)
    if options.workers < 0:
        raise UserError(f"--workers is {options.workers}; 0 (one per core) or more is allowed")
    if options.most < 1:
        raise UserError(f"--most is {options.most}; 1 or more is allowed")
    from mnemos.sharding.upkeep.verify_set import verify_set

    verdict = verify_set(options.data, workers=options.workers, most=options.most)
    print((as_json if options.json else report)(verdict, options.data, options.most))
    if verdict.num_faults:
        faults = "1 fault was" if verdict.num_faults == 1 else f"{verdict.num_faults} faults were"
        what = f"{faults} found; restore the files they name, or build the set again"
        raise DataError(what, source=options.data)
    if verdict.unreached:
        raise StoreError(f"{len(verdict.unreached)} shards could not be had: {verdict.unreached[0]}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    return run_command(command, argv)


if __name__ == "__main__":
    sys.exit(main())
