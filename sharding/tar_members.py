"""Walk a plain tar header by header, refusing whatever a shard has no use for.

`tarfile` unpacks compressed archives unasked, follows links, and ends without a word at a damaged header, so that the
samples behind it are lost in silence. Here every byte of a tar is a header, a member or a zero, or the walk stops with
the byte at which it is none of these. Only `tarfile`'s parser of one 512-byte header is used.
"""

import json
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

BLOCK = 512  # tar's unit: a header is one block, data are padded to blocks
MEMBER_BYTES = 64 << 20
JSON_BYTES = 64 << 10
_EXTENDED_BYTES = {tarfile.XHDTYPE: 64 << 10, tarfile.GNUTYPE_LONGNAME: 4 << 10}
_FILES = (tarfile.REGTYPE, tarfile.AREGTYPE)
_NAMED_TYPES = {
    tarfile.LNKTYPE: "a hard link",
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a pipe",
    tarfile.GNUTYPE_SPARSE: "a sparse file",
    tarfile.XGLTYPE: "a header for all that follows",
}
_RECORD = re.compile(rb"(\d{1,5}) ([^=\n]+)=")
_HARMLESS = {b"path", b"atime", b"ctime", b"mtime", b"uid", b"gid", b"uname", b"gname", b"comment"}
_HARMLESS_PREFIXES = (b"SCHILY.", b"LIBARCHIVE.")  # extended attributes
_KEY = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)", re.DOTALL)  # as WebDataset cuts a name, at the first dot
_META = re.compile(r"__[^/]*__($|/)")  # WebDataset passes these over


class TarFault(ValueError):
    """A tar that cannot be walked on: what is wrong, at which byte, in which member."""

    def __init__(self, reason: str, byte: int, member: str = "") -> None:
        super().__init__(reason)
        self.reason, self.byte, self.member = reason, byte, member


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """One file of a tar.

    Attributes:
        start: byte of its first header, an extended one too.
        offset, size: place of its data.
        key, extension: parts of its name, as WebDataset cuts it; "" where it belongs to no sample.
    """

    name: str
    start: int
    offset: int
    size: int
    key: str
    extension: str

    @property
    def end(self) -> int:
        """Return the byte behind its padding."""
        return self.offset + padded(self.size)


@dataclass(kw_only=True, slots=True)
class Sample:
    """The members of one key, by extension, and the bytes from the first header to the end of the last one."""

    key: str
    start: int
    end: int
    members: dict[str, Member] = field(default_factory=dict)


