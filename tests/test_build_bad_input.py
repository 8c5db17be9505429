"""A user's mistake at the build command: one sentence, exit code 2, no traceback, nothing left behind."""

import numpy as np
import pytest
from PIL import Image
from sample_files import grey_film, head, key_file, write_csv, write_dicom, write_films, write_nifti

from mnemos.sharding import build, show

IDENTITY = np.diag([-1.0, -1.0, 1.0, 1.0])


def truncated(folder):
    path = folder / "film.jpg"
    Image.fromarray(grey_film(0, (200, 200))).save(path)
    path.write_bytes(path.read_bytes()[:1500])


def mri_as_ct(folder):
    write_nifti(folder / "a.nii.gz", np.abs(head()).transpose(2, 1, 0), IDENTITY)


def ct_slice_as_xray(folder):
    write_dicom(folder / "a.dcm", grey_film(0), dicom_type="CT")


def unknown_label(folder):
    write_films(folder / "films", 3)
    (folder / "films" / "labels.csv").unlink()
    write_csv(
        folder / "labels.csv", ["file", "label"], [("films/film_000.jpg", "a"), ("films/film_9.jpg", "b")]
    )


def labels_without_file(folder):
    write_films(folder / "films", 3)
    write_csv(folder / "labels.csv", ["name", "label"], [("film_000.jpg", "a")])


def labels_like_names(folder):
    rows = []
    for number in range(101):
        (folder / f"{number}.jpg").touch()
        rows.append((f"{number}.jpg", f"Quodlibetius {number}"))
    write_csv(folder / "labels.csv", ["file", "label"], rows)


CASES = {
    "unknown modality": ("ultrasound", None, [], ["'ultrasound'", "report, xray, ct, mri, pathology"]),
    "unknown preset": ("xray", None, ["--preset", "bse"], ["'bse'", "sample, base"]),
    "missing folder": ("xray", None, [], ["does not exist", "JPEG"]),
    "empty folder": ("xray", lambda folder: None, [], ["is empty"]),
    "films for reports": ("report", lambda f: write_films(f / "films", 3), [], ["3 .jpg", "CSV or JSONL"]),
    "volumes for films": ("xray", mri_as_ct, [], ["1 .nii.gz", "BMP or DICOM"]),
    "films for volumes": ("ct", lambda f: write_films(f / "films", 3), [], ["3 .jpg", "NIfTI"]),
    "MR values for CT": ("ct", mri_as_ct, [], ["a.nii.gz", "Hounsfield"]),
    "a CT slice for X-ray": ("xray", ct_slice_as_xray, [], ["a.dcm", "type CT"]),
    "truncated JPEG": ("xray", truncated, [], ["film.jpg", "truncated"]),
    "unreadable DICOM": (
        "mri",
        lambda f: (f / "a.dcm").write_bytes(b"no" * 300),
        [],
        ["a.dcm", "readable DICOM"],
    ),
    "unreadable DICOM film": (
        "xray",
        lambda f: (f / "a.dcm").write_bytes(b""),
        [],
        ["a.dcm", "readable DICOM"],
    ),
    "NIfTI of two dimensions": (
        "mri",
        lambda f: write_nifti(f / "flat.nii.gz", np.zeros((9, 9), np.int16), np.eye(4)),
        [],
        ["flat.nii.gz", "2 dimensions", "needs three"],
    ),
    "a volume of one slice": (
        "mri",
        lambda f: write_nifti(f / "flat.nii.gz", head()[:1].transpose(2, 1, 0), IDENTITY),
        [],
        ["no sample", "slices"],
    ),
    "CSV without the column": (
        "report",
        lambda f: write_csv(f / "r.csv", ["id", "findings"], [("1", "clear")]),
        [],
        ["'text'", "id, findings", "--text-column"],
    ),
    "JSONL without the column": (
        "report",
        lambda f: (f / "r.jsonl").write_text('{"findings": "clear"}\n'),
        [],
        ["'text'", "findings", "--text-column"],
    ),
    "CSV that is none": (
        "report",
        lambda f: (f / "r.csv").write_bytes(b"\xff\xfe\x00\x80"),
        [],
        ["r.csv", "UTF-8"],
    ),
    "CSV of nothing": ("report", lambda f: (f / "r.csv").touch(), [], ["r.csv", "(none)"]),
    "CSV of empty texts": (
        "report",
        lambda f: write_csv(f / "r.csv", ["text"], [(" ",), ("",)]),
        [],
        ["2 rows"],
    ),
    "labels of unknown files": ("xray", unknown_label, [], ["labels.csv", "films/film_9.jpg"]),
    "labels without the column": ("xray", labels_without_file, [], ["name, label", "column file"]),
    "missing label file": ("xray", lambda f: write_films(f / "a", 3), ["--labels", "no.csv"], ["no.csv"]),
    "share out of range": ("xray", lambda f: write_films(f / "a", 3), ["--val-fraction", "1.5"], ["1.5"]),
    "share that is no number": ("xray", lambda f: None, ["--val-fraction", "many"], ["many", "--help"]),
    "misspelt flag": ("xray", lambda f: None, ["--presets", "base"], ["--presets", "--help"]),
    "axes that are none": ("ct", mri_as_ct, ["--axes", "LPP"], ["LPP", "LPS"]),
    "negative workers": ("xray", lambda f: None, ["--workers", "-1"], ["-1"]),
    "shards of nothing": ("xray", lambda f: None, ["--shard-mb", "0"], ["--shard-mb", "more than 0"]),
    "unknown centre": ("ct", mri_as_ct, ["--centre", "heart"], ["'heart'", "volume, body"]),
    "labels that look like names": ("xray", labels_like_names, [], ["101 different labels", "--labels"]),
}


