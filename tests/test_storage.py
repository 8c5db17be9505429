"""Stores: every shard arrives whole, or fails by its name.

The faults come from a server of our own (`flaky_server`), the object store is moto's.
"""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from flaky_server import FlakyServer
from remote_sets import FIRST, ONE_RANGE, SECOND, SHARDS, SIZE, cached, quick, remote, view
from s3_double import SECRET, s3_bucket

from mnemos.sharding.errors import DataError, StoreError
from mnemos.sharding.stores.object_process import classify
from mnemos.sharding.stores.storage import list_sets


@pytest.mark.parametrize("ranges", [True, False], ids=["ranges", "no-ranges"])
def test_flaky_server_delivers_every_shard_whole(tmp_path: Path, ranges: bool) -> None:
    with FlakyServer(SHARDS, rate=1 / 3, seed=1, ranges=ranges) as server:
        store = remote(server.url, quick(tmp_path))
        for name, content in SHARDS.items():
            assert view(store, name) == content
        failed = {fault for _, _, fault in server.requests if fault}
        asked = len(server.requests)
        for name, content in SHARDS.items():  # from the cache
            assert view(store, name) == content
        assert len(server.requests) == asked
    assert len(failed) >= 3, "too few kinds of faults occurred: change the seed"
    assert sorted(cached(store).values()) == sorted(len(content) for content in SHARDS.values())


def test_a_server_without_ranges_is_asked_for_whole_shards(tmp_path: Path) -> None:
    with FlakyServer(SHARDS, ranges=False) as server:
        store = remote(server.url, quick(tmp_path))
        assert view(store, FIRST) == SHARDS[FIRST]
        assert view(store, SECOND) == SHARDS[SECOND]
        assert [place for path, place, _ in server.requests if path == SECOND] == [""], (
            "ranges were tried again"
        )


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("drop", "IncompleteBody"),
        ("short", "4500 of 9000 bytes came"),
        ("500", "HTTP 500"),
        ("503", "HTTP 503"),
        ("429", "HTTP 429"),
        ("408", "HTTP 408"),
    ],
)
def test_a_lasting_fault_names_root_shard_and_reason(tmp_path: Path, fault: str, reason: str) -> None:
    with FlakyServer(SHARDS, always={FIRST: fault}) as server:
        store = remote(server.url, quick(tmp_path, retries=2))
        with pytest.raises(StoreError) as caught:
            view(store, FIRST)
        places = [place for path, place, _ in server.requests if path == FIRST]
        assert view(store, SECOND) == SHARDS[SECOND], "its neighbour is sound"
    message = str(caught.value)
    assert FIRST in message and server.url in message and reason in message and "3 attempts" in message
    assert max(places.count(place) for place in places) == 3
    assert cached(store) == {name: size for name, size in cached(store).items() if "000001" in name}


@pytest.mark.parametrize("status", ["404", "403", "401", "400"])
def test_what_will_not_change_fails_at_once(tmp_path: Path, status: str) -> None:
    with FlakyServer(SHARDS, always={FIRST: status}) as server:
        store = remote(server.url, quick(tmp_path, range_bytes=ONE_RANGE, retries=5))
        with pytest.raises(StoreError, match=f"{FIRST} of {server.url}.*HTTP {status}"):
            view(store, FIRST)
        assert server.count(FIRST) == 1
    assert cached(store) == {}


def test_a_stalled_answer_is_given_up(tmp_path: Path) -> None:
    with FlakyServer(SHARDS, always={FIRST: "stall"}) as server:
        store = remote(server.url, quick(tmp_path, retries=1, timeout_s=0.2))
        with pytest.raises(StoreError, match="TimedOut"):
            store.read_small(FIRST, 10_000_000)  # a bound that leaves the whole answer minutes
        assert server.count(FIRST) == 2


def test_small_files_are_given_up_sooner(tmp_path: Path) -> None:
    with FlakyServer(SHARDS, always={FIRST: "503"}) as server:
        store = remote(server.url, quick(tmp_path, range_bytes=ONE_RANGE, retries=7))
        with pytest.raises(StoreError, match="6 attempts"):
            store.read_small(FIRST, SIZE)
        with pytest.raises(StoreError, match="8 attempts"):
            view(store, FIRST)
        assert server.count(FIRST) == 6 + 8


def test_half_a_small_file_is_not_taken_for_the_whole(tmp_path: Path) -> None:
    with FlakyServer(SHARDS, always={FIRST: "short"}) as server:
        store = remote(server.url, quick(tmp_path, retries=1))
        with pytest.raises(StoreError, match=r"2 attempts.*20000 of 40000 bytes came"):
            store.read_small(FIRST, 10 * SIZE)
    assert cached(store) == {}


def test_nobody_listens(tmp_path: Path) -> None:
    with FlakyServer(SHARDS) as server:
        url = server.url
    with pytest.raises(StoreError, match=r"000000\.tar of http.*Connection refused.*try again"):
        view(remote(url, quick(tmp_path, retries=1)), FIRST)


def test_another_length_than_the_manifest_says(tmp_path: Path) -> None:
    with FlakyServer(SHARDS) as server:
        store = remote(server.url, quick(tmp_path, retries=1))
        with pytest.raises(StoreError, match="train/000000"):
            store.view(FIRST, SIZE + 5)
        whole = remote(server.url, quick(tmp_path, retries=1, range_bytes=ONE_RANGE))
        with pytest.raises(StoreError, match=f"{SIZE} bytes where {SIZE + 5} are expected"):
            whole.view(FIRST, SIZE + 5)
        with pytest.raises(DataError, match=f"{SIZE} bytes where {SIZE - 5} are allowed"):
            whole.view(FIRST, SIZE - 5)
    assert cached(store) == {}


