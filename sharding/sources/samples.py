"""From an input folder to units, and from units to stored samples: all sources behind one door."""

from dataclasses import replace
from pathlib import Path

from mnemos.sharding.errors import DataError, LeftOut, UserError
from mnemos.sharding.modalities import Modality, StoredSize
from mnemos.sharding.sources.bounds import refusing
from mnemos.sharding.sources.registry import GENERAL, readers, sources
from mnemos.sharding.sources.source import FindOptions, Outcome, Source
from mnemos.sharding.sources.units import Unit, describe_files, files_below, leads_out

_WANTED = {
    "text": "CSV or JSONL tables",
    "image": "JPEG, PNG, TIFF, BMP or DICOM pictures",
    "volume": "NIfTI files or DICOM series",
}
_LINKED = "it is a link that leads out of the input folder; copy the file, or give the folder that it lies in"


def find_units(source_path: Path, modality: Modality, options: FindOptions, source: str = "") -> list[Unit]:
    """List what a folder (or a single file) holds for a modality, in name order.

    Args:
        source_path: the input.
        modality: decides which sources can serve.
        options: what the user said about the input.
        source: name of the one source to ask; "": every general one that can serve, their units joined.

    Raises:
        UserError: an unknown source, or one that does not give this modality; or the input is missing, empty, or
            holds only files of another kind.
    """
    asked = _chosen(source, modality)
    wanted = asked[0].about if source else _WANTED[modality.kind]
    if not source_path.exists():
        raise UserError(f"input {source_path} does not exist; give a folder with {wanted}")
    if source_path.is_dir() and not any(source_path.iterdir()):
        raise UserError(f"input folder {source_path} is empty; {modality.name} is built from {wanted}")
    units = [unit for one in asked for unit in one.find(source_path, modality, options)]
    if not units:
        found = describe_files(files_below(source_path)) or "no file"
        raise UserError(
            f"input {source_path} holds {found} but {modality.name} is built from {wanted}; "
            "check the modality and the folder"
        )
    if modality.kind == "volume":
        units = [replace(unit, facts={"centre": options.centre, **unit.facts}) for unit in units]
    for place, unit in enumerate(units):
        if any(leads_out(path, source_path) for path in unit.files):
            units[place] = replace(unit, broken=_LINKED)
    return sorted(units, key=lambda unit: unit.name)


def _chosen(name: str, modality: Modality) -> list[Source]:
    """Return the sources to ask; UserError where the named one is unknown or serves other modalities."""
    known = sources()
    serving = [key for key in known if modality.kind in known[key].kinds and known[key].fits(modality)]
    if not name:
        return [known[key] for key in GENERAL if key in serving]
    if name not in known:
        raise UserError(f"source {name!r} is unknown; for {modality.name} choose one of {', '.join(serving)}")
    if name not in serving:
        raise UserError(
            f"source {name} ({known[name].about}) gives no {modality.name}; choose one of {', '.join(serving)}"
        )
    return [known[name]]


def read_unit(unit: Unit, modality: Modality, size: StoredSize) -> Outcome:
    """Read one unit and bring it to its stored form; never raises for what the unit holds."""
    if unit.broken or unit.left_out:
        return Outcome(broken=unit.broken, left_out=unit.left_out)
    try:
        with refusing("it cannot be read", explain=False):
            return readers()[unit.reader](unit, modality, size)
    except LeftOut as reason:
        return Outcome(left_out=str(reason))
    except DataError as error:
        return Outcome(broken=error.reason)
