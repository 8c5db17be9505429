"""Where does a step's time go, and how much of it could be saved?

    python bench/step_profile.py --kind image --phase pretext
    python bench/step_profile.py --kind text --phase rehearsal --batch 32 --precision fp32 --detail
    python bench/step_profile.py --kind volume --phase embedding --preset sample --data data_shards/sample

Some real steps of the engine (model, DeepSpeed, optimiser; a batch of an embedding pass) run under torch's profiler, at a
preset's size, by default on shard sets of noise made for the purpose. A step begins with its batch in the host's memory:
reading is what bench/loader.py measures. Written to the folder --out:

    trace.json.gz   every operator and kernel; open it in ui.perfetto.dev or chrome://tracing
    step.txt        the table
    step.png        the same as bars: what a role takes, and what it could take
    step.json       all of it, for programs

How to read the table. A row is a role; the rows add up to the step. On a GPU `ms` is the time of the role's kernels, and
`device idle` what lies between them; `host ms` is what the processor needed to launch them, which costs nothing while the
device is busy. On a CPU `ms` is all there is. `GFLOP` and `MB` are the least the role must do: products and attention
once, every operand read and written once. `could be` is how long that takes at the rates of this machine, a large matrix
product and a copy, both measured in the same run: a role far above it is worth work, one near it is done. Roles without
a figure there need not exist. The engine's own estimate of FLOPs, above the table, takes texts at full length. `other` is
what no rule of bench/step_profile_roles.py knows; above 15 % of the step the table means little and the exit code is 1.

The profiler itself takes time, in every operator the same: compare the step's two times, with and without it.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from mnemos.bench import step_profile_picture
from mnemos.bench.op_timing import copy_bytes_per_s
from mnemos.bench.runs import machine
from mnemos.bench.step_profile_data import make_sets
from mnemos.bench.step_profile_roles import OTHER, break_down, read_trace
from mnemos.bench.step_profile_run import WARM_UP, Subject, make_embedding, make_training, record, wait
from mnemos.bench.step_profile_table import Row, as_text, detail, headlines, table
from mnemos.bench.step_profile_work import work_by_role
from mnemos.engine import dist
from mnemos.engine.arguments import parse
from mnemos.engine.curriculum import Plan, make_plan
from mnemos.engine.data_root import find_shard_sets
from mnemos.engine.estimates import matrix_rate
from mnemos.engine.presets import PRESETS
from mnemos.engine.settings import Settings
from mnemos.kernels.linear import product
from mnemos.sharding.command import Parser, run_command
from mnemos.sharding.errors import UserError
from mnemos.sharding.manifest import load_manifest
from mnemos.sharding.modalities import DEFAULT_ORDER, MODALITIES

PHASES = ("pretext", "rehearsal", "embedding")
BATCH = {"cpu": 8, "cuda": 128}
MOST_OTHER = 0.15
MANY_UPDATES = 400  # of a schedule: enough that every set has its turns
CALIBRATIONS = 3
EDGE = {"cpu": 1024, "cuda": 8192}  # of the matrices that tell how fast a product can be


def plan_for(given: argparse.Namespace, folder: Path) -> Plan:
    """Return a plan whose last stage is of the asked kind, the others one of every other kind that there is.

    Raises:
        UserError: the data hold no set of that kind, or a setting does not fit.
    """
    data = given.data or make_sets(folder / "data", given.preset)
    there = {name: load_manifest(place).kind for name, place in find_shard_sets(data).items()}
    names = {there[name]: name for name in reversed(DEFAULT_ORDER) if name in there}
    if given.kind not in names:
        raise UserError(
            f"--data {data}: holds no {given.kind} set, only {', '.join(sorted(set(there.values())))}; name a folder that has one, or "
            "another --kind"
        )
    order = [name for kind, name in names.items() if kind != given.kind] + [names[given.kind]]
    settings: Row = {
        "curriculum.stages": f"[{','.join(order)}]",
        "training.batch": given.batch,
        "training.precision": given.precision,
        "training.steps": MANY_UPDATES,
        "rehearsal.mix_group": mix_group(given.batch),
        "data.workers": 0,
        "training.graphs": "never",  # a replayed graph's kernels belong to no operator; --set turns it on
    }
    flags = [
        "--stage",
        order[-1],
        "--run",
        str(folder / "run"),
        "--data",
        str(data),
        "--preset",
        given.preset,
    ]
    for key, value in settings.items():
        flags += ["--set", f"{key}={value}"]
    for assignment in given.assignments:
        flags += ["--set", assignment]
    return make_plan(parse(flags), 1)


def mix_group(batch: int) -> int:
    """Return the largest run of mixing partners, 16 at most, that divides a batch."""
    return next(size for size in range(min(16, batch), 1, -1) if batch % size == 0)


def seconds_of(subject: Subject) -> float:
    """Return the seconds of a step without the profiler: the batches one after the other, after a warm-up."""
    first, *others = subject.batches
    for _ in range(WARM_UP):
        subject.do(first)
    for batch in others:  # texts have other sizes in every batch
        subject.do(batch)
    wait()
    start = time.perf_counter()
    for batch in others:
        subject.do(batch)
    wait()
    return (time.perf_counter() - start) / len(others)


def rates(bf16: bool) -> tuple[float, float]:
    """Return what this machine reaches at its best: FLOP/s of a large matrix product, bytes/s of a copy.

    The best of several: whatever else the machine does can only take from it.
    """
    device = dist.device()
    found = [matrix_rate(device, bf16=bf16) for _ in range(CALIBRATIONS)]
    edge, dtype = EDGE[device.type], torch.bfloat16 if bf16 else torch.float32
    left, right = (torch.randn(edge, edge, device=device, dtype=dtype) for _ in range(2))
    for _ in range(CALIBRATIONS):
        wait()
        start = time.perf_counter()
        product(left, right)
        wait()
        found.append(2 * edge**3 / (time.perf_counter() - start))
    return max(found), copy_bytes_per_s(device)


def measure(given: argparse.Namespace) -> tuple[Row, list[Row], bool]:
    """Profile, write the trace, and return what is true of all, the rows, and whether a device was measured."""
    dist.adopt_environment()
    if dist.world_size() > 1:
        raise UserError(f"{dist.world_size()} ranks were started; a profile is of one: start it with python")
    with tempfile.TemporaryDirectory(prefix="mnemos-profile-") as name, dist.quiet():
        threads = torch.get_num_threads()
        dist.meet()
        plan = plan_for(given, Path(name))
        if given.phase == "embedding":
            if not torch.cuda.is_available():
                torch.set_num_threads(1)  # every core computes batches of its own: one of them is looked at
            subject = make_embedding(plan, given.batch, given.steps)
        else:
            subject = make_training(plan, given.phase, given.steps)
        step_s = seconds_of(subject)
        record(subject, given.out / "trace.json.gz")
        flops_per_s, bytes_per_s = rates(subject.bf16)
        about = {
            "bench": "step_profile",
            "kind": given.kind,
            "phase": given.phase,
            "preset": given.preset,
            **machine(),
        }
        torch.set_num_threads(threads)
    found = break_down(read_trace(given.out / "trace.json.gz"), given.steps)
    settings: Settings = plan.settings
    work = work_by_role(subject.load, settings, given.phase, bf16=subject.bf16, parameters=subject.parameters)
    about |= {
        "precision": "bf16" if subject.bf16 else "fp32",
        "batch": settings.training.batch if given.phase != "embedding" else given.batch,
        "steps": given.steps,
        "parameters": subject.parameters,
        "ms": 1e3 * step_s,
        "profiled_ms": found.step_ms,
        "product_flop_per_s": flops_per_s,
        "copy_bytes_per_s": bytes_per_s,
        "estimate_flop": subject.load.estimate.get(given.phase),
        "other": found.other_share,
    }
    return about, table(found, work, flops_per_s, bytes_per_s), found.on_device


def main(argv: Sequence[str] | None = None) -> int:
    """Profile, print and write, return the exit code."""
    unknown: list[float] = []

    def command(argv: Sequence[str] | None) -> None:
        given = make_parser().parse_args(argv)
        check(given)
        given.out.mkdir(parents=True, exist_ok=True)
        about, rows, on_device = measure(given)
        text = f"{headlines(about)}\n\n{as_text(rows, on_device=on_device)}\n"
        if given.detail:
            text += f"\nms of a step by operator or kernel\n{detail(rows)}\n"
        print(text)
        (given.out / "step.txt").write_text(text, encoding="utf-8")
        record_line = json.dumps({**about, "rows": rows})
        (given.out / "step.json").write_text(record_line + "\n", encoding="utf-8")
        step_profile_picture.draw(given.out / "step.png", about, rows)
        if given.json:
            with given.json.open("a", encoding="utf-8") as file:
                file.write(record_line + "\n")
        print(
            f"written: {', '.join(str(given.out / name) for name in ('trace.json.gz', 'step.txt', 'step.png'))}"
        )
        if about["other"] > MOST_OTHER:
            unknown.append(about["other"])
            names = next(row["names"] for row in rows if row["role"] == OTHER)
            print(
                f"other is {100 * about['other']:.0f} % of the step, {100 * MOST_OTHER:.0f} % are allowed: give its names a "
                f"role in bench/step_profile_roles.py: {', '.join(names)}"
            )

    return run_command(command, argv) or int(bool(unknown))


def check(given: argparse.Namespace) -> None:
    """Raise UserError for numbers and places that make no sense; fill in the defaults that depend on others."""
    if given.batch is None:
        given.batch = BATCH["cuda" if torch.cuda.is_available() else "cpu"]
    if given.batch < 2:
        raise UserError(
            f"--batch is {given.batch}; 2 samples or more are allowed, since rehearsal mixes them"
        )
    if given.steps < 1:
        raise UserError(f"--steps {given.steps}: nothing would be measured; give 1 or more")
    if given.json and not given.json.parent.is_dir():
        raise UserError(f"--json {given.json}: there is no folder {given.json.parent}; make it first")
    if given.out is None:
        given.out = Path("runs") / "step_profile" / f"{given.kind}-{given.phase}"


def make_parser() -> Parser:
    """Return the parser with every flag."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    kinds = sorted({one.kind for one in MODALITIES.values()})
    add("--kind", choices=kinds, required=True, help="of data")
    add("--phase", choices=PHASES, default="pretext", help="of training, or an embedding pass (pretext)")
    add("--preset", choices=list(PRESETS), default="base", help="sizes of model and samples (base)")
    add("--batch", type=int, help=f"samples of a step ({BATCH['cpu']} on a CPU, {BATCH['cuda']} on a GPU)")
    add("--precision", choices=("auto", "bf16", "fp32"), default="auto", help="computed in (auto)")
    add("--steps", type=int, default=3, help="to record (3)")
    add(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="assignments",
        help="a setting of the engine",
    )
    add("--data", type=Path, metavar="FOLDER", help="holds shard sets of the preset's size (default: noise)")
    add("--out", type=Path, metavar="FOLDER", help="for the files (runs/step_profile/KIND-PHASE)")
    add("--json", type=Path, metavar="FILE", help="append the profile to it as one line")
    add("--detail", action="store_true", help="name the operators or kernels of every role")
    return parser


if __name__ == "__main__":
    code = main()
    dist.leave(code)
