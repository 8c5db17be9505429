"""`python -m mnemos.sharding.build`: from a folder of files to a shard set that tells nothing of its source."""

import json
import os
import stat
import subprocess
import sys

import numpy as np
import pydicom
import pytest
from PIL import Image
from sample_files import (
    KEY,
    grey_film,
    head,
    key_file,
    write_csv,
    write_dicom,
    write_films,
    write_nifti,
    write_series,
)

from mnemos.sharding import build
from mnemos.sharding.building.build_fill import num_allowed_broken
from mnemos.sharding.building.build_set import BuildOptions, build_set
from mnemos.sharding.building.splits import assign_splits
from mnemos.sharding.keys import hashed_name
from mnemos.sharding.manifest import load_manifest
from mnemos.sharding.modalities import STORED_SIZES
from mnemos.sharding.reader import ShardSet
from mnemos.sharding.sources.units import Unit


def run(tmp_path, modality, source, *flags, out="set"):
    """Build with the tests' key and return the exit code."""
    flags = [str(flag) for flag in flags]
    return build.main(
        [modality, str(source), "--out", str(tmp_path / out), "--key-file", key_file(tmp_path), *flags]
    )


def both_splits(directory):
    return {split: ShardSet(directory, split) for split in ("train", "val")}


def test_films_with_labels_and_groups(tmp_path, capsys):
    films = write_films(tmp_path / "films", 40, groups=10)
    assert run(tmp_path, "xray", films, "--val-fraction", "0.2") == 0
    splits = both_splits(tmp_path / "set")
    manifest = splits["train"].manifest
    assert (
        manifest.classes == ("healthy", "ill") and manifest.shape == (64, 64) and manifest.preset == "sample"
    )
    keys = {}
    for split, shards in splits.items():
        for place, key in enumerate(shards.index["key"]):
            keys[key.decode()] = (split, shards, place)
    groups = {split: set(shards.index["group"].tolist()) for split, shards in splits.items()}
    assert not groups["train"] & groups["val"], "a patient lies on one side only"
    assert (len(groups["train"]), len(groups["val"])) == (8, 2)
    for number in range(40):
        split, shards, place = keys[hashed_name(KEY, f"film_{number:03d}.jpg")]
        assert shards.index["group"][place].decode() == hashed_name(KEY, f"patient_{number % 10}")
        assert shards.labels[place] == number % 2
        assert shards.index["scale"][place] == np.float32(1 / 255)
        small = (
            Image.fromarray(grey_film(number)).resize((64, 77), Image.Resampling.BICUBIC).crop((0, 6, 64, 70))
        )
        assert np.abs(shards.read(place)[0].astype(int) - np.asarray(small)).mean() < 2
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert lines[0] == "X-ray from images: 40 samples of 40 found, 64x64 pixels"
    stored = sum(shard.bytes for shard in manifest.splits["val"].shards) / 1e6
    val = manifest.splits["val"].labels
    assert lines[2] == (
        f"  val   8 samples of 2 groups, {stored:.1f} MB, 32,768 pixels "
        f"({', '.join(f'{label} {number}' for label, number in val.items() if number)})"
    )
    for command in ("show", "verify"):
        assert f"  python -m mnemos.sharding.{command} {tmp_path / 'set'}" in lines


def test_the_split_does_not_depend_on_the_order_of_files():
    units = [Unit(name=f"{n}", reader="image", files=(), group=f"g{n % 7}") for n in range(50)]
    order = np.random.default_rng(0).permutation(50)
    splits = assign_splits(units, 0.3, KEY)
    shuffled = assign_splits([units[n] for n in order], 0.3, KEY)
    assert [splits[n] for n in order] == shuffled
    assert len({unit.group for unit, split in zip(units, splits, strict=True) if split == "val"}) == 2
    assert splits != assign_splits(units, 0.3, b"another key of enough bytes")


