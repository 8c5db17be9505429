"""The shard cache: its limit, its order, one fetch for many processes, and what killed ones leave behind."""

import errno
import os
import pickle
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from flaky_server import FlakyServer
from remote_sets import FIRST, ONE_RANGE, SECOND, SHARDS, SIZE, cached, quick, remote, view

from mnemos.sharding.errors import StoreError, UserError
from mnemos.sharding.stores import cache as cache_module
from mnemos.sharding.stores import objects
from mnemos.sharding.stores.ahead import Ahead
from mnemos.sharding.stores.storage import RemoteStore, default_cache_dir


def shard_in_cache(store: RemoteStore, name: str) -> bool:
    return store.cache.holds(store.cache.slot(store.root, name, ""), len(SHARDS[name]))


def test_least_recently_used_make_room(tmp_path: Path) -> None:
    names = list(SHARDS)[:5]
    with FlakyServer(SHARDS) as server:
        store = remote(server.url, quick(tmp_path, cache_bytes=int(3.5 * SIZE)))
        for name in names[:3]:
            view(store, name)
        view(store, names[0])  # used again: the second is the oldest now
        kept = store.view(names[1], len(SHARDS[names[1]]))
        view(store, names[0])
        view(store, names[2])
        view(store, names[3])
        assert [shard_in_cache(store, name) for name in names] == [True, False, True, True, False]
        assert bytes(kept) == SHARDS[names[1]], "mapped before it was evicted, it stays readable"
        view(store, names[4])
        assert [shard_in_cache(store, name) for name in names] == [False, False, True, True, True]
        assert sum(cached(store).values()) <= store.cache.limit_bytes
        assert view(store, names[1]) == SHARDS[names[1]], "fetched again"
        assert sum(cached(store).values()) <= store.cache.limit_bytes


def test_the_limit_holds_while_threads_fetch(tmp_path: Path) -> None:
    with FlakyServer(SHARDS, delay_s=0.002) as server:
        store = remote(server.url, quick(tmp_path, cache_bytes=int(2.5 * SIZE)))
        seen, most, done = dict[str, bytes](), 0, threading.Event()
        threads = [
            threading.Thread(target=lambda name=name: seen.update({name: view(store, name)}))
            for name in SHARDS
        ]

        def watch() -> None:
            nonlocal most
            while not done.is_set():
                found = 0
                for path in store.cache.folder.rglob("*"):
                    try:
                        found += path.stat().st_size if path.is_file() else 0
                    except OSError:  # evicted meanwhile
                        continue
                most = max(most, found)

        watcher = threading.Thread(target=watch)
        for thread in (watcher, *threads):
            thread.start()
        for thread in threads:
            thread.join()
        done.set()
        watcher.join()
    assert seen == SHARDS
    assert SIZE < most <= store.cache.limit_bytes


def test_a_limit_below_one_shard_is_refused(tmp_path: Path) -> None:
    store = remote("http://127.0.0.1:1/sets", quick(tmp_path, cache_bytes=SIZE - 1))
    with pytest.raises(UserError, match=r"may hold 39,999 bytes, fewer than the 40,000 of train/000000\.tar"):
        store.view(FIRST, SIZE)


def test_a_lock_taken_over_keeps_others_out(tmp_path: Path) -> None:
    took_over, done = threading.Event(), threading.Event()

    def wait_for_it() -> None:
        with cache_module._locked(tmp_path / "a"):
            took_over.set()
            done.wait(20)

    thread = threading.Thread(target=wait_for_it, daemon=True)
    with cache_module._locked(tmp_path / "a"):
        thread.start()
        time.sleep(0.1)  # it waits on the file that is removed now
    assert took_over.wait(20)
    with cache_module._locked(tmp_path / "a", wait=False) as mine:
        assert not mine
    done.set()
    thread.join()
    with cache_module._locked(tmp_path / "a", wait=False) as mine:
        assert mine
    assert list(tmp_path.iterdir()) == []


def test_a_copy_of_another_length_is_fetched_again(tmp_path: Path) -> None:
    with FlakyServer(SHARDS) as server:
        store = remote(server.url, quick(tmp_path))
        view(store, FIRST)
        slot = store.cache.slot(store.root, FIRST, "")
        slot.write_bytes(SHARDS[FIRST][:-1])
        assert view(store, FIRST) == SHARDS[FIRST]
    assert list(cached(store)) == [slot.name]


