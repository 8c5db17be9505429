"""Hostile raw files are refused in one sentence, without the memory and the time they ask for."""

import gzip
import itertools
import json
import os
import re
import subprocess
import sys
import tracemalloc
import warnings
from pathlib import Path

import hostile_worker
import nibabel
import numpy as np
import pytest
from bombs import NIFTI, gzipped
from bombs_dicom import DICOM, body, element, enclosed, us
from bombs_pictures import FILM, PICTURES
from bombs_tables import PATHS, TABLES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom.uid import ExplicitVRLittleEndian, JPEG2000Lossless, JPEGLSLossless, RLELossless
from sample_files import grey_film, head, write_dicom, write_nifti

from mnemos.sharding.errors import UserError
from mnemos.sharding.modalities import MODALITIES, STORED_SIZES
from mnemos.sharding.sources import dicom, gunzip, volumes
from mnemos.sharding.sources.samples import find_units, read_unit
from mnemos.sharding.sources.source import FindOptions, Outcome
from mnemos.sharding.sources.units import files_below

HOSTILE = {
    f"{kind}: {name}": case
    for kind, cases in {
        "NIfTI": NIFTI,
        "DICOM": DICOM,
        "picture": PICTURES,
        "table": TABLES,
        "path": PATHS,
    }.items()
    for name, case in cases.items()
}
MOST_BYTES = 512 << 20
SIZE = STORED_SIZES["sample"]


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """Return what became of every hostile file, read one after another by a process of its own."""
    root = tmp_path_factory.mktemp("hostile")
    folders = {f"{number:03d}": name for number, name in enumerate(HOSTILE)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom's, of the nonsense it writes for us
        for folder, name in folders.items():
            (root / folder).mkdir()
            HOSTILE[name].write(root / folder)
    cases = [[folder, HOSTILE[name].modality] for folder, name in folders.items()]
    (root / "cases.json").write_text(json.dumps(cases))
    command = [sys.executable, hostile_worker.__file__, str(root)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = map(json.loads, done.stdout.splitlines())
    return {folders[answer["name"]]: answer for answer in lines} | {"root": str(root)}


@pytest.mark.parametrize("name", HOSTILE)
def test_it_is_refused_in_one_sentence_and_little_memory(answers, name):
    answer, case = answers[name], HOSTILE[name]
    print(f"{answer['seconds']:.2f} s, {answer['peak_bytes'] / 2**20:.0f} MB: {answer['says']}")
    assert answer["verdict"] == case.verdict, answer
    assert re.search(case.says, answer["says"]), answer
    assert answer["peak_bytes"] < MOST_BYTES
    assert answer["says"].isprintable() and "Error:" not in answer["says"]
    if answer["verdict"] != "refused":  # what is said of one file goes beside its hashed or own name
        assert answers["root"] not in answer["says"]


# --- what is harmless stays readable, and what is hostile in it is never touched


def outcome(path: Path, modality: str) -> Outcome:
    """Read a single file as the build does."""
    (unit,) = find_units(path, MODALITIES[modality], FindOptions())
    return read_unit(unit, MODALITIES[modality], SIZE)


def picture(path: Path) -> np.ndarray:
    """Return the sample made of a film."""
    found = outcome(path, "xray")
    assert not found.broken and not found.left_out, found
    return found.samples[0].array


def test_overlays_preambles_and_what_follows_the_pixels_leave_no_trace(tmp_path):
    path = tmp_path / "a.dcm"
    path.write_bytes(enclosed(body()))
    plain = picture(path)
    overlay = {
        "t60000010": us(0x60000010, 64),
        "t60000011": us(0x60000011, 64),
        "t60000100": us(0x60000100, 1),
        "t60003000": element(0x60003000, b"OW", b"\xff" * 512),
    }
    path.write_bytes(enclosed(body(**overlay) + b"\xff" * 999, preamble=b"MZ" * 64))
    np.testing.assert_array_equal(picture(path), plain)


def test_private_and_personal_fields_are_not_even_read(tmp_path):
    path = write_dicom(tmp_path / "a.dcm", grey_film(0), PatientName="DOE^JOHN", AccessionNumber="4711")
    header = dicom.read_header(path)
    assert "PatientName" not in header and "AccessionNumber" not in header and header.Rows == 96


@pytest.mark.parametrize("write", ["fortran", "big-endian", "NIfTI-2", "packed by name only", "many members"])
def test_every_sound_form_of_nifti_reads_as_nibabel_reads_it(tmp_path, write):
    values = np.random.default_rng(0).integers(-900, 900, (7, 6, 5)).astype(np.int16)
    kind = nibabel.Nifti2Image if write == "NIfTI-2" else nibabel.Nifti1Image
    image = kind(values, np.diag([-2.0, -3.0, 4.0, 1.0]))
    if write == "big-endian":
        image = nibabel.Nifti1Image(values, image.affine, image.header.as_byteswapped(">"))
    image.header.set_slope_inter(0.1, -7.5)
    image.to_filename(tmp_path / "a.nii")
    truth = np.asarray(nibabel.load(tmp_path / "a.nii").dataobj)
    content, path = (tmp_path / "a.nii").read_bytes(), tmp_path / "b.nii.gz"
    if write == "many members":
        content = b"".join(gzipped(content[start : start + 100]) for start in range(0, len(content), 100))
    path.write_bytes(content)
    raw = volumes.read_nifti(path)
    np.testing.assert_allclose(raw.values_ZYX, truth.transpose(2, 1, 0), rtol=1e-6)
    assert raw.spacing_mm == (4.0, 3.0, 2.0)


def test_a_volume_in_double_precision_takes_its_float32_and_little_more(tmp_path):
    values = np.random.default_rng(0).normal(size=(64, 256, 256))
    path = write_nifti(tmp_path / "a.nii.gz", values, np.diag([-1.0, -1.0, 1.0, 1.0]))
    tracemalloc.start()
    raw = volumes.read_nifti(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_array_equal(raw.values_ZYX, values.astype(np.float32).transpose(2, 1, 0))
    assert peak < 1.5 * values.nbytes, "nibabel alone takes three times as much"


@settings(derandomize=True, database=None, max_examples=100, deadline=None)
@given(
    parts=st.lists(st.binary(max_size=300), max_size=5), most=st.integers(1, 400), padding=st.integers(0, 9)
)
def test_gzip_members_of_any_kind_are_unpacked_whole(tmp_path_factory, parts, most, padding):
    path = tmp_path_factory.mktemp("gz") / "a.gz"
    path.write_bytes((b"".join(map(gzip.compress, parts)) or gzip.compress(b"")) + bytes(padding))
    with path.open("rb") as file:
        stream = gunzip.Gunzip(file)
        assert b"".join(iter(lambda: stream.read(most), b"")) == b"".join(parts)


# --- files nobody may read


def test_files_and_folders_without_permission_are_told(tmp_path, monkeypatch):
    FILM.save(tmp_path / "a.png")
    (tmp_path / "IM0001").write_bytes(b"x" * 200)
    (tmp_path / "closed").mkdir()
    opened, listed = Path.open, os.scandir

    def closed(path, *arguments, **options):
        if str(path).endswith(("a.png", "IM0001")):
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", closed)
    units = find_units(tmp_path, MODALITIES["xray"], FindOptions())
    said = [read_unit(unit, MODALITIES["xray"], SIZE).broken for unit in units]
    assert [unit.name for unit in units] == ["IM0001", "a.png"]
    assert all("Permission denied" in reason and str(tmp_path) not in reason for reason in said), said

    def unlisted(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(os, "scandir", unlisted)
    with pytest.raises(UserError, match=r"closed cannot be listed \(Permission denied\)"):
        files_below(tmp_path)


# --- truncated and with flipped bits


def _nifti_bytes(folder: Path, name: str) -> bytes:
    return write_nifti(folder / name, head(shape_ZYX=(12, 48, 48)).transpose(2, 1, 0), SFORM).read_bytes()


def _dicom_bytes(folder: Path, syntax: str) -> bytes:
    film = grey_film(3, (48, 40)).astype(np.uint16) * 16
    return write_dicom(
        folder / "a.dcm", film, dicom_type="DX", syntax=syntax, WindowCenter=2048, WindowWidth=4000
    ).read_bytes()


def _saved(folder: Path, name: str, **options: object) -> bytes:
    Image.fromarray(grey_film(2, (48, 40))).save(folder / name, **options)
    return (folder / name).read_bytes()


SFORM = np.diag([-3.0, -3.0, 4.0, 1.0])
SOUND = {
    "a.nii": ("mri", lambda folder: _nifti_bytes(folder, "a.nii")),
    "a.nii.gz": ("mri", lambda folder: _nifti_bytes(folder, "a.nii.gz")),
    "native.dcm": ("xray", lambda folder: _dicom_bytes(folder, ExplicitVRLittleEndian)),
    "rle.dcm": ("xray", lambda folder: _dicom_bytes(folder, RLELossless)),
    "jpeg2000.dcm": ("xray", lambda folder: _dicom_bytes(folder, JPEG2000Lossless)),
    "jpeg-ls.dcm": ("xray", lambda folder: _dicom_bytes(folder, JPEGLSLossless)),
    "a.png": ("xray", lambda folder: _saved(folder, "a.png")),
    "a.jpg": ("xray", lambda folder: _saved(folder, "a.jpg", quality=80)),
    "progressive.jpg": ("xray", lambda folder: _saved(folder, "a.jpg", quality=80, progressive=True)),
    "a.tif": ("xray", lambda folder: _saved(folder, "a.tif", compression="tiff_lzw")),
}
CHECKED = ("a.nii.gz", "a.png")  # formats with checksums: never a wrong sample


@pytest.mark.parametrize("name", SOUND)
def test_damaged_files_give_an_outcome_and_never_an_exception(tmp_path, name):
    modality, make = SOUND[name]
    content, path = make(tmp_path), tmp_path / "damaged" / name
    path.parent.mkdir()
    path.write_bytes(content)
    whole = outcome(path, modality)
    assert whole.samples and not whole.broken
    counts = {"read": 0, "broken": 0}
    places = st.integers(0, 8 * len(content) - 1)
    early = st.integers(0, 8 * min(400, len(content)) - 1)  # headers, where a bit does more harm

    @settings(
        derandomize=True, database=None, max_examples=200, deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )  # fmt: skip
    @given(st.lists(early | places, max_size=3), st.none() | st.integers(0, len(content)))
    def damage(bits, cut):
        data = bytearray(content)
        for bit in bits:
            data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data[:cut])
        found = outcome(path, modality)
        assert bool(found.samples) + bool(found.broken) + bool(found.left_out) == 1, found
        counts["broken" if found.broken else "read"] += 1
        for sample in found.samples:
            assert sample.array.shape in ((1, *SIZE.image), SIZE.volume)
            assert np.isfinite([sample.scale, sample.shift]).all()
        if name in CHECKED and found.samples:
            for sample, sound in itertools.zip_longest(found.samples, whole.samples):
                np.testing.assert_array_equal(sample.array, sound.array)

    damage()
    assert counts["broken"] > 20, counts