@pytest.mark.parametrize("case", CASES)
def test_one_sentence_and_exit_code_2(tmp_path, capsys, case):
    modality, make, flags, expected = CASES[case]
    source = tmp_path / "input"
    if make is not None:
        source.mkdir()
        make(source)
    before = sorted(tmp_path.rglob("*"))
    key = key_file(tmp_path)
    code = build.main([modality, str(source), "--out", str(tmp_path / "set"), "--key-file", key, *flags])
    printed = capsys.readouterr()
    assert code == 2
    assert printed.out == ""
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1, printed.err
    assert "Traceback" not in printed.err
    for words in expected:
        assert words in printed.err, printed.err
    assert sorted(path for path in tmp_path.rglob("*") if path.name != "key") == before, (
        "something was left behind"
    )


def test_a_key_file_that_cannot_serve(tmp_path, capsys):
    films = write_films(tmp_path / "films", 3)
    (tmp_path / "key").write_bytes(b"short")
    flags = ["--out", str(tmp_path / "set"), "--key-file", str(tmp_path / "key")]
    assert build.main(["xray", str(films), *flags]) == 2
    assert "16 secret bytes" in capsys.readouterr().err
    assert not (tmp_path / "set").exists()


def test_an_output_that_cannot_be_made(tmp_path, capsys):
    films = write_films(tmp_path / "films", 3)
    (tmp_path / "file").touch()
    out = ["--out", str(tmp_path / "file" / "set"), "--key-file", key_file(tmp_path)]
    assert build.main(["xray", str(films), *out]) == 2
    assert "cannot be made" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("make", "flags", "expected"),
    [
        (None, [], "does not exist"),
        (lambda f: f.mkdir(), [], "is empty"),
        (lambda f: write_films(f, 2), [], "holds no manifest.json"),
        ("set", ["--split", "test"], "train and val"),
        ("set", ["--num", "0"], "--num"),
        ("set", ["--out", "nowhere/a.png"], "--out"),
        ("set", ["--out", "a.jpg"], ".png"),
    ],
    ids=["missing", "empty", "no set", "split", "num", "folder", "ending"],
)
def test_show_refuses_in_one_sentence(tmp_path, capsys, make, flags, expected):
    data = tmp_path / "data"
    if make == "set":
        films = write_films(tmp_path / "films", 3)
        key = key_file(tmp_path)
        assert build.main(["xray", str(films), "--out", str(data), "--key-file", key]) == 0
        capsys.readouterr()
    elif make:
        make(data)
    assert show.main([str(data), *flags]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1 and expected in printed.err, printed.err
