"""Volumes keep their orientation, their millimetres and their values on the way into a shard."""

import itertools
from dataclasses import replace

import nibabel
import numpy as np
import pytest
from sample_files import head, write_nifti, write_series

from mnemos.sharding.building import preprocess
from mnemos.sharding.building.preprocess import recipe, recipe_centre, resample, volume_samples
from mnemos.sharding.errors import DataError, LeftOut, UserError
from mnemos.sharding.modalities import MODALITIES, STORED_SIZES, StoredSize
from mnemos.sharding.sources import dicom, volumes
from mnemos.sharding.sources.units import RawVolume
from mnemos.sharding.sources.volumes import read_nifti

SAMPLE, PAPER = STORED_SIZES["sample"], STORED_SIZES["base"]
CT, MRI = MODALITIES["ct"], MODALITIES["mri"]


def marked_volume() -> np.ndarray:
    """Return [Z, Y, X] = [5, 7, 9] whose every voxel names its place, with 0 at foot, front, right."""
    return np.arange(5 * 7 * 9, dtype=np.int16).reshape(5, 7, 9)


@pytest.mark.parametrize("flips", list(itertools.product((1, -1), repeat=3)), ids=str)
def test_nifti_axes_are_brought_into_patient_order(tmp_path, flips):
    """Every order and direction of the voxel axes, honestly described by the affine, reads as one volume."""
    truth_ZYX = marked_volume()
    values_RAS = truth_ZYX.transpose(2, 1, 0)[::-1, ::-1]  # towards right and front, as the affine's axes run
    spacing_RAS = np.array([2.0, 3.0, 5.0])
    for order in itertools.permutations(range(3)):
        affine = np.zeros((4, 4))
        affine[3] = affine[:3, 3] = 1
        values = values_RAS.transpose(order)
        for column, axis in enumerate(order):
            affine[axis, column] = flips[column] * spacing_RAS[axis]
            if flips[column] < 0:
                values = np.flip(values, column)
        raw = read_nifti(write_nifti(tmp_path / "volume.nii.gz", values, affine))
        np.testing.assert_array_equal(raw.values_ZYX, truth_ZYX)
        np.testing.assert_allclose(raw.spacing_mm, (5.0, 3.0, 2.0))
        assert not raw.doubtful


def test_named_axes_override_a_made_up_header(tmp_path):
    truth_ZYX = marked_volume()
    values_LPS = np.ascontiguousarray(truth_ZYX.transpose(2, 1, 0))
    path = write_nifti(tmp_path / "volume.nii", values_LPS, np.diag([2.0, 3.0, 5.0, 1.0]))
    believed = read_nifti(path)
    assert believed.doubtful, "a header without a position deserves a second look"
    np.testing.assert_array_equal(believed.values_ZYX, truth_ZYX[:, ::-1, ::-1])
    named = read_nifti(path, "LPS")
    np.testing.assert_array_equal(named.values_ZYX, truth_ZYX)
    assert named.spacing_mm == (5.0, 3.0, 2.0) and not named.doubtful


def test_nifti_slope_units_and_fourth_axis(tmp_path):
    image = nibabel.Nifti1Image(np.full((6, 6, 6, 1), 100, np.int16), np.diag([1e-3, 1e-3, 2e-3, 1.0]))
    image.header.set_slope_inter(2.0, -1024.0)
    image.header.set_xyzt_units("meter")
    image.to_filename(tmp_path / "volume.nii.gz")
    raw = read_nifti(tmp_path / "volume.nii.gz")
    assert raw.values_ZYX.shape == (6, 6, 6)
    np.testing.assert_allclose(raw.values_ZYX, 2 * 100 - 1024)
    np.testing.assert_allclose(raw.spacing_mm, (2.0, 1.0, 1.0), rtol=1e-5)


