"""What decides the bytes of a set, in a form that names nothing: two builds of the same head are one build."""

import hashlib
import hmac
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from mnemos.sharding.building.journal import Head
from mnemos.sharding.keys import hashed_name, key_check
from mnemos.sharding.sources.units import Unit

# Packages that decode, resize, encode or tokenise: another version may give other bytes.
TOOLS = (
    "mnemos",
    "numpy",
    "Pillow",
    "simplejpeg",
    "blosc2",
    "nibabel",
    "pydicom",
    "pylibjpeg-openjpeg",
    "pylibjpeg-rle",
    "pyjpegls",
    "openslide-python",
    "openslide-bin",
    "tokenizers",
    "webdataset",
)


def head_of(options: dict[str, Any], units: list[Unit], key: bytes) -> Head:
    """Describe a build.

    Args:
        options: flag -> value, of all flags that have a say in the bytes.
        units: in the build's order, as they were found and labelled.
        key: secret bytes.
    """
    tools = {name: _version(name) for name in TOOLS}
    hashed = {flag: hashed_name(key, f"{flag} {value!r}") for flag, value in options.items()}
    return Head(key=key_check(key), tools=tools, options=hashed, contents=_contents(units, key))


def _contents(units: list[Unit], key: bytes) -> dict[str, str]:
    """Return keyed hashes of the units: other files, changed files and other labels can be told apart."""
    names, files, said = (hmac.new(key, digestmod=hashlib.sha256) for _ in range(3))
    known: dict[Path, str] = {}  # a table of a million texts is asked once
    for unit in units:
        names.update(_line(unit.name, unit.reader))
        for path in sorted(unit.files):
            if path not in known:
                known[path] = _size_and_date(path)
            files.update(_line(known[path]))
        facts = sorted(unit.facts.items())
        told = (unit.label, unit.group, unit.split, unit.text, unit.broken, unit.left_out, unit.axes)
        said.update(_line(*told, facts))
    return {
        "names of files": names.hexdigest(),
        "sizes or dates of files": files.hexdigest(),
        "labels, groups or texts": said.hexdigest(),
    }


def _line(*values: object) -> bytes:
    return f"{values!r}\n".encode("utf-8", "surrogatepass")


def _size_and_date(path: Path) -> str:
    try:
        found = path.stat()
    except OSError:  # reading it will say what is wrong
        return "absent"
    return f"{found.st_size} {found.st_mtime_ns}"


@cache
def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"
