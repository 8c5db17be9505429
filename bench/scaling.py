"""How fast would N GPUs on several nodes train? A model from measured inputs, checked against two ranks where they run.

    python bench/scaling.py                                   the sample preset on this machine, about a minute
    python bench/scaling.py --kind text --ranks 1 2 4 8       another kind of data, other numbers of ranks
    python bench/scaling.py --intra-gbps 3600 --inter-gbps 3200 --latency-us 20 --ranks-per-node 8     a planned cluster
    python bench/scaling.py --picture scaling.png --out bench/results/scaling.jsonl

The model is told in bench/scaling_model.py: compute, reading, and what DeepSpeed sends, one after the other, as
engine/deepspeed_config.py has it. The batch of a rank stays, so the global batch grows with the ranks. Every input is
listed with how it was got. A run of one stage is measured, its pretext task, on random shards unless --data names others.

Two ranks on one machine share its memory and its power: the compute of a rank of several is therefore measured on two
at once that know nothing of each other, and the slower one counts, since ranks wait for each other. A run of one rank is
measured on its own: DeepSpeed does less there. On a CPU a rank has one thread (OMP_NUM_THREADS), so that two ranks fit two
cores.

--check, on by itself where two ranks have a core or a GPU each, really trains on one and on two ranks, and holds the
model against it: bytes sent, and samples/s. All processes live at once and take turns, round by round, so that what else
the machine does meets all alike. Exits 1 when prediction and measurement differ by more than --limit.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mnemos.bench.runs import machine
from mnemos.bench.scaling_check import Check, checks
from mnemos.bench.scaling_inputs import Measured, inputs_of, listed, planned
from mnemos.bench.scaling_model import predict
from mnemos.bench.scaling_picture import draw
from mnemos.bench.scaling_runs import RANKS, ask, check_flags, make_shards, stage_flags, started
from mnemos.engine import dist
from mnemos.engine.plain_table import format_table
from mnemos.engine.presets import PRESETS
from mnemos.sharding.command import Parser, run_command
from mnemos.sharding.errors import UserError
from mnemos.sharding.modalities import MODALITIES

KINDS = tuple(dict.fromkeys(one.kind for one in MODALITIES.values()))
BATCHES = {"cpu": 8, "cuda": 128}  # of a rank, but for the sample preset
SAMPLE_BATCH = 16
SAMPLES = 64  # of a random set
LIMIT = 0.25


def processors() -> tuple[str, int]:
    """Return "cuda" and the number of GPUs, or "cpu" and the number of cores."""
    import torch

    gpus = torch.cuda.device_count()
    return ("cuda", gpus) if gpus else ("cpu", len(os.sched_getaffinity(0)))


def measure(given: argparse.Namespace, batch: int, pair: bool) -> Measured:
    """Start the ranks, take turns, return medians over the rounds (and what the ranks say of the stage)."""
    name = next(one.name for one in MODALITIES.values() if one.kind == given.kind)
    with tempfile.TemporaryDirectory(prefix="mnemos-scaling-") as place:
        folder = Path(place)
        if given.data is None:
            make_shards(folder / "data", MODALITIES[name], given.preset, max(SAMPLES, RANKS * batch))
        flags = stage_flags(name, given.preset, (given.data or folder / "data").resolve(), given.assignments)
        zero = check_flags([*flags, "--set", f"training.batch={RANKS * batch}"], RANKS if pair else 1)
        print("starting the ranks ...", flush=True)
        with started(folder, flags, batch, zero=zero, pair=pair) as ranks:
            turns = [("one", ranks.one, question) for question in ("updates", "step", "split", "load")]
            turns += [("many", ranks.many, question) for question in ("step", "split", "load")]
            turns += [("joint", ranks.joint, question) for question in ("updates", "network") if pair]
            found: dict[str, list[dict[str, float]]] = {}
            for number in tqdm(range(given.rounds), desc="rounds", unit="round"):
                for who, processes, question in turns if number % 2 == 0 else reversed(turns):
                    answer = ask(processes, question, given.updates)
                    found.setdefault(f"{who} {question}", []).append(answer)
            counted = ask(ranks.joint, "count", 1) if pair else None
            facts = ranks.facts
    return Measured(facts=facts, rounds=found, counted=counted)


def report(given: argparse.Namespace, measured: Measured, pair: bool) -> list[Check]:
    """Predict, print, draw and write down; return the checks."""
    make = partial(inputs_of, cores=given.cores, overlap=given.overlap, samples_per_core=given.core_rate)
    inputs = make(measured)
    cluster = planned(measured, given)
    steps = [predict(inputs, cluster, ranks) for ranks in given.ranks]
    print("\ninputs")
    table = listed(measured, inputs, cluster, given)
    print(format_table(table, {"name": "input", "value": "value", "unit": "unit", "how": "how it was got"}))
    rows = [asdict(step) for step in steps]
    print(f"\nmodel: {inputs.batch} samples of a rank, {measured.facts['kind']}, pretext")
    print(format_table([_shown(row) for row in rows], COLUMNS))
    found = checks(measured, make) if pair else []
    for check in found:
        print(check.sentence())
    if given.picture:
        draw(given.picture, steps, f"{given.preset}, {measured.facts['kind']}, {inputs.batch} samples a rank")
        print(f"picture: {given.picture}")
    if given.out:
        with dist.quiet():
            about = {"bench": "scaling", **machine(), "preset": given.preset, "kind": given.kind}
        with given.out.open("a", encoding="utf-8") as file:
            lines = [{"inputs": table}, *rows, *({"check": asdict(check)} for check in found)]
            file.writelines(json.dumps({**about, **line}) + "\n" for line in lines)
    return found


COLUMNS = {
    "ranks": "ranks",
    "nodes": "nodes",
    "samples_per_s": "samples/s",
    "efficiency": "efficiency",
    "step": "step ms",
    "compute": "compute",
    "network": "network",
    "loader": "loader",
    "bound": "bound by",
}


def _shown(row: Mapping[str, Any]) -> dict[str, Any]:
    milliseconds = {
        name: f"{1e3 * row[f'{name}_s']:.2f}" for name in ("step", "compute", "network", "loader")
    }
    return {
        **row,
        **milliseconds,
        "samples_per_s": f"{row['samples_per_s']:,.1f}",
        "efficiency": f"{row['efficiency']:.1%}",
    }


def check_given(given: argparse.Namespace) -> bool:
    """Fill in what was left open, and tell whether two ranks are measured.

    Raises:
        UserError: a number out of range, or nothing to get the network from.
    """
    device, number = processors()
    for name in ("rounds", "updates", "ranks_per_node", "cores", "batch", "latency_us", "intra_gbps"):
        value = getattr(given, name)
        if value is not None and value <= 0:
            raise UserError(f"--{name.replace('_', '-')} {value:g}: must be above 0; give more")
    if given.inter_gbps is not None and given.inter_gbps <= 0:
        raise UserError(f"--inter-gbps {given.inter_gbps:g}: must be above 0; give more")
    if not 0 <= given.overlap <= 1:
        raise UserError(f"--overlap {given.overlap:g}: a share from 0 to 1 is allowed; correct it")
    if any(text.split("=")[0].strip() == "training.batch" for text in given.assignments):
        raise UserError("--set training.batch: of all ranks, which differ here; give a rank's with --batch")
    for path, flag in ((given.out, "--out"), (given.picture, "--picture")):
        if path and not path.parent.is_dir():
            raise UserError(f"{flag} {path}: there is no folder {path.parent}; make it first")
    can = number >= RANKS
    if given.check and not can:
        raise UserError(f"--check needs {RANKS} GPUs or cores, here is {number}; drop it")
    pair = can if given.check is None else given.check
    if not pair and (given.intra_gbps is None or given.latency_us is None):
        raise UserError(
            "no two ranks are run here, so nothing is known of the network; give --intra-gbps and --latency-us"
        )
    given.ranks_per_node = given.ranks_per_node or number
    for ranks in given.ranks:
        if ranks < 1 or (ranks > given.ranks_per_node and ranks % given.ranks_per_node):
            raise UserError(
                f"--ranks {ranks}: does not fill whole nodes of {given.ranks_per_node}; give multiples of it, or fewer "
                "than a node has"
            )
    given.cores = given.cores or max(1, len(os.sched_getaffinity(0)) // given.ranks_per_node)
    given.batch = given.batch or (SAMPLE_BATCH if given.preset == "sample" else BATCHES[device])
    return pair


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, model and check, return the exit code."""
    failed: list[Check] = []

    def command(argv: Sequence[str] | None) -> None:
        given = make_parser().parse_args(argv)
        pair = check_given(given)
        found = report(given, measure(given, given.batch, pair), pair)
        if not pair:
            print("not checked: two ranks were not run")
        failed.extend(check for check in found if abs(check.difference) > min(given.limit, check.limit))
        for check in failed:
            print(f"OFF: {check.sentence()}")

    return run_command(command, argv) or int(bool(failed))


