"""Batches come in the plan's order with the plan's samples, whatever the number of reading processes."""

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from mnemos.sharding.errors import DataError
from mnemos.sharding.reader import ShardSet
from mnemos.sharding.stream import RawBatch, Request, read_batch, stream
from mnemos.sharding.tokenizer import PAD

NAMES = ("report", "xray", "ct")


def plan(count: int) -> Iterator[Request]:
    """Yield batches of four from three sets in turn."""
    for step in range(count):
        samples = np.arange(4, dtype=np.int64) * 3 + step % 7
        yield Request(step=step, member=step % len(NAMES), samples=samples, places=samples + 100 * step)


def sets(folder: Path) -> list[ShardSet]:
    return [ShardSet(folder / name, "train") for name in NAMES]


def kept(batches: Iterator[RawBatch]) -> list[RawBatch]:
    """Take all batches, each in memory of its own: the loader's is used again."""
    return [replace(batch, data=batch.data.clone()) for batch in batches]


def equal(one: RawBatch, two: RawBatch) -> bool:
    tensors = ("data", "scale_B", "shift_B", "place_B")
    same = all(torch.equal(getattr(one, name), getattr(two, name)) for name in tensors)
    return same and (one.step, one.member) == (two.step, two.member)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [1, 3])
def test_the_order_does_not_depend_on_the_workers(tiny_sets: Path, workers: int) -> None:
    alone = kept(stream(sets(tiny_sets), partial(plan, 10), workers=0, pin=False))
    shared = kept(stream(sets(tiny_sets), partial(plan, 10), workers=workers, pin=False))
    assert [batch.step for batch in alone] == list(range(10))
    assert len(alone) == len(shared) and all(map(equal, alone, shared))


def test_a_batch_holds_the_stored_values(tiny_sets: Path) -> None:
    texts, images, volumes = sets(tiny_sets)
    requests = list(plan(3))
    ids, films, scans = (read_batch(sets(tiny_sets), request) for request in requests)
    for row, number in enumerate(requests[0].samples):
        stored = texts.read(int(number))
        assert ids.data[row, : len(stored)].tolist() == stored.tolist()
        assert (ids.data[row, len(stored) :] == PAD).all()
    assert ids.data.shape[1] == max(len(texts.read(int(number))) for number in requests[0].samples)
    assert films.data.dtype == torch.uint8 and scans.data.dtype == torch.int16
    assert torch.equal(films.data[2], torch.from_numpy(images.read(int(requests[1].samples[2]))))
    assert torch.equal(scans.data[1, 0], torch.from_numpy(volumes.read(int(requests[2].samples[1]))))
    assert torch.equal(scans.place_B, torch.from_numpy(requests[2].places))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_sample_is_named(tiny_sets: Path, tmp_path: Path, workers: int) -> None:
    shutil.copytree(tiny_sets / "xray", tmp_path / "xray")
    shard = next((tmp_path / "xray" / "train").glob("*.tar"))
    broken = ShardSet(tmp_path / "xray", "train")
    at = int(broken.index["offset"][3]) + 5
    content = bytearray(shard.read_bytes())
    content[at] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DataError, match=rf"{shard.name}:{broken.index['key'][3].decode()}") as told:
        list(stream([broken], partial(only, 3), workers=workers, pin=False))
    assert "\n" not in str(told.value)  # a reader's traceback stays with the reader


def only(number: int) -> Iterator[Request]:
    one = np.array([number], dtype=np.int64)
    yield Request(step=0, member=0, samples=one, places=one)


def test_readers_outlive_a_signal_to_the_job(tiny_sets: Path) -> None:
    batches = stream(sets(tiny_sets), partial(plan, 40), workers=2, pin=False)
    first = next(batches)
    readers = multiprocessing.active_children()
    assert len(readers) == 2
    for reader in readers:
        assert reader.pid is not None
        os.kill(reader.pid, signal.SIGTERM)
    assert [first.step, *(batch.step for batch in batches)] == list(range(40))


def test_a_stream_given_up_early_leaves_no_reader(tiny_sets: Path) -> None:
    batches = stream(sets(tiny_sets), partial(plan, 40), workers=2, pin=False)
    next(batches)
    readers = multiprocessing.active_children()
    assert len(readers) == 2
    batches.close()
    assert not [reader for reader in readers if reader.is_alive()]


def test_a_program_that_ends_amid_a_stream_ends(tiny_sets: Path) -> None:
    script = (
        "import sys; from functools import partial; from pathlib import Path; import test_stream as here\n"
        "batches = here.stream(here.sets(Path(sys.argv[1])), partial(here.plan, 40), workers=2, pin=False)\n"
        "kept = [next(batches), next(batches)]; print(kept[1].step)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tiny_sets)],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert done.stdout == "1\n"