def test_voxels_that_are_no_number_become_the_lowest_value(tmp_path):
    values = np.random.default_rng(0).normal(5, 1, (6, 6, 6)).astype(np.float32)
    values[0] = np.nan
    raw = read_nifti(write_nifti(tmp_path / "volume.nii", values, np.diag([-1.0, -1.0, 1.0, 1.0])))
    assert (raw.values_ZYX[:, :, 0] == np.nanmin(values)).all()


@pytest.mark.parametrize("shape", [(8, 8), (8, 8, 8, 3)], ids=["two dimensions", "three frames"])
def test_nifti_of_other_dimensions_is_refused(tmp_path, shape):
    path = write_nifti(tmp_path / "volume.nii.gz", np.zeros(shape, np.int16), np.eye(4))
    with pytest.raises(DataError, match=r"dimensions|frames"):
        read_nifti(path)


def test_a_nifti_header_that_declares_too_much_is_refused_before_reading(tmp_path):
    header = nibabel.Nifti1Header()
    header.set_data_dtype(np.float64)
    header.set_data_shape((32767, 32767, 32767))
    header["vox_offset"], header["magic"] = 352, b"n+1"
    (tmp_path / "lie.nii").write_bytes(header.binaryblock + bytes(4096))
    with pytest.raises(DataError, match="2 GiB"):
        read_nifti(tmp_path / "lie.nii")


def test_a_truncated_nifti_is_refused(tmp_path):
    path = write_nifti(tmp_path / "volume.nii.gz", head(), np.eye(4))
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(DataError, match="ends early"):
        read_nifti(path)


def test_absurd_spacing_is_refused(tmp_path):
    path = write_nifti(tmp_path / "volume.nii", np.ones((4, 4, 4), np.int16), np.diag([900.0, 1, 1, 1]))
    with pytest.raises(DataError, match="900"):
        read_nifti(path)


@pytest.mark.parametrize("from_mm", [(2.5, 0.8, 1.3), (1.0, 1.0, 1.0), (6.5, 4.2, 4.2)], ids=str)
@pytest.mark.parametrize("to_mm", [SAMPLE.spacing_mm, PAPER.spacing_mm], ids=["sample", "paper"])
def test_resampling_keeps_millimetres(from_mm, to_mm):
    """A block of 60 x 48 x 54 mm, off centre, keeps its volume, its place and its edges."""
    extent_mm, low, high = np.array([130.0, 120, 126]), np.array([25.0, 40, 12]), np.array([85.0, 88, 66])
    shape = np.round(extent_mm / from_mm).astype(int)
    inside = []
    for axis in range(3):
        edges = np.arange(shape[axis] + 1) * from_mm[axis]
        covered = np.minimum(edges[1:], high[axis]) - np.maximum(edges[:-1], low[axis])
        inside.append(np.clip(covered / from_mm[axis], 0, 1))
    block = np.einsum("z,y,x->zyx", *inside).astype(np.float32)
    result = resample(block, from_mm, to_mm)
    assert result.sum() * np.prod(to_mm) == pytest.approx(np.prod(high - low), rel=0.02)
    for axis in range(3):
        profile = result.sum(axis=tuple(a for a in range(3) if a != axis))
        # Both grids share their centre.
        places = (np.arange(len(profile)) - (len(profile) - 1) / 2) * to_mm[axis] + shape[axis] * from_mm[
            axis
        ] / 2
        assert (profile * places).sum() / profile.sum() == pytest.approx((low + high)[axis] / 2, abs=0.15)
        inner = np.interp([low[axis] + 10, high[axis] - 10], places, profile)
        np.testing.assert_allclose(inner, profile.max(), rtol=0.02)
        outer = np.interp([low[axis] - 10, high[axis] + 10], places, profile)
        np.testing.assert_allclose(outer, 0, atol=0.02 * profile.max())


