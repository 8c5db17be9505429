"""How fast is a training step: ours, ours without kernels, torch.compile alone, and the MedCoSS authors' way, side by side.

    python bench/step.py --shards FOLDER                        base preset, batch 8, every kind and phase
    python bench/step.py --shards FOLDER --kinds text --phases pretext --precision fp32 bf16
    python bench/step.py --preset sample --batch 16 --unchecked --rounds 2 --steps 2          a quick try
    python bench/step.py --shards FOLDER --batch 512 --end-to-end        on a GPU: the targets are for this
    python bench/step.py --shards FOLDER --numerics 200         is bf16 within the noise of fp32?
    python bench/step.py --shards FOLDER --out bench/results/step.jsonl       one JSON line a row, appended

Phases: pretext (masked reconstruction or masked words), rehearsal (distillation on mixed samples), embedding (nothing
masked, no gradient). FOLDER holds shard sets as --data of engine/train.py does; the first of each kind is measured.
Without --shards, sets of drawn samples in the preset's sizes are made in a temporary folder.

Sides, in one process, taking turns window by window (A B C D, D C B A, ...):
- ours: `StageTraining.train_step` of a real stage under DeepSpeed, and the embedding of engine/rehearsal; crops, masks
  and mixing are part of it. With --end-to-end once more from tar shards, reading included; the reference is not read.
- no kernels: the same with every kernel's function replaced by its definition in plain PyTorch.
- compiled: no kernels, and the blocks through torch.compile. Off on a CPU unless --compiled: compiling takes minutes.
- reference: what the authors' step does, written for this bench (bench/step_reference.py). It starts from our weights
  and has our pixels, masks, words, DropPath and positions; its loader's work (crops, fp32 pixels) is not in its time.

Nothing is timed unless (1) the fp32 losses of ours and the reference agree to 1e-5 for every row, and (2) the reference
reaches 90 % of the published rates of the authors' own model, scaled by what matrix products reach here: base preset,
batch 8, a CPU with two threads. For anything else no rate was published: say --unchecked, and the table says so. On a
GPU there are modelled rates only, which are printed.

Columns: samples/s is the median over the windows, beside it its quartiles; ratio is to the reference, the median of the
rounds' own; MFU is useful operations (visible patches, real tokens, masked predictions; see bench/step_rates.py) over a
peak that is printed; host ms is CPU time of this process to issue an update (on a CPU that is the step itself); peak MB
is what the side itself takes of a GPU. Texts are measured with the authors' 49,411 words and with the tokenizer's own.

Last comes what DeepSpeed costs: the update under it less the same in a plain loop, see bench/step_overhead.py.
Exits 1 when it refuses to time or when --numerics finds bf16 outside the noise.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from mnemos.bench import step_rates as rates
from mnemos.bench.runs import machine
from mnemos.bench.step_data import find_sets, make_sets
from mnemos.bench.step_inputs import KINDS, Data
from mnemos.bench.step_numerics import SEEDS, numerics
from mnemos.bench.step_overhead import ALLOWED_MS, Overhead, narrow, overhead
from mnemos.bench.step_plain import KernelRan
from mnemos.bench.step_rows import BENCH_PHASES, Bench, Refused, Task, check_losses, check_rates
from mnemos.bench.step_timing import show
from mnemos.engine import dist
from mnemos.engine.parallel import computes_in_bf16
from mnemos.engine.plain_table import format_table
from mnemos.engine.presets import PRESETS
from mnemos.engine.stage_model import OFFICIAL_VOCAB
from mnemos.sharding.command import Parser, run_command
from mnemos.sharding.errors import UserError

VOCABULARIES: dict[str, int | None] = {"authors": OFFICIAL_VOCAB, "own": None}
DRAWN_SAMPLES = 160  # of a set made for the purpose: an embedding window of texts, and some
Row = dict[str, Any]


def tasks_of(data: Data, given: argparse.Namespace, compiled: bool) -> list[Task]:
    """Return what is to be measured, a task for every kind and vocabulary."""
    return [
        Task(
            data=data,
            kind=kind,
            vocab=vocab,
            phases=given.phases,
            steps=given.steps,
            rounds=given.rounds,
            compiled=compiled,
            end_to_end=given.end_to_end,
        )
        for kind in given.kinds
        for vocab in ([VOCABULARIES[name] for name in given.vocabularies] if kind == "text" else [None])
    ]


def check(tasks: Sequence[Task], precisions: Sequence[str], device: torch.device, unchecked: bool) -> None:
    """Print what is compared before anything is timed.

    Raises:
        Refused: losses differ, or the reference is slower than the authors' own model.
        UserError: no rate was published of what is measured, and --unchecked was not given.
    """
    data = tasks[0].data
    published = rates.has_published_rate(data.preset, data.batch, device)
    if device.type == "cpu" and not published and not unchecked:
        came = f"preset {data.preset}, batch {data.batch}, {torch.get_num_threads()} threads"
        raise UserError(
            f"{came}: rates of the authors' model were published for preset {rates.PUBLISHED_PRESET}, batch "
            f"{rates.PUBLISHED_BATCH} and {rates.PUBLISHED_THREADS} threads on a CPU; measure that, or give --unchecked"
        )
    for task in tasks:
        for phase, difference in check_losses(task).items():
            print(f"{task.title}, {phase}: fp32 losses agree to {difference:.1e}", flush=True)
    for task in tasks:
        for precision in precisions if published and not unchecked else ():
            print(*check_rates(task, precision), sep="\n", flush=True)
    if device.type == "cuda":
        for task in tasks:
            modelled = {phase: rates.MODELLED.get((task.kind, phase)) for phase in task.phases}
            told = ", ".join(f"{phase} {rate or 'none'}" for phase, rate in modelled.items())
            print(f"{task.title}: modelled samples/s of the authors' step on an H200, never measured: {told}")
    elif not published or unchecked:
        print("the reference was NOT held against the published rates of the authors' model (--unchecked)")


def time_rows(
    tasks: Sequence[Task], precisions: Sequence[str], device: torch.device, write: Callable[[list[Row]], None]
) -> list[Row]:
    """Time every task in every precision; return the table's rows, each written as soon as it is there."""
    rows: list[Row] = []
    for precision in precisions:
        calibrated = rates.gemm_rate(device, precision)
        peak, what = rates.peak_rate(device, precision, calibrated)
        told = f"matrix products in {precision}: {calibrated / 1e9:.0f} GFLOP/s"
        print(f"{told}; MFU is of {f'{peak / 1e12:.3f} TFLOP/s, ' if peak else ''}{what}", flush=True)
        for task in tasks:
            sides = 3 + task.compiled + task.end_to_end
            bench = Bench(task=task, precision=precision)
            total = task.rounds * sides * len(task.phases)
            with tqdm(total=total, unit="window", desc=f"{task.title}, {precision}", leave=False) as bar:
                try:
                    bench.build()
                    for phase in task.phases:
                        found = bench.time(phase, peak, bar.update)
                        write(found)
                        rows += found
                finally:
                    bench.close()
    return rows


