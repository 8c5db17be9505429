"""How many samples does one core read, decode and put into batches? Ours, webdataset's, the MedCoSS authors' way.

    python bench/loader.py                                      all of it, about two minutes
    python bench/loader.py --sorts grey --rounds 15             one sort of sample, more rounds
    python bench/loader.py --out bench/results/loader.jsonl     one JSON line a row, appended

The process is bound to one core. Loaders take turns, window by window; printed are medians over the rounds with the
20th and 80th percentile, and of ratios the median of the rounds' own. A rate is samples by seconds of CPU, of this
process and its workers: what a core gives whoever else uses it, too; what the clock says stands beside. No loader is
timed whose first batch, in stored order and without augmentation, is not the expected one: JPEGs to three levels, as
decoders round differently, volumes exactly. What the peers do is told in bench/loader_peers.py.

Nobody wins against a straw man: the authors' way must come within 25 % of the rates it was once measured at, 1,494
images and 246 volumes a second. Machines differ, so decoders alone are timed in the same rounds: simplejpeg on the grey
JPEGs (62 us there), and zlib, at its default level, on the bytes of the volumes (2,309 us there; it is two thirds of
reading .nii.gz). The column "scaled" is a rate at the speed of that machine; where blosc2 opens the volumes it is
scaled by blosc2 (188 us there), RGB images by simplejpeg (122 us).

Memory: resident size of a fresh process over 50,000 samples, beyond what it was after the first 5,000.

Exits 1 when something is refused or a target is missed. --quick runs all of it on a few samples: its figures mean
nothing, and only wrong samples are judged.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from mnemos.bench.loader_data import SORTS, Data, make
from mnemos.bench.loader_peers import (
    Loader,
    authors_images,
    authors_volumes,
    ours,
    webdataset_images,
    webdataset_volumes,
)
from mnemos.bench.loader_timing import (
    AUTHORS_DECODERS,
    DECODERS,
    Opened,
    Rate,
    Refused,
    calibrate,
    check,
    growth_afresh,
    one_core,
    straw_man,
)
from mnemos.bench.runs import machine
from mnemos.engine import dist
from mnemos.engine.plain_table import format_table
from mnemos.sharding.command import Parser, run_command
from mnemos.sharding.errors import UserError

OURS, AUTHORS = "ours", "authors'"
LOADERS: dict[str, tuple[Loader, ...]] = {
    "grey": (*map(ours, (0, 1, 2)), webdataset_images("pil"), webdataset_images("pill"), authors_images()),
    "rgb": (*map(ours, (0, 1, 2)), webdataset_images("pil")),
    "volume": (*map(ours, (0, 1, 2)), webdataset_volumes(), authors_volumes()),
}
READ_BY_OPENCV = "grey"  # by its peer that does what the authors do
GROWTH_BYTES = 16 << 20
BUSY = 0.9  # share of the core below which it is said that others used it


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much is measured: share of a sort's samples and batch, memory's samples, rounds, seconds a window."""

    divisor: int = 1
    memory: tuple[int, int] = (5_000, 50_000)
    rounds: int = 7
    seconds: float = 0.4


QUICK = Size(divisor=16, memory=(16, 32), rounds=1, seconds=0.01)


@dataclass(frozen=True, kw_only=True)
class Target:
    """What ours must reach: samples/s a core, or so many times another loader's."""

    sort: str
    least: float
    than: str = ""


TARGETS = (
    Target(sort="grey", least=9000),
    Target(sort="grey", least=2, than="webdataset pil"),
    Target(sort="grey", least=7, than=AUTHORS),
    Target(sort="volume", least=4500),
    Target(sort="volume", least=12, than=AUTHORS),
)


@dataclass(kw_only=True)
class Found:
    """What was found of one sort: rates by loader, a decoder's times in us by its name, growth in bytes, refusals."""

    data: Data
    rates: dict[str, list[Rate]] = field(default_factory=dict)
    us: dict[str, list[float]] = field(default_factory=dict)
    growth: int | None = None
    refused: list[str] = field(default_factory=list)

    @property
    def sort(self) -> str:
        """Name of the sort."""
        return self.data.sort.name

    def rate(self, loader: str) -> float:
        """Return a loader's samples/s a core, the median."""
        return statistics.median(rate.per_cpu_s for rate in self.rates[loader])

    def scale(self, loader: str) -> float:
        """Return what a loader's rate is multiplied with to be that of the other machine."""
        decoder = (AUTHORS_DECODERS if loader == AUTHORS else DECODERS)[self.sort]
        return statistics.median(self.us[decoder.name]) / decoder.us

    def ratio(self, loader: str) -> float:
        """Return how many times a loader's rate ours is, median of the rounds' own."""
        pairs = zip(self.rates[OURS], self.rates[loader], strict=True)
        return statistics.median(mine.per_cpu_s / other.per_cpu_s for mine, other in pairs)


