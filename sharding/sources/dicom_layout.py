"""Where the fields of a DICOM file lie: a walk over tags and lengths alone, before anything is read.

pydicom believes a length until it has tried to read it, builds an object a field, calls itself a level deeper for every
sequence within a sequence, and stops in silence where a file ends early. Here every length is compared with what is
there, and fields, levels and bytes are counted. DICOM PS3.5, sections 7 and A.4.
"""

import os
import struct
from dataclasses import dataclass
from typing import BinaryIO

from mnemos.sharding.errors import DataError

PIXEL_TAGS = (0x7FE00008, 0x7FE00009, 0x7FE00010)  # float, double and integer pixels
HEADER_BYTES = 32 << 20  # most before the pixels
MOST_FIELDS = 50_000  # a large header has some thousands
MOST_LEVELS = 32
_TABLES = (0x00283000, 0x00283010)  # of the modality and the window: the sequences whose items we use
LONG_KINDS = frozenset(
    (b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV")
)
_ITEM, _ITEM_END, _SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
_OPEN = 0xFFFFFFFF  # a length that is not known beforehand: a delimiter ends what it is the length of


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where a picture lies in its file.

    Attributes:
        pixels: (first byte, length) of native pixels, or of each fragment of encapsulated ones.
        encapsulated: whether they are fragments, without the table of offsets.
        tag, kind: of the pixels; 0: there are none; b"": their kind is not written.
    """

    pixels: tuple[tuple[int, int], ...] = ()
    encapsulated: bool = False
    tag: int = 0
    kind: bytes = b""

    @property
    def stored_bytes(self) -> int:
        """Return what the pixels take in the file."""
        return sum(length for _, length in self.pixels)


@dataclass
class _Level:
    """A data set (or, `items`, a sequence of them) being walked over; `open` up to a delimiter."""

    end: int
    items: bool
    open: bool
    explicit: bool


def layout(file: BinaryIO, *, explicit: bool, little: bool, cut: bool = False) -> Layout:
    """Walk over a data set up to the end of its pixels; what lies behind them is never read.

    Args:
        file: at the data set's first byte.
        explicit, little: how the transfer syntax says the fields are written.
        cut: the file ends somewhere on purpose, because no more of it was unpacked.

    Raises:
        DataError: a length beyond the file, too many fields, levels or bytes, or items that do not fit together.
    """
    walk = _Walk(file, little=little, cut=cut)
    return walk.run(explicit)


class _Walk:
    def __init__(self, file: BinaryIO, *, little: bool, cut: bool) -> None:
        self._file, self._cut = file, cut
        self._start = self._at = file.tell()
        self._end = file.seek(0, os.SEEK_END)
        self._tag, self._short, self._long = (
            struct.Struct(("<" if little else ">") + code) for code in ("HH", "H", "I")
        )
        self._fields = 0

    def run(self, explicit: bool) -> Layout:
        # Some files are written the other way than their syntax says; pydicom looks, and so do we.
        kind = self._peek(6)[4:]
        explicit = kind.isalpha() and kind.isupper() if len(kind) == 2 else explicit
        levels = [_Level(self._end, False, False, explicit)]
        while levels:
            level = levels[-1]
            if self._at >= level.end:
                if self._at > level.end:
                    raise DataError("a field of its header is longer than what holds it")
                if level.open and not self._cut:
                    raise self._early()
                levels.pop()
                continue
            self._count(levels)
            tag = self._next_tag()
            if tag in (_ITEM_END, _SEQUENCE_END):
                self._length(4)
                if not level.open or level.items != (tag == _SEQUENCE_END):
                    raise DataError("its sequences are not nested as sequences must be")
                levels.pop()
            elif (tag == _ITEM) != level.items:
                raise DataError("its sequences are not nested as sequences must be")
            elif tag == _ITEM:
                self._enter(levels, self._length(4), False, level.explicit)
            else:
                kind, length = self._kind_and_length(level.explicit)
                if tag in PIXEL_TAGS and len(levels) == 1:
                    return self._pixels(tag, kind, length)
                if length == _OPEN and (kind in (b"OB", b"OW") or tag in PIXEL_TAGS):
                    self._fragments()  # of an icon, say
                elif length == _OPEN or tag in _TABLES:
                    # What is of unknown kind and open is written without kinds: PS3.5, 6.2.2.
                    self._enter(levels, length, True, level.explicit and kind != b"UN")
                else:
                    self._skip(length)
        return Layout()

    def _count(self, levels: list[_Level]) -> None:
        self._fields += 1
        if self._fields > MOST_FIELDS:
            raise DataError(f"its header has more than {MOST_FIELDS} fields")
        if len(levels) > 2 * MOST_LEVELS:
            raise DataError(f"its header has sequences more than {MOST_LEVELS} deep")
        if self._at - self._start > HEADER_BYTES:
            raise DataError(f"its header is longer than {HEADER_BYTES >> 20} MB")

    def _enter(self, levels: list[_Level], length: int, items: bool, explicit: bool) -> None:
        outer = levels[-1]
        if length == _OPEN:
            levels.append(_Level(outer.end, items, True, explicit))
            return
        end = self._at + length
        if end > outer.end and not self._cut:
            raise self._early()
        levels.append(_Level(min(end, outer.end), items, False, explicit))

    def _kind_and_length(self, explicit: bool) -> tuple[bytes, int]:
        if explicit:
            kind = self._peek(2)
            if b"AA" <= kind <= b"ZZ":  # pydicom's own test, so that both walk the same way
                self._at += 2
                if kind not in LONG_KINDS:
                    return kind, self._length(2)
                self._at += 2
                return kind, self._length(4)
        return b"", self._length(4)  # a private field may be written without its kind

    def _pixels(self, tag: int, kind: bytes, length: int) -> Layout:
        if length == _OPEN:
            return Layout(pixels=self._fragments(), encapsulated=True, tag=tag, kind=kind)
        start = self._at
        self._skip(length)
        return Layout(pixels=((start, length),), tag=tag, kind=kind)

    def _fragments(self) -> tuple[tuple[int, int], ...]:
        """Walk over fragments; the first one is the table of offsets, which nothing needs for one picture."""
        fragments: list[tuple[int, int]] = []
        while not (self._cut and self._at >= self._end):
            tag, length = self._next_tag(), self._length(4)
            if tag == _SEQUENCE_END:
                break
            if tag != _ITEM:
                raise DataError("its pixels are not made of fragments, as its transfer syntax says")
            fragments.append((self._at, length))
            self._skip(length)
            if len(fragments) > MOST_FIELDS:
                raise DataError(f"its pixels are cut into more than {MOST_FIELDS} fragments")
        return tuple(fragments[1:])

    def _next_tag(self) -> int:
        group, number = self._tag.unpack(self._take(4))
        return int(group) << 16 | int(number)

    def _length(self, num_bytes: int) -> int:
        return int((self._short if num_bytes == 2 else self._long).unpack(self._take(num_bytes))[0])

    def _take(self, num_bytes: int) -> bytes:
        content = self._peek(num_bytes)
        if len(content) < num_bytes:
            raise self._early()
        self._at += num_bytes
        return content

    def _peek(self, num_bytes: int) -> bytes:
        self._file.seek(self._at)  # stays inside the buffer, as a rule
        return self._file.read(num_bytes)

    def _skip(self, length: int) -> None:
        if self._at + length > self._end and not self._cut:
            raise self._early()
        self._at = min(self._at + length, self._end)

    def _early(self) -> DataError:
        if self._cut:
            return DataError(f"its header is longer than {HEADER_BYTES >> 20} MB")
        return DataError("it ends early: a field is said to be longer than what is left of the file")
