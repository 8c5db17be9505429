"""Gzip content a piece at a time: never more in memory than was asked for, every checksum checked."""

import io
import zlib
from typing import Any, BinaryIO, Protocol

from mnemos.sharding.errors import DataError

MAGIC = b"\x1f\x8b"
_STORED_BYTES = 64 << 10  # read at a time
_SMALL_BYTES = 1 << 10
_MOST_SMALL = 1_000  # members of less than that: writers of many members make them of 64 KiB each


class Stream(Protocol):
    """What content is read from, packed or plain."""

    def read(self, most: int, /) -> bytes:
        """Return up to so many bytes, none at the end only."""
        ...


class Gunzip(io.RawIOBase):
    """The content of a gzip file of any number of members.

    The standard library's reader walks over a member's name byte by byte and builds an object a member: a file of a
    few megabytes keeps it busy for minutes.

    Args:
        file: at its first byte.
    """

    def __init__(self, file: BinaryIO) -> None:
        super().__init__()
        self._file = file
        self._stored = b""
        self._member = zlib.decompressobj(zlib.MAX_WBITS | 16)
        self._in_member = 0  # bytes this member has given
        self._small = 0

    def readable(self) -> bool:
        """Return that it can be read, for the buffers and text layers of ``io``."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer as far as one step goes; return the number of bytes, 0 at the end."""
        into = memoryview(buffer).cast("B")
        content = self.read(len(into))
        into[: len(content)] = content
        return len(content)

    def read(self, most: int = -1, /) -> bytes:
        """Return up to so many bytes, none at the end only.

        Raises:
            DataError: the content is damaged, ends early, or is cut into ever so many next to empty members.
        """
        while most > 0:
            self._stored = self._stored or self._file.read(_STORED_BYTES)
            if self._member.eof and not self._next_member():
                return b""
            if not self._stored and not self._member.eof:
                raise DataError("its compressed content ends early")
            try:
                content = self._member.decompress(self._stored, most)
            except zlib.error as error:
                raise DataError(f"its compressed content is damaged ({error})") from error
            self._in_member += len(content)
            self._stored = self._member.unused_data if self._member.eof else self._member.unconsumed_tail
            if content:
                return content
        return b""

    def _next_member(self) -> bool:
        """Start the member behind one that has ended; zeros that fill up a tape's block may lie between."""
        self._small += self._in_member < _SMALL_BYTES
        if self._small > _MOST_SMALL:
            raise DataError(
                f"its compressed content is cut into more than {_MOST_SMALL} members of next to nothing"
            )
        stored = self._stored.lstrip(b"\0")
        while not stored:
            more = self._file.read(_STORED_BYTES)
            if not more:
                return False
            stored = more.lstrip(b"\0")
        self._stored = stored
        self._member, self._in_member = zlib.decompressobj(zlib.MAX_WBITS | 16), 0
        return True