def measure_overhead(data: Data, given: argparse.Namespace, precision: str) -> list[Overhead]:
    """Measure and print what DeepSpeed costs, at full size and where compute vanishes."""
    kind = "image" if "image" in data.sets else given.kinds[0]
    cases = [("as narrow as can be", narrow(data), 4 * given.rounds), ("full size", data, given.rounds)]
    with tqdm(total=3 * sum(rounds for *_, rounds in cases), unit="window", leave=False) as bar:
        found = [
            one
            for title, case, rounds in cases
            for one in overhead(
                case,
                kind,
                title=title,
                precision=precision,
                rounds=rounds,
                steps=given.steps,
                advance=bar.update,
            )
        ]
    print(f"\nDeepSpeed's part of an update, {kind} pretext, {precision}; {ALLOWED_MS:g} ms are the aim")
    rows = [one.row() for one in found]
    print(format_table(rows, list(rows[0])))
    return found


def measure_numerics(data: Data, given: argparse.Namespace) -> Row:
    """Compare loss curves and print the verdict."""
    kind, steps = given.kinds[0], given.numerics
    with tqdm(total=(1 + len(SEEDS)) * steps, unit="update", leave=False) as bar:
        found, curves = numerics(data, kind, steps, bar.update)
    print(
        f"{kind} pretext, {steps} updates: bf16 is {found['bf16_from_fp32']:.2g} from fp32 on the same batches (rms of "
        f"running means), fp32 is {found['fp32_seeds_apart']:.2g} from itself with other seeds; the last losses are "
        f"{found['last_bf16']:.4f} and {found['last_fp32']:.4f}; bf16 is "
        f"{'within' if found['within_noise'] else 'OUTSIDE'} the noise of fp32"
    )
    return {"kind": kind, "numerics": steps, **found, "curves": curves}


