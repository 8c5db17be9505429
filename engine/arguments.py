"""The command line of `engine/train.py`; imports nothing heavy, so that --help answers at once."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mnemos.engine.presets import PRESETS
from mnemos.engine.settings import describe, parse_assignment, read_file
from mnemos.sharding.command import Parser

EXAMPLES = """
examples:
  deepspeed engine/train.py --stage pathology             all five stages on the sample data, in minutes, on a CPU
  deepspeed engine/train.py --stage ct --dry-run          what would be done: plan, parameters, memory, time
  deepspeed --num_gpus 8 engine/train.py --stage pathology --preset base --data /data/shards --run runs/paper
  deepspeed engine/train.py --stage ct --set curriculum.stages=[xray,ct] --run runs/chest
  python engine/train.py --stage report                   one rank, without a launcher

A run is begun once and continued by the same command: finished stages are never done again, an interrupted one goes
on from its last checkpoint. Exit codes: 0 done; 2 a mistake in the call or the data; 65 the numbers went bad;
75 stopped and saved, start the same command again; 130 interrupted twice.
"""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """What was asked for.

    Attributes:
        overrides: flat settings from --config, --set and the short flags, later ones over earlier ones.
        preset: None where it was not named.
    """

    stage: str
    only: bool
    dry_run: bool
    fresh: bool
    run: Path | None
    data: Path | str | None
    preset: str | None
    overrides: dict[str, Any]
    deepspeed_config: Path | None


def as_root(text: str) -> Path | str:
    """Return a folder as a Path and an URL as it is."""
    return text if "://" in text or text.startswith("pipe:") else Path(text)


def make_parser() -> Parser:
    """Return the parser with every flag."""
    parser = Parser(
        prog="train.py",
        description="Pre-train one encoder on one modality after another, without forgetting. --stage NAME brings the run "
        "up to and including that stage.",
        epilog=EXAMPLES
        + "\nsettings for --set and --config (name, default of the base preset, meaning):\n"
        + describe(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--stage", required=True, metavar="NAME", help="last stage to do, such as report, ct or pathology"
    )
    parser.add_argument(
        "--only", action="store_true", help="do exactly that stage; refuse where earlier ones are missing"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print plan, settings and estimates, then stop"
    )
    parser.add_argument(
        "--fresh", action="store_true", help="start over; the old run is moved aside, nothing is deleted"
    )
    parser.add_argument("--run", type=Path, metavar="DIR", help="the run's folder (default: runs/<preset>)")
    parser.add_argument(
        "--data",
        type=as_root,
        metavar="DIR",
        help="a folder with one shard set a sub-folder, or its URL: http(s)://, s3://, gs://, az:// (default: sample shards)",
    )
    parser.add_argument("--preset", metavar="NAME", help=f"{', '.join(PRESETS)} (default: sample)")
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML file with settings")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="assignments",
        help="one setting; may be repeated",
    )
    parser.add_argument(
        "--strategy", metavar="NAME", help="medcoss or sequential: short for rehearsal.strategy"
    )
    parser.add_argument("--seed", type=int, metavar="N", help="short for training.seed")
    parser.add_argument(
        "--epochs", type=float, metavar="N", help="passes over a stage's data: short for training.epochs"
    )
    parser.add_argument(
        "--steps", type=int, metavar="N", help="updates on a stage's own data: short for training.steps"
    )
    parser.add_argument(
        "--deepspeed_config", type=Path, metavar="FILE", help="a DeepSpeed configuration (JSON) of your own"
    )
    parser.add_argument("--deepspeed", action="store_true", help=argparse.SUPPRESS)  # a habit; always on
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # the launcher passes it
    return parser


def parse(argv: Sequence[str] | None = None) -> Arguments:
    """Parse the command line.

    Raises:
        UserError: an unknown flag, an unreadable file, a malformed assignment.
        SystemExit: after --help.
    """
    given = make_parser().parse_args(argv)
    overrides = read_file(given.config) if given.config else {}
    overrides |= dict(parse_assignment(text) for text in given.assignments)
    preset = overrides.pop("preset", None)
    if given.preset is not None:
        preset = given.preset
    short = {
        "rehearsal.strategy": given.strategy,
        "training.seed": given.seed,
        "training.epochs": given.epochs,
        "training.steps": given.steps,
    }
    overrides |= {key: value for key, value in short.items() if value is not None}
    return Arguments(
        stage=given.stage,
        only=given.only,
        dry_run=given.dry_run,
        fresh=given.fresh,
        run=given.run,
        data=given.data,
        preset=None if preset is None else str(preset),
        overrides=overrides,
        deepspeed_config=given.deepspeed_config,
    )
