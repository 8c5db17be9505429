"""What an unfinished build has done so far, so that one stopped at any moment goes on to the same bytes.

Beside the place of the set ``NAME``, in the hidden folder ``.NAME.partial``::

    lock                 held by the build that is running
    set/                 the set as it grows; renamed to NAME when it is whole
    head.json            what the build was told and given: another one is refused
    records/train-000003.npz   a finished shard: its rows of the index, its samples' content hashes, and how far the
                         build had got in that split

Every file appears under its name in one step, the shard before its record. So whatever the moment of a kill, the
shards with a record are whole, and everything after them is made again. Nothing here names a file, a patient or a
path: the input is held in keyed hashes, units by their place in an order that the key decides.
"""

import fcntl
import json
import os
import shutil
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from mnemos.sharding.durable import sync_file, sync_path, write_durably
from mnemos.sharding.errors import UserError
from mnemos.sharding.manifest import MANIFEST_FILE, SPLITS, Shard
from mnemos.sharding.split_writer import FinishedShard
from mnemos.sharding.writer import check_new_folder

_LOCK, _HEAD, _SET, _RECORDS = "lock", "head.json", "set", "records"
_ATTEMPTS = 100  # at a lock that others make and remove in the same moments
_AGAIN = "or begin again with --fresh"


@dataclass(frozen=True, kw_only=True)
class Head:
    """What decides the bytes of a set; two builds of the same head give the same set.

    Attributes:
        key: what tells one secret key from another.
        tools: package -> version.
        options: flag -> keyed hash of its value.
        contents: what changed, in words -> keyed hash over all units.
    """

    key: str
    tools: dict[str, str]
    options: dict[str, str]
    contents: dict[str, str]


@dataclass(kw_only=True)
class Progress:
    """How far a build has got in one split, and what it left out on the way.

    Attributes:
        unit: place of the first unit, in the build's order, that is not wholly stored.
        sample: number of that unit's samples in this split that are stored or were dropped.
        duplicates, dropped, doubtful, left_out: counts as in a build's report, of the units before.
        broken: places of the broken units before.
    """

    unit: int = 0
    sample: int = 0
    duplicates: int = 0
    dropped: int = 0
    doubtful: int = 0
    left_out: dict[str, int] = field(default_factory=dict)
    broken: list[int] = field(default_factory=list)

    @property
    def position(self) -> tuple[int, int]:
        """Everything before (unit, sample) is dealt with."""
        return self.unit, self.sample


