"""MIMIC-CXR-JPG: films of the chest from one hospital, as published on PhysioNet (versions 2.0.0 and 2.1.0).

    files/p10/p10000032/s50414267/02aa804e-bde0afdd-112c0b34-7bc16630-4e384014.jpg
    mimic-cxr-2.0.0-split.csv.gz      dicom_id, study_id, subject_id, split (train, validate, test)
    mimic-cxr-2.0.0-chexpert.csv.gz   subject_id, study_id and a column for each of 14 findings

Layout, columns and the meaning of the labels (1.0 named, 0.0 denied, -1.0 uncertain, empty: not mentioned) are those
of physionet.org/content/mimic-cxr-jpg. Films of every view are taken, as in the paper, which counts 355,840 of the
377,110, and in its authors' script, which takes every file below the folder.
"""

from pathlib import Path

from mnemos.sharding.modalities import Modality
from mnemos.sharding.sources import images
from mnemos.sharding.sources.published import check_root, rows, table
from mnemos.sharding.sources.source import FindOptions, Source
from mnemos.sharding.sources.units import Unit, read_table, relative_name

TABLES = "mimic-cxr-2.0.0-"  # in version 2.1.0 too
SPLITS = {"train": "train", "validate": "val"}
TEST = "official test split, kept for testing"
_FILMS = "files/p1[0-9]/p*/s*/*.jpg"
SPLIT_COLUMNS = ("dicom_id", "study_id", "subject_id", "split")
# The labeller calls a film with nothing but a tube or a pacemaker on it "No Finding".
_NO_DISEASE = ("subject_id", "study_id", "No Finding", "Support Devices")
_NAMED = ("1.0", "1")


def find_films(source: Path, modality: Modality, options: FindOptions) -> list[Unit]:
    """Return one unit for every row of the split table and every film without a row.

    The group is the patient, written as in the source of the reports. The label is "No Finding", or "Finding" where
    at least one disease is named; films of other studies have none.

    Raises:
        UserError: not the data set's top folder, or a table is missing.
    """
    check_root(source, (_FILMS,), SOURCE.name, "files/p10/p10000032/s50414267/*.jpg")
    splits = table(source, f"{TABLES}split", SPLIT_COLUMNS, why="says which films train, validate and test")
    labels = _study_labels(source)
    films = {path.stem: path for path in source.glob(_FILMS)}
    units = []
    for film, study, patient, split in rows(splits, SPLIT_COLUMNS):
        name = f"files/p{patient[:2]}/p{patient}/s{study}/{film}.jpg"
        path = films.pop(film, None)
        if path is None:
            reason = "row of a film that is not in the folder"
        else:
            name = relative_name(path, source)
            reason = "" if split in SPLITS else TEST if split == "test" else "film whose row names no split"
        if path is None or reason:
            units.append(Unit(name=name, reader="image", files=(), left_out=reason))
        else:
            group, label = f"p{patient}", labels.get(study, "")
            units.append(
                Unit(name=name, reader="image", files=(path,), group=group, label=label, split=SPLITS[split])
            )
    reason = "film without a row in the split table"
    names = (relative_name(path, source) for path in films.values())
    return units + [Unit(name=name, reader="image", files=(), left_out=reason) for name in names]


def _study_labels(source: Path) -> dict[str, str]:
    """Return the class of every study whose findings the labeller is sure of."""
    columns = ("study_id", "No Finding", "Pneumonia")
    file = table(source, f"{TABLES}chexpert", columns, why="holds the findings of every study")
    labels = {}
    for row in read_table(file):
        if row.get("No Finding") in _NAMED:
            labels[row["study_id"]] = "No Finding"
        elif any(value in _NAMED for finding, value in row.items() if finding not in _NO_DISEASE):
            labels[row["study_id"]] = "Finding"
    return labels


SOURCE = Source(
    name="mimic-cxr-jpg",
    about="MIMIC-CXR-JPG, films of the chest",
    kinds=("image",),
    fits=lambda modality: modality.channels == 1,
    find=find_films,
    readers={"image": images.read_unit},
)
