"""Make the sample shards: synthetic data of all five modalities, the same bytes from the same seed.

Nothing is downloaded and nothing is copied: generators draw films, tiles, slabs and reports. Every modality has
streams of random numbers of its own, so one does not change when another does.
"""

import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from mnemos.sharding.building.preprocess import recipe
from mnemos.sharding.command import Parser, run_command
from mnemos.sharding.errors import UserError
from mnemos.sharding.keys import SYNTHETIC_KEY
from mnemos.sharding.modalities import MODALITIES, STORED_SIZES
from mnemos.sharding.sample import Sample
from mnemos.sharding.synthetic import bodies, chests, heads, reports, studies, tiles
from mnemos.sharding.synthetic.drawing import stream
from mnemos.sharding.tokenizer import train_tokenizer
from mnemos.sharding.writer import ShardSetWriter, check_new_folder

VERSION = "1"  # of the generators; a change of any of them raises it
SEED = 2311
SIZE = STORED_SIZES["sample"]
VISITS = 4  # samples a group
GROUPS = {"train": 240, "val": 48}  # multiples of 3, for classes of equal size
BATCH = 16  # groups of images drawn at once; part of what the bytes depend on
WORKERS = 2


def draw_reports(split: str, groups: int, seed: int = SEED) -> Iterator[Sample]:
    """Yield the report of every study."""
    for place, study in enumerate(studies.draw_studies(seed, split, groups, VISITS)):
        text = reports.write_report(study, stream(seed, "report", split, place))
        yield _sample(text, f"chest/{split}", place, study.label)


def draw_films(split: str, groups: int, seed: int = SEED) -> Iterator[Sample]:
    """Yield the film of every study, in the order of the reports."""
    shown = studies.draw_studies(seed, split, groups, VISITS)
    for start in range(0, len(shown), BATCH * VISITS):
        batch = shown[start : start + BATCH * VISITS]
        films = chests.draw_chests(batch, stream(seed, "xray", split, start), SIZE.image[0])
        for place, (film, study) in enumerate(zip(films, batch, strict=True), start):
            yield _sample(film[None], f"chest/{split}", place, study.label, scale=1 / 255)


def draw_tiles(split: str, groups: int, seed: int = SEED) -> Iterator[Sample]:
    """Yield tissue tiles."""
    of_N = np.repeat(np.arange(groups), VISITS)
    for start in range(0, len(of_N), BATCH * VISITS):
        batch = of_N[start : start + BATCH * VISITS]
        labels = batch % len(tiles.CLASSES)
        drawn = tiles.draw_tiles(labels, batch, stream(seed, "pathology", split, start), SIZE.image[0])
        for place, (tile, label) in enumerate(zip(drawn, labels, strict=True), start):
            yield _sample(tile, f"tissue/{split}", place, tiles.CLASSES[label], scale=1 / 255)


def draw_bodies(split: str, groups: int, seed: int = SEED) -> Iterator[Sample]:
    """Yield CT slabs, in Hounsfield units."""
    for group in range(groups):
        label = group % len(bodies.CLASSES)
        rng = stream(seed, "ct", split, group)
        slabs = bodies.draw_bodies(np.full(VISITS, label), rng, SIZE.volume, SIZE.spacing_mm)
        for place, slab in enumerate(slabs, group * VISITS):
            yield _sample(slab, f"trunk/{split}", place, bodies.CLASSES[label], scale=1 / 1024)


def draw_heads(split: str, groups: int, seed: int = SEED) -> Iterator[Sample]:
    """Yield MR slabs in scanner units, with the scale and shift that make each a z-score."""
    for group in range(groups):
        label = group % len(heads.CLASSES)
        rng = stream(seed, "mri", split, group)
        slabs = heads.draw_heads(np.full(VISITS, label), rng, SIZE.volume, SIZE.spacing_mm)
        for place, slab in enumerate(slabs, group * VISITS):
            low, high = np.quantile(slab, (0.002, 0.998))
            stored = np.rint(np.clip(slab, low, high) * heads.UNITS).astype(np.int16)
            scale = 1 / float(stored.std())
            shift = -float(stored.mean()) * scale
            yield _sample(stored, f"head/{split}", place, heads.CLASSES[label], scale=scale, shift=shift)


def _sample(
    array: np.ndarray | str,
    people: str,
    place: int,
    label: str,
    *,
    scale: float = 1.0,
    shift: float = 0.0,
) -> Sample:
    """Return sample number ``place`` of the split ``people``; a film and its report have one name."""
    source, group = f"{people}/{place}", f"{people}/{place // VISITS}"
    return Sample(array=array, source=source, group=group, label=label, scale=scale, shift=shift)