class Journal:
    """The unfinished build of one set; use as a context manager, which holds its lock.

    On leaving, the folder is removed where the set is finished or not a single shard of it is; otherwise it stays,
    and the error that stopped the build gets a note that says so.

    Args:
        out: where the set will appear.

    Attributes:
        folder: the hidden folder.
        set_folder: the set as it grows.
        progress: by split; the build keeps it up to date, and every record stores it.
        digests: by split, content hashes of the samples since the last record; the build appends.
        finished: by split, the shards found when the build was opened.
        seen: content hashes of all samples found then.
        notes: sentences for the user's screen.

    Raises:
        UserError: the folder cannot be made, or another build holds it.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        place = out.resolve()
        self.folder = place.parent / f".{place.name}.partial"
        self.set_folder = self.folder / _SET
        self.progress = {split: Progress() for split in SPLITS}
        self.digests: dict[str, list[bytes]] = {split: [] for split in SPLITS}
        self.finished: dict[str, list[FinishedShard]] = {split: [] for split in SPLITS}
        self.seen: set[bytes] = set()
        self.notes: tuple[str, ...] = ()
        self._began = False

    def __enter__(self) -> Self:
        self._lock = self._locked()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            done, resumable = self.is_done(), self._resumable()
            if error is not None and done:
                error.add_note(f"the set {self.out} is finished")
            elif error is not None and resumable and (self._began or not isinstance(error, UserError)):
                error.add_note(self._kept())
            if done or not resumable:
                self._remove()
        finally:
            os.close(self._lock)

    def is_done(self) -> bool:
        """Tell whether the set has been moved to its place."""
        return (
            self._read_head() is not None
            and not self.set_folder.exists()
            and (self.out / MANIFEST_FILE).is_file()
        )

    def open(self, head: Head, *, fresh: bool = False) -> None:
        """Begin a build, or go on with the one that was stopped; nothing to do where it is done.

        Args:
            head: what this build is told and given.
            fresh: throw away what an earlier one left.

        Raises:
            UserError: the one that was stopped was told or given something else; the sentence says what.
        """
        found = self._read_head()
        if self.is_done():
            if found != head:
                check_new_folder(self.out)
            return
        if found is not None and self._resumable() and not fresh:
            self._compare(found, head)
        else:
            self._clear()
        (self.folder / _RECORDS).mkdir(exist_ok=True)
        for split in SPLITS:
            (self.set_folder / split).mkdir(parents=True, exist_ok=True)
        write_durably(self.folder / _HEAD, json.dumps(asdict(head), indent=1).encode())
        for split in SPLITS:
            self._load(split)
        self._began = True

    def record(self, split: str, finished: FinishedShard) -> None:
        """Store that a shard is finished, and how far the build has got in its split."""
        state = {"shard": asdict(finished.shard), "progress": asdict(self.progress[split])}
        name = f"{split}-{len(self.finished[split]):06d}.npz"
        partial = self.folder / _RECORDS / f".{name}.partial"
        digests = np.frombuffer(b"".join(self.digests[split]), dtype="V16")
        with partial.open("wb") as file:
            columns: dict[str, Any] = {f"column_{key}": array for key, array in finished.columns.items()}
            np.savez(file, state=np.array(json.dumps(state)), digests=digests, **columns)
            sync_file(file)
        partial.replace(self.folder / _RECORDS / name)
        sync_path(self.folder / _RECORDS)
        self.finished[split].append(finished)
        self.digests[split] = []

    def _load(self, split: str) -> None:
        """Read the records of one split in order and take its last progress."""
        while (file := self.folder / _RECORDS / f"{split}-{len(self.finished[split]):06d}.npz").exists():
            try:
                with np.load(file, allow_pickle=False) as arrays:
                    state = json.loads(str(arrays["state"]))
                    columns = {
                        name.removeprefix("column_"): arrays[name]
                        for name in arrays.files
                        if name.startswith("column_")
                    }
                    digests = arrays["digests"].tobytes()
                shard = Shard(**state["shard"])
                size = (self.set_folder / shard.name).stat().st_size
                if size != shard.bytes:
                    raise ValueError(f"{shard.name} has {size} bytes instead of {shard.bytes}")
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise UserError(
                    f"the unfinished build {self.folder} is damaged ({error}); begin again with --fresh"
                ) from error
            self.progress[split] = Progress(**state["progress"])
            self.finished[split].append(FinishedShard(shard=shard, columns=columns))
            self.seen.update(digests[start : start + 16] for start in range(0, len(digests), 16))

    def _compare(self, found: Head, head: Head) -> None:
        """Raise UserError where the head that was found is not this build's."""
        begun = f"the unfinished build of {self.out} was begun"
        if found.key != head.key:
            raise UserError(f"{begun} with another secret key; give that one with --key-file, {_AGAIN}")
        if found.tools != head.tools:
            other = [
                f"{name} {found.tools.get(name, 'none')}, now {head.tools.get(name, 'none')}"
                for name in sorted(found.tools | head.tools)
                if found.tools.get(name) != head.tools.get(name)
            ]
            raise UserError(
                f"{begun} with other versions ({'; '.join(other)}), which may give other bytes; install those, {_AGAIN}"
            )
        options = [
            name
            for name in sorted(found.options | head.options)
            if found.options.get(name) != head.options.get(name)
        ]
        if options:
            raise UserError(f"{begun} with another {' and '.join(options)}; give the same command, {_AGAIN}")
        contents = [name for name, value in head.contents.items() if found.contents.get(name) != value]
        if contents:
            raise UserError(
                f"{begun} from other input (changed since: {', '.join(contents)}); put it back, {_AGAIN}"
            )

    def _read_head(self) -> Head | None:
        """Return the head that lies in the folder; None where there is none or it is of another format."""
        with suppress(OSError, ValueError, TypeError):
            return Head(**json.loads((self.folder / _HEAD).read_bytes()))
        return None

    def _resumable(self) -> bool:
        return self._read_head() is not None and any(self._records())

    def _records(self) -> list[Path]:
        return sorted((self.folder / _RECORDS).glob("*-*.npz"))

    def _kept(self) -> str:
        samples = sum(one.shard.samples for split in SPLITS for one in self.finished[split])
        of = f" with {samples} samples" if self._began else ""
        return (
            f"{len(self._records())} finished shards{of} are kept beside {self.out}: the same command goes on from "
            "there, with --fresh it begins again"
        )

    def _locked(self) -> int:
        """Make the folder and lock it against a second build; return the lock's descriptor."""
        file = self.folder / _LOCK
        for _ in range(_ATTEMPTS):
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o600)
            except FileNotFoundError:  # a build that has just ended took its folder away
                continue
            except OSError as error:
                raise self._not_made(error.strerror) from error
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                os.close(descriptor)
                raise UserError(
                    f"another build is writing --out {self.out} at this moment; wait for it, or name another folder"
                ) from error
            except OSError:  # as on a network file system that is mounted without locks
                self.notes = (
                    "this file system knows no locks: see to it that no second build writes this set",
                )
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), file.stat()):
                    return descriptor
            os.close(descriptor)  # the lock of a build that has just ended
        raise self._not_made("its folder comes and goes")

    def _not_made(self, why: str | None) -> UserError:
        return UserError(f"--out {self.out} cannot be made ({why}); name another one")

    def _clear(self) -> None:
        """Remove everything but the lock.

        The head goes last where the set is done, because it tells so; otherwise first, because records without a
        head are worth nothing.
        """
        head_last = self.is_done()
        entries = [path for path in self.folder.iterdir() if path.name != _LOCK]
        for path in sorted(entries, key=lambda path: (path.name == _HEAD) == head_last):
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _remove(self) -> None:
        """Remove the folder, the lock last: whoever comes next makes its own."""
        self._clear()
        (self.folder / _LOCK).unlink()
        with suppress(OSError):  # somebody came
            self.folder.rmdir()
