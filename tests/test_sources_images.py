"""The published data sets of pictures, through the build command: what is kept, and as what; what users get wrong."""

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lookalikes import (
    SPLIT_OF_PATIENT,
    film,
    pack,
    patient,
    stained,
    study,
    write_mimic_films,
    write_mimic_reports,
    write_nct,
    write_nih,
)
from PIL import Image
from sample_files import KEY, grey_film, key_file

from mnemos.sharding import build
from mnemos.sharding.errors import DataError
from mnemos.sharding.keys import hashed_name
from mnemos.sharding.manifest import load_manifest
from mnemos.sharding.modalities import MODALITIES
from mnemos.sharding.reader import ShardSet
from mnemos.sharding.sources import images
from mnemos.sharding.sources.nct_crc_he import CLASSES
from mnemos.sharding.sources.registry import GENERAL, NAMES, readers, sources
from mnemos.sharding.sources.samples import find_units
from mnemos.sharding.sources.source import FindOptions


def run(tmp_path: Path, modality: str, source: str, root: Path, *flags: str) -> int:
    """Build with the tests' key and return the exit code."""
    given = [modality, str(root), "--out", str(tmp_path / "set"), "--key-file", key_file(tmp_path)]
    return build.main([*given, "--source", source, *flags])


def stored(directory: Path) -> dict[str, tuple[str, str, str, np.ndarray]]:
    """Return (split, class, hashed group, picture) of every stored sample by its hashed key."""
    found = {}
    for split in ("train", "val"):
        shards = ShardSet(directory, split)
        for place, key in enumerate(shards.index["key"].tolist()):
            label = int(shards.labels[place])
            group = shards.index["group"][place].decode()
            name = shards.manifest.classes[label] if label >= 0 else ""
            found[key.decode()] = (split, name, group, shards.read(place))
    return found


@pytest.mark.parametrize("packed", [True, False], ids=["tables packed", "tables unpacked"])
def test_mimic_cxr_jpg(tmp_path, packed):
    root = write_mimic_films(tmp_path / "mimic-cxr-jpg" / "2.0.0", packed=packed)
    assert run(tmp_path, "xray", "mimic-cxr-jpg", root) == 0
    found = stored(tmp_path / "set")
    manifest = load_manifest(tmp_path / "set")
    assert manifest.source == "mimic-cxr-jpg" and manifest.classes == ("Finding", "No Finding")
    assert manifest.skipped == {
        "official test split, kept for testing": 2,
        "row of a film that is not in the folder": 1,
        "film without a row in the split table": 1,
    }
    assert len(found) == 9
    for number, split in SPLIT_OF_PATIENT.items():
        for place in range(2):
            folder = f"files/p{number}/p{patient(number)}/s{study(number, place)}"
            key = hashed_name(KEY, f"{folder}/{film(number, place)}.jpg")
            if split == "test" or (number, place) == (12, 1):
                assert key not in found
                continue
            # lateral films are kept; a pacemaker without a word on disease is no label
            label = "" if number == 13 else ("No Finding", "Finding")[place]
            group = hashed_name(KEY, f"p{patient(number)}")
            assert found[key][:3] == ({"train": "train", "validate": "val"}[split], label, group)
            expected = images.stored_image(Image.fromarray(grey_film(10 * number + place)), 1, (64, 64))
            assert np.abs(found[key][3].astype(int) - expected).mean() < 3


@pytest.mark.parametrize(
    ("flat", "table"),
    [(False, "Data_Entry_2017_v2020.csv"), (True, "Data_Entry_2017.csv")],
    ids=["12 folders", "flat"],
)
def test_nih_chestxray14(tmp_path, flat, table):
    root = write_nih(tmp_path / "CXR8", flat=flat, table=table)
    assert run(tmp_path, "xray", "nih-chestxray14", root, "--val-fraction", "0.25") == 0
    found = stored(tmp_path / "set")
    manifest = load_manifest(tmp_path / "set")
    assert manifest.classes == ("Effusion", "No Finding")
    assert manifest.skipped == {
        "official test split, kept for testing": 4,
        "row of a film that is not in the folders": 1,
        "film without a row in the table": 1,
    }
    assert len(found) == 15
    sides = {}
    for number in range(1, 9):
        for place in range(2 if number < 8 else 1):
            key = hashed_name(KEY, f"{number:08d}_{place:03d}.png")
            split, label, group, picture = found[key]
            assert label == ("No Finding", "Effusion", "")[(number + place) % 3]
            assert group == hashed_name(KEY, str(number))
            assert sides.setdefault(number, split) == split, "a patient lies on one side only"
            assert picture.shape == (1, 64, 64)
            expected = images.stored_image(Image.fromarray(grey_film(100 * number + place)), 1, (64, 64))
            assert np.abs(picture.astype(int) - expected).mean() < 3, "RGBA films are grey all the same"
    assert Counter(sides.values()) == {"train": 6, "val": 2}