GENERATORS: dict[str, tuple[Callable[..., Iterator[Sample]], tuple[str, ...], str]] = {
    "ct": (
        draw_bodies,
        bodies.CLASSES,
        "trunks drawn from solids in Hounsfield units; lesions in half of the patients",
    ),
    "mri": (
        draw_heads,
        heads.CLASSES,
        "heads drawn from shells with a random weighting; tumours in half of the patients",
    ),
    "pathology": (
        draw_tiles,
        tiles.CLASSES,
        "nuclei and stroma drawn as stain densities; classes differ in arrangement",
    ),
    "xray": (
        draw_films,
        studies.CLASSES,
        "chests drawn as sums of attenuations, exposed to a random film curve",
    ),
    "report": (draw_reports, studies.CLASSES, "texts of a grammar about the findings of the synthetic films"),
}


def make_set(name: str, folder: Path, groups: dict[str, int], seed: int = SEED) -> None:
    """Write the shard set of one modality to ``folder``, with ``groups`` groups in each split."""
    # glibc returns every freed block of a few 100 KB to the system until it has seen a larger one freed; without this
    # half of the generators' time goes into fetching fresh pages.
    np.empty(31 << 20, np.uint8)
    draw, classes, story = GENERATORS[name]
    modality = MODALITIES[name]
    shape = {"text": (SIZE.text,), "image": SIZE.image, "volume": SIZE.volume}[modality.kind]
    told = {
        "source": f"synthetic, generator version {VERSION}, seed {seed}: nothing here comes from a patient; "
        "drawn as the steps below would leave a real file",
        "content": story,
        "split": f"by group: {VISITS} samples of one made-up patient or slide lie in the same split",
        **recipe(modality, SIZE),
    }
    with TemporaryDirectory() as scratch:
        tokenizer_file = None
        if modality.kind == "text":
            tokenizer_file = Path(scratch) / "tokenizer.json"
            texts = (str(sample.array) for sample in draw("train", groups["train"], seed))
            train_tokenizer(texts, SIZE.vocab).save(str(tokenizer_file))
        with ShardSetWriter(
            folder,
            modality=modality,
            source="synthetic",
            shape=shape,
            spacing_mm=SIZE.spacing_mm if modality.kind == "volume" else None,
            preset="sample",
            classes=classes,
            recipe=told,
            key=SYNTHETIC_KEY,
            tokenizer_file=tokenizer_file,
        ) as writer:
            for split, number in groups.items():
                for sample in draw(split, number, seed):
                    writer.add(split, sample)


def make_sample_shards(
    root: Path, progress: bool = True, groups: dict[str, int] | None = None, seed: int = SEED
) -> None:
    """Make ``root`` with one shard set of each modality in it, whole or not at all.

    Args:
        root: absent or empty.
        progress: print a line for each modality as it is finished.
        groups: number of groups by split; None for the full set of about 1,000 and 200 samples.
        seed: of all generators.

    Raises:
        UserError: ``root`` is not empty or cannot be made.
    """
    root = Path(root)
    check_new_folder(root)
    partial = root.parent / f".{root.name}.partial-{os.getpid()}"
    started = time.monotonic()
    try:
        try:
            partial.mkdir(parents=True)
        except OSError as error:
            raise UserError(f"--out {root} cannot be made ({error.strerror}); name another one") from error
        # Spawned, because the caller may hold threads; two, because more would not pay on the smallest machine.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(WORKERS, context) as pool:
            jobs = {
                pool.submit(make_set, name, partial / name, groups or GROUPS, seed): name
                for name in GENERATORS
            }
            for job in as_completed(jobs):
                job.result()
                if progress:
                    print(f"  {jobs[job]:<10} made, {time.monotonic() - started:.1f} s", flush=True)
        check_new_folder(root)
        with suppress(FileNotFoundError):
            root.rmdir()
        partial.replace(root)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def main(argv: Sequence[str] | None = None) -> None:
    """Make the sample shards as the command line says."""
    parser = Parser(
        prog="python -m mnemos.sharding.synthetic.make", description="Make the synthetic sample shards."
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="a new folder; it gets one sub-folder per modality"
    )
    arguments = parser.parse_args(argv)
    make_sample_shards(arguments.out)
    print(f"written to {arguments.out}")


if __name__ == "__main__":
    sys.exit(run_command(main))
