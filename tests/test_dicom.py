"""DICOM files: geometry, value scale, every transfer syntax we promise, and what is refused."""

import tracemalloc
import zlib

import numpy as np
import pydicom
import pytest
from pydicom.encaps import encapsulate
from pydicom.pixels import get_decoder
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)
from sample_files import grey_film, head, write_dicom, write_series

from mnemos.sharding.errors import DataError, LeftOut
from mnemos.sharding.sources import dicom
from mnemos.sharding.sources.dicom_file import read_pixels

TRUTH = head(shape_ZYX=(6, 40, 32))  # [Z, Y, X], foot to head, front to back, right to left


def read(folder, **options):
    paths = tuple(sorted(folder.iterdir()))
    return dicom.read_series(paths, ("MR",), **{"invert": True, **options})


@pytest.mark.parametrize(
    "syntax",
    [ExplicitVRLittleEndian, DeflatedExplicitVRLittleEndian, RLELossless, JPEGLSLossless, JPEG2000Lossless],
    ids=lambda uid: uid.name,
)
def test_every_transfer_syntax_gives_the_same_volume(tmp_path, syntax):
    write_series(tmp_path / "series", TRUTH, syntax=syntax, RescaleSlope=2, RescaleIntercept=-1024)
    written = pydicom.dcmread(next((tmp_path / "series").iterdir()))
    assert written.file_meta.TransferSyntaxUID == syntax
    raw = read(tmp_path / "series")
    np.testing.assert_array_equal(raw.values_ZYX, 2.0 * TRUTH - 1024)
    np.testing.assert_allclose(raw.spacing_mm, (5.0, 2.0, 1.0))


@pytest.mark.parametrize(
    ("orientation", "to_slices", "spacing_ZYX"),
    [
        ((1, 0, 0, 0, 1, 0), lambda v: v, (5, 2, 1)),
        (
            (1, 0, 0, 0, -1, 0),
            lambda v: v[::-1, ::-1],
            (5, 2, 1),
        ),  # upside down: its normal points to the feet
        ((1, 0, 0, 0, 0, -1), lambda v: v[::-1].transpose(1, 0, 2), (2, 5, 1)),  # coronal
        ((0, 1, 0, 0, 0, -1), lambda v: v[::-1, :, ::-1].transpose(2, 0, 1), (2, 1, 5)),  # sagittal
    ],
    ids=["axial", "axial turned over", "coronal", "sagittal"],
)
def test_orientation(tmp_path, orientation, to_slices, spacing_ZYX):
    write_series(tmp_path / "series", np.ascontiguousarray(to_slices(TRUTH)), orientation=orientation)
    raw = read(tmp_path / "series")
    np.testing.assert_array_equal(raw.values_ZYX, TRUTH)
    np.testing.assert_allclose(raw.spacing_mm, spacing_ZYX)


def test_monochrome1_is_turned_round_where_values_have_no_unit(tmp_path):
    write_series(tmp_path / "series", TRUTH, photometric="MONOCHROME1")
    np.testing.assert_array_equal(read(tmp_path / "series").values_ZYX, -TRUTH.astype(np.float32))
    np.testing.assert_array_equal(read(tmp_path / "series", invert=False).values_ZYX, TRUTH)


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("windowed", [False, True], ids=["percentiles", "window"])
def test_pictures_come_out_bright_where_bone_is(tmp_path, photometric, windowed):
    film = grey_film(3, (64, 64)).astype(np.uint16) * 16  # 12 bits used of 16
    stored = film if photometric == "MONOCHROME2" else 4095 - film
    window = {"WindowCenter": 2048, "WindowWidth": 2048} if windowed else {}
    path = write_dicom(tmp_path / "a.dcm", stored, dicom_type="DX", photometric=photometric, **window)
    picture = dicom.read_picture(path, ("DX",), 1, (64, 64))
    low, high = (1024, 3072) if windowed else np.percentile(film, (0.5, 99.5))
    expected = np.clip((film.astype(float) - low) / (high - low), 0, 1) * 255
    assert picture.shape == (1, 64, 64) and picture.dtype == np.uint8
    np.testing.assert_allclose(picture[0], expected, atol=1.01)


