"""Is a training step slower than at another revision? Both measured side by side, window by window.

    python bench/step_against.py --against HEAD            the tree as it is against the last commit
    python bench/step_against.py --against v0.1 --kinds text --rounds 9

Updates of the sample preset (its model, batch and data), everything from reading a batch to the optimiser. Pretext and
rehearsal apart, for every kind of data. The revision is checked out into a temporary folder. In every round two fresh
processes, one for each tree, take turns (A B B A B A A B), so that what else the machine does meets both alike, and so
does the luck of where a process lies in memory; the quickest of its turns stands for a process. Printed: milliseconds
an update and their ratio, medians over the rounds. Exits 1 when the sum over all kinds grew by more than --limit.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mnemos.bench.runs import machine
from mnemos.bench.worker_process import WorkerProcess, last_line
from mnemos.engine import dist
from mnemos.engine.plain_table import format_table
from mnemos.sharding.command import Parser, run_command
from mnemos.sharding.errors import UserError
from mnemos.sharding.modalities import DEFAULT_ORDER, MODALITIES

REPOSITORY = Path(__file__).resolve().parents[1]
KINDS = tuple(dict.fromkeys(MODALITIES[name].kind for name in DEFAULT_ORDER))
TURNS = (0, 1, 1, 0, 1, 0, 0, 1)  # of the two sides, for each window of a round
SHORT_RUN = 4  # updates of the stages that come before the measured ones


def stages() -> list[str]:
    """Return the stages of the run: the first modality of each kind, then one more whose stage rehearses them all."""
    first = {MODALITIES[name].kind: name for name in reversed(DEFAULT_ORDER)}
    chosen = [name for name in DEFAULT_ORDER if name in first.values()]
    return [*chosen, next(name for name in reversed(DEFAULT_ORDER) if name not in chosen)]


class Side(WorkerProcess):
    """One tree's worker process.

    Args:
        title: of the tree, for messages.
        tree: whose `mnemos` it runs.
        log: file its output goes to.
    """

    def __init__(self, title: str, tree: Path, log: Path) -> None:
        super().__init__(title, Path(__file__).with_name("step_against_worker.py"), log, environment(tree))

    def ask(self, what: object) -> Any:
        """Send one line, return the answer.

        Raises:
            UserError: the worker ended, or its tree lacks what is measured.
        """
        self.send(what)
        answer = self.answer()
        if isinstance(answer, dict) and "failed" in answer:
            raise UserError(
                f"{self.title} cannot be measured ({answer['failed']}); name a revision whose StageTraining can be "
                "used as bench/step_against_worker.py does"
            )
        return answer


def environment(tree: Path) -> dict[str, str]:
    """Return the environment in which `mnemos` is that of a tree."""
    return {**os.environ, "PYTHONPATH": str(tree / "typings")}


def git(*arguments: str) -> str:
    """Return what a git command prints.

    Raises:
        UserError: it failed.
    """
    command = ["git", "-C", str(REPOSITORY), *arguments]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"git {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout.strip()


@contextmanager
def checked_out(revision: str, folder: Path) -> Iterator[Path]:
    """Check a revision out below a folder; leaves no trace in the repository."""
    tree = folder / "tree"
    try:
        git("worktree", "add", "--quiet", "--detach", str(tree), revision)
        yield tree
    finally:
        subprocess.run(
            ["git", "-C", str(REPOSITORY), "worktree", "remove", "--force", str(tree)],
            check=False,
            capture_output=True,
        )


def make_data(tree: Path, data: Path) -> None:
    """Make the sample shards with a tree's own generator: their format may be another in each.

    Raises:
        UserError: it failed.
    """
    command = [sys.executable, "-m", "mnemos.sharding.synthetic.make", "--out", str(data)]
    log = data.with_suffix(".log")
    with log.open("w") as file:
        done = subprocess.run(
            command,
            env=environment(tree),
            stdout=file,
            stderr=subprocess.STDOUT,
            check=False,
            cwd=data.parent,
        )
    if done.returncode:
        raise UserError(f"{tree} cannot make its sample shards: {last_line(log)}")


def make_run(tree: Path, data: Path, run: Path) -> None:
    """Do the stages before the last one, a few updates each, with a tree's own command.

    Raises:
        UserError: it failed.
    """
    *earlier, _ = stages()
    log = run.with_suffix(".log")
    flags = [
        "--stage",
        earlier[-1],
        "--steps",
        str(SHORT_RUN),
        "--set",
        f"curriculum.stages=[{','.join(stages())}]",
    ]
    command = [
        sys.executable,
        str(tree / "engine" / "train.py"),
        "--run",
        str(run),
        "--data",
        str(data),
        *flags,
    ]
    with log.open("w") as file:
        done = subprocess.run(
            command, env=environment(tree), stdout=file, stderr=subprocess.STDOUT, check=False, cwd=run.parent
        )
    if done.returncode:
        raise UserError(f"the revision cannot train on {data}: {last_line(log)}")


def compare(
    sides: Sequence[Side], requests: Sequence[dict[str, Any]], order: Sequence[int]
) -> dict[str, list[float]]:
    """Return, for every window, the milliseconds on each side: the quickest of its turns.

    Raises:
        UserError: the trees have different windows.
    """
    # one after the other: they share the cores
    ready = [side.ask(request) for side, request in zip(sides, requests, strict=True)]
    if any(one != ready[0] for one in ready):
        raise UserError(
            f"{sides[0].title} trains on {ready[0]}, {sides[1].title} on {ready[1]}; compare like with like"
        )
    found = {}
    for name in ready[0]["windows"]:
        turns: list[list[float]] = [[] for _ in sides]
        for side in order:
            turns[side].append(1e3 * sides[side].ask(name))
        found[name] = [min(times) for times in turns]
    return found


def summary(found: dict[str, list[list[float]]]) -> tuple[list[dict[str, Any]], float]:
    """Return the table's rows, and the ratio of the sums over all windows, now over before.

    Milliseconds are medians over the rounds. So are ratios, of the rounds' own: both sides of a round met the same load.
    """
    sums = [[sum(times) for times in zip(*side, strict=True)] for side in zip(*found.values(), strict=True)]
    rows = [_row(name, *sides) for name, sides in {**found, "all -": sums}.items()]
    return rows, rows[-1]["ratio"]


def _row(name: str, before: list[float], now: list[float]) -> dict[str, Any]:
    kind, phase = name.split()
    ratio = statistics.median(new / old for old, new in zip(before, now, strict=True))
    medians = (round(statistics.median(times), 2) for times in (before, now))
    return {
        "kind": kind,
        "phase": phase,
        **dict(zip(("before", "now"), medians, strict=True)),
        "ratio": ratio,
    }


def measure(revision: str, given: argparse.Namespace) -> dict[str, list[list[float]]]:
    """Return, for every window, the milliseconds of all rounds on each side; every round has processes of its own."""
    found: dict[str, list[list[float]]] = {}
    with (
        tempfile.TemporaryDirectory(prefix="mnemos-step-") as name,
        checked_out(revision, Path(name)) as tree,
    ):
        folder = Path(name)
        places = {given.against: tree, "the tree as it is": REPOSITORY}
        requests = []
        for side, (title, place) in enumerate(places.items()):
            print(f"the stages before, {SHORT_RUN} updates each, at {title} ...", flush=True)
            data, run = given.data or folder / f"data{side}", folder / f"run{side}"
            if given.data is None:
                make_data(place, data)
            make_run(place, data, run)
            requests.append(
                {
                    "flags": ["--stage", stages()[-1], "--run", str(run), "--data", str(data)],
                    "pretext": [name for name in stages()[:-1] if MODALITIES[name].kind in given.kinds],
                    "kinds": given.kinds,
                    "steps": given.steps,
                }
            )
        for number in tqdm(range(given.rounds), desc="rounds", unit="round"):
            with ExitStack() as stack:
                sides = [
                    stack.enter_context(Side(title, place, folder / f"{side}.log"))
                    for side, (title, place) in enumerate(places.items())
                ]
                order = TURNS if number % 2 == 0 else [1 - side for side in TURNS]
                for window, times in compare(sides, requests, order).items():
                    for before, one in zip(found.setdefault(window, [[], []]), times, strict=True):
                        before.append(one)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print table and JSON line, return the exit code."""
    slower: list[float] = []

    def command(argv: Sequence[str] | None) -> None:
        given = make_parser().parse_args(argv)
        for name in ("rounds", "steps"):
            if getattr(given, name) < 1:
                raise UserError(f"--{name} {getattr(given, name)}: nothing would be measured; give 1 or more")
        revision = git("rev-parse", "--verify", "--quiet", f"{given.against}^{{commit}}")
        given.data = given.data and given.data.resolve()
        found = measure(revision, given)
        rows, ratio = summary(found)
        columns = {"kind": "kind", "phase": "phase", "before": given.against, "now": "now", "ratio": "ratio"}
        print(f"ms an update, median of {given.rounds} rounds, {given.steps} updates a window")
        print(format_table([{**row, "ratio": f"{row['ratio']:.3f}"} for row in rows], columns))
        record = {"against": revision, "rounds": given.rounds, "steps": given.steps, "ratio": round(ratio, 4)}
        with dist.quiet():
            where = machine()
        print(json.dumps({"bench": "step against", **where, **record, "ms": found}))
        if ratio > 1 + given.limit:
            slower.append(ratio)
            print(f"slower by {100 * (ratio - 1):.1f} %; {100 * given.limit:g} % are allowed")

    return run_command(command, argv) or int(bool(slower))


def make_parser() -> Parser:
    """Return the parser with every flag."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", required=True, metavar="REV", help="the revision to compare with")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="all by default")
    parser.add_argument("--rounds", type=int, default=5, help="pairs of fresh processes (5)")
    parser.add_argument("--steps", type=int, default=6, help="updates of a window (6)")
    parser.add_argument("--limit", type=float, default=0.03, help="how much slower is still well (0.03)")
    parser.add_argument(
        "--data",
        type=Path,
        help="folder of sample shards that both revisions read (default: each makes its own)",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