def test_nct_crc_he(tmp_path):
    root = write_nct(tmp_path / "zenodo", {"NCT-CRC-HE-100K": 3, "CRC-VAL-HE-7K": 1}, CLASSES)
    assert run(tmp_path, "pathology", "nct-crc-he", root) == 0
    found = stored(tmp_path / "set")
    assert load_manifest(tmp_path / "set").classes == CLASSES and len(found) == 36
    for path in root.rglob("*.tif"):
        name = path.relative_to(root).as_posix()
        part, label = name.split("/")[:2]
        split, kept, group, picture = found[hashed_name(KEY, name)]
        assert (split, kept) == ("val" if part == "CRC-VAL-HE-7K" else "train", label)
        assert group == hashed_name(KEY, name), "the patients of patches are unknown: each is a group"
        expected = images.stored_image(Image.open(path), 3, (64, 64))
        assert np.abs(picture.astype(int) - expected).mean() < 4


def test_one_part_of_nct_crc_he_is_split_by_us(tmp_path):
    root = write_nct(tmp_path / "zenodo", {"NCT-CRC-HE-100K-NONORM": 2}, CLASSES[:5])
    assert run(tmp_path, "pathology", "nct-crc-he", root, "--val-fraction", "0.2") == 0
    assert Counter(split for split, *_ in stored(tmp_path / "set").values()) == {"train": 8, "val": 2}


def without(*names: str) -> Any:
    """Return what removes files or folders of a tree."""

    def remove(root: Path) -> Path:
        for name in names:
            path = root / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        return root

    return remove


def renamed(old: str, new: str) -> Any:
    """Return what renames a column of a table."""

    def rename(root: Path) -> Path:
        path = next(root.glob("*split.csv"))
        path.write_text(path.read_text().replace(old, new))
        return root

    return rename


def mimic(folder: Path) -> Path:
    return write_mimic_films(folder / "data", packed=False)


def nih(folder: Path) -> Path:
    return write_nih(folder / "data")


def nct(folder: Path) -> Path:
    return write_nct(folder / "data", {"NCT-CRC-HE-100K": 1, "CRC-VAL-HE-7K": 1}, CLASSES[:2])


MISTAKES = {
    "one level too deep": (
        "mimic-cxr-jpg",
        mimic,
        lambda root: root / "files",
        ["p10/, p11/", "give {root}"],
    ),
    "one level too high": ("mimic-cxr-jpg", mimic, lambda root: root.parent, ["data/", "give {root}"]),
    "the reports instead": (
        "mimic-cxr-jpg",
        lambda folder: write_mimic_reports(folder / "data", {(10, 0): "FINDINGS: Clear."}),
        lambda root: root,
        ["files/", "files/p10/p10000032/s50414267/*.jpg", "unpacked"],
    ),
    "no split table": (
        "mimic-cxr-jpg",
        mimic,
        without("mimic-cxr-2.0.0-split.csv"),
        ["split.csv", "validate"],
    ),
    "no labels": (
        "mimic-cxr-jpg",
        mimic,
        without("mimic-cxr-2.0.0-chexpert.csv"),
        ["chexpert.csv", "findings"],
    ),
    "another table": (
        "mimic-cxr-jpg",
        mimic,
        renamed("dicom_id", "image"),
        ["image, study_id", "not dicom_id"],
    ),
    "a truncated table": (
        "mimic-cxr-jpg",
        lambda folder: write_mimic_films(folder / "data"),
        lambda root: truncated(root / "mimic-cxr-2.0.0-split.csv.gz"),
        ["split.csv.gz", "cannot be read"],
    ),
    "no film at all": (
        "nih-chestxray14",
        nih,
        without("images_001", "images_002"),
        ["no sample", "not in the folders"],
    ),
    "a folder of images": (
        "nih-chestxray14",
        nih,
        lambda root: root / "images_001",
        ["images/", "give {root}"],
    ),
    "no entries": (
        "nih-chestxray14",
        nih,
        without("Data_Entry_2017_v2020.csv"),
        ["Data_Entry_2017*", "patient"],
    ),
    "no test list": ("nih-chestxray14", nih, without("test_list.txt"), ["test_list.txt", "out of training"]),
    "a class as the input": (
        "nct-crc-he",
        nct,
        lambda root: root / "NCT-CRC-HE-100K" / "ADI",
        ["holds ADI-AAAAAAAA.tif", "NCT-CRC-HE-100K/ADI/*.tif", "give {root}"],
    ),
    "both forms": (
        "nct-crc-he",
        nct,
        lambda root: shutil.copytree(root / "NCT-CRC-HE-100K", root / "NCT-CRC-HE-100K-NONORM").parent,
        ["same patches"],
    ),
    "a class that is none": (
        "nct-crc-he",
        nct,
        lambda root: shutil.move(root / "NCT-CRC-HE-100K" / "ADI", root / "NCT-CRC-HE-100K" / "fat") and root,
        ["fat", "ADI, BACK"],
    ),
    "a misspelt source": ("mimic", mimic, lambda root: root, ["'mimic'", "images, dicom, mimic-cxr-jpg"]),
    "another kind": ("pubmed-rct", mimic, lambda root: root, ["sentences of abstracts", "gives no xray"]),
    "a missing folder": (
        "nih-chestxray14",
        lambda folder: folder / "none",
        lambda root: root,
        ["does not exist"],
    ),
}