def until(condition: Callable[[], bool]) -> None:
    """Wait for something that happens elsewhere, for 20 seconds at most."""
    deadline = time.monotonic() + 20
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)


def running(process: int) -> bool:
    """Say whether a process runs; one that only waits to be collected does not."""
    try:
        return "State:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def in_child(work: Callable[[], bool]) -> int:
    """Run something in a forked child, as loaders do; return its process id."""
    child = os.fork()
    if child == 0:
        signal.alarm(30)
        try:
            os._exit(0 if work() else 1)
        except BaseException as error:  # noqa: BLE001  # nothing of a test may run on in the child
            print(repr(error), file=sys.stderr)
            os._exit(2)
    return child


def test_forked_processes_fetch_a_shard_once(tmp_path: Path) -> None:
    with FlakyServer(SHARDS, delay_s=0.05) as server:
        store = remote(server.url, quick(tmp_path, range_bytes=ONE_RANGE))
        assert view(store, SECOND) == SHARDS[SECOND]  # the parent's reading process runs
        again = pickle.loads(pickle.dumps(store))
        children = [
            in_child(lambda source=source: view(source, FIRST) == SHARDS[FIRST])
            for source in (store, store, again)
        ]
        ends = [os.waitpid(child, 0)[1] for child in children]
        assert ends == [0, 0, 0]
        assert server.count(FIRST) == 1
        assert view(store, FIRST) == SHARDS[FIRST], "the parent's reading process has not suffered"
    assert len(cached(store)) == 2


def test_a_child_forked_during_a_fetch_holds_nobody_up(tmp_path: Path) -> None:
    with FlakyServer(SHARDS, delay_s=0.3) as server:
        store = remote(server.url, quick(tmp_path, range_bytes=ONE_RANGE))
        fetching, waiting = (
            threading.Thread(target=view, args=(store, FIRST), daemon=True) for _ in range(2)
        )
        fetching.start()
        until(lambda: server.count(FIRST) > 0)
        waiting.start()
        child = in_child(lambda: time.sleep(30) is None)  # it has the fetching thread's lock open, too
        waiting.join(10)
        ended = not waiting.is_alive()
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        fetching.join()
    assert ended


def test_a_killed_fetch_is_cleaned_up_by_the_next(tmp_path: Path) -> None:
    with FlakyServer(SHARDS, always={FIRST: "stall"}) as server:
        store = remote(server.url, quick(tmp_path))
        child = in_child(lambda: bool(view(store, FIRST)))
        until(lambda: server.count(FIRST) > 0)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert [name.rpartition(".")[2] for name in cached(store)] == ["lock", "part"]
        view(store, SECOND)  # another shard's fetch
        assert len(cached(store)) == 1
        server.always.clear()
        assert view(store, FIRST) == SHARDS[FIRST]
    assert sorted(cached(store).values()) == [SIZE, SIZE + 1]


def test_what_a_killed_fetch_left_is_written_anew(tmp_path: Path) -> None:
    with FlakyServer(SHARDS) as server:
        store = remote(server.url, quick(tmp_path))
        slot = store.cache.slot(store.root, FIRST, "")
        slot.parent.mkdir(parents=True)
        slot.with_name(slot.name + ".part").write_bytes(b"x" * SIZE)
        slot.with_name(slot.name + ".lock").touch()
        assert view(store, FIRST) == SHARDS[FIRST]
    assert list(cached(store)) == [slot.name]


def test_what_is_being_written_is_not_evicted(tmp_path: Path) -> None:
    with FlakyServer(SHARDS, delay_s=0.3) as server:
        store = remote(server.url, quick(tmp_path, cache_bytes=int(1.5 * SIZE), range_bytes=ONE_RANGE))
        child = in_child(lambda: view(store, FIRST) == SHARDS[FIRST])
        until(lambda: server.count(FIRST) > 0)
        assert view(store, SECOND) == SHARDS[SECOND]  # waits, then evicts the first
        assert os.waitpid(child, 0)[1] == 0
        assert (server.count(FIRST), server.count(SECOND)) == (1, 1)
    assert list(cached(store).values()) == [SIZE + 1]