def test_sha256_is_checked_after_fetching(tmp_path: Path) -> None:
    right = hashlib.sha256(SHARDS[FIRST]).hexdigest()
    with FlakyServer(SHARDS) as server:
        store = remote(server.url, quick(tmp_path, range_bytes=ONE_RANGE))
        assert bytes(store.view(FIRST, SIZE, right)) == SHARDS[FIRST]
        assert server.count(FIRST) == 1
        with pytest.raises(DataError, match=r"000000\.tar: fetched twice"):
            store.view(FIRST, SIZE, "0" * 64)
        assert server.count(FIRST) == 3
        assert bytes(store.read_small(FIRST, SIZE, right)) == SHARDS[FIRST]
        with pytest.raises(DataError, match="sha256"):
            store.read_small(FIRST, SIZE, "0" * 64)
    assert len(cached(store)) == 1


def test_read_small_and_exists(tmp_path: Path) -> None:
    files = {"manifest.json": b"{}", "empty": b"", "a b/ü%20#?.json": b"odd"}
    with FlakyServer(files, rate=1 / 3, seed=3) as server:
        store = remote(server.url + "/", quick(tmp_path))
        assert [store.exists(name) for name in (*files, "none")] == [True, True, True, False]
        assert [store.read_small(name, 100) for name in files] == list(files.values())
        with pytest.raises(DataError, match="2 bytes where 1 are allowed"):
            store.read_small("manifest.json", 1)
        with pytest.raises(StoreError, match=r"none of http.*is not there: HTTP 404"):
            store.read_small("none", 1)
        assert store.view("empty", 0) == b""


def test_list_sets_tries_names(tmp_path: Path) -> None:
    files = {"chest/manifest.json": b"{}", "head/manifest.json": b"{}", "knee/other.json": b"{}"}
    for name, content in files.items():
        (tmp_path / "sets" / name).parent.mkdir(parents=True)
        (tmp_path / "sets" / name).write_bytes(content)
    names = ("chest", "head", "knee", "none")
    with FlakyServer(files, always={"none/manifest.json": "403"}) as server:
        assert list_sets(server.url, names, quick(tmp_path)) == {
            name: f"{server.url}/{name}" for name in ("chest", "head")
        }
        with pytest.raises(StoreError, match="403"):
            list_sets(server.url, ("knee", "none"), quick(tmp_path))
        server.always["head/manifest.json"] = "503"
        with pytest.raises(StoreError, match="503"):  # an outage does not pass for a missing set
            list_sets(server.url, names, quick(tmp_path, retries=1))
    local = list_sets(str(tmp_path / "sets"), names, quick(tmp_path))
    assert local == {name: str(tmp_path / "sets" / name) for name in ("chest", "head")}
    pipe = f"pipe:cat {tmp_path / 'sets'}/{{name}}"
    assert list_sets(pipe, names, quick(tmp_path, pipe=True)) == {
        name: f"pipe:cat {tmp_path / 'sets'}/{name}/{{name}}" for name in ("chest", "head")
    }


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """Yield the root of a bucket with the shards."""
    files = {f"chest/{name}": content for name, content in SHARDS.items()}
    with s3_bucket("shard-sets", {**files, "chest/manifest.json": b"{}"}) as root:
        yield f"{root}/chest"


def test_s3_delivers_every_shard(bucket: str, tmp_path: Path) -> None:
    store = remote(bucket, quick(tmp_path))
    for name, content in SHARDS.items():
        assert view(store, name) == content
    assert store.read_small("manifest.json", 100) == b"{}"
    assert list_sets("s3://shard-sets", ("chest", "head"), quick(tmp_path)) == {"chest": bucket}
    with pytest.raises(
        StoreError, match="none of s3://shard-sets/chest is not there: HTTP 404 Not Found NoSuchKey"
    ):
        store.view("none", 5)
    with pytest.raises(StoreError, match="NoSuchBucket") as caught:
        remote("s3://no-such-set/chest", quick(tmp_path, range_bytes=ONE_RANGE)).view(FIRST, SIZE)
    assert SECRET not in str(caught.value)


def test_s3_keys_of_the_command_line_files(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint = os.environ["AWS_ENDPOINT_URL"]
    for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_PROFILE", "lab")
    (tmp_path / "credentials").write_text("[lab]\naws_access_key_id = a\naws_secret_access_key = b\n")
    (tmp_path / "config").write_text(f"[profile lab]\nregion = us-east-1\nendpoint_url = {endpoint}\n")
    assert view(remote(bucket, quick(tmp_path)), FIRST) == SHARDS[FIRST]
    monkeypatch.setenv("AWS_PROFILE", "sso")
    (tmp_path / "config").write_text("[profile sso]\nsso_session = x\n")
    with pytest.raises(StoreError, match=r"'sso' has no static keys: .*export-credentials --profile sso"):
        remote(bucket, quick(tmp_path)).exists(FIRST)
    (tmp_path / "config").write_text(f"aws_secret_access_key = {SECRET}\n")
    with pytest.raises(StoreError, match="is not written as the AWS command line writes it") as caught:
        remote(bucket, quick(tmp_path)).exists(FIRST)
    assert SECRET not in str(caught.value)


def test_settings_that_are_missing_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("AZURE_")]:
        monkeypatch.delenv(name)
    with pytest.raises(StoreError, match=r"Account must be specified.*check the address and the credentials"):
        remote("az://container/sets", quick(tmp_path)).exists("manifest.json")


def test_reasons_hold_no_signature() -> None:
    fault = classify(
        RuntimeError(f"no answer from https://host/sets/a.tar?sig={SECRET}&x=1 today\n\nDebug source: x")
    )
    assert str(fault) == "no answer from https://host/sets/a.tar?... today"
