"""Tables of texts that do not end or nest without end, and links, pipes and names that lead astray."""

import json
import os
from collections.abc import Callable
from pathlib import Path

from bombs import GIB, Hostile, hole
from bombs_pictures import FILM, saved


def table(modality_says: str, write: Callable[[Path], object], verdict: str = "refused") -> Hostile:
    """Return a case of one table of texts."""
    return Hostile(modality="report", write=write, says=modality_says, verdict=verdict)


def _lines(name: str, *lines: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(b"\n".join(lines) + b"\n")


_GOOD = b'{"text": "clear lungs"}'
TABLES = {
    "CSV line of 2 GB": table("longer than", hole("a.csv", b"text\nclear\n", 2 * GIB)),
    "CSV heading of 2 GB": table("longer than", hole("a.csv", b"text,", 2 * GIB)),
    "CSV row over many lines": table("longer than", _lines("a.csv", b"text,b", b'"x\n","y\n",' * 3_000_000)),
    "CSV quote that never closes": table(
        "longer than|field", _lines("a.csv", b"text", b'"' + b"word\n" * 5_000_000)
    ),
    "CSV of a million columns": table("columns", _lines("a.csv", b"text" + b",x" * 1_000_000, *[b"a"] * 200)),
    "CSV of three long rows": table("3 samples", _lines("a.csv", b"text", *[b"word " * 500_000] * 3), "read"),
    "CSV that is no UTF-8": table("UTF-8", _lines("a.csv", b"text", b"\xff\xfe\x80")),
    "CSV with NUL bytes": table("", _lines("a.csv", b"text", b"a\0b clear"), "read"),
    "JSONL line of 2 GB": table("longer than", hole("a.jsonl", _GOOD + b"\n", 2 * GIB)),
    "JSONL nested 100,000 deep": table(
        "JSON", _lines("a.jsonl", _GOOD, b'{"text":' + b"[" * 100_000), "broken"
    ),
    "JSONL number of a million digits": table(
        "JSON", _lines("a.jsonl", _GOOD, b'{"text": ' + b"9" * 1_000_000 + b"}"), "broken"
    ),
    "JSONL list of pairs": table("JSON", _lines("a.jsonl", _GOOD, b'[["text", "sly"]]'), "broken"),
    "JSONL that is no UTF-8": table("UTF-8", _lines("a.jsonl", _GOOD, b'{"text": "\xff"}')),
    "JSONL half a character": table(
        "", _lines("a.jsonl", json.dumps({"text": "\ud83d clear"}).encode()), "read"
    ),
}


def _films(folder: Path) -> None:
    FILM.save(folder / "good.png")


def _link_outside(folder: Path) -> None:
    outside = folder.parent.resolve() / f"{folder.name} outside"
    outside.mkdir()
    _films(outside)
    (folder / "a.png").symlink_to(outside / "good.png")


def _links_in_a_circle(folder: Path) -> None:
    _films(folder)
    (folder / "a.png").symlink_to(folder / "b.png")
    (folder / "b.png").symlink_to(folder / "a.png")
    (folder / "deeper").symlink_to(folder)


def _pipe(folder: Path) -> None:
    _films(folder)
    os.mkfifo(folder / "a.png")
    os.mkfifo(folder / "without an ending")
    (folder / "zero.png").symlink_to("/dev/zero")


def _odd_names(folder: Path) -> None:
    for name in (b"a\xff\xfe.png", b"two\nlines.png", b"\x1b[31mred.png"):
        (folder / os.fsdecode(name)).write_bytes(saved(FILM, "PNG"))


PATHS = {
    "link to the outside": Hostile(modality="xray", write=_link_outside, says="leads out"),
    "links in a circle": Hostile(modality="xray", write=_links_in_a_circle, says="1 samples", verdict="read"),
    "pipes and devices": Hostile(modality="xray", write=_pipe, says="1 samples", verdict="read"),
    "names of bytes and lines": Hostile(modality="xray", write=_odd_names, says="3 samples", verdict="read"),
}