def test_a_picture_of_another_dicom_type_is_refused(tmp_path):
    path = write_dicom(tmp_path / "a.dcm", grey_film(0), dicom_type="CT")
    with pytest.raises(DataError, match="type CT; CR or DX"):
        dicom.read_picture(path, ("CR", "DX"), 1, (64, 64))


def test_a_missing_decoder_is_named(tmp_path):
    if get_decoder(JPEGLosslessSV1).is_available:
        pytest.skip("python-gdcm is installed here, so that no decoder is missing")
    path = write_dicom(tmp_path / "a.dcm", grey_film(0))
    dataset = pydicom.dcmread(path)
    dataset.file_meta.TransferSyntaxUID = JPEGLosslessSV1
    dataset.PixelData = encapsulate([b"\xff\xd8 not decoded here"])
    dataset["PixelData"].is_undefined_length = True
    dataset.save_as(path)
    with pytest.raises(DataError, match="pip install python-gdcm"):
        read_pixels(path)


def test_text_burned_into_a_picture_is_left_out(tmp_path):
    path = write_dicom(tmp_path / "a.dcm", grey_film(0), dicom_type="DX", BurnedInAnnotation="YES")
    with pytest.raises(LeftOut, match="burned"):
        dicom.read_picture(path, ("DX",), 1, (64, 64))


def test_files_are_grouped_by_series_and_patient(tmp_path):
    write_series(tmp_path / "scan", TRUTH, PatientID="p1")
    for number, path in enumerate(write_series(tmp_path / "more", TRUTH, PatientID="p2")):
        path.rename(tmp_path / "scan" / f"IM{number:04d}")  # a name without an ending
    (tmp_path / "scan" / "notes").write_text("not DICOM")
    (tmp_path / "scan" / "broken.dcm").write_bytes(b"rubbish" * 100)
    files = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    units = dicom.find_series(files, tmp_path)
    assert [(unit.name, unit.group, len(unit.files), bool(unit.broken)) for unit in units] == [
        ("scan/broken.dcm", "", 1, True),
        *sorted([("scan", units[1].group, 6, False), ("scan#2", units[2].group, 6, False)]),
    ]
    assert {units[1].group, units[2].group} == {"p1", "p2"}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"Modality": "CT"}, "type CT"),
        ({"ImageOrientationPatient": [0, 1, 0, 0, 0, -1]}, "directions"),
        ({"ImagePositionPatient": [0.0, 0.0, 999.0]}, "missing or uneven"),
        ({"ImagePositionPatient": [0.0, 0.0, 0.0]}, "one position"),
        ({"Rows": 39}, "several sizes"),
        ({"ImageOrientationPatient": None}, "ImageOrientationPatient"),
        ({"Rows": 60000, "Columns": 60000}, "64 million"),
        ({"Rows": 0}, "no picture"),
        ({"NumberOfFrames": 5}, "5 frames"),
        ({"PixelData": b"\0" * 10}, "cannot be decoded"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_a_slice_that_does_not_fit_is_refused(tmp_path, change, reason):
    write_series(tmp_path / "series", TRUTH, shuffle=False)
    path = tmp_path / "series" / "004.dcm"
    dataset = pydicom.dcmread(path)
    for name, value in change.items():
        setattr(dataset, name, value)
    dataset.save_as(path)
    with pytest.raises(DataError, match=reason):
        read(tmp_path / "series")


def test_a_deflated_file_is_inflated_no_further_than_it_declares(tmp_path):
    path = write_dicom(tmp_path / "bomb.dcm", grey_film(0), syntax=DeflatedExplicitVRLittleEndian)
    content = path.read_bytes()
    start = 144 + int(pydicom.dcmread(path).file_meta.FileMetaInformationGroupLength)
    plain = zlib.decompress(content[start:], -zlib.MAX_WBITS)
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    bomb = packer.compress(plain) + packer.compress(bytes(200 << 20)) + packer.flush()
    path.write_bytes(content[:start] + bomb)
    tracemalloc.start()
    with pytest.raises(DataError, match="beyond"):
        read_pixels(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100 << 20
    path.write_bytes(content[: start + 200])
    with pytest.raises(DataError, match=r"ends early|readable|no picture"):
        read_pixels(path)
