"""A search for planted words that looks into every file, container and encoding of shards and runs."""

import gzip
import io
import tarfile
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import blosc2
import numpy as np
import tifffile
from PIL import Image

from mnemos.sharding.tokenizer import load_tokenizer


def search(canaries: Iterable[str], haystacks: Iterable[tuple[str, bytes]]) -> dict[str, set[str]]:
    """Return where each canary was found, whatever its case, in UTF-8 and in both UTF-16."""
    by_start: dict[bytes, dict[bytes, str]] = {}
    for canary in canaries:
        for form in {canary.lower().encode(code) for code in ("utf-8", "utf-16-le", "utf-16-be")}:
            by_start.setdefault(form[:4], {})[form] = canary
    may_start = np.zeros(1 << 24, bool)
    may_start[_mixed(np.array([np.frombuffer(start, "<u4")[0] for start in by_start]))] = True
    found: dict[str, set[str]] = {}
    for name, content in haystacks:
        lower = content.lower()
        starts = np.ndarray(
            (max(len(lower) - 3, 0),), "<u4", lower, strides=(1,)
        )  # four bytes from every place
        for place in np.flatnonzero(may_start[_mixed(starts)]).tolist():
            for form, canary in by_start.get(lower[place : place + 4], {}).items():
                if lower.startswith(form, place) and _stands_alone(form, place, lower):
                    found.setdefault(canary, set()).add(name)
    return found


def _mixed(numbers: np.ndarray) -> np.ndarray:
    """Return 24 bits of every uint32: a table of them is quicker to ask than a thousand searches."""
    return (numbers * np.uint32(2654435761)) >> np.uint32(8)


def _stands_alone(form: bytes, place: int, lower: bytes) -> bool:
    """Tell a date of eight digits from the middle of a longer number; anything else counts wherever it is."""
    if not (form.isdigit() and len(form) == 8):
        return True
    before, after = lower[max(place - 1, 0) : place], lower[place + 8 : place + 9]
    return not (before.isdigit() or before == b"." or after.isdigit())


def contents(*folders: Path) -> Iterator[tuple[str, bytes]]:
    """Yield the name and the bytes of every file, and of everything packed, compressed or encoded in it."""
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            name = str(path.relative_to(folder))
            yield f"the name of {name}", name.encode()
            if path.is_file():
                yield from opened(name, path.read_bytes(), path)


def opened(name: str, content: bytes, path: Path) -> Iterator[tuple[str, bytes]]:
    """Yield a file's bytes, and what is inside of them, down to pixels, voxels and words."""
    yield name, content
    ending = name.rsplit(".", 1)[-1]
    if ending == "tar":
        with tarfile.open(fileobj=io.BytesIO(content)) as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None
                yield f"{name}: header", repr(member.get_info()).encode()
                yield from opened(f"{name}/{member.name}", file.read(), path)
    elif zipfile.is_zipfile(io.BytesIO(content)) and ending in ("npz", "pt", "zip"):
        with zipfile.ZipFile(io.BytesIO(content)) as packed:
            yield f"{name}: comment", packed.comment
            for member_name in packed.namelist():
                yield from opened(f"{name}/{member_name}", packed.read(member_name), path)
    elif ending == "gz":
        yield f"{name} unpacked", gzip.decompress(content)
    elif ending == "vol":
        yield f"{name} decoded", blosc2.decompress(content)
    elif ending in ("jpg", "jpeg", "png", "tif", "tiff"):
        with Image.open(io.BytesIO(content)) as picture:
            yield f"{name}: tags", repr((picture.info, dict(picture.getexif()))).encode()
            yield f"{name}: pixels", picture.tobytes()
    elif ending == "svs":
        with tifffile.TiffFile(io.BytesIO(content)) as slide:
            yield from (
                (f"{name}: picture {number}", page.asarray().tobytes())
                for number, page in enumerate(slide.pages)
            )
    elif ending == "ids":
        tokenizer = load_tokenizer(path.parents[1] / "tokenizer.json")
        yield f"{name} decoded", tokenizer.decode(np.frombuffer(content, "<u2").tolist()).encode()
    elif name.endswith("tokenizer.json"):
        yield f"{name}: vocabulary", "\n".join(vocabulary(path)).encode()


def vocabulary(tokenizer_file: Path) -> list[str]:
    """Return every entry of a tokenizer as text, its byte-level alphabet undone."""
    tokenizer = load_tokenizer(tokenizer_file)
    return [
        tokenizer.decode([number], skip_special_tokens=False) for number in range(tokenizer.get_vocab_size())
    ]
