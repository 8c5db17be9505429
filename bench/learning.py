"""Does the model infer what is hidden from what it sees? A control: visible patches taken from another sample.

    python bench/learning.py

Trains the curriculum twice, as it is and with every sample's visible patches replaced by another's
(`training.shuffle_visible`), and prints both validation losses against the best constant predictor's. Texts have no
such control; their line stands for completeness.
"""

import argparse
from pathlib import Path

from mnemos.bench.runs import Run, do_runs, without_model
from mnemos.engine.plain_table import format_table
from mnemos.sharding.modalities import DEFAULT_ORDER

TARGET = 0.90  # of the best constant's loss, for images and volumes


def main() -> None:
    """Do both runs and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; the cores are shared out")
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path("runs/learning"),
        help="where the runs lie; finished ones are kept",
    )
    parser.add_argument("flags", nargs="*", help="further flags of engine/train.py, after --")
    given = parser.parse_args()
    runs = [
        Run(name="real", flags=("--strategy", "sequential")),
        Run(name="shuffled", flags=("--strategy", "sequential", "--set", "training.shuffle_visible=true")),
    ]
    found = do_runs(given.folder, runs, DEFAULT_ORDER[-1], given.flags, given.jobs)
    rows = []
    for stage in DEFAULT_ORDER:
        real, shuffled = found["real"][stage], found["shuffled"][stage]
        rows.append(
            {
                "stage": stage,
                "no model": f"{without_model(real):.3f}",
                "loss": f"{real['validation']['loss']:.3f}",
                "ratio": f"{real['validation']['ratio']:.3f}",
                "shuffled": f"{shuffled['validation']['loss']:.3f}",
                "shuffled ratio": f"{shuffled['validation']['ratio']:.3f}",
            }
        )
    print(format_table(rows, ["stage", "no model", "loss", "ratio", "shuffled", "shuffled ratio"]))
    print(
        f"images and volumes: a ratio of {TARGET:.2f} is asked for; shuffled visible patches must not reach it"
    )


if __name__ == "__main__":
    main()
