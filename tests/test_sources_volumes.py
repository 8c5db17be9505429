"""DeepLesion and ADNI in their published folders: each tree is written here, and goes through the build command."""

import itertools
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sample_files import KEY, key_file, write_csv, write_nifti, write_series

from mnemos.sharding import build
from mnemos.sharding.errors import DataError
from mnemos.sharding.keys import hashed_name
from mnemos.sharding.modalities import MODALITIES, STORED_SIZES
from mnemos.sharding.reader import ShardSet
from mnemos.sharding.sources import adni, deeplesion
from mnemos.sharding.sources.samples import find_units, read_unit
from mnemos.sharding.sources.source import FindOptions

CT, MRI, SIZE = MODALITIES["ct"], MODALITIES["mri"], STORED_SIZES["sample"]
DL_COLUMNS = [
    "File_name",
    "Patient_index",
    "Study_index",
    "Series_ID",
    "Key_slice_index",
    "Measurement_coordinates",
    "Bounding_boxes",
    "Lesion_diameters_Pixel_",
    "Normalized_lesion_location",
    "Coarse_lesion_type",
    "Possibly_noisy",
    "Slice_range",
    "Spacing_mm_px_",
    "Image_size",
    "DICOM_windows",
    "Patient_gender",
    "Patient_age",
    "Train_Val_Test",
]
IDA_COLUMNS = [
    "Image Data ID",
    "Subject",
    "Group",
    "Sex",
    "Age",
    "Visit",
    "Modality",
    "Description",
    "Type",
    "Acq Date",
    "Format",
    "Downloaded",
]


def run(tmp_path, modality, folder, source, *flags, out="set"):
    """Build with the tests' key and return the exit code."""
    given = [modality, str(folder), "--source", source, "--out", str(tmp_path / out)]
    return build.main([*given, "--key-file", key_file(tmp_path), "--workers", "1", *flags])


def by_key(directory):
    """Return (shards, place, split) of every sample by its key."""
    sets = {split: ShardSet(directory, split) for split in ("train", "val")}
    return {
        key.decode(): (shards, place, split)
        for split, shards in sets.items()
        for place, key in enumerate(shards.index["key"])
    }


