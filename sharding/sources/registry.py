"""Every source by name. Registering one is one line here: the file's name, with hyphens, and its SOURCE."""

from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # a source imports what it reads with; this table answers --help at once
    from mnemos.sharding.sources.source import Reader, Source

GENERAL = ("images", "volumes", "dicom", "texts")  # asked together when the user names no source
NAMES = (
    *GENERAL,
    "mimic-cxr-reports",
    "mimic-cxr-jpg",
    "nih-chestxray14",
    "nct-crc-he",
    "pubmed-rct",
    "deeplesion",
    "adni",
    "tcga",
)


@cache
def sources() -> "dict[str, Source]":
    """Return all sources by name."""
    modules = (import_module(f"mnemos.sharding.sources.{name.replace('-', '_')}") for name in NAMES)
    return {module.SOURCE.name: module.SOURCE for module in modules}


@cache
def readers() -> "dict[str, Reader]":
    """Return what reads a unit, by ``Unit.reader``; data sets share the readers of the general sources."""
    return {name: reader for source in sources().values() for name, reader in source.readers.items()}