def run(given: argparse.Namespace, folder: Path) -> list[str]:
    """Check, measure, print and write down; return what failed."""
    dist.adopt_environment()
    with dist.quiet():
        dist.meet()
    device = dist.device()
    sets = (
        find_sets(given.shards) if given.shards else make_sets(folder / "drawn", given.preset, DRAWN_SAMPLES)
    )
    if missing := [kind for kind in given.kinds if kind not in sets]:
        raise UserError(
            f"--shards {given.shards}: holds no set of {', '.join(missing)}; name by --kinds what it has: {', '.join(sets)}"
        )
    data = Data(
        sets=sets, folder=folder, preset=given.preset, batch=given.batch, assignments=given.assignments
    )
    if given.numerics:
        row = measure_numerics(data, given)
        _write(given, [row])
        return [] if row["within_noise"] else ["bf16 is outside the noise of fp32"]
    compiled = device.type == "cuda" if given.compiled is None else given.compiled
    auto = "bf16" if computes_in_bf16("auto") else "fp32"
    precisions = list(dict.fromkeys(auto if one == "auto" else one for one in given.precision))
    tasks = tasks_of(data, given, compiled)
    try:
        check(tasks, precisions, device, given.unchecked)
        rows = time_rows(tasks, precisions, device, partial(_write, given))
    except (Refused, KernelRan) as reason:
        return [f"refused: {reason}"]
    print(f"batch {given.batch}, windows of {given.steps} batches, {given.rounds} rounds, {_threads(device)}")
    show(rows)
    if not compiled:
        print("compiled was not measured: on a CPU compiling takes minutes; --compiled measures it")
    for one in precisions if given.overhead else ():
        costs = measure_overhead(data, given, one)
        _write(given, [{"kind": "overhead", "precision": one, **cost.row()} for cost in costs])
    return []


def _threads(device: torch.device) -> str:
    return (
        f"{torch.get_num_threads()} threads" if device.type == "cpu" else torch.cuda.get_device_name(device)
    )


def _write(given: argparse.Namespace, rows: Sequence[Row]) -> None:
    """Append one JSON line a row, where asked to."""
    if not given.out:
        return
    with dist.quiet():
        where = machine()
    about = {
        "preset": given.preset,
        "batch": given.batch,
        "steps": given.steps,
        "rounds": given.rounds,
        "shards": "given" if given.shards else "drawn",
        "checked": not given.unchecked,
        "settings": given.assignments,
    }
    with given.out.open("a", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps({"bench": "step", **where, **about, **row}) + "\n")


def check_flags(given: argparse.Namespace) -> None:
    """Raise UserError for a number or a combination of flags that makes no sense."""
    for name, least in (("batch", 2), ("steps", 1), ("rounds", 1), ("numerics", 0)):
        if getattr(given, name) < least:
            raise UserError(f"--{name} is {getattr(given, name)}; {least} or more is allowed")
    if given.preset not in PRESETS or given.preset == "official":
        allowed = ", ".join(name for name in PRESETS if name != "official")
        raise UserError(f"--preset {given.preset}: the bench knows {allowed}; choose one of them")
    if given.shards and not given.shards.is_dir():
        raise UserError(f"--shards {given.shards}: there is no such folder; name one that holds shard sets")
    if given.out and not given.out.parent.is_dir():
        raise UserError(f"--out {given.out}: there is no folder {given.out.parent}; make it first")


def main(argv: Sequence[str] | None = None) -> int:
    """Check, measure and print; return the exit code."""
    failed: list[str] = []

    def command(argv: Sequence[str] | None) -> None:
        given = make_parser().parse_args(argv)
        check_flags(given)
        with tempfile.TemporaryDirectory(prefix="mnemos-step-") as folder:
            failed.extend(run(given, Path(folder)))
        if failed:
            print(*failed, sep="\n", file=sys.stderr)

    return run_command(command, argv) or int(bool(failed))


def make_parser() -> Parser:
    """Return the parser with every flag."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add: Callable[..., Any] = parser.add_argument
    add("--shards", type=Path, metavar="FOLDER", help="holds shard sets of the preset (default: drawn ones)")
    add("--preset", default="base", metavar="NAME", help="sizes of model and data (base)")
    add("--batch", type=int, default=8, help="samples of an update (8)")
    add("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="all by default")
    add("--phases", nargs="+", choices=BENCH_PHASES, default=list(BENCH_PHASES), help="all by default")
    add(
        "--precision",
        nargs="+",
        choices=("auto", "fp32", "bf16"),
        default=["auto"],
        help="(auto, as the engine's)",
    )
    add(
        "--vocabularies",
        nargs="+",
        choices=list(VOCABULARIES),
        default=list(VOCABULARIES),
        help="of texts (both)",
    )
    add(
        "--steps", type=int, default=4, help="batches of a window, of random lengths where they are texts (4)"
    )
    add("--rounds", type=int, default=5, help="windows of every side (5)")
    add("--end-to-end", action="store_true", help="measure ours from tar shards, too")
    add(
        "--compiled",
        action=argparse.BooleanOptionalAction,
        help="measure torch.compile alone (on a GPU: yes)",
    )
    add(
        "--overhead",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="measure DeepSpeed's part (yes)",
    )
    add("--unchecked", action="store_true", help="do not hold the reference against the published rates")
    add("--numerics", type=int, default=0, metavar="N", help="only compare N updates in bf16 and fp32")
    add(
        "--set",
        action="append",
        default=[],
        dest="assignments",
        metavar="KEY=VALUE",
        help="a setting of the engine, for all sides",
    )
    add("--out", type=Path, metavar="FILE", help="append one JSON line a row")
    return parser


if __name__ == "__main__":
    sys.exit(main())
