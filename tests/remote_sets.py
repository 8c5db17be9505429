"""Eight small shards and stores of them that wait hardly at all; shared by the tests of storage."""

from pathlib import Path
from random import Random
from typing import Any

from mnemos.sharding.stores.storage import RemoteStore, Store, StoreOptions, open_store

SIZE = 40_000
SHARDS = {f"train/{number:06d}.tar": Random(number).randbytes(SIZE + number) for number in range(8)}
FIRST, SECOND = list(SHARDS)[:2]
ONE_RANGE = 1 << 20
"""A range that holds a whole shard; `quick` cuts one into five."""


def quick(folder: Path, **changes: Any) -> StoreOptions:
    """Return options with a cache below a folder."""
    settings = {"cache_dir": folder / "cache", "backoff_s": 0.001, "range_bytes": 9_000, "timeout_s": 5.0}
    return StoreOptions(**{**settings, **changes})


def remote(root: str, options: StoreOptions) -> RemoteStore:
    """Return the store of a root that is not local."""
    store = open_store(root, options)
    assert isinstance(store, RemoteStore)
    return store


def view(store: Store, name: str) -> bytes:
    """Return one of the shards, as a store gives it."""
    return bytes(store.view(name, len(SHARDS[name])))


def cached(store: RemoteStore) -> dict[str, int]:
    """Return what lies in the cache: name of the file -> length."""
    return {
        path.name: path.stat().st_size for path in sorted(store.cache.folder.rglob("*")) if path.is_file()
    }