def test_full_disk_names_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with FlakyServer(SHARDS) as server:
        store = remote(server.url, quick(tmp_path))
        with monkeypatch.context() as patch:
            patch.setattr(cache_module.os, "truncate", no_room)
            with pytest.raises(
                StoreError, match=r"shard cache .*cache failed while train/000000.*No space left.*free"
            ):
                view(store, FIRST)
        assert cached(store) == {}
        # the reading process meets it, too: here a limit on the length of files
        view(store, FIRST)
        process = objects._process().started.pid
        limits = resource.prlimit(process, resource.RLIMIT_FSIZE, (1_000, resource.RLIM_INFINITY))
        with pytest.raises(StoreError, match=r"shard cache .*train/000001.tar.*File too large"):
            view(store, SECOND)
        resource.prlimit(process, resource.RLIMIT_FSIZE, limits)
        assert view(store, SECOND) == SHARDS[SECOND]
    assert len(cached(store)) == 2


def test_the_cache_is_for_its_user_alone(tmp_path: Path) -> None:
    with FlakyServer(SHARDS) as server:
        store = remote(server.url, quick(tmp_path))
        view(store, FIRST)
    for path in (store.cache.folder, *store.cache.folder.rglob("*")):
        assert path.stat().st_mode & 0o077 == 0, path


def test_default_cache_dir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "mnemos" / "shards"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert default_cache_dir() == tmp_path / "home" / ".cache" / "mnemos" / "shards"


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_prefetch_fetches_what_fits_and_fails_silently(tmp_path: Path) -> None:
    names = list(SHARDS)
    with FlakyServer(SHARDS, always={names[1]: "404"}) as server:
        store = remote(server.url, quick(tmp_path, cache_bytes=8 * (SIZE + 9), range_bytes=ONE_RANGE))
        store.prefetch([(name, len(SHARDS[name])) for name in names])
        until(lambda: sum(map(server.count, names)) == 4)
        assert {name: view(store, name) for name in (names[0], *names[2:4])} == {
            name: SHARDS[name] for name in (names[0], *names[2:4])
        }
        assert [server.count(name) for name in names] == [1, 1, 1, 1, 0, 0, 0, 0], (
            "half of the cache, each once"
        )
        with pytest.raises(StoreError, match="404"):
            view(store, names[1])
        store.prefetch([(name, len(SHARDS[name])) for name in names[2:4]])
    assert [server.count(name) for name in names[:4]] == [1, 2, 1, 1], "nothing is fetched that is there"


def test_what_waits_to_be_fetched_is_not_added_again() -> None:
    begin, fetched = threading.Event(), list[int]()
    ahead = Ahead[int](lambda thing: begin.wait(20) and fetched.append(thing))
    for _ in range(3):
        ahead.add([1, 2, 3, 4])
    begin.set()
    until(lambda: ahead.running == 0)
    assert sorted(fetched) == [1, 2, 3, 4]


def test_a_dead_reading_process_is_replaced(tmp_path: Path) -> None:
    with FlakyServer(SHARDS) as server:
        store = remote(server.url, quick(tmp_path))
        view(store, FIRST)
        process = objects._process()
        process.started.kill()
        process.started.wait()
        assert view(store, SECOND) == SHARDS[SECOND]
        assert objects._process() is not process


def test_the_reading_process_ends_with_its_parent(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys, time\n"
        "from pathlib import Path\n"
        "from mnemos.sharding.stores import objects\n"
        "from mnemos.sharding.stores.storage import StoreOptions, open_store\n"
        "open_store(sys.argv[1], StoreOptions(cache_dir=Path(sys.argv[2]))).exists('none')\n"
        "print(objects._process().started.pid, flush=True)\n"
        "if os.fork() == 0:\n"
        "    time.sleep(30)  # holds the parent's end of the pipes\n"
        "    os._exit(0)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    with FlakyServer(SHARDS) as server:
        run = subprocess.Popen(
            [sys.executable, "-c", script, server.url, str(tmp_path)],
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert run.stdout is not None
        process = int(run.stdout.readline())
        assert run.wait() == -signal.SIGKILL
        until(lambda: not running(process))
        os.killpg(run.pid, signal.SIGKILL)
        run.stdout.close()
    assert not running(process)