def ct_slice(index: int, edge: int = 64, tissue: int = 40) -> np.ndarray:
    """Return Hounsfield units [Y, X]: soft tissue, the slice's number, bone in front on the right, lung at the back."""
    values = np.full((edge, edge), tissue, np.int32)
    values[0] = -1000
    values[edge // 2] = 2 * index
    values[: edge // 4, : edge // 4] = 700
    values[-edge // 4 :] = -800
    values[-1, 0] = 3071
    return values


def write_slices(folder: Path, indices, edge: int = 64, tissue: int = 40) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for index in indices:
        Image.fromarray((ct_slice(index, edge, tissue) + 32768).astype(np.uint16)).save(
            folder / f"{index:03d}.png"
        )


def dl_row(series: str, index: int, slices: tuple[int, int], spacing: str) -> tuple[str, ...]:
    patient, study, number = (str(int(part)) for part in series.split("_"))
    name, ends = f"{series}_{index:03d}.png", f"{slices[0]}, {slices[1]}"
    place = ("233.5, 95.0", "226.2, 90.2", "17.0, 7.0", "0.4, 0.2, 0.3", "3", "0")
    return (
        name,
        patient,
        study,
        number,
        str(index),
        *place,
        ends,
        spacing,
        "512, 512",
        "-175, 275",
        "F",
        "62",
        "3",
    )


def write_deeplesion(root: Path) -> Path:
    """Write nine series of eight patients; the first has two neighbourhoods, and the last no row in the table."""
    rows = [
        dl_row("000001_01_01", 18, (10, 25), "3, 3, 4"),
        dl_row("000001_01_01", 46, (40, 52), "3, 3, 4"),
        dl_row("000002_03_02", 9, (1, 16), "1.5, 1.5, 4"),
    ]
    write_slices(root / "Images_png" / "000001_01_01", [*range(10, 26), *range(40, 53)])
    write_slices(root / "Images_png" / "000002_03_02", range(1, 17), edge=128)
    for patient in range(2, 9):
        series = f"{patient:06d}_01_01"
        write_slices(root / "Images_png" / series, range(98, 106), tissue=50 + patient)
        rows += [dl_row(series, 101, (98, 105), "3, 3, 4")] if patient < 8 else []
    write_csv(root / "DL_info.csv", DL_COLUMNS, rows)
    return root


@pytest.fixture(scope="module")
def deeplesion_tree(tmp_path_factory):
    return write_deeplesion(tmp_path_factory.mktemp("deeplesion"))


def test_deeplesion_goes_through_the_build(deeplesion_tree, tmp_path, capsys):
    assert run(tmp_path, "ct", deeplesion_tree, "deeplesion") == 0
    samples = by_key(tmp_path / "set")
    manifest = next(iter(samples.values()))[0].manifest
    assert manifest.source == "deeplesion" and manifest.skipped == {"broken file": 1}
    assert "000008_01_01/098-105: DL_info.csv has no row for its series" in capsys.readouterr().out
    assert len(samples) == 3 + 2 + 3 + 6
    for run_of, last, parts in (("000001_01_01/010-025", 25, 3), ("000001_01_01/040-052", 52, 2)):
        for part in range(parts):
            shards, place, _ = samples[hashed_name(KEY, f"{run_of}:{part}")]
            assert shards.index["group"][place].decode() == hashed_name(KEY, "000001")
            assert shards.labels[place] == -1
            stored = shards.read(place)
            indices = (
                last - 4 * part - np.arange(8)
            )  # from foot to head, while indices count from head to foot
            np.testing.assert_array_equal(stored[:, 32, 32], 2 * indices)
            expected = np.clip([ct_slice(index) for index in indices], -1024, 1024)
            np.testing.assert_array_equal(stored, expected)
            assert stored[0, 8, 8] == 700, "rows run from front to back, columns from right to left"
    shards, place, _ = samples[hashed_name(KEY, "000002_03_02/001-016:0")]
    assert abs(int((shards.read(place)[4, 1:16, 1:30] > 600).sum()) - 15 * 16) < 30, (
        "96 of 192 mm in front are bone"
    )
    groups = {
        split: {s.index["group"][p] for s, p, side in samples.values() if side == split}
        for split in ("train", "val")
    }
    assert groups["train"] and groups["val"] and not groups["train"] & groups["val"]


def test_deeplesion_runs_are_the_same_from_either_folder(deeplesion_tree):
    above = find_units(deeplesion_tree, CT, FindOptions(), "deeplesion")
    inside = find_units(deeplesion_tree / "Images_png", CT, FindOptions(), "deeplesion")
    assert [(unit.name, unit.facts) for unit in above] == [(unit.name, unit.facts) for unit in inside]
    assert [unit.name for unit in above[:3]] == [
        "000001_01_01/010-025",
        "000001_01_01/040-052",
        "000002_01_01/098-105",
    ]
    assert above[3].facts["spacing"] == "1.5, 1.5, 4"


@pytest.mark.parametrize(
    ("given", "needs"),
    [
        ("Images_png/000002_01_01", "holds no folder named like 000001_01_01"),
        ("Images_png/000002_01_01/099.png", "give the folder that holds Images_png and DL_info.csv"),
        ("elsewhere", "holds no folder named like 000001_01_01"),
        ("without/Images_png", "DL_info.csv is neither in"),
        ("other", "but not Spacing_mm_px_"),
    ],
    ids=["a series", "a slice", "another folder", "no table", "another table"],
)
def test_mistakes_with_deeplesion(tmp_path, capsys, given, needs):
    write_slices(tmp_path / "Images_png" / "000002_01_01", [98, 99])
    write_slices(tmp_path / "without" / "Images_png" / "000002_01_01", [98])
    write_slices(tmp_path / "other" / "Images_png" / "000002_01_01", [98])
    write_csv(
        tmp_path / "other" / "DL_info.csv", ["File_name", "Spacing"], [("000002_01_01_098.png", "1, 1, 1")]
    )
    (tmp_path / "elsewhere" / "png").mkdir(parents=True)
    (tmp_path / "elsewhere" / "png" / "1.png").touch()
    assert run(tmp_path, "ct", tmp_path / given, "deeplesion") == 2
    error = capsys.readouterr().err
    assert needs in error and "Traceback" not in error and error.count("\n") == 1
    assert not (tmp_path / "set").exists()


def test_deeplesion_is_ct_and_nothing_else(deeplesion_tree, tmp_path, capsys):
    assert run(tmp_path, "mri", deeplesion_tree, "deeplesion") == 2
    assert "deeplesion" in capsys.readouterr().err


def bomb(path: Path, width: int, height: int) -> None:
    """Write a PNG of 16-bit grey that declares this size and holds one compressed megabyte of zeros."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 16, 0, 0, 0, 0)
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(bytes(1 << 20))), chunk(b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]), "ends early"),
        (lambda path: path.write_bytes(b"no picture"), "no readable PNG"),
        (lambda path: bomb(path, 5000, 5000), "5000x5000"),
        (lambda path: bomb(path, 60000, 60000), "60000x60000"),
        (lambda path: Image.new("L", (64, 64), 90).save(path), "16-bit"),
        (lambda path: Image.fromarray(np.zeros((32, 64), np.uint16)).save(path), "the first one"),
    ],
    ids=["truncated", "text", "bomb", "large bomb", "8 bits", "another size"],
)
def test_an_unreadable_slice_breaks_its_run_alone(tmp_path, spoil, reason):
    write_slices(tmp_path / "Images_png" / "000001_01_01", [*range(8), *range(20, 28)])
    write_csv(tmp_path / "DL_info.csv", DL_COLUMNS, [dl_row("000001_01_01", 3, (0, 7), "3, 3, 4")])
    units = find_units(tmp_path, CT, FindOptions(), "deeplesion")
    spoil(tmp_path / "Images_png" / "000001_01_01" / "005.png")
    first, second = (read_unit(unit, CT, SIZE) for unit in units)
    assert "005.png" in first.broken and reason in first.broken and not first.samples
    assert not second.broken and len(second.samples) == 1


@pytest.mark.parametrize("spacing", ["", "1, 1", "a, b, c", "1, 1, 900", "nan, 1, 1"])
def test_impossible_spacing_is_refused(tmp_path, spacing):
    write_slices(tmp_path, range(8))
    paths = tuple(sorted(tmp_path.glob("*.png")))
    with pytest.raises(DataError, match=r"spacing|mm"):
        deeplesion.read_run(paths, spacing)


def test_spacing_is_across_down_between(tmp_path):
    write_slices(tmp_path, range(8))
    raw = deeplesion.read_run(tuple(sorted(tmp_path.glob("*.png"))), "0.5, 0.7, -5")
    assert raw.spacing_mm == (5.0, 0.7, 0.5)
    np.testing.assert_array_equal(raw.values_ZYX[0], ct_slice(7))  # a sign turns nothing round


def test_a_run_has_the_spacing_of_its_own_row(tmp_path):
    write_slices(tmp_path / "Images_png" / "000001_01_01", [1, 2, 3, 7, 8, 9])
    write_slices(tmp_path / "more" / "Images_png" / "000001_01_01", [4, 20])
    rows = [dl_row("000001_01_01", 2, (0, 4), "1, 1, 1"), dl_row("000001_01_01", 8, (7, 9), "2, 2, 2")]
    write_csv(tmp_path / "DL_info.csv", DL_COLUMNS, rows)
    units = find_units(tmp_path, CT, FindOptions(), "deeplesion")
    assert [(unit.name.partition("/")[2], unit.facts["spacing"]) for unit in units] == [
        ("001-004", "1, 1, 1"),  # out of two archives
        ("007-009", "2, 2, 2"),
        ("020-020", "1, 1, 1"),
    ]


def t1(seed: int, shape_ZYX=(20, 64, 64)) -> np.ndarray:
    """Return an MR-like head in patient order, whose every slice and quarter differs."""
    z, y, x = np.meshgrid(*(np.arange(size) for size in shape_ZYX), indexing="ij")
    inside = ((y - 32) / 26) ** 2 + ((x - 32) / 22) ** 2 < 1
    noise = np.random.default_rng(seed).normal(0, 5, shape_ZYX)
    return np.round(np.where(inside, 300 + 10 * z + 3 * y + x, 0) + noise).clip(0).astype(np.int16)


def ida_name(subject: str, image: str, kind: str = "MR") -> str:
    return f"ADNI_{subject}_{kind}_MP-RAGE__br_raw_20060418193713091_100_S13408_{image}"


def write_adni(root: Path) -> Path:
    """Write two NIfTI scans of one subject, a DICOM series of another and a PET scan, with the collection's CSV."""
    affine = np.diag([-3.0, -3.0, 4.0, 1.0])
    affine[:3, 3] = 90, 90, -40
    for number, image in enumerate(("I13722", "I45108")):
        folder = root / "ADNI" / "002_S_0295" / "MP-RAGE" / f"200{6 + number}-04-18_08_20_30.0" / "S13408"
        folder.mkdir(parents=True)
        write_nifti(folder / f"{ida_name('002_S_0295', image)}.nii", t1(number).transpose(2, 1, 0), affine)
    series = root / "ADNI" / "011_S_0005" / "MPR____N3" / "2005-09-02_12_56_35.0" / "I32237"
    files = write_series(series, t1(2), spacing_mm=(4.0, 3.0, 3.0), PatientID="hospital number 7")
    for number, file in enumerate(files):
        file.rename(series / f"ADNI_011_S_0005_MR_MPR____N3_br_{number}_S9145_I32237.dcm")
    folder = root / "ADNI" / "011_S_0005" / "FDG" / "2005-09-02_12_56_35.0" / "I99"
    folder.mkdir(parents=True)
    write_nifti(folder / f"{ida_name('011_S_0005', 'I99', 'PT')}.nii", t1(3).transpose(2, 1, 0), affine)
    rest = ("F", "74", "sc", "MRI", "MP-RAGE", "Original", "4/18/2006", "NiFTI", "11/20/2026")
    rows = [
        ("I13722", "002_S_0295", "CN", *rest),
        ("45108", "002_S_0295", "MCI", *rest),  # older ones have no letter
        ("I1", "011_S_0005", "AD", *rest),  # another image of the subject
    ]
    write_csv(root / "ADNI1_Screening_11_20_2026.csv", IDA_COLUMNS, rows)
    write_csv(root / "visits.csv", ["subject", "visit"], [("002_S_0295", "sc")])  # not the collection's
    return root


@pytest.fixture(scope="module")
def adni_tree(tmp_path_factory):
    return write_adni(tmp_path_factory.mktemp("ida"))


def test_adni_goes_through_the_build(adni_tree, tmp_path):
    assert run(tmp_path, "mri", adni_tree, "adni", "--val-fraction", "0.4") == 0
    samples = by_key(tmp_path / "set")
    manifest = next(iter(samples.values()))[0].manifest
    assert manifest.classes == ("AD", "CN", "MCI") and manifest.skipped == {"a scan of type PT": 1}
    assert len(samples) == 9
    adni_folder = (
        "ADNI/002_S_0295/MP-RAGE/200{}-04-18_08_20_30.0/S13408/" + ida_name("002_S_0295", "{}") + ".nii"
    )
    scans = (
        (adni_folder.format(6, "I13722"), "002_S_0295", "CN", 0),
        (adni_folder.format(7, "I45108"), "002_S_0295", "MCI", 1),
        ("ADNI/011_S_0005/MPR____N3/2005-09-02_12_56_35.0/I32237", "011_S_0005", "AD", 2),
    )
    for (name, subject, label, seed), part in itertools.product(scans, range(3)):
        shards, place, _ = samples[hashed_name(KEY, f"{name}:{part}")]
        assert shards.index["group"][place].decode() == hashed_name(KEY, subject)
        assert manifest.classes[shards.labels[place]] == label
        cut = t1(seed)[2 + 4 * part : 10 + 4 * part].astype(
            np.float32
        )  # foot to head, front to back, right to left
        clipped = np.clip(cut, *np.percentile(cut, (0.2, 99.8)))
        expected = (clipped - clipped.mean()) / clipped.std()
        scale, shift = shards.index["scale"][place], shards.index["shift"][place]
        np.testing.assert_allclose(shards.read(place) * scale + shift, expected, atol=0.01)
    sides = {(shards.index["group"][place], split) for shards, place, split in samples.values()}
    assert len(sides) == 2, "all visits of a subject lie on one side"


def test_adni_from_the_folder_below_the_table(adni_tree):
    units = find_units(adni_tree / "ADNI", MRI, FindOptions(), "adni")
    assert sorted(unit.label for unit in units if unit.reader != "another_type") == ["AD", "CN", "MCI"]
    subject = find_units(adni_tree / "ADNI" / "002_S_0295", MRI, FindOptions(), "adni")
    assert {unit.group for unit in subject} == {"002_S_0295"}


@pytest.mark.parametrize(
    "name", ["002_S_0295.nii.gz", "sub-ADNI002S0295_ses-M00_T1w.nii", "ADNI_002_S_0295_MR.nii"]
)
def test_a_file_name_may_carry_the_subject(tmp_path, name):
    write_nifti(tmp_path / name, t1(0).transpose(2, 1, 0), np.diag([-3.0, -3, 4, 1]))
    write_nifti(tmp_path / "100_S13408.nii", t1(0).transpose(2, 1, 0), np.eye(4))
    write_csv(
        tmp_path / "search.csv", ["Subject ID", "Research Group", "Image ID"], [("002_S_0295", "AD", "5")]
    )
    stray, unit = sorted(find_units(tmp_path, MRI, FindOptions(), "adni"), key=lambda unit: unit.group)
    assert (unit.group, unit.label, unit.broken) == ("002_S_0295", "AD", "")
    assert "subject" in stray.broken, "a slice and series number is no subject"


@pytest.mark.parametrize(
    ("files", "needs"),
    [
        (("scan1.nii", "scan2.nii"), "carries a subject such as 002_S_0295"),
        (("table.csv",), "holds 1 .csv but mri is built from ADNI"),
    ],
    ids=["no subject", "no scan"],
)
def test_mistakes_with_adni(tmp_path, capsys, files, needs):
    folder = tmp_path / "scans"
    folder.mkdir()
    for name in files:
        if name.endswith(".csv"):
            write_csv(folder / name, IDA_COLUMNS, [])
        else:
            write_nifti(folder / name, t1(0).transpose(2, 1, 0), np.eye(4))
    assert run(tmp_path, "mri", folder, "adni") == 2
    error = capsys.readouterr().err
    assert needs in error and "Traceback" not in error


def test_adni_with_another_collections_table(adni_tree, tmp_path, capsys):
    subject = adni_tree / "ADNI" / "002_S_0295"
    shutil.copytree(subject, tmp_path / "ADNI" / "002_S_0295")
    rows = [("I7", "941_S_7051", "CN", *("",) * 9)]
    write_csv(tmp_path / "ADNI" / "PPMI.csv", IDA_COLUMNS, rows)
    assert run(tmp_path, "mri", tmp_path / "ADNI", "adni") == 2
    assert "PPMI.csv speaks of none" in capsys.readouterr().err


def test_an_image_of_a_subject_with_two_groups_has_none(adni_tree, tmp_path):
    shutil.copy(adni_tree / "ADNI1_Screening_11_20_2026.csv", tmp_path)
    for subject in ("002_S_0295", "011_S_0005"):
        write_nifti(tmp_path / f"{ida_name(subject, 'I500')}.nii", t1(0).transpose(2, 1, 0), np.eye(4))
    first, second = find_units(tmp_path, MRI, FindOptions(), "adni")
    assert (first.label, second.label) == ("", "AD")


def test_adni_without_a_table_has_no_classes(adni_tree):
    series = adni_tree / "ADNI" / "011_S_0005"
    (unit,) = (
        unit
        for unit in adni.find_units(series / "MPR____N3", MRI, FindOptions())
        if unit.reader == "dicom_series"
    )
    assert (unit.label, unit.group) == ("", "011_S_0005")
