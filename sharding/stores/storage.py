"""Where shard sets lie: a local folder, an HTTP server, an object store, or what a command prints.

A `Store` gives the small files of a set as bytes and its shards as memory: mapped where they lie, or mapped from a
copy in a local cache (`cache`). Failures from afar are repeated (`remote.transfer`) and end in a `StoreError` that
names the shard.
"""

import contextlib
import hashlib
import mmap
import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from mnemos.sharding.errors import DataError, StoreError, UserError
from mnemos.sharding.stores.ahead import Ahead
from mnemos.sharding.stores.cache import Cache
from mnemos.sharding.stores.commands import CommandReader
from mnemos.sharding.stores.objects import ObjectReader
from mnemos.sharding.stores.options import FIRST_RETRIES, StoreOptions
from mnemos.sharding.stores.roots import (
    PIPE,
    as_root,
    checked_name,
    checked_url,
    default_cache_dir,
    join_root,
    local_folder,
)
from mnemos.sharding.stores.transfer import Gone, Passing, Reader, Refused, TooBig, fetch_whole, persist

__all__ = ["Shard", "Store", "StoreOptions", "as_root", "default_cache_dir", "list_sets", "open_store"]

T = TypeVar("T")
Shard = tuple[str, int] | tuple[str, int, str]
"""Name, length in bytes and, where known, sha256."""


class Store(ABC):
    """The files of one root. Picklable; usable from several threads and after a fork.

    Names are relative to the root, with "/" between folders; any that could lead out of it is a `UserError`.

    Attributes:
        root: the root as messages and logs may show it.
        options: how it is read.
        local: the folder of a local root, None for others.
    """

    local: Path | None = None

    def __init__(self, root: str, options: StoreOptions) -> None:
        self.root = root
        self.options = options

    @property
    def cache_dir(self) -> Path:
        """The folder for copies of what is remote.

        Raises:
            UserError: none is set and there is no home folder.
        """
        return self.options.cache_dir or default_cache_dir()

    @abstractmethod
    def exists(self, name: str) -> bool:
        """Say whether there is such a file.

        Raises:
            StoreError: no answer came, or reading is not permitted.
        """

    @abstractmethod
    def read_small(self, name: str, most_bytes: int, sha256: str = "") -> bytes:
        """Return a whole small file.

        Args:
            name: of the file.
            most_bytes: a longer one is refused before it is read.
            sha256: checked when given.

        Raises:
            DataError: it is longer, or has another hash.
            StoreError: it cannot be read, also because there is none.
        """

    @abstractmethod
    def view(self, name: str, size_bytes: int, sha256: str = "") -> memoryview:
        """Return a whole shard as read-only memory.

        A remote one is fetched into the cache first, unless a copy of this length is there. The length of a local
        one is not checked, nor its hash: its samples are, one by one.

        Args:
            name: of the shard.
            size_bytes: its length.
            sha256: checked after fetching when given.

        Raises:
            DataError: what was fetched, twice, has another hash.
            StoreError: it cannot be read, also because there is none, or the cache's disk is full.
            UserError: the cache is smaller than the shard.
        """

    @abstractmethod
    def prefetch(self, shards: Iterable[Shard]) -> None:
        """Start fetching in the background what `view` will be asked for next, in this order.

        As much as half of the cache holds; a failure is met again by `view`. Nothing to do for a local root.

        Args:
            shards: what `view` will get: a hash left out there is left out here.
        """

    def _where(self, name: str) -> str:
        return f"{name} of {self.root}"

    def _checked(self, name: str, data: bytes, sha256: str) -> bytes:
        if sha256 and hashlib.sha256(data).hexdigest() != sha256:
            raise DataError("its sha256 is not the expected one", source=f"{self.root}/{name}")
        return data


class LocalStore(Store):
    """A folder; its shards are mapped where they lie."""

    def __init__(self, folder: Path, options: StoreOptions) -> None:
        super().__init__(str(folder), options)
        self.local: Path = folder

    def exists(self, name: str) -> bool:
        try:
            return (self.local / checked_name(name, self.root)).is_file()
        except OSError as error:  # a folder above it may not be entered
            raise self._failed(name, error) from error

    def read_small(self, name: str, most_bytes: int, sha256: str = "") -> bytes:
        path = self.local / checked_name(name, self.root)
        try:
            with path.open("rb") as file:
                data = file.read(most_bytes + 1)
        except OSError as error:
            raise self._failed(name, error) from error
        if len(data) > most_bytes:
            raise DataError(f"it has more than {most_bytes} bytes", source=path)
        return self._checked(name, data, sha256)

    def view(self, name: str, size_bytes: int, sha256: str = "") -> memoryview:
        path = self.local / checked_name(name, self.root)
        try:
            with path.open("rb") as file:
                if os.fstat(file.fileno()).st_size == 0:  # cannot be mapped
                    return memoryview(b"")
                return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        except OSError as error:
            raise self._failed(name, error) from error

    def prefetch(self, shards: Iterable[Shard]) -> None:
        """Do nothing: the operating system reads ahead by itself."""

    def _failed(self, name: str, error: OSError) -> StoreError:
        return StoreError(f"{self._where(name)} cannot be read: {error.strerror or error}")