def test_a_published_split_is_kept(tmp_path):
    published = {"a": "val", "b": "train", "c": ""}
    units = [
        Unit(
            name=f"{n}",
            reader="image",
            files=(),
            group="abcdefgh"[n % 8],
            split=published.get("abcdefgh"[n % 8], ""),
        )
        for n in range(40)
    ]
    splits = dict(zip([unit.group for unit in units], assign_splits(units, 0.2, KEY), strict=False))
    assert splits["a"] == "val" and splits["b"] == "train"
    assert sum(splits[group] == "val" for group in "cdefgh") == 1, "a fifth of those left to us"


@pytest.mark.parametrize(
    ("groups", "fraction", "validating"), [(2, 0.01, 1), (2, 0.99, 1), (10, 0.0, 0), (20, 0.15, 3)]
)
def test_each_split_has_a_group(groups, fraction, validating):
    units = [Unit(name=f"{n}", reader="image", files=(), group=f"g{n}") for n in range(groups)]
    assert assign_splits(units, fraction, KEY).count("val") == validating


def test_a_single_patient_is_split_by_its_tail_with_a_warning(tmp_path, capsys):
    films = write_films(tmp_path / "films", 20, groups=1)
    assert run(tmp_path, "xray", films) == 0
    assert "only one group" in capsys.readouterr().out
    validating = ShardSet(tmp_path / "set", "val").index["key"].tolist()
    assert sorted(validating) == sorted(hashed_name(KEY, f"film_{n:03d}.jpg").encode() for n in (17, 18, 19))


def test_same_files_and_key_give_the_same_bytes_from_any_folder_with_any_workers(tmp_path):
    for name in ("one", "two/deeper"):
        write_films(tmp_path / name, 70, groups=9)
    assert run(tmp_path, "xray", tmp_path / "one", "--workers", 1, out="a") == 0
    assert run(tmp_path, "xray", tmp_path / "two" / "deeper", "--workers", 2, out="b") == 0
    assert load_manifest(tmp_path / "a").fingerprint == load_manifest(tmp_path / "b").fingerprint
    for file in (tmp_path / "a").rglob("*"):
        if file.is_file():
            assert file.read_bytes() == (tmp_path / "b" / file.relative_to(tmp_path / "a")).read_bytes()


def test_no_name_of_the_source_is_stored(tmp_path):
    """Plant names in file names, folders, labels' groups, EXIF, PNG text, DICOM headers and NIfTI headers."""
    secret = "Quodlibetia"
    films, scans = tmp_path / secret / "films", tmp_path / secret / "scans"
    write_films(films, 12)
    exif = Image.Exif()
    exif[0x010E] = secret
    Image.fromarray(grey_film(1)).save(films / f"{secret}.jpg", exif=exif, comment=secret.encode())
    write_dicom(films / f"{secret}.dcm", grey_film(2), dicom_type="DX", PatientName=secret, PatientID=secret)
    rows = [(f"film_{n:03d}.jpg", "ill", secret) for n in range(6)]
    write_csv(films / "labels.csv", ["file", "label", "group"], rows)
    write_series(scans / secret, head(), PatientName=secret, PatientID=secret, StudyDescription=secret)
    path = write_nifti(scans / f"{secret}.nii.gz", head().transpose(2, 1, 0), np.diag([-3.0, -3.0, 4.0, 1.0]))
    assert secret.encode() not in path.read_bytes()
    reports = write_csv(
        tmp_path / f"{secret}.csv", ["id", "text"], [(f"{secret}{n}", f"clear {n}") for n in range(12)]
    )
    assert run(tmp_path, "xray", films, out="xray") == 0
    assert run(tmp_path, "mri", scans, out="mri") == 0
    assert run(tmp_path, "report", reports, out="report") == 0
    stored = [path for name in ("xray", "mri", "report") for path in (tmp_path / name).rglob("*")]
    assert len([path for path in stored if path.is_file()]) > 12
    for path in stored:
        assert secret not in path.name
        if path.is_file():
            assert secret.lower().encode() not in path.read_bytes().lower(), path
            assert KEY not in path.read_bytes()