def truncated(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[:40])
    return path.parent


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_sentence_that_says_what_was_expected(tmp_path, capsys, case):
    source, write, spoil, expected = MISTAKES[case]
    root = write(tmp_path)
    modality = "pathology" if source == "nct-crc-he" else "xray"
    assert run(tmp_path, modality, source, spoil(root)) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1 and "Traceback" not in printed.err
    for words in expected:
        assert words.format(root=root) in printed.err, printed.err
    assert not (tmp_path / "set").exists()


def test_a_table_is_inflated_line_by_line_and_no_further(tmp_path, capsys):
    root = write_mimic_films(tmp_path / "data", packed=False)
    path = root / "mimic-cxr-2.0.0-split.csv"
    path.write_bytes(path.read_bytes() + b"a" * (20 << 20))
    pack(path)
    assert run(tmp_path, "xray", "mimic-cxr-jpg", root) == 2
    assert "row is longer than" in capsys.readouterr().err


@pytest.mark.parametrize("codec", ["raw", "packbits", "tiff_lzw", "tiff_adobe_deflate", "jpeg"])
def test_tiff_files_are_read_as_any_picture(tmp_path, codec):
    Image.fromarray(stained(1)).save(tmp_path / "a.tif", compression=codec)
    Image.fromarray(stained(1)).save(tmp_path / "a.bmp")
    read = images.read_image(tmp_path / "a.tif", 3, (64, 64)).astype(int)
    assert np.abs(read - images.read_image(tmp_path / "a.bmp", 3, (64, 64))).mean() < 3
    units = find_units(tmp_path, MODALITIES["pathology"], FindOptions())
    assert [unit.name for unit in units] == ["a.bmp", "a.tif"]


def tiled(side: int) -> bytes:
    """Return a TIFF of 64x64 pixels that declares one tile of side x side."""
    tags = {256: 64, 257: 64, 258: 8, 259: 8, 262: 1, 277: 1, 322: side, 323: side, 324: 200, 325: 20}
    entries = b"".join(
        tag.to_bytes(2, "little") + b"\x04\0\x01\0\0\0" + value.to_bytes(4, "little")
        for tag, value in tags.items()
    )
    return b"II*\0\x08\0\0\0" + len(tags).to_bytes(2, "little") + entries + bytes(300)


@pytest.mark.parametrize(
    "trap", ["large tiles", "many pixels", "several pictures", "odd codec", "packed BMP"]
)
def test_pictures_that_cost_more_than_they_look_are_refused(tmp_path, trap):
    path, small = tmp_path / "a.tif", Image.new("L", (64, 64))
    if trap == "large tiles":
        path.write_bytes(tiled(30_000))  # Pillow by itself takes 900 MB for it
    elif trap == "many pixels":
        Image.new("1", (4096, 4097)).save(path, compression="tiff_lzw")
    elif trap == "several pictures":
        small.save(path, save_all=True, append_images=[small])
    elif trap == "odd codec":
        small.save(path, compression="lzma")
    else:
        path = tmp_path / "a.bmp"
        small.save(path)
        content = bytearray(path.read_bytes())
        content[30] = 1  # the header's field of the compression: run lengths, unpacked by a slow loop
        path.write_bytes(content)
    with pytest.raises(DataError, match=r"tiles|16 million|several|packed as lzma|compressed BMP"):
        images.read_image(path, 1, (64, 64))


def test_every_source_is_registered_under_its_own_name():
    assert tuple(sources()) == NAMES and set(GENERAL) <= set(NAMES)
    keys = Counter((name, reader) for source in sources().values() for name, reader in source.readers.items())
    assert len({name for name, _ in keys}) == len(keys), "two readers share a name"
    assert set(readers()) == {name for name, _ in keys}
    for source in sources().values():
        assert source.about and source.readers and source.kinds
        assert any(
            modality.kind in source.kinds and source.fits(modality) for modality in MODALITIES.values()
        )


def test_every_source_has_a_place_in_the_docs():
    text = (Path(images.__file__).parent / "README.md").read_text()
    for name in NAMES:
        assert f"--source {name}" in text or name in GENERAL, f"{name} has no command in sources/README.md"
        assert f"`{name}`" in text
