"""TCGA slides as gdc-client downloads them: tissue tiles of every patient, classes from the sample sheet.

Layout: ``<file uuid>/TCGA-XX-XXXX-01Z-00-DX1.<uuid>.svs`` with ``logs/`` and ``annotations.txt`` beside, and the
portal's ``gdc_sample_sheet*.tsv`` in the input folder. Class = project (of the sheet, or of a folder named like
TCGA-BRCA), group = patient: the barcode's first twelve characters.
"""

import re
from collections import defaultdict
from pathlib import Path

from mnemos.sharding.errors import UserError
from mnemos.sharding.modalities import Modality
from mnemos.sharding.sources.slides import LEAST_TISSUE, MICRONS, MOST_TILES, read_patient, require_openslide
from mnemos.sharding.sources.source import FindOptions, Source
from mnemos.sharding.sources.units import Unit, files_below, read_table, relative_name, root_of, table_columns

ENDING = ".svs"
PARTIAL = ".partial"  # how gdc-client marks a download that has not ended
SHEET = "gdc_sample_sheet*.tsv"
_FILE, _PROJECT = "File Name", "Project ID"
_PATIENT = re.compile(r"TCGA-[0-9A-Z]{2}-[0-9A-Z]{4}(?=-)")
_PROJECT_FOLDER = re.compile(r"TCGA-[A-Z]{2,5}")


def find_units(source: Path, modality: Modality, options: FindOptions) -> list[Unit]:
    """Return one unit for every patient, with all slides; a slide that names none is a broken unit of its own.

    Args:
        source: the folder the download lies in, or one above.
        modality: any that the source fits.
        options: of no concern here.

    Raises:
        UserError: OpenSlide is missing, there is no slide, or the sample sheet is not one or speaks of other files.
    """
    require_openslide()
    root = root_of(source)
    slides = [path for path in files_below(source) if path.name.lower().endswith((ENDING, ENDING + PARTIAL))]
    if not slides:
        return []
    projects = _projects(slides, root)
    patients: dict[str, list[Path]] = defaultdict(list)
    units = []
    for path in slides:
        patient = _PATIENT.match(path.name)
        if patient and not path.name.endswith(PARTIAL):
            patients[patient[0]].append(path)
            continue
        reason = (
            "its name carries no TCGA barcode"
            if not patient
            else "its download has not ended; start it again"
        )
        units.append(Unit(name=relative_name(path, root), reader="slide", files=(path,), broken=reason))
    return units + [
        Unit(
            name=patient, reader="slide", files=tuple(paths), group=patient, label=projects.get(paths[0], "")
        )
        for patient, paths in patients.items()
    ]


def _projects(slides: list[Path], root: Path) -> dict[Path, str]:
    """Return the project of every slide that the sample sheets or a folder's name tell one of."""
    projects = {}
    for path in slides:
        folders = [part for part in path.relative_to(root.parent).parts if _PROJECT_FOLDER.fullmatch(part)]
        projects.update({path: folders[-1]} if folders else {})
    sheets = sorted(root.glob(SHEET)) or sorted(root.parent.glob(SHEET))
    of_name = {name: project for sheet in sheets for name, project in _read_sheet(sheet)}
    told = {path: of_name[path.name] for path in slides if path.name in of_name}
    if sheets and not told:
        raise UserError(
            f"{sheets[0]} speaks of none of the {len(slides)} slides in {root}; "
            "download the sample sheet of the same files, or take it away"
        )
    return projects | told


def _read_sheet(sheet: Path) -> list[tuple[str, str]]:
    """Return a sample sheet's file names and projects."""
    columns = table_columns(sheet, delimiter="\t")
    if {_FILE, _PROJECT} - set(columns):
        raise UserError(
            f"{sheet} has the columns {', '.join(columns) or '(none)'}; a sample sheet has {_FILE} and {_PROJECT}: "
            "download it again"
        )
    return [
        (row[_FILE].strip(), row[_PROJECT].split(",")[0].strip())
        for row in read_table(sheet, delimiter="\t")
        if row.get(_FILE) and row.get(_PROJECT)
    ]


def _fits(modality: Modality) -> bool:
    return modality.channels == 3


SOURCE = Source(
    name="tcga",
    about="TCGA slides as gdc-client downloads them: a folder a file with an .svs in it",
    kinds=("image",),
    find=find_units,
    readers={"slide": read_patient},
    fits=_fits,
    steps={
        "tiles": f"at most {MOST_TILES} a patient at {MICRONS} micrometres a pixel, each at least {LEAST_TISSUE:.0%} tissue, "
        "spread over the slide; labels and macros are never read"
    },
)
