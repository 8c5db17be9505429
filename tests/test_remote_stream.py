"""A stream from afar delivers what a local one does, each sample exactly once, or fails with the shard's name."""

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from flaky_server import FlakyServer
from numbered_sets import STEPS, schedule_of, write_numbered
from remote_sets import quick
from s3_double import s3_bucket
from test_command_line import LAST, PYTHON, SMALL, call, errors, losses

from mnemos.engine.stage_training import _requests
from mnemos.sharding.errors import StoreError
from mnemos.sharding.manifest import load_manifest
from mnemos.sharding.modalities import DEFAULT_ORDER
from mnemos.sharding.reader import ShardSet
from mnemos.sharding.stores.storage import open_store
from mnemos.sharding.stream import stream


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with one set of many shards in it."""
    return write_numbered(tmp_path_factory.mktemp("remote") / "films").parent


def numbers(shards: ShardSet, workers: int, ranks: int = 1) -> list[int]:
    """Return the numbers the images of one epoch show, in the order in which they come."""
    schedule, found = replace(schedule_of(shards), pretext_steps=STEPS // 3), list[int]()
    for rank in range(ranks):
        plan = partial(_requests, schedule, 0, rank, ranks)
        for batch in stream([shards], plan, workers=workers, pin=False):
            found += batch.data[:, 0, 0, 0].tolist()
    return found


@pytest.mark.parametrize("workers", [0, 2])
def test_a_flaky_server_delivers_every_sample_exactly_once(
    folder: Path, tmp_path: Path, workers: int
) -> None:
    expected = numbers(ShardSet(folder / "films", "train"), 0)
    assert len(set(expected)) == len(expected) == 48
    with FlakyServer(folder, rate=0.3, seed=4) as server:
        shards = ShardSet(f"{server.url}/films", "train", quick(tmp_path))
        assert numbers(shards, workers) == expected
        assert sum(bool(fault) for _, _, fault in server.requests) >= 5, "too few faults: change the seed"


def test_two_ranks_of_two_readers_share_one_cache(folder: Path, tmp_path: Path) -> None:
    with FlakyServer(folder) as server:
        shards = ShardSet(f"{server.url}/films", "train", quick(tmp_path, range_bytes=1 << 20))
        found = numbers(shards, 2, ranks=2)
        names = {shard.name for shard in shards.manifest.splits["train"].shards}
        asked = [path.removeprefix("films/") for path, _, _ in server.requests if path.endswith(".tar")]
    assert sorted(found) == sorted(numbers(ShardSet(folder / "films", "train"), 0))
    assert set(asked) <= names and len(asked) == len(set(asked)), "no shard came twice"


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_that_cannot_be_had_is_named(folder: Path, tmp_path: Path, workers: int) -> None:
    victim = "films/train/000004.tar"
    with FlakyServer(folder, always={victim: "500"}) as server:
        shards = ShardSet(f"{server.url}/films", "train", quick(tmp_path, retries=1))
        with pytest.raises(StoreError, match=r"train/000004\.tar"):
            numbers(shards, workers)


def test_the_wrong_shard_in_the_right_place_is_noticed(folder: Path, tmp_path: Path) -> None:
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    files["films/train/000002.tar"] = files["films/train/000003.tar"]
    with FlakyServer(files) as server:
        shards = ShardSet(f"{server.url}/films", "train", quick(tmp_path))
        mine = np.flatnonzero(shards.index["shard"] == 2)
        _, skipped = shards.read_into(mine, np.zeros((len(mine), 8, 8, 1), np.uint8))
        assert {one.place for one in skipped} == set(mine.tolist())
        assert all("000002.tar" in one.reason for one in skipped)


@pytest.fixture(scope="module")
def bucket(folder: Path) -> Iterator[str]:
    """Yield the root of a bucket that holds the set."""
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with s3_bucket("sets", files) as root:
        yield root


@pytest.mark.parametrize("workers", [0, 2])
def test_an_object_store_delivers_every_sample_exactly_once(
    bucket: str, folder: Path, tmp_path: Path, workers: int
) -> None:
    shards = ShardSet(f"{bucket}/films", "train", quick(tmp_path))
    assert numbers(shards, workers) == numbers(ShardSet(folder / "films", "train"), 0)


def test_a_run_from_a_server_is_the_run_from_the_folder(tiny_sets: Path, tmp_path: Path) -> None:
    flags = ["--stage", LAST, *SMALL, "--set", "training.steps=4"]
    cache = ["--set", f"data.cache={tmp_path / 'cache'}", "--set", "data.workers=1"]
    call(PYTHON, *flags, "--data", tiny_sets, "--run", "near", cwd=tmp_path)
    with FlakyServer(tiny_sets, rate=0.2, seed=2) as server:
        call(PYTHON, *flags, *cache, "--data", server.url, "--run", "far", cwd=tmp_path)
        ledger = json.loads((tmp_path / "far" / "ledger.json").read_text())
        assert ledger["data"] == server.url
    assert losses(tmp_path / "far") == losses(tmp_path / "near")


def test_a_store_that_fails_is_named_and_worth_another_try(tmp_path: Path) -> None:
    with FlakyServer({}, always={f"{name}/manifest.json": "403" for name in DEFAULT_ORDER}) as server:
        done = call(PYTHON, "--stage", LAST, "--data", server.url, *SMALL, cwd=tmp_path, expect=75)
    (error,) = errors(done)
    assert server.url in error and "manifest.json" in error and "403" in error


def test_an_url_without_sets_is_a_mistake(tmp_path: Path) -> None:
    with FlakyServer({}) as server:
        done = call(PYTHON, "--stage", LAST, "--data", server.url, *SMALL, cwd=tmp_path, expect=2)
    (error,) = errors(done)
    assert "holds no shard set" in error and LAST in error


def test_a_pipe_is_refused_unless_asked_for(tiny_sets: Path, tmp_path: Path) -> None:
    root = f"pipe:cat {tiny_sets}/{{name}}"
    done = call(PYTHON, "--stage", LAST, "--data", root, *SMALL, "--dry-run", cwd=tmp_path, expect=2)
    (error,) = errors(done)
    assert "data.pipe" in error
    allowed = ["--set", "data.pipe=true", "--set", f"data.cache={tmp_path / 'cache'}"]
    call(PYTHON, "--stage", LAST, "--data", root, *SMALL, *allowed, "--dry-run", cwd=tmp_path)


def test_a_manifest_from_afar_is_checked(folder: Path, tmp_path: Path) -> None:
    files = {"films/manifest.json": (folder / "films" / "manifest.json").read_bytes().replace(b"8", b"9")}
    with FlakyServer(files) as server, pytest.raises(ValueError, match=r"films/manifest\.json is damaged"):
        load_manifest(open_store(f"{server.url}/films", quick(tmp_path)))