def test_resampling_does_not_fold_fine_patterns_over():
    stripes = np.zeros((8, 8, 300), np.float32)
    stripes[:, :, ::3] = 3.0  # mean 1, three voxels a period
    inner = resample(stripes, (1, 1, 1), (1, 1, 4))[:, :, 3:-3]
    np.testing.assert_allclose(inner, 1.0, atol=0.15)  # picking every fourth voxel would give 0 and 3


def test_resampling_to_the_same_spacing_changes_nothing():
    values = head().astype(np.float32)
    np.testing.assert_array_equal(resample(values, (3, 2, 2), (3, 2, 2)), values)


def test_ct_values_are_hounsfield_units_clipped():
    values = head(0).astype(np.float32)
    values[:, 20, 20] = 3000  # metal
    raw = RawVolume(values_ZYX=values, spacing_mm=SAMPLE.spacing_mm)
    samples, dropped = volume_samples(raw, CT, SAMPLE)
    stored = samples[0].values_ZYX
    assert stored.dtype == np.int16 and stored.shape == SAMPLE.volume
    assert samples[0].scale == 1 / 1024 and samples[0].shift == 0
    assert (stored.min(), stored.max()) == (-1024, 1024)
    np.testing.assert_array_equal(stored[:, 12:52, 12:52], np.clip(values[:8], -1024, 1024))
    assert (stored[:, :12] == -1024).all(), "what the volume does not cover is air"
    assert len(samples) == (24 - 8) // 4 + 1 and dropped == 0


