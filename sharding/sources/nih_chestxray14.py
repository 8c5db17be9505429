"""NIH ChestX-ray14: frontal films of the chest, as the NIH Clinical Center publishes them.

    images_001/images/00000001_000.png ... images_012/images/...   or all of them in images/
    Data_Entry_2017_v2020.csv (or Data_Entry_2017.csv)   Image Index, Finding Labels (joined by |), Patient ID, ...
    train_val_list.txt, test_list.txt                    one file name a line; no patient is in both

Layout and columns are those of nihcc.app.box.com/v/ChestXray-NIHCC and of the copy on Kaggle. Some of the PNGs are
RGBA although they are grey.
"""

from pathlib import Path

from mnemos.sharding.errors import UserError
from mnemos.sharding.modalities import Modality
from mnemos.sharding.sources import images
from mnemos.sharding.sources.published import check_root, rows, table
from mnemos.sharding.sources.source import FindOptions, Source
from mnemos.sharding.sources.units import Unit, relative_name

TEST = "official test split, kept for testing"
_LIST_BYTES = 64 << 20
_COLUMNS = ("Image Index", "Finding Labels", "Patient ID")
_FILMS = ("images_0[0-9][0-9]/images/*.png", "images/*.png")


def find_films(source: Path, modality: Modality, options: FindOptions) -> list[Unit]:
    """Return one unit for every row of the table and every film without a row.

    The group is the patient. The label is the finding where a row names exactly one ("No Finding" among them); a
    film with several has no class of its own and gets none. Films of the official test list are left out; which of
    the others validate is ours to choose, by patient.

    Raises:
        UserError: not the data set's top folder, or a table or a list is missing.
    """
    marks = ("images_0[0-9][0-9]/images", "Data_Entry_2017*.csv", "train_val_list.txt")
    check_root(source, marks, SOURCE.name, "images_001/images/*.png, Data_Entry_2017*.csv and the two lists")
    entries = table(
        source, "Data_Entry_2017*", _COLUMNS, why="names the findings and the patient of every film"
    )
    train, test = (_names(source, f"{part}_list.txt") for part in ("train_val", "test"))
    films = {path.name: path for pattern in _FILMS for path in source.glob(pattern)}
    units = []
    for film, findings, patient in rows(entries, _COLUMNS):
        path = films.pop(film, None)
        if path is None:
            reason = "row of a film that is not in the folders"
        elif film in test:
            reason = TEST
        else:
            reason = "" if film in train else "film in neither of the two lists"
        if path is None or reason:
            units.append(Unit(name=film, reader="image", files=(), left_out=reason))
        else:
            label = findings if "|" not in findings else ""
            units.append(Unit(name=film, reader="image", files=(path,), group=patient, label=label))
    reason = "film without a row in the table"
    names = (relative_name(path, source) for path in films.values())
    return units + [Unit(name=name, reader="image", files=(), left_out=reason) for name in names]


def _names(source: Path, name: str) -> set[str]:
    """Return the file names of a list."""
    file = source / name
    try:
        if file.stat().st_size > _LIST_BYTES:
            raise UserError(f"{file} is larger than any list of film names; download it again")
        return set(file.read_text(encoding="utf-8-sig").split())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{file} cannot be read ({error}); it comes with the data set and keeps the test patients out of "
            "training: put it there"
        ) from error


SOURCE = Source(
    name="nih-chestxray14",
    about="NIH ChestX-ray14, films of the chest",
    kinds=("image",),
    fits=lambda modality: modality.channels == 1,
    find=find_films,
    readers={"image": images.read_unit},
)
