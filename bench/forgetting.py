"""Does rehearsal remember, and what does it cost? Whole curricula under two strategies and several seeds.

    python bench/forgetting.py --seeds 3

Drift is the mean squared change of a modality's pooled held-out features between its own stage and the last one, in
units of their variance. Printed beside it: each stage's own validation loss under both strategies. One JSON line a
(seed, strategy) goes to --out.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from mnemos.bench.runs import Run, do_runs, machine
from mnemos.engine.plain_table import format_table
from mnemos.sharding.modalities import DEFAULT_ORDER

STRATEGIES = ("medcoss", "sequential")


def main() -> None:
    """Do the runs and print both tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0 to N - 1")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; the cores are shared out")
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path("runs/forgetting"),
        help="where the runs lie; finished ones are kept",
    )
    parser.add_argument("--out", type=Path, help="append one JSON line a run to this file")
    parser.add_argument("flags", nargs="*", help="further flags of engine/train.py, after --")
    given = parser.parse_args()
    runs = [
        Run(name=f"{strategy}-{seed}", flags=("--strategy", strategy, "--seed", str(seed)))
        for seed in range(given.seeds)
        for strategy in STRATEGIES
    ]
    found = do_runs(given.folder, runs, DEFAULT_ORDER[-1], given.flags, given.jobs)
    print(drift_table(found, given.seeds))
    print()
    print(loss_table(found, given.seeds))
    if given.out:
        where = machine()
        with given.out.open("a", encoding="utf-8") as file:
            for name, stages in found.items():
                file.write(
                    json.dumps({"bench": "forgetting", "run": name, **where, "stages": list(stages.values())})
                    + "\n"
                )


def drift_table(found: dict[str, dict[str, Any]], seeds: int) -> str:
    """Return the drift after the last stage of every earlier modality: both strategies, seed by seed."""
    rows = []
    for modality in DEFAULT_ORDER[:-1]:
        row: dict[str, object] = {"modality": modality}
        ratios = []
        for seed in range(seeds):
            kept, plain = (
                found[f"{name}-{seed}"][DEFAULT_ORDER[-1]]["drift"][modality] for name in STRATEGIES
            )
            ratios.append(kept / plain)
            row[f"seed {seed}"] = f"{kept:.3f} / {plain:.3f} = {kept / plain:.2f}"
        rows.append({**row, "mean": f"{statistics.mean(ratios):.2f}"})
    columns = ["modality", *(f"seed {seed}" for seed in range(seeds)), "mean"]
    return "drift after the last stage, medcoss / sequential (at most 0.50 is asked for)\n" + format_table(
        rows, columns
    )


def loss_table(found: dict[str, dict[str, Any]], seeds: int) -> str:
    """Return each stage's own validation loss: both strategies, seed by seed."""
    rows = []
    for modality in DEFAULT_ORDER:
        row: dict[str, object] = {"stage": modality}
        ratios = []
        for seed in range(seeds):
            kept, plain = (found[f"{name}-{seed}"][modality]["validation"]["loss"] for name in STRATEGIES)
            ratios.append(kept / plain)
            row[f"seed {seed}"] = f"{kept:.3f} / {plain:.3f} = {kept / plain:.3f}"
        rows.append({**row, "mean": f"{statistics.mean(ratios):.3f}"})
    columns = ["stage", *(f"seed {seed}" for seed in range(seeds)), "mean"]
    return "validation loss of a stage, medcoss / sequential (at most 1.030 is asked for)\n" + format_table(
        rows, columns
    )


if __name__ == "__main__":
    main()