class RemoteStore(Store):
    """A root whose shards are fetched into the cache.

    Args:
        root: as messages may show it.
        options: see `Store`.
        reader: copies its objects.
        address: the root as it was given.
    """

    def __init__(self, root: str, options: StoreOptions, reader: Reader, address: str) -> None:
        super().__init__(root, options)
        self.reader = reader
        self.address = address
        self.cache = Cache(self.cache_dir, options.cache_bytes)
        self._ahead: dict[int, Ahead[Shard]] = {}  # by process: threads do not survive a fork

    def __reduce__(self) -> tuple[Any, ...]:
        return open_store, (self.address, self.options)  # threads stay behind

    def exists(self, name: str) -> bool:
        checked_name(name, self.root)
        return self._insist(name, lambda: self._persist(lambda: self.reader.exists(name)))

    def read_small(self, name: str, most_bytes: int, sha256: str = "") -> bytes:
        checked_name(name, self.root)
        where = f"the folder for temporary files {tempfile.gettempdir()}"
        # the reading process writes files; this one lives as long as the block
        with (
            _naming_the_disk(where, self._where(name)),
            tempfile.NamedTemporaryFile(prefix="mnemos-") as file,
        ):

            def copy() -> bytes:
                num_bytes = self.reader.copy(name, Path(file.name), most_bytes)
                file.seek(0)
                return file.read(num_bytes)

            data = self._insist(name, lambda: self._persist(copy))
        return self._checked(name, data, sha256)

    def view(self, name: str, size_bytes: int, sha256: str = "") -> memoryview:
        checked_name(name, self.root)
        if size_bytes > self.cache.limit_bytes:
            raise UserError(
                f"the shard cache may hold {self.cache.limit_bytes:,} bytes, fewer than the {size_bytes:,} of "
                f"{self._where(name)}: allow it room for several shards"
            )
        slot = self.cache.slot(self.address, name, sha256)
        with _naming_the_disk(f"the shard cache {self.cache.folder}", self._where(name)):
            return self.cache.map(slot, size_bytes, lambda part: self._fetch(name, size_bytes, sha256, part))

    def prefetch(self, shards: Iterable[Shard]) -> None:
        room, soon = self.cache.limit_bytes // 2, list[Shard]()
        for shard in shards:
            room -= shard[1]
            if room < 0:  # fetching more would evict what has not been used yet
                break
            if not self.cache.holds(self.cache.slot(self.address, shard[0], "".join(shard[2:])), shard[1]):
                soon.append(shard)
        if soon:
            self._ahead.setdefault(os.getpid(), Ahead(lambda shard: self.view(*shard))).add(soon)

    def _fetch(self, name: str, size: int, sha256: str, part: Path) -> None:
        for _ in range(2):
            self._insist(name, lambda: fetch_whole(self.reader, name, size, part, self.options))
            if not sha256 or _file_sha256(part) == sha256:
                return
        raise DataError(
            "fetched twice, its sha256 is not the manifest's: run verify on the set where it lies",
            source=f"{self.root}/{name}",
        )

    def _persist(self, action: Callable[[], T]) -> T:
        return persist(action, replace(self.options, retries=min(self.options.retries, FIRST_RETRIES)))

    def _insist(self, name: str, action: Callable[[], T]) -> T:
        """Return what an action of the reader returns; its failures name the file."""
        try:
            return action()
        except TooBig as failure:
            raise DataError(str(failure), source=f"{self.root}/{name}") from failure
        except Gone as failure:
            raise StoreError(f"{self._where(name)} is not there: {failure}") from failure
        except Refused as failure:
            raise StoreError(
                f"{self._where(name)} cannot be read: {failure}; check the address and the credentials"
            ) from failure
        except Passing as failure:
            raise StoreError(f"{self._where(name)} cannot be read: {failure}; try again later") from failure


def open_store(root: str | Path, options: StoreOptions | None = None) -> Store:
    """Return the store of a root; nothing is read yet.

    Args:
        root: a folder, or a file://, http(s)://, s3://, gs:// or az:// URL; object stores take their credentials
            from the environment. Or "pipe:COMMAND" with {name} in it, when the options allow that.
        options: None for the defaults.

    Raises:
        UserError: a root of another kind, with credentials or a query in it, or a pipe: that is not allowed.
    """
    options = options or StoreOptions()
    folder = local_folder(root)
    if folder is not None:
        return LocalStore(folder, options)
    address = str(root)
    if address.startswith(PIPE):
        if not options.pipe:
            raise UserError(
                "a pipe: root runs a command and is refused unless pipes are allowed (in training: --set data.pipe=true); "
                "allow them only for roots you wrote yourself"
            )
        command = address.removeprefix(PIPE).strip()
        # only its first word is shown, the rest may hold a password; the hash tells two apart
        shown = f"{PIPE}{command.partition(' ')[0]}-{hashlib.sha256(command.encode()).hexdigest()[:8]}"
        return RemoteStore(shown, options, CommandReader(command, options.timeout_s), address)
    url = checked_url(address)
    return RemoteStore(url, options, ObjectReader(url, options.timeout_s), url)


def list_sets(root: str, names: Iterable[str], options: StoreOptions | None = None) -> dict[str, str]:
    """Return which of the named shard sets lie below a root: name -> root of the set.

    Each name is tried, since an HTTP server lists nothing. One that is refused counts as not there: without the right
    to list, that is what object stores answer for what they do not have.

    Raises:
        UserError: as `open_store`.
        StoreError: no answer came for one, or none was found and one was refused.
    """
    found, failure = dict[str, str](), None
    for name in names:
        below = join_root(root, name)
        try:
            if open_store(below, options).exists("manifest.json"):
                found[name] = below
        except StoreError as error:
            if isinstance(error.__cause__, Passing):  # an outage must not pass for a set that is not there
                raise
            failure = error
    if not found and failure is not None:
        raise failure
    return found


@contextlib.contextmanager
def _naming_the_disk(place: str, what: str) -> Iterator[None]:
    """Turn failures of the local disk into a `StoreError` that names the folder."""
    try:
        yield
    except StoreError:
        raise
    except OSError as error:
        raise StoreError(
            f"{place} failed while {what} was fetched: {error.strerror or error}; free space there, or set another one"
        ) from error


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