def padded(size: int) -> int:
    """Return a size rounded up to whole blocks."""
    return -(-size // BLOCK) * BLOCK


def walk_tar(tar: memoryview, start: int = 0, end: int | None = None) -> Iterator[Member]:
    """Yield the files of a tar, or of the part of it between two bytes where no closing zeros may be.

    Args:
        tar: the whole file.
        start: byte of a header.
        end: byte behind the last member's padding; None: to the end of the tar and its closing blocks of zeros.

    Raises:
        TarFault: a damaged or cut off header or member; a link, device, sparse or oversized member; a name that is
            absolute, leads upwards or is not UTF-8.
    """
    last = len(tar) if end is None else end
    first, long_name = -1, ""
    at = start
    while at < last:
        block = bytes(tar[at : at + BLOCK])
        if len(block) < BLOCK or not any(block):
            if end is None and first < 0 and not any(block):
                _check_closing(tar, at)
                return
            raise TarFault("it ends inside a member, or there are zeros in the place of a header", at)
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
        except tarfile.HeaderError as error:
            raise TarFault(f"a damaged header ({error})", at) from error
        except UnicodeDecodeError as error:
            raise TarFault("a name that is not UTF-8", at) from error
        name = long_name or info.name
        offset, size = at + BLOCK, info.size
        if block[257:262] != b"ustar":
            raise TarFault("a header that is not of the ustar format", at, name)
        if not 0 <= size <= _EXTENDED_BYTES.get(info.type, MEMBER_BYTES):
            raise TarFault(f"a member of {size} bytes, where {MEMBER_BYTES >> 20} MB are allowed", at, name)
        if offset + padded(size) > last:
            raise TarFault("the tar is cut off inside this member", at, name)
        if info.type in _EXTENDED_BYTES:
            if first >= 0:
                raise TarFault("two extended headers in a row", at, name)
            first, data = at, bytes(tar[offset : offset + size])
            long_name = _long_name(info.type, data, at)
        else:
            _check_member(info, name, at)
            if info.type in _FILES:
                key, extension = split_name(name)
                begun = at if first < 0 else first
                yield Member(name=name, start=begun, offset=offset, size=size, key=key, extension=extension)
            first, long_name = -1, ""
        at = offset + padded(size)
    if end is None:
        raise TarFault("the tar ends without its closing blocks of zeros: it was cut off", last)
    if first >= 0:
        raise TarFault("an extended header without its member", first)


def group_members(members: Iterator[Member], loose: list[Member]) -> Iterator[Sample]:
    """Yield the samples of a tar; members without a key are appended to `loose`.

    Raises:
        TarFault: the members of a key do not lie together, or one comes twice.
    """
    seen: set[str] = set()
    sample: Sample | None = None
    for member in members:
        if not member.key:
            loose.append(member)
            continue
        if sample is None or member.key != sample.key:
            if sample is not None:
                yield sample
            if member.key in seen:
                raise TarFault("the members of its key do not lie together", member.start, member.name)
            seen.add(member.key)
            sample = Sample(key=member.key, start=member.start, end=member.end)
        if member.extension in sample.members:
            raise TarFault("a second member of this name", member.start, member.name)
        sample.members[member.extension] = member
        sample.end = member.end
    if sample is not None:
        yield sample


def split_name(name: str) -> tuple[str, str]:
    """Cut a member's name into key and extension (lower case), as WebDataset does; "" and "" where it has none."""
    match = None if _META.match(name) else _KEY.fullmatch(name)
    return (match[1], match[2].lower()) if match else ("", "")


def small_json(data: bytes | memoryview) -> dict[str, Any]:
    """Return the object a JSON member describes a sample with.

    Raises:
        ValueError: more than 64 kB, no JSON object in UTF-8, or nested too deeply.
    """
    if len(data) > JSON_BYTES:
        raise ValueError(f"its JSON has {len(data)} bytes, where {JSON_BYTES} are allowed")
    try:
        record = json.loads(bytes(data).decode("utf-8"))
    except RecursionError as error:
        raise ValueError("its JSON is nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"its JSON cannot be read ({error})") from error
    if isinstance(record, dict):
        return record
    raise ValueError("its JSON is no object")


def _check_closing(tar: memoryview, at: int) -> None:
    """Raise TarFault unless nothing but zeros, two blocks or more, lies from `at` to the end."""
    if len(tar) - at < 2 * BLOCK:
        raise TarFault("the tar's closing blocks of zeros are cut off", at)
    for begin in range(at, len(tar), 1 << 20):
        chunk = bytes(tar[begin : begin + (1 << 20)])
        if any(chunk):
            behind = begin + len(chunk) - len(chunk.lstrip(b"\0"))
            raise TarFault("bytes behind the tar's end", behind)


def _check_member(info: tarfile.TarInfo, name: str, at: int) -> None:
    """Raise TarFault unless it is a plain file, or a folder without data, of a harmless name."""
    if info.type not in _FILES and not (info.isdir() and info.size == 0):
        raise TarFault(_NAMED_TYPES.get(info.type, f"a member of type {info.type!r}"), at, name)
    if not name or name.startswith("/") or ".." in name.split("/") or "\0" in name:
        raise TarFault("a name that is empty, absolute or leads upwards", at, name)


def _long_name(kind: bytes, data: bytes, at: int) -> str:
    """Return the name that an extended header gives the next member; "" where it gives none."""
    name = data.rstrip(b"\0") if kind == tarfile.GNUTYPE_LONGNAME else b""
    place = 0
    while kind == tarfile.XHDTYPE and place < len(data):
        match = _RECORD.match(data, place)
        end = place + int(match[1]) if match else 0
        if match is None or not match.end() < end <= len(data) or data[end - 1 : end] != b"\n":
            raise TarFault("a damaged extended header", at)
        if match[2] not in _HARMLESS and not match[2].startswith(_HARMLESS_PREFIXES):
            raise TarFault(f"an extended header with {match[2][:40]!r}", at)
        if match[2] == b"path":
            name = data[match.end() : end - 1]
        place = end
    try:
        return name.decode("utf-8")
    except UnicodeDecodeError as error:
        raise TarFault("a name that is not UTF-8", at) from error
