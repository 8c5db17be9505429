"""Small trees in the published layout of the data sets that are read: real names, columns and headings, drawn pictures.

No line of them comes from a data set; the reports are written here.
"""

import gzip
from pathlib import Path

import numpy as np
from PIL import Image
from sample_files import grey_film, write_csv

NIH_COLUMNS = [
    *("Image Index", "Finding Labels", "Follow-up #", "Patient ID", "Patient Age", "Patient Gender"),
    *("View Position", "OriginalImage[Width", "Height]", "OriginalImagePixelSpacing[x", "y]"),
]
CHEXPERT = [
    *("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Enlarged Cardiomediastinum", "Fracture"),
    *("Lung Lesion", "Lung Opacity", "No Finding", "Pleural Effusion", "Pleural Other", "Pneumonia"),
    *("Pneumothorax", "Support Devices"),
]
SPLIT_OF_PATIENT = {10: "train", 11: "train", 12: "train", 13: "train", 14: "validate", 15: "test"}


def pack(path: Path) -> Path:
    """Turn a file into its .gz, as PhysioNet serves the tables."""
    packed = path.with_name(f"{path.name}.gz")
    packed.write_bytes(gzip.compress(path.read_bytes(), mtime=0))
    path.unlink()
    return packed


def patient(number: int) -> str:
    """Return the id of a patient whose files lie in p<number>."""
    return f"{number}000032"


def study(number: int, place: int) -> str:
    """Return the id of a patient's study."""
    return f"5{number}{place:04d}7"


def film(number: int, place: int) -> str:
    """Return the DICOM id of a study's film."""
    return f"{number:08x}-{place:08x}-112c0b34-7bc16630-4e384014"


def write_mimic_tables(root: Path, *, packed: bool) -> None:
    """Write split, metadata and chexpert: two studies a patient, the second one with a lateral film only."""
    splits, metadata, findings = [], [], []
    named = {0: {"No Finding": "1.0"}, 1: {"Pneumonia": "1.0", "Edema": "-1.0"}}
    for number, split in SPLIT_OF_PATIENT.items():
        for place in range(2):
            ids = (film(number, place), study(number, place), patient(number))
            splits.append((*ids, split))
            metadata.append((ids[0], ids[2], ids[1], ("PA", "LATERAL")[place], "2544", "3056"))
            row = {"Support Devices": "1.0"} if number == 13 else named[place]
            findings.append((ids[2], ids[1], *(row.get(finding, "") for finding in CHEXPERT)))
    tables = {
        "split": (["dicom_id", "study_id", "subject_id", "split"], splits),
        "metadata": (["dicom_id", "subject_id", "study_id", "ViewPosition", "Rows", "Columns"], metadata),
        "chexpert": (["subject_id", "study_id", *CHEXPERT], findings),
    }
    for name, (columns, rows) in tables.items():
        path = write_csv(root / f"mimic-cxr-2.0.0-{name}.csv", columns, rows)
        if packed:
            pack(path)


def write_mimic_films(root: Path, *, packed: bool = True) -> Path:
    """Write MIMIC-CXR-JPG: six patients of two films; one film is missing, and one has no row."""
    for number in SPLIT_OF_PATIENT:
        for place in range(2):
            folder = root / "files" / f"p{number}" / f"p{patient(number)}" / f"s{study(number, place)}"
            folder.mkdir(parents=True)
            if (number, place) != (12, 1):
                Image.fromarray(grey_film(10 * number + place)).save(folder / f"{film(number, place)}.jpg")
    Image.fromarray(grey_film(999)).save(folder / f"{film(15, 9)}.jpg")
    (root / "index.html").write_text("what wget leaves behind")
    write_mimic_tables(root, packed=packed)
    return root


def write_mimic_reports(root: Path, texts: dict[tuple[int, int], str]) -> Path:
    """Write the files of mimic-cxr-reports.zip: the text of study (patient, place)."""
    for (number, place), text in texts.items():
        folder = root / "files" / f"p{number}" / f"p{patient(number)}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"s{study(number, place)}.txt").write_text(text, encoding="utf-8")
    return root


def write_nih(root: Path, *, flat: bool = False, table: str = "Data_Entry_2017_v2020.csv") -> Path:
    """Write ChestX-ray14: ten patients of two films, the last two to test; some are RGBA, one is missing."""
    rows, lists = [], {"train_val": [], "test": []}
    for number in range(1, 11):
        for place in range(2):
            name = f"{number:08d}_{place:03d}.png"
            findings = ("No Finding", "Effusion", "Effusion|Mass")[(number + place) % 3]
            rows.append(
                (name, findings, str(place), str(number), "58", "M", "PA", "2682", "2749", "0.143", "0.143")
            )
            lists["test" if number > 8 else "train_val"].append(name)
            folder = root / "images" if flat else root / f"images_{1 + number // 6:03d}" / "images"
            folder.mkdir(parents=True, exist_ok=True)
            picture = Image.fromarray(grey_film(100 * number + place))
            if (number, place) != (8, 1):
                picture.convert("RGBA" if number == 2 else "L").save(folder / name)
    Image.fromarray(grey_film(5)).save(folder / "00000099_000.png")
    write_csv(root / table, NIH_COLUMNS, rows)
    for name, names in lists.items():
        (root / f"{name}_list.txt").write_text("\n".join(names) + "\n")
    return root


def stained(seed: int) -> np.ndarray:
    """Return a 224x224 patch in colours of its own, uint8 [Y, X, 3]."""
    colour = np.random.default_rng(seed).uniform(0.3, 1, 3)
    return (grey_film(seed, (224, 224))[..., None] * colour).astype(np.uint8)


def write_nct(root: Path, parts: dict[str, int], classes: tuple[str, ...]) -> Path:
    """Write NCT-CRC-HE: so many patches of every class in each part, as uncompressed TIFF."""
    for part, count in parts.items():
        for rank, name in enumerate(classes):
            (root / part / name).mkdir(parents=True)
            for number in range(count):
                letters = "".join(chr(65 + (rank + number * k) % 26) for k in range(8))
                picture = Image.fromarray(stained(sum(map(ord, part)) * 1000 + 10 * rank + number))
                picture.save(root / part / name / f"{name}-{letters}.tif")
    return root


def write_rct(root: Path) -> Path:
    """Write PubMed RCT: four, two and two abstracts of five sentences."""
    roles = ("BACKGROUND", "OBJECTIVE", "METHODS", "RESULTS", "CONCLUSIONS")
    root.mkdir(parents=True)
    first = 24293578
    for file, count in (("train.txt", 4), ("dev.txt", 2), ("test.txt", 2)):
        abstracts = []
        for number in range(first, first + count):
            lines = [
                f"{role}\tAbstract {number} says of its {role.lower()} that p < 0.05 ." for role in roles
            ]
            abstracts.append("\n".join([f"###{number}", *lines, "", ""]))
        (root / file).write_text("".join(abstracts))
        first += count
    return root