def measure(found: Found, size: Size, done: Callable[[], object]) -> None:
    """Check the loaders of a sort, then time in rounds those that deliver the right samples."""
    loaders, data = [], found.data
    for loader in LOADERS[found.sort]:
        try:
            check(loader, data)
            loaders.append(Opened(loader, data))
        except Refused as reason:
            found.refused.append(f"{found.sort}: {reason}")
            tqdm.write(f"not timed: {found.refused[-1]}")
    if OURS in (one.loader.name for one in loaders):
        found.growth = growth_afresh(data, *size.memory)
    decoders = {
        one[found.sort].name: one[found.sort] for one in (DECODERS, AUTHORS_DECODERS) if found.sort in one
    }
    items = {name: decoder.items(data) for name, decoder in decoders.items()}
    for number in range(size.rounds):
        for name, decoder in decoders.items():
            found.us.setdefault(name, []).append(calibrate(decoder, items[name]))
        for one in loaders if number % 2 == 0 else reversed(loaders):
            found.rates.setdefault(one.loader.name, []).append(one.window(size.seconds))
            done()
    for one in loaders:
        one.close()


def figures(found: Found) -> list[dict[str, Any]]:
    """Return a row for every loader of a sort."""
    rows = []
    for loader, rates in found.rates.items():
        low, middle, high = np.percentile([rate.per_cpu_s for rate in rates], (20, 50, 80))
        clock = statistics.median(rate.per_s for rate in rates)
        rows.append(
            {
                "sort": found.sort,
                "loader": loader,
                "per_s_p20": round(low, 1),
                "per_s": round(middle, 1),
                "per_s_p80": round(high, 1),
                "clock_per_s": round(clock, 1),
                "scaled_per_s": round(middle * found.scale(loader), 1),
                "ratio": round(found.ratio(loader), 3) if OURS in found.rates else None,
            }
        )
    return rows


def judged(target: Target, found: Found) -> dict[str, Any]:
    """Return a row for a target; one whose loaders were refused is missed."""
    there = {OURS, target.than or OURS} <= set(found.rates)
    reached = (found.ratio(target.than) if target.than else found.rate(OURS)) if there else None
    scaled = reached * found.scale(OURS) if reached is not None and not target.than else None
    return {
        "target": f"{target.sort}, times {target.than}" if target.than else f"{target.sort}/s a core",
        "least": target.least,
        "reached": None if reached is None else round(reached, 2),
        "scaled": None if scaled is None else round(scaled, 1),
        "met": reached is not None and reached >= target.least,
    }


def judged_memory(found: Found) -> dict[str, Any]:
    """Return a row for the memory a sort's stream takes."""
    reached = None if found.growth is None else found.growth / 2**20
    return {
        "target": f"{found.sort}, MiB grown at most",
        "least": GROWTH_BYTES >> 20,
        "reached": reached if reached is None else round(reached, 2),
        "scaled": None,
        "met": reached is not None and found.growth is not None and found.growth <= GROWTH_BYTES,
    }


def fair(found: Found) -> list[str]:
    """Return why the authors' way is no fair peer, if it is none."""
    if AUTHORS not in found.rates:
        return []
    us = statistics.median(found.us[AUTHORS_DECODERS[found.sort].name])
    return [reason for reason in [straw_man(found.sort, found.rate(AUTHORS), us)] if reason]