def make_parser() -> Parser:
    """Return the parser with every flag."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--preset", choices=list(PRESETS), default="sample", help="(sample)")
    add("--kind", choices=KINDS, default="image", help="of the stage's data (image)")
    add("--data", type=Path, metavar="DIR", help="shard sets to read instead of random ones")
    add("--set", action="append", default=[], metavar="KEY=VALUE", dest="assignments", help="a setting")
    add("--batch", type=int, help=f"samples of a rank ({SAMPLE_BATCH}; other presets {BATCHES})")
    add("--ranks", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64], metavar="N", help="to predict")
    add("--ranks-per-node", type=int, metavar="N", help="(as many as there are GPUs here, or cores)")
    add("--cores", type=int, help="of a rank, for its reading processes (this machine's, shared out)")
    add("--core-rate", type=float, metavar="RATE", help="samples/s a core reads, as bench/loader.py found")
    add("--intra-gbps", type=float, metavar="GBIT", help="within a node, Gbit/s of a rank (measured)")
    add("--inter-gbps", type=float, metavar="GBIT", help="between nodes, Gbit/s of all a node's adapters")
    add("--latency-us", type=float, metavar="US", help="of an empty collective between two (measured)")
    add("--overlap", type=float, default=0.0, help="share of the all-reduce behind the backward pass (0)")
    add("--check", action=argparse.BooleanOptionalAction, help="against two ranks (where they can run)")
    add("--limit", type=float, default=LIMIT, help=f"relative difference allowed ({LIMIT:g})")
    add("--rounds", type=int, default=7, help="(7)")
    add("--updates", type=int, default=4, help="of a window (4)")
    add("--picture", type=Path, metavar="FILE", help="draw the table, a PNG")
    add("--out", type=Path, metavar="FILE", help="append JSON lines: the inputs, each row, each check")
    return parser


if __name__ == "__main__":
    sys.exit(main())