def test_what_volumes_are_cut_around(tmp_path):
    """A body at the edge of a wide field of view: the middle of the volume cuts through it, its own does not."""
    values = np.full((24, 100, 100), -1000, np.int16)
    values[:, 30:70, 60:100] = head(1)
    write_nifti(tmp_path / "a.nii.gz", values.transpose(2, 1, 0), np.diag([-2.5, -2.5, 4.0, 1.0]))
    stored = {}
    for centre in ("volume", "body"):
        assert run(tmp_path, "ct", tmp_path / "a.nii.gz", "--centre", centre, out=centre) == 0
        stored[centre] = (ShardSet(tmp_path / centre, "train").read(0) > -300).mean()
    assert stored["body"] > 1.2 * stored["volume"]


def test_one_broken_file_among_many_is_skipped_and_named(tmp_path, capsys):
    films = write_films(tmp_path / "films", 20)
    whole = (films / "film_007.jpg").read_bytes()
    (films / "film_007.jpg").write_bytes(whole[: len(whole) // 2])
    assert run(tmp_path, "xray", films) == 0
    printed = capsys.readouterr()
    assert "film_007.jpg" in printed.out and "truncated" in printed.out
    manifest = load_manifest(tmp_path / "set")
    assert manifest.skipped == {"broken file": 1}
    assert sum(split.samples for split in manifest.splits.values()) == 19


@pytest.mark.parametrize(
    ("total", "fraction", "allowed"),
    [(9, 0.01, 0), (10, 0.01, 1), (199, 0.01, 1), (200, 0.01, 2), (50, 0.1, 5), (50, 0, 0)],
)
def test_how_many_files_may_be_broken(total, fraction, allowed):
    assert num_allowed_broken(total, fraction) == allowed


def test_too_many_broken_files_stop_the_build_and_leave_nothing(tmp_path, capsys):
    films = write_films(tmp_path / "films", 20)
    for number in (3, 4):
        (films / f"film_{number:03d}.jpg").write_bytes(b"rubbish")
    assert run(tmp_path, "xray", films) == 2
    message = capsys.readouterr().err
    assert "film_003.jpg" in message and "film_004.jpg" in message and "--max-broken" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["films", "key"]
    assert run(tmp_path, "xray", films, "--max-broken", "0.1") == 0


def test_volumes_of_both_formats_in_one_folder(tmp_path):
    scans = tmp_path / "scans"
    write_series(scans / "series", head(1), spacing_mm=(4.0, 3.0, 3.0), RescaleSlope=1, RescaleIntercept=0)
    for number in range(2, 5):
        write_nifti(
            scans / f"{number}.nii.gz", head(number).transpose(2, 1, 0), np.diag([-3.0, -3.0, 4.0, 1.0])
        )
    write_csv(scans / "labels.csv", ["file", "label", "group"], [("series", "b", ""), ("3.nii.gz", "a", "p")])
    assert run(tmp_path, "mri", scans) == 0
    splits = both_splits(tmp_path / "set")
    manifest = splits["train"].manifest
    assert manifest.spacing_mm == (4.0, 3.0, 3.0) and manifest.shape == (8, 64, 64)
    assert manifest.source == "volumes+dicom"
    groups = {group for shards in splits.values() for group in shards.index["group"].tolist()}
    expected = {
        "patient-7",
        "p",
        "2.nii.gz",
        "4.nii.gz",
    }  # the DICOM file's patient, the label file's group, itself
    assert groups == {hashed_name(KEY, name).encode() for name in expected}
    for shards in splits.values():
        for place in range(len(shards)):
            volume = shards.read(place) * shards.index["scale"][place] + shards.index["shift"][place]
            # 40 x 40 voxels of 3 mm, padded to 64: skull bright, air and padding dark, brain between
            assert volume[4, 32, 32] > volume[4, 0, 0] + 0.5
            assert volume[4, 32, 32 - 15] > volume[4, 32, 32] + 0.5


def test_the_folder_may_be_the_series_itself(tmp_path, capsys):
    write_series(tmp_path / "series", head(1), spacing_mm=(4.0, 3.0, 3.0))
    assert run(tmp_path, "mri", tmp_path / "series") == 0
    assert "only one group" in capsys.readouterr().out
    splits = both_splits(tmp_path / "set")
    assert (len(splits["train"]), len(splits["val"])) == (
        2,
        1,
    )  # middle 80 % of 24 slices, windows of 8 every 4


def test_dicom_pictures_beside_jpegs(tmp_path):
    films = write_films(tmp_path / "films", 4)
    write_dicom(
        films / "x.dcm", 255 - grey_film(9), dicom_type="CR", photometric="MONOCHROME1", PatientID="patient_0"
    )
    assert run(tmp_path, "xray", films, "--val-fraction", "0") == 0
    shards = ShardSet(tmp_path / "set", "train")
    place = shards.index["key"].tolist().index(hashed_name(KEY, "x.dcm").encode())
    assert shards.index["group"][place].decode() == hashed_name(KEY, "patient_0")
    jpeg = Image.fromarray(grey_film(9)).resize((64, 77), Image.Resampling.BICUBIC).crop((0, 6, 64, 70))
    assert np.corrcoef(shards.read(place)[0].ravel(), np.asarray(jpeg).ravel())[0, 1] > 0.99


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_reports(tmp_path, form):
    texts = [f"  The heart is normal.\n\tNo   effusion in case {n}.\x00 " for n in range(20)]
    labels = ["normal", "abnormal"]
    if form == "csv":
        rows = [(text, labels[n % 2], f"study{n // 2}") for n, text in enumerate(texts)]
        source = write_csv(tmp_path / "r.csv", ["findings", "label", "group"], rows)
    else:
        records = [
            {"findings": t, "label": labels[n % 2], "group": f"study{n // 2}"} for n, t in enumerate(texts)
        ]
        source = tmp_path / "r.jsonl"
        source.write_text("\n".join(json.dumps(record) for record in records))
    assert run(tmp_path, "report", source, "--text-column", "findings") == 0
    splits = both_splits(tmp_path / "set")
    manifest = splits["train"].manifest
    assert manifest.classes == ("abnormal", "normal") and manifest.shape == (64,)
    found = {}
    for split, shards in splits.items():
        for place in range(len(shards)):
            found[shards.text(place)] = (split, manifest.classes[shards.labels[place]], shards.read(place))
    assert set(found) == {f"The heart is normal. No effusion in case {n}." for n in range(20)}
    for n in range(20):
        split, label, ids = found[f"The heart is normal. No effusion in case {n}."]
        assert label == labels[n % 2]
        assert split == found[f"The heart is normal. No effusion in case {n ^ 1}."][0], (
            "a study lies on one side"
        )
        assert (
            0 < len(ids) <= 64 and ids.max() < manifest.tokenizer.vocab_size <= STORED_SIZES["sample"].vocab
        )


def test_the_tokenizer_knows_only_the_training_split(tmp_path):
    rows = [(f"sentinel{'abcdefghij'[n]} " * 8, f"g{n}") for n in range(10)]
    source = write_csv(tmp_path / "r.csv", ["text", "group"], rows)
    assert run(tmp_path, "report", source, "--val-fraction", "0.3", "--rare-words", "0") == 0
    tokenizer = (tmp_path / "set" / "tokenizer.json").read_text()
    for split, shards in both_splits(tmp_path / "set").items():
        for place in range(len(shards)):
            word = shards.text(place).split()[0]
            assert (f"Ġ{word}" in tokenizer) == (split == "train")


def test_empty_and_broken_rows_are_counted_apart(tmp_path, capsys):
    lines = [json.dumps({"text": f"clear lungs {n}"}) for n in range(20)]
    lines[4], lines[9] = json.dumps({"text": "  \n "}), "{not json"
    (tmp_path / "r.jsonl").write_text("\n".join(lines))
    assert run(tmp_path, "report", tmp_path / "r.jsonl") == 0
    assert load_manifest(tmp_path / "set").skipped == {"empty text": 1, "broken file": 1}
    assert "r.jsonl:10: the line is not a JSON object" in capsys.readouterr().out


def test_the_default_key_is_made_once_and_private(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    films = write_films(tmp_path / "films", 4)
    for out in ("a", "b"):
        assert build.main(["xray", str(films), "--out", str(tmp_path / out)]) == 0
    assert load_manifest(tmp_path / "a").fingerprint == load_manifest(tmp_path / "b").fingerprint
    assert capsys.readouterr().out.count("a new secret key was made") == 1
    file = tmp_path / "config" / "mnemos" / "key"
    assert "can be read by others" not in capsys.readouterr().out
    assert stat.S_IMODE(file.stat().st_mode) == 0o600 and len(file.read_bytes()) > 32
    assert run(tmp_path, "xray", films, out="c") == 0
    assert load_manifest(tmp_path / "a").fingerprint != load_manifest(tmp_path / "c").fingerprint


@pytest.mark.parametrize(
    ("trouble", "code"), [(KeyboardInterrupt(), 130), (OSError(28, "No space left"), 75)]
)
def test_a_stopped_build_leaves_nothing(tmp_path, monkeypatch, capsys, trouble, code):
    from mnemos.sharding.writer import ShardSetWriter

    def stop(writer, *args, **kwargs):
        assert any(path.name.startswith(".set.partial") for path in tmp_path.iterdir())
        raise trouble

    films = write_films(tmp_path / "films", 4)
    monkeypatch.setattr(ShardSetWriter, "add_encoded", stop)
    assert run(tmp_path, "xray", films) == code
    assert sorted(path.name for path in tmp_path.iterdir()) == ["films", "key"]
    assert capsys.readouterr().err.count("\n") == 1


def test_paper_sizes(tmp_path):
    write_nifti(
        tmp_path / "a.nii.gz", head(shape_ZYX=(40, 60, 60)).transpose(2, 1, 0), np.diag([-3.0, -3, 1.5, 1])
    )
    report = build_set(
        BuildOptions(
            modality="ct",
            input=tmp_path / "a.nii.gz",
            out=tmp_path / "set",
            preset="base",
            key_file=tmp_path / "key" if key_file(tmp_path) else None,
            workers=1,
        )
    )
    assert report.manifest.shape == (16, 192, 192) and report.manifest.spacing_mm == (1.0, 1.0, 1.0)
    assert sum(split.samples for split in report.manifest.splits.values()) == (60 - 16) // 12 + 1
    volume = ShardSet(tmp_path / "set", "train").read(0)
    assert volume[8, 96, 96] == pytest.approx(40, abs=30) and volume[8, 0, 0] < -900


def test_the_command_as_users_type_it(tmp_path):
    films = write_films(tmp_path / "films", 70)
    command = [
        sys.executable,
        "-m",
        "mnemos.sharding.build",
        "xray",
        str(films),
        "--out",
        str(tmp_path / "set"),
    ]
    environment = {**os.environ, "XDG_CONFIG_HOME": str(tmp_path / "config")}
    done = subprocess.run(
        [*command, "--workers", "2"], check=False, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert "70 samples" in done.stdout
    again = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    assert again.returncode == 2 and again.stderr.count("\n") == 1 and "not empty" in again.stderr
    assert again.stdout == ""


def test_help_needs_nothing_heavy():
    code = (
        "import sys, contextlib, io\nfrom mnemos.sharding import build, show\n"
        "for module in (build, show):\n"
        "    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()) as out:\n"
        "        module.main(['--help'])\n"
        "    assert 'examples:' in out.getvalue()\n"
        "print(sorted({'torch', 'numpy', 'PIL', 'pydicom', 'nibabel', 'webdataset'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_dicom_series_are_read_whatever_the_order_of_files(tmp_path):
    slices = head(5)
    write_series(tmp_path / "a" / "s", slices, spacing_mm=(4.0, 3.0, 3.0), shuffle=True)
    write_series(tmp_path / "b" / "s", slices, spacing_mm=(4.0, 3.0, 3.0), shuffle=False)
    for name in ("a", "b"):
        assert run(tmp_path, "mri", tmp_path / name, out=f"set_{name}") == 0
    assert pydicom.dcmread(tmp_path / "b" / "s" / "000.dcm").ImagePositionPatient[2] == 0
    fingerprints = {load_manifest(tmp_path / f"set_{name}").fingerprint for name in ("a", "b")}
    assert len(fingerprints) == 1
