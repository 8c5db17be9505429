"""The shard sets of the step bench: a user's, or drawn ones in the sizes of a preset."""

from pathlib import Path
from typing import Any

import numpy as np

from mnemos.bench.loader_data import draw_image, draw_volume
from mnemos.engine.data_root import find_shard_sets
from mnemos.sharding.modalities import DEFAULT_ORDER, MODALITIES, STORED_SIZES, Modality
from mnemos.sharding.sample import Sample
from mnemos.sharding.tokenizer import train_tokenizer
from mnemos.sharding.writer import ShardSetWriter


def find_sets(shards: Path) -> dict[str, Path]:
    """Return the first shard set of every kind below a folder.

    Raises:
        UserError: there is none.
    """
    found = find_shard_sets(shards)
    ordered = [name for name in DEFAULT_ORDER if name in found]
    return {MODALITIES[name].kind: Path(found[name]).resolve() for name in reversed(ordered)}


def make_sets(folder: Path, preset: str, samples: int) -> dict[str, Path]:
    """Make a shard set of each kind in the sizes of a preset, of drawn samples."""
    if preset == "sample":
        from mnemos.sharding.synthetic.make import VISITS, make_sample_shards

        groups = {"train": -(-samples // VISITS), "val": 3}
        make_sample_shards(folder, progress=False, groups=groups)
        return find_sets(folder)
    folder.mkdir()
    sets: dict[str, Path] = {}
    for name in DEFAULT_ORDER:
        modality = MODALITIES[name]
        if modality.kind not in sets:
            sets[modality.kind] = folder / name
            _make_set(folder / name, modality, preset, samples)
    return sets


def _make_set(folder: Path, modality: Modality, preset: str, samples: int) -> None:
    from mnemos.sharding.synthetic import reports, studies

    size, kind = STORED_SIZES[preset], modality.kind
    rng = np.random.default_rng(0)
    drawn: list[Any]
    tokenizer = None
    if kind == "text":
        visits = studies.draw_studies(0, "train", samples + 2, 1)
        drawn = [
            reports.write_report(study, np.random.default_rng(place)) for place, study in enumerate(visits)
        ]
        tokenizer = folder.with_suffix(".tokenizer")
        train_tokenizer(drawn, size.vocab).save(str(tokenizer))
    elif kind == "image":
        drawn = [draw_image(rng, modality.channels, 5.0).transpose(2, 0, 1) for _ in range(samples + 2)]
    else:
        drawn = [draw_volume(rng, 20.0) for _ in range(samples + 2)]
    with ShardSetWriter(
        folder,
        modality=modality,
        source="synthetic",
        shape={"text": (size.text,), "image": size.image, "volume": size.volume}[kind],
        spacing_mm=size.spacing_mm if kind == "volume" else None,
        preset=preset,
        classes=(),
        recipe={"drawn": "for bench/step.py"},
        key=b"a key of the step bench",
        tokenizer_file=tokenizer,
    ) as writer:
        for number, array in enumerate(drawn):
            split = "train" if number < samples else "val"
            scale = {"text": 1.0, "image": 1 / 255, "volume": 1 / 1024}[kind]
            writer.add(split, Sample(array=array, source=f"{kind}-{number}", group=str(number), scale=scale))
