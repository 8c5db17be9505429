"""A shard set whose images say their own number, in many small shards; shared by the tests of order and of stores."""

from pathlib import Path

import numpy as np
from sample_files import KEY

from mnemos.engine.slots import Schedule
from mnemos.sharding.modalities import MODALITIES
from mnemos.sharding.reader import ShardSet
from mnemos.sharding.sample import Sample
from mnemos.sharding.writer import ShardSetWriter

BATCH = 12
SIZE = 53
STEPS = 12  # three epochs of four whole batches


def write_numbered(folder: Path) -> Path:
    """Write the set: image number n has the value n everywhere."""
    with ShardSetWriter(
        folder,
        modality=MODALITIES["xray"],
        source="synthetic",
        shape=(8, 8),
        spacing_mm=None,
        preset="sample",
        classes=(),
        recipe={},
        key=KEY,
        shard_bytes=12_000,
        lossless=True,
    ) as writer:
        for number in range(SIZE):
            writer.add("train", Sample(array=np.full((1, 8, 8), number, np.uint8), source=f"{number}"))
    return folder


def schedule_of(shards: ShardSet) -> Schedule:
    """Return the schedule of three epochs over it."""
    return Schedule(
        sizes=(SIZE,),
        batch=BATCH,
        pretext_steps=STEPS,
        least_share=0.0,
        seed=7,
        stage="order",
        shards=(tuple(shard.samples for shard in shards.manifest.splits["train"].shards),),
        streams=4,
    )
