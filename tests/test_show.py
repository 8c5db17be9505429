"""The contact sheet shows every class, the right way up, the same every time."""

import numpy as np
import pytest
from PIL import Image
from sample_files import head, key_file, write_csv, write_films, write_nifti

from mnemos.sharding import build, show
from mnemos.sharding.contact_sheet import TILE, choose_samples, draw_sheet, volume_slices
from mnemos.sharding.reader import ShardSet


def make_set(tmp_path, modality, source):
    key = key_file(tmp_path)
    assert build.main([modality, str(source), "--out", str(tmp_path / "set"), "--key-file", key]) == 0
    return tmp_path / "set"


def test_classes_share_the_sheet():
    labels = np.array([0] * 50 + [1] * 3 + [2] * 50 + [-1] * 5)
    chosen = choose_samples(labels, 24)
    assert {label: len(places) for label, places in chosen.items()} == {-1: 5, 0: 6, 1: 3, 2: 6}
    assert all(labels[place] == label for label, places in chosen.items() for place in places)
    assert chosen[0] == [0, 8, 16, 25, 33, 41]


def test_volumes_are_seen_as_a_doctor_sees_them():
    volume = np.zeros((5, 7, 9), np.int16)
    volume[-1, 3, 4], volume[2, 0, 4], volume[2, 3, 0] = 1, 2, 3  # head, front, the patient's right
    views = volume_slices(volume)
    assert views["axial"][0, 4] == 2 and views["axial"][3, 0] == 3
    assert views["coronal"][0, 4] == 1 and views["coronal"][2, 0] == 3
    assert views["sagittal"][0, 3] == 1 and views["sagittal"][2, 0] == 2


@pytest.mark.parametrize("modality", ["xray", "ct", "report"])
def test_a_sheet_is_written_and_the_same_again(tmp_path, capsys, modality):
    if modality == "xray":
        source = write_films(tmp_path / "films", 30)
    elif modality == "ct":
        source = tmp_path / "scans"
        source.mkdir()
        for n in range(3):
            write_nifti(source / f"{n}.nii.gz", head(n).transpose(2, 1, 0), np.diag([-3.0, -3.0, 4.0, 1.0]))
    else:
        rows = [(f"The lungs are clear in case {n}. " * 20, "ab"[n % 2]) for n in range(12)]
        source = write_csv(tmp_path / "r.csv", ["text", "label"], rows)
    directory = make_set(tmp_path, modality, source)
    assert show.main([str(directory)]) == 0
    assert f"written to {directory / 'contact_sheet.png'}" in capsys.readouterr().out
    assert show.main([str(directory), "--out", str(tmp_path / "again.png")]) == 0
    first = (directory / "contact_sheet.png").read_bytes()
    assert first == (tmp_path / "again.png").read_bytes()
    with Image.open(directory / "contact_sheet.png") as sheet:
        pixels = np.asarray(sheet.convert("RGB"))
    assert pixels.shape[1] > 2 * TILE and pixels.std() > 10
    ShardSet(directory, "train")  # a sheet beside the shards does not disturb them


def test_the_first_tile_is_the_first_sample(tmp_path):
    directory = make_set(tmp_path, "xray", write_films(tmp_path / "films", 8))
    shards = ShardSet(directory, "train")
    sheet = np.asarray(draw_sheet(shards, 4))
    stored = shards.read(choose_samples(shards.labels, 4)[0][0])[0]
    factor = TILE // 64
    tile = np.repeat(np.repeat(stored, factor, axis=0), factor, axis=1)
    rows = np.lib.stride_tricks.sliding_window_view(sheet[:200, :160, 0], tile.shape)
    assert any((rows[y, 8] == tile).all() for y in range(rows.shape[0]))
