"""Copies of remote shards in a local folder of limited size, shared by every process of a machine.

Layout: FOLDER/<hash of the root>/<name>-<hash of the name>, beside each file under way NAME.part (already at its full
length, so that it counts) and NAME.lock. A copy appears under its name only when it is whole; it never changes, so
it is mapped without a lock, and one that is evicted stays readable for whoever has it mapped.

Locks are `flock`s: the kernel frees those of a killed process.
"""

import contextlib
import fcntl
import hashlib
import mmap
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from mnemos.sharding.durable import sync_path

LOCK, PART = ".lock", ".part"
ROOM = "room"  # whoever has its lock may count, evict and reserve
POLL_S = 0.05


class Cache:
    """A folder of shards; the least recently used make room for the next.

    Args:
        folder: made when missing, for this user alone: shards are patients' data.
        limit_bytes: most bytes of shards, those being fetched included.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self.folder = folder
        self.limit_bytes = limit_bytes

    def slot(self, root: str, name: str, sha256: str) -> Path:
        """Return where a shard's copy belongs; another hash is another copy, so a rebuilt set meets no old one."""
        digest = hashlib.sha256(f"{root}\n{name}\n{sha256}".encode()).hexdigest()
        readable = name.rpartition("/")[2][-80:]
        return self.folder / hashlib.sha256(root.encode()).hexdigest()[:16] / f"{readable}-{digest[:16]}"

    def holds(self, slot: Path, size: int) -> bool:
        """Say whether a whole copy is there."""
        try:
            return slot.stat().st_size == size
        except OSError:
            return False

    def map(self, slot: Path, size: int, fetch: Callable[[Path], None]) -> memoryview:
        """Return a shard's bytes, fetched first when no copy of this length is there.

        One process (and one thread) fetches a shard; others that ask for it wait.

        Args:
            slot: from `slot`.
            size: length, bytes; at most the limit.
            fetch: writes [0, size) of a file that has this length already.

        Raises:
            OSError: the folder cannot be used: full, read-only, without locks.
            Exception: whatever `fetch` raises; nothing is left behind then.
        """
        if (view := _map_file(slot, size)) is not None:
            return view
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        slot.parent.mkdir(exist_ok=True, mode=0o700)
        with _locked(slot):
            if (view := _map_file(slot, size)) is not None:  # somebody else has fetched it meanwhile
                return view
            part = slot.with_name(slot.name + PART)
            for stale in (slot, part):  # of another length; left by a killed process
                stale.unlink(missing_ok=True)
            try:
                self._reserve(part, size)
                fetch(part)
                sync_path(part)  # after a power cut its length must not stand for bytes that never came
                view = _map_file(part, size)
                if view is None:
                    raise OSError(f"{part} lost its length while it was written")
                # whoever counts meanwhile must see it under one of its two names
                with _locked(self.folder / ROOM):
                    part.replace(slot)
            except BaseException:
                part.unlink(missing_ok=True)
                raise
            return view

    def _reserve(self, part: Path, size: int) -> None:
        """Make a file of this length, once older copies have made room for it."""
        while True:
            with _locked(self.folder / ROOM):
                if self._excess(size) <= 0:
                    number = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
                    try:
                        os.truncate(number, size)
                    finally:
                        os.close(number)
                    return
            time.sleep(POLL_S)  # the rest is being fetched: that ends, and can be evicted then

    def _excess(self, size: int) -> int:
        """Evict until `size` more bytes fit; return how many are too many, or at most 0."""
        copies, used = [], 0
        for path in self.folder.glob("*/*"):
            with contextlib.suppress(FileNotFoundError):  # a fetch failed meanwhile
                if path.suffix == LOCK or (path.suffix == PART and _sweep(path)):
                    continue
                status = path.stat()
                used += status.st_size
                if path.suffix != PART:
                    copies.append((status.st_mtime_ns, status.st_size, path))
        excess = used + size - self.limit_bytes
        for _, copy_bytes, path in sorted(copies):
            if excess <= 0:
                break
            path.unlink(missing_ok=True)
            excess -= copy_bytes
        return excess


def _map_file(path: Path, size: int) -> memoryview | None:
    """Return a file's bytes, mapped and marked as used now; None when there is none of this length."""
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size != size:
                return None
            now = time.time_ns()  # the kernel's own "now" is too coarse to order uses
            os.utime(file.fileno(), ns=(now, now))
            if size == 0:  # cannot be mapped
                return memoryview(b"")
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except FileNotFoundError:
        return None


def _sweep(part: Path) -> bool:
    """Remove what a killed process left of a fetch; return whether it was one."""
    with _locked(part.with_suffix(""), wait=False) as mine:
        if mine:
            part.unlink(missing_ok=True)
        return mine


@contextlib.contextmanager
def _locked(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold the lock of a path; yields False, without it, where it is taken and `wait` is off."""
    lock = path.with_name(path.name + LOCK)
    number = _acquire(lock, wait)
    try:
        yield number is not None
    finally:
        if number is not None:
            lock.unlink(missing_ok=True)
            # not by closing alone: a child forked meanwhile holds the same lock
            fcntl.flock(number, fcntl.LOCK_UN)
            os.close(number)


def _acquire(lock: Path, wait: bool) -> int | None:
    while True:
        number = os.open(lock, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(number, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            # whoever had it removes the file: a lock on a removed file keeps nobody out
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(number), lock.stat()):
                    return number
        except BlockingIOError:
            os.close(number)
            return None
        except BaseException:
            os.close(number)
            raise
        os.close(number)
