"""Roots and names that are refused, commands as roots, local folders, and the waits between attempts."""

import pickle
from pathlib import Path
from typing import Any

import pytest
from remote_sets import FIRST, SHARDS, SIZE, quick, remote, view

from mnemos.sharding.errors import DataError, StoreError, UserError
from mnemos.sharding.stores.storage import StoreOptions, as_root, open_store
from mnemos.sharding.stores.transfer import Passing, persist


def test_pipe_is_refused_unless_allowed(tmp_path: Path) -> None:
    root = f"pipe:touch {tmp_path}/ran; cat {{name}}"
    with pytest.raises(UserError, match="pipe: root runs a command and is refused"):
        open_store(root, quick(tmp_path))
    with pytest.raises(UserError, match=r"needs \{name\}"):
        open_store("pipe:cat everything", quick(tmp_path, pipe=True))
    assert not (tmp_path / "ran").exists()


def test_pipe_reads_what_the_command_prints(tmp_path: Path) -> None:
    for name, content in SHARDS.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    # fails at every first call for a name
    seen = f"test -e {tmp_path}/$(basename {{name}}).seen || {{ touch {tmp_path}/$(basename {{name}}).seen; exit 3; }}"
    store = remote(f"pipe:{seen}; cat {tmp_path}/{{name}}", quick(tmp_path, pipe=True, retries=1))
    for name, content in SHARDS.items():
        assert view(store, name) == content
    plain = remote(f"pipe:cat {tmp_path}/{{name}}", quick(tmp_path, pipe=True, retries=1))
    assert plain.read_small(FIRST, SIZE) == SHARDS[FIRST]
    assert plain.exists(FIRST) and not plain.exists("none")
    with pytest.raises(DataError, match="more than 39999 bytes"):
        plain.read_small(FIRST, SIZE - 1)
    with pytest.raises(
        StoreError, match=r"none of pipe:cat-\w{8} cannot be read: 2 attempts.*code 1: cat: .*No such"
    ):
        plain.view("none", 5)
    with pytest.raises(StoreError, match="40000 bytes where 40005"):
        plain.view(FIRST, SIZE + 5)
    assert str(tmp_path) not in plain.root, "the command may hold a password"
    assert view(pickle.loads(pickle.dumps(plain)), FIRST) == SHARDS[FIRST]


def test_pipe_is_bounded_in_time_and_bytes(tmp_path: Path) -> None:
    endless = remote("pipe:yes {name}", quick(tmp_path, pipe=True, retries=0))
    with pytest.raises(DataError, match="more than 5 bytes"):
        endless.view("a", 5)
    silent = remote("pipe:sleep 60 # {name}", quick(tmp_path, pipe=True, retries=0, timeout_s=0.2))
    with pytest.raises(StoreError, match="printed nothing"):
        silent.view("a", 5)


def test_pipe_names_cannot_leave_their_quotes(tmp_path: Path) -> None:
    store = remote(f"pipe:cat '{tmp_path}/{{name}}'", quick(tmp_path, pipe=True, retries=0))
    for name in ("a; touch ran", "$(touch ran)", "`touch ran`", "a'b", "-rf", "a\u00a0b", "a b"):
        with pytest.raises(UserError, match="name"):
            store.view(name, 5)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "name",
    [
        "../a",
        "a/../b",
        "/a",
        "a//b",
        "a/",
        "./a",
        "",
        "..",
        "a\\b",
        "file:///a",
        "C:/a",
        "http://x/a",
        "a\nb",
        "a\0b",
    ],
)
def test_names_that_lead_out_are_refused(tmp_path: Path, name: str) -> None:
    for root in (str(tmp_path), "http://127.0.0.1:1/sets", "pipe:cat {name}"):
        store = open_store(root, quick(tmp_path, pipe=True))
        with pytest.raises(UserError, match="leads out of"):
            store.exists(name)
        with pytest.raises(UserError, match="leads out of"):
            store.read_small(name, 9)
        with pytest.raises(UserError, match="leads out of"):
            store.view(name, 9)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("root", "message"),
    [
        ("ftp://host/sets", r"ftp:// is no kind of root; a folder, file://, http"),
        ("https://alice:hunter2@host/sets", "came with a user or a password"),
        ("https://hunter2@host/sets", "came with a user or a password"),
        ("https://host/sets?sig=hunter2", r"came with a \? or # part"),
        ("s3:///sets", "no host or bucket"),
        ("http://[hunter2/sets", "no valid URL"),
        ("file://host/sets", "without a host"),
    ],
)
def test_roots_that_are_refused(tmp_path: Path, root: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        open_store(root, quick(tmp_path))
    assert "hunter2" not in str(caught.value)


def test_as_root_keeps_urls_as_text() -> None:
    assert as_root("runs/sets") == Path("runs/sets")
    assert as_root("s3://bucket/sets") == "s3://bucket/sets"
    assert as_root("pipe:cat {name}") == "pipe:cat {name}"


@pytest.mark.parametrize(
    "changes", [{"cache_bytes": 0}, {"retries": -1}, {"timeout_s": 0.0}, {"range_bytes": 0}]
)
def test_options_out_of_range(changes: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(changes))):
        StoreOptions(**changes)


@pytest.mark.parametrize("as_url", [False, True], ids=["path", "url"])
def test_local_folder(tmp_path: Path, as_url: bool) -> None:
    folder = tmp_path / "a set"
    (folder / "train").mkdir(parents=True)
    (folder / FIRST).write_bytes(SHARDS[FIRST])
    (folder / "empty").touch()
    store = pickle.loads(pickle.dumps(open_store(folder.as_uri() if as_url else folder, quick(tmp_path))))
    assert store.local == folder
    mapped = store.view(FIRST, SIZE)
    assert mapped.readonly and bytes(mapped) == SHARDS[FIRST]
    assert store.view("empty", 0) == b""
    assert store.read_small(FIRST, SIZE) == SHARDS[FIRST]
    assert store.exists(FIRST) and not store.exists("train")
    store.prefetch([(FIRST, SIZE)])
    with pytest.raises(DataError, match="more than 5 bytes"):
        store.read_small(FIRST, 5)
    for use in (lambda: store.view("none", 5), lambda: store.read_small("none", 5)):
        with pytest.raises(StoreError, match=r"none of .*a set cannot be read: No such file"):
            use()
    assert not (tmp_path / "cache").exists()


def test_waits_double_and_are_drawn() -> None:
    class Clock:
        """Stands in for the event that is waited for."""

        def __init__(self) -> None:
            self.waits: list[float] = []

        def wait(self, seconds: float) -> bool:
            self.waits.append(seconds)
            return False

    def fail() -> None:
        raise Passing("no")

    clock: Any = Clock()
    with pytest.raises(Passing, match="9 attempts, the last one: no"):
        persist(fail, StoreOptions(retries=8, backoff_s=0.5), clock)
    longest = [min(30.0, 0.5 * 2**attempt) for attempt in range(8)]
    assert all(most / 2 <= wait <= most for wait, most in zip(clock.waits, longest, strict=True))
    assert len({wait / most for wait, most in zip(clock.waits, longest, strict=True)}) > 1
