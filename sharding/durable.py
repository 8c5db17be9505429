"""Files that are there whole or not at all, after a killed process and after a power cut, too."""

import os
from pathlib import Path
from typing import IO, Any


def sync_file(file: IO[Any]) -> None:
    """Return when what was written to an open file has reached the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_path(path: Path) -> None:
    """Return when a file's content, or the names in a folder (new files, renamed ones), have reached the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_durably(path: Path, content: bytes) -> None:
    """Write a file under a temporary name and rename it, replacing an older one in one step."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        file.write(content)
        sync_file(file)
    partial.replace(path)
    sync_path(path.parent)