def test_mr_samples_are_the_papers(slices=40):
    """Middle 80 % of the slices, 16 every 8, 192x192 in the middle, clipped at 0.2 and 99.8 %, z-scored: each alone."""
    values = np.random.default_rng(0).gamma(2.0, 200.0, (slices, 200, 230)).astype(np.float32)
    values *= np.linspace(0.5, 2, slices, dtype=np.float32)[
        :, None, None
    ]  # a scanner's coil is brighter at one end
    samples, dropped = volume_samples(RawVolume(values_ZYX=values, spacing_mm=(1, 1, 1)), MRI, PAPER)
    middle = values[4:36]
    assert (len(samples), dropped) == ((32 - 16) // 8 + 1, 0)
    for number, sample in enumerate(samples):
        cut = middle[8 * number : 8 * number + 16, 4:196, 19:211]
        clipped = np.clip(cut, *np.percentile(cut, (0.2, 99.8)))
        expected = (clipped - clipped.mean()) / clipped.std()
        assert sample.values_ZYX.dtype == np.int16 and sample.values_ZYX.flags.c_contiguous
        model = sample.values_ZYX * np.float64(sample.scale) + sample.shift
        np.testing.assert_allclose(model, expected, atol=0.51 * sample.scale + 1e-4)
    assert len({sample.scale for sample in samples}) == len(samples), "each sample keeps a scale of its own"


@pytest.mark.parametrize("slices", [20, 24, 36, 41, 60])
def test_ct_samples_are_the_papers(slices):
    """Windows of 24 slices every 12, of which the 16x192x192 centre is stored, clipped to +-1024."""
    values = np.random.default_rng(slices).normal(0, 900, (slices, 200, 230)).astype(np.float32)
    values[:, 0, 0] = -3000
    samples, dropped = volume_samples(RawVolume(values_ZYX=values, spacing_mm=(1, 1, 1)), CT, PAPER)
    windows = max(0, slices - 24) // 12 + 1
    assert (len(samples), dropped) == (windows, 0)
    left_over = max(0, slices - 24) % 12
    for number, sample in enumerate(samples):
        first = (4 if slices >= 24 else (slices - 16) // 2) + left_over // 2 + 12 * number
        expected = np.clip(values[first : first + 16, 4:196, 19:211], -1024, 1024)
        np.testing.assert_array_equal(sample.values_ZYX, np.round(expected))
        assert (sample.scale, sample.shift) == (1 / 1024, 0)


def test_the_cut_in_plane_is_the_middle_or_follows_the_body():
    values = np.full((8, 100, 100), -1000, np.float32)
    values[:, 60:90, 5:35] = 50
    values[:, 98, ::8] = 500  # what is dense in a couch
    raw = RawVolume(values_ZYX=values, spacing_mm=SAMPLE.spacing_mm)
    samples, _ = volume_samples(raw, CT, SAMPLE, "body")
    body = np.argwhere(samples[0].values_ZYX == 50)
    assert len(body) == 8 * 30 * 30, "the whole body lies in the cut"
    assert samples[0].values_ZYX.shape == SAMPLE.volume
    values[:, 40:60, 40:60] = 40
    samples, _ = volume_samples(raw, CT, SAMPLE)
    np.testing.assert_array_equal(samples[0].values_ZYX, values[:, 18:82, 18:82])
    with pytest.raises(UserError, match="volume, body"):
        volume_samples(raw, CT, SAMPLE, "patient")


def test_a_wide_ct_loses_its_rim():
    size = replace(SAMPLE, volume=(8, 200, 200))
    values = np.full((8, 120, 120), 50, np.float32)
    values[0, 0, 0] = -1000
    samples, _ = volume_samples(RawVolume(values_ZYX=values, spacing_mm=(4.0, 3.0, 3.0)), CT, size)
    assert (samples[0].values_ZYX[4] == 50).sum() == 96 * 96  # 80 % of 360 mm
    oblong = RawVolume(values_ZYX=values[:, :60], spacing_mm=(4.0, 3.0, 3.0))
    assert (volume_samples(oblong, CT, size)[0][0].values_ZYX[4] == 50).sum() == 48 * 96, (
        "a plane is wide as a whole"
    )
    narrow = RawVolume(values_ZYX=values[:, :100, :100], spacing_mm=(4.0, 3.0, 3.0))
    assert (volume_samples(narrow, CT, size)[0][0].values_ZYX[4] == 50).sum() == 100 * 100


def test_the_recipe_tells_the_steps_and_what_the_cut_is_centred_on():
    steps = recipe(CT, PAPER)
    assert "24 slices every 12, of which the middle 16 are stored" in steps["sub-volumes"]
    assert "192x192 around the middle of the plane" in steps["cut"] and "1024" in steps["values"]
    assert recipe_centre(steps) == "volume" and recipe_centre(recipe(CT, PAPER, "body")) == "body"
    del steps["centre"]
    assert recipe_centre(steps) == "body", "what was built before there was a choice"
    steps = recipe(MRI, PAPER)
    assert steps["sub-volumes"].startswith("16 slices every 8;") and "0.2 and 99.8" in steps["values"]


def test_what_counts_as_empty_is_measured_against_the_whole_mr_volume():
    """Noise fills the range of its own sub-volume; it is still nearly empty beside a head."""
    values = np.random.default_rng(0).uniform(0, 20, (40, 64, 64)).astype(np.float32)
    values[20:, 8:56, 8:56] += 1000
    samples, dropped = volume_samples(RawVolume(values_ZYX=values, spacing_mm=SAMPLE.spacing_mm), MRI, SAMPLE)
    assert (len(samples), dropped) == (4, 3)


def test_nearly_empty_sub_volumes_are_dropped():
    values = np.full((24, 64, 64), -1000, np.float32)
    values[:8, 16:48, 16:48] = 50
    samples, dropped = volume_samples(RawVolume(values_ZYX=values, spacing_mm=SAMPLE.spacing_mm), CT, SAMPLE)
    assert (len(samples), dropped) == (2, 3)


def test_short_volumes_are_padded_or_left_out():
    values = np.full((5, 64, 64), 50, np.float32)
    values[:, 0] = -1000
    samples, _ = volume_samples(RawVolume(values_ZYX=values, spacing_mm=SAMPLE.spacing_mm), CT, SAMPLE)
    filled = (samples[0].values_ZYX == 50).any(axis=(1, 2))
    assert filled.tolist() == [False] + [True] * 5 + [False] * 2
    with pytest.raises(LeftOut, match="slices"):
        volume_samples(RawVolume(values_ZYX=values[:3], spacing_mm=SAMPLE.spacing_mm), CT, SAMPLE)


@pytest.mark.parametrize(
    ("modality", "value", "reason"), [(CT, 300.0, "Hounsfield"), (MRI, 7.0, "one value")], ids=["ct", "mri"]
)
def test_values_without_meaning_are_refused(modality, value, reason):
    raw = RawVolume(values_ZYX=np.full((16, 64, 64), value, np.float32), spacing_mm=SAMPLE.spacing_mm)
    with pytest.raises(DataError, match=reason):
        volume_samples(raw, modality, SAMPLE)


def test_a_new_modality_has_a_stride_of_half_a_sub_volume():
    size: StoredSize = replace(SAMPLE, stride={})
    samples, _ = volume_samples(
        RawVolume(values_ZYX=head().astype(np.float32), spacing_mm=(4, 3, 3)), CT, size
    )
    assert len(samples) == (24 - 8) // 4 + 1


def test_dicom_and_nifti_of_one_volume_agree(tmp_path):
    truth_ZYX = head(shape_ZYX=(10, 16, 12))
    write_series(tmp_path / "series", truth_ZYX, spacing_mm=(5.0, 2.0, 1.0))
    series = dicom.read_series(tuple((tmp_path / "series").iterdir()), ("MR",), invert=False)
    path = write_nifti(tmp_path / "v.nii", truth_ZYX.transpose(2, 1, 0), np.diag([-1.0, -2.0, 5.0, 1.0]))
    nifti = volumes.read_nifti(path)
    np.testing.assert_array_equal(series.values_ZYX, nifti.values_ZYX)
    np.testing.assert_allclose(series.spacing_mm, nifti.spacing_mm)


@pytest.mark.parametrize("to_mm", [(1.0, 1.0, 1.0), (4.0, 3.0, 3.0), (2.5, 4.9, 4.7)])
@pytest.mark.parametrize("keep", [(None, 24, 25), (7, None, 3), (None, 500, 500)])
def test_what_is_kept_is_what_a_cut_of_the_whole_would_be(to_mm, keep):
    values_ZYX = np.random.default_rng(3).normal(size=(18, 41, 40)).astype(np.float32)
    whole_ZYX = preprocess.resample(values_ZYX, (2.5, 4.9, 4.7), to_mm)
    middle = []
    for have, most in zip(whole_ZYX.shape, keep, strict=True):
        kept = have if most is None else min(have, most)
        middle.append(slice((have - kept) // 2, (have - kept) // 2 + kept))
    kept_ZYX = preprocess.resample(values_ZYX, (2.5, 4.9, 4.7), to_mm, keep)
    np.testing.assert_array_equal(kept_ZYX, whole_ZYX[tuple(middle)])


def test_a_wide_plane_is_not_made_to_be_cut_off(monkeypatch):
    """128 x 128 voxels of 4.9 mm are 627 x 627 of 1 mm, of which 192 x 192 are stored."""
    made = []
    axis = preprocess._resample_axis
    monkeypatch.setattr(preprocess, "_resample_axis", lambda *given: made.append(axis(*given)) or made[-1])
    values_ZYX = np.full((24, 128, 128), 40, np.float32)
    values_ZYX[:, :, :8] = -1000
    raw = RawVolume(values_ZYX=values_ZYX, spacing_mm=(1.0, 4.9, 4.9))
    kept, _ = volume_samples(raw, MODALITIES["ct"], STORED_SIZES["base"])
    assert kept[0].values_ZYX.shape == (16, 192, 192)
    assert max(volume.size for volume in made) <= 24 * 192 * 192
