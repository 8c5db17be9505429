"""On a GPU: batches are copied from page-locked memory that is used again, and arrive as they are stored."""

from functools import partial
from pathlib import Path

import pytest
import torch
from numbered_sets import BATCH, SIZE, STEPS, schedule_of, write_numbered

from mnemos.engine.stage_training import _requests
from mnemos.sharding.reader import ShardSet
from mnemos.sharding.stream import RawBatch, Request, read_batch, stream

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_from_the_ring_arrive_whole(tmp_path: Path, workers: int) -> None:
    shards = ShardSet(write_numbered(tmp_path / "set"), "train")
    device = torch.device("cuda")
    work = torch.randn(4096, 4096, device=device)
    arrived = []
    for batch in stream(
        [shards], partial(_requests, schedule_of(shards), 0, 0, 1), workers=workers, pin=True
    ):
        assert isinstance(batch, RawBatch) and batch.data.is_pinned()
        for _ in range(20):  # the copy waits behind work, while the ring goes on
            work = work @ work / 4096
        arrived.append(batch.to(device).data)
    assert len(arrived) == STEPS
    expected = [slot.samples.tolist() for slot in schedule_of(shards).slots()]
    for images, numbers in zip(arrived, expected, strict=True):
        assert images.shape == (BATCH, 1, 8, 8) and images.is_contiguous()
        assert images[:, 0, 0, 0].tolist() == numbers
        assert (images == images[:, :, :1, :1]).all()


def test_colours_reach_the_device_in_planes(tiny_sets: Path) -> None:
    name = next(path.name for path in sorted(tiny_sets.iterdir()) if path.name == "pathology")
    shards = ShardSet(tiny_sets / name, "train")
    numbers = torch.arange(5).numpy()
    raw = read_batch([shards], Request(step=0, member=0, samples=numbers, places=numbers))
    images = raw.to(torch.device("cuda")).data
    assert images.is_contiguous() and len(images) < SIZE
    assert torch.equal(images[3].cpu(), torch.from_numpy(shards.read(3)))