def show(results: Sequence[Found], targets: Sequence[dict[str, Any]]) -> None:
    """Print the tables."""
    rows = [row for found in results for row in figures(found)]
    for row in rows:
        row["spread"] = f"{row['per_s_p20']:,.0f} to {row['per_s_p80']:,.0f}"
        for name in ("per_s", "clock_per_s", "scaled_per_s"):
            row[name] = round(row[name])
    columns = {
        "sort": "samples",
        "loader": "loader",
        "per_s": "/s a core",
        "spread": "p20 to p80",
        "scaled_per_s": "scaled",
        "clock_per_s": "by the clock",
        "ratio": "ours is, times",
    }
    print(format_table(rows, columns))
    for found in results:
        data, us = found.data, {name: statistics.median(times) for name, times in found.us.items()}
        sizes = f"{statistics.mean(map(len, data.payloads(64))) / 1e3:.1f} kB"
        if data.sort.modality.kind == "volume":
            sizes += (
                f", as .nii.gz {statistics.mean(file.stat().st_size for file in data.files) / 1e3:.1f} kB"
            )
        alone = ", ".join(f"{name} alone {time:.1f} us" for name, time in us.items())
        print(f"{found.sort}: {sizes} a sample; {alone}; batches of {data.batch}")
    single = [rate for found in results for rate in found.rates.get(OURS, [])]
    share = statistics.median(rate.per_s / rate.per_cpu_s for rate in single) if single else 1.0
    if share < BUSY:
        print(f"others used the core, too: {share:.0%} of it was ours")
    shown = [{**row, "met": "met" if row["met"] else "MISSED"} for row in targets]
    names = {"target": "target", "least": "asked", "reached": "found", "scaled": "scaled", "met": ""}
    print(format_table(shown, names))


def run(given: argparse.Namespace, size: Size) -> tuple[list[Found], list[dict[str, Any]]]:
    """Make the data, measure all of it, print and write it down; return what was found, and the targets."""
    results: list[Found] = []
    with tempfile.TemporaryDirectory(prefix="mnemos-loader-") as folder, one_core():
        sorts = [SORTS[name] for name in given.sorts]
        samples = sum(sort.num // size.divisor for sort in sorts)
        with tqdm(total=samples, desc="samples", unit="sample") as progress:
            for sort in sorts:
                for data in make(
                    sort, Path(folder) / sort.name, sort.num // size.divisor, sort.batch // size.divisor
                ):
                    progress.update(data is None)
                assert data is not None, "the last one is the data"
                results.append(Found(data=data))
        windows = size.rounds * sum(len(LOADERS[name]) for name in given.sorts)
        with tqdm(total=windows, desc="windows", unit="window") as progress:
            for found in results:
                measure(found, size, progress.update)
        targets = [
            judged(target, found) for found in results for target in TARGETS if target.sort == found.sort
        ]
        targets += [judged_memory(found) for found in results]
        show(results, targets)
    if given.out:
        with dist.quiet():
            about = {"bench": "loader", **machine(), "rounds": size.rounds, "seconds": size.seconds}
        decoders = [
            {"sort": one.sort, "decoder": name, "us": us} for one in results for name, us in one.us.items()
        ]
        with given.out.open("a", encoding="utf-8") as file:
            for row in [*(row for found in results for row in figures(found)), *decoders, *targets]:
                file.write(json.dumps({**about, **row}) + "\n")
    return results, targets


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and judge, return the exit code."""
    failed: list[str] = []

    def command(argv: Sequence[str] | None) -> None:
        given = make_parser().parse_args(argv)
        if given.rounds < 1 or not given.seconds > 0:
            raise UserError(
                f"--rounds {given.rounds} --seconds {given.seconds:g}: nothing would be measured; give more"
            )
        if given.out and not given.out.parent.is_dir():
            raise UserError(f"--out {given.out}: there is no folder {given.out.parent}; make it first")
        if find_spec("cv2") is None and READ_BY_OPENCV in given.sorts:
            raise UserError(
                "the peer that does what the authors do needs OpenCV, which is not installed; "
                "pip install opencv-python-headless, or this project with its extra: pip install -e '.[bench]'"
            )
        results, targets = run(
            given, QUICK if given.quick else Size(rounds=given.rounds, seconds=given.seconds)
        )
        failed.extend(reason for found in results for reason in found.refused)
        if given.quick:
            print("--quick: the figures mean nothing")
            return
        failed.extend(reason for found in results for reason in fair(found))
        failed.extend(f"missed: {row['target']}" for row in targets if not row["met"])
        if failed:
            print(*failed, sep="\n")

    return run_command(command, argv) or int(bool(failed))


def make_parser() -> Parser:
    """Return the parser with every flag."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--sorts",
        nargs="+",
        choices=list(SORTS),
        default=list(SORTS),
        metavar="NAME",
        help=f"of {', '.join(SORTS)}",
    )
    parser.add_argument(
        "--rounds", type=int, default=Size.rounds, help=f"windows of a loader ({Size.rounds})"
    )
    parser.add_argument("--seconds", type=float, default=Size.seconds, help=f"of a window ({Size.seconds:g})")
    parser.add_argument("--quick", action="store_true", help="a few samples, to see that it works")
    parser.add_argument("--out", type=Path, metavar="FILE", help="append one JSON line a row")
    return parser


if __name__ == "__main__":
    sys.exit(main())
