"""ADNI as the Image and Data Archive (IDA) hands it out: NIfTI files or DICOM series, classes from its CSV.

Layout: ``ADNI/002_S_0295/MP-RAGE/2006-04-18_08_20_30.0/S13408/ADNI_002_S_0295_MR_..._S13408_I13722.nii`` (or as many
``.dcm`` files); other folders do as well where a file's name carries its subject, as ``sub-ADNI002S0295_T1w.nii.gz``
does. The CSV of the collection is known by its columns. Class = research group (CN, MCI, AD ...), group = subject, so
that all visits of one stay on one side of the split. Values, axes and spacing come from the files' own headers.
"""

import re
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

from mnemos.sharding.errors import LeftOut, UserError
from mnemos.sharding.modalities import DICOM_TYPES, Modality, StoredSize
from mnemos.sharding.sources import dicom, volumes
from mnemos.sharding.sources.source import FindOptions, Outcome, Source
from mnemos.sharding.sources.units import Unit, files_below, read_table, relative_name, root_of, table_columns

# As the CSV of a collection writes them, and the result of an advanced search.
_IMAGE_COLUMNS = ("Image Data ID", "Image ID")
_SUBJECT_COLUMNS = ("Subject", "Subject ID")
_GROUP_COLUMNS = ("Group", "Research Group")
_SUBJECT = re.compile(r"(?<!\d)(\d{3})(?:_S_|S)(\d{4,5})(?!\d)")
_IMAGE = re.compile(r"(?:^|[/_])I(\d+)(?=[./]|$)")
_TYPE = re.compile(r"ADNI_\d{3}_S_\d{4,5}_([A-Z]{2})_")  # MR, PT
_EXAMPLE = "002_S_0295"


def find_units(source: Path, modality: Modality, options: FindOptions) -> list[Unit]:
    """Return one unit for every NIfTI file and every DICOM series, with its subject and research group.

    Args:
        source: a folder above the scans.
        modality: decides the DICOM types; a scan whose file name states another one is left out.
        options: the axes of NIfTI files with wrong headers.

    Raises:
        UserError: there are scans, but none that names a subject, or the CSV speaks of none of them.
    """
    root = root_of(source)
    found = volumes.find_nifti(source, modality, options) + dicom.find_series(files_below(source), root)
    units = [_named(unit, root, DICOM_TYPES.get(modality.name, ())) for unit in found]
    if units and not any(unit.group for unit in units):
        raise UserError(
            f"input {source} holds {len(units)} scans, but neither a folder nor a file name carries a subject such as "
            f"{_EXAMPLE}; give the folder ADNI of the download"
        )
    tables = [
        file for file in sorted(root.glob("*.csv")) + sorted(root.parent.glob("*.csv")) if _is_table(file)
    ]
    if not units or not tables:
        return units
    by_image, by_subject = _read_groups(tables[0])
    labelled = [replace(unit, label=_label(unit, root, by_image, by_subject)) for unit in units]
    if not any(unit.label for unit in labelled):
        raise UserError(
            f"{tables[0]} speaks of none of the {len(units)} scans in {source}; "
            "put the CSV of the same collection there, or none"
        )
    return labelled


def read_another_type(unit: Unit, modality: Modality, size: StoredSize) -> Outcome:
    """Leave out a scan that is of another type, whatever its file holds."""
    raise LeftOut(f"a scan of type {unit.facts['type']}")


def _named(unit: Unit, root: Path, types: tuple[str, ...]) -> Unit:
    """Give a unit its subject; mark one that names none, or that is of another type."""
    path = _path(unit, root)
    subject = _subject(path) or _subject(unit.group)
    kind = _TYPE.search(path)
    if kind and types and kind[1] not in types:
        return replace(unit, reader="another_type", group=subject, broken="", facts={"type": kind[1]})
    reason = "" if subject else f"neither its folders nor its name carry a subject such as {_EXAMPLE}"
    return replace(unit, group=subject, broken=unit.broken or reason)


def _path(unit: Unit, root: Path) -> str:
    """Return the path of a unit's first file below the input folder, whose own name leads."""
    return f"{root.resolve().name}/{relative_name(unit.files[0], root)}"


def _subject(text: str) -> str:
    found = _SUBJECT.search(text)
    return f"{found[1]}_S_{found[2]}" if found else ""


def _is_table(file: Path) -> bool:
    columns = set(table_columns(file))
    return all(columns & set(names) for names in (_IMAGE_COLUMNS, _SUBJECT_COLUMNS, _GROUP_COLUMNS))


def _read_groups(file: Path) -> tuple[dict[str, str], dict[str, set[str]]]:
    """Return the research group of every image and the research groups of every subject."""
    by_image: dict[str, str] = {}
    by_subject: dict[str, set[str]] = defaultdict(set)
    for row in read_table(file):
        image, subject, group = (
            next((row[name].strip() for name in names if row.get(name)), "")
            for names in (_IMAGE_COLUMNS, _SUBJECT_COLUMNS, _GROUP_COLUMNS)
        )
        by_image[image.lstrip("I")] = group  # written with the letter or without
        by_subject[_subject(subject)].add(group)
    return by_image, by_subject


def _label(unit: Unit, root: Path, by_image: dict[str, str], by_subject: dict[str, set[str]]) -> str:
    """Return the group stated for a unit's image, else its subject's, where that has only one."""
    for image in reversed(_IMAGE.findall(_path(unit, root))):
        if image in by_image:
            return by_image[image]
    groups = by_subject.get(unit.group, set())
    return next(iter(groups)) if len(groups) == 1 else ""


def _fits(modality: Modality) -> bool:
    return modality.values == "zscore"


SOURCE = Source(
    name="adni",
    about="ADNI as downloaded from the IDA: NIfTI files or DICOM series of subjects, and the collection's CSV",
    kinds=("volume",),
    find=find_units,
    readers={"another_type": read_another_type},
    fits=_fits,
)
