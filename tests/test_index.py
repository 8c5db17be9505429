"""`index` makes a set of a user's own tars where they lie, and refuses whatever could lose or smuggle in a sample."""

import gzip
import hashlib
import io
import json
import os
import pickle
import tarfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hostile_tars import HOSTILE, volumes, write_tar
from PIL import Image
from small_sets import (
    PAYLOADS,
    SAMPLES,
    SIZE,
    add_member,
    array,
    contents,
    files,
    own_options,
    own_payload,
    small_preset,
    text,
    write_own_tars,
    write_small_set,
    write_tokenizer,
)

from mnemos.sharding import index
from mnemos.sharding.codecs import encode_ids, encode_volume
from mnemos.sharding.errors import DataError, UserError
from mnemos.sharding.keys import hashed_name
from mnemos.sharding.manifest import load_manifest
from mnemos.sharding.reader import ShardSet
from mnemos.sharding.stream import Request, stream
from mnemos.sharding.tokenizer import load_tokenizer
from mnemos.sharding.upkeep.index_set import IndexReport, index_set
from mnemos.sharding.upkeep.verify_set import verify_set

MODALITY = {"jpg": "xray", "png": "pathology", "npy": "ct", "txt": "report"}
LONG_KEY = f"clinic/{'long' * 30}/secret_"


def run(folder: Path, modality: str, **options: Any) -> IndexReport:
    with small_preset():
        return index_set(own_options(folder, modality, **options))


@pytest.mark.parametrize("payload", MODALITY)
def test_own_tars_are_read_as_they_are(tmp_path, payload):
    folder = tmp_path / "tars"
    paths = write_own_tars(folder, payload)
    before = [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]
    with pytest.raises(UserError, match=r"mnemos\.sharding\.index MODALITY"):
        load_manifest(folder)
    report = run(folder, MODALITY[payload])
    assert [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths] == before
    manifest = load_manifest(folder)
    assert manifest == report.manifest and manifest.source == "index" and manifest.payload == payload
    assert manifest.classes == ("a", "b") and report.others == {"note": SAMPLES}
    key = (tmp_path / "key").read_bytes()
    numbers = {hashed_name(key, f"{LONG_KEY}{number}").encode(): number for number in range(SAMPLES)}
    found = set()
    for split in ("train", "val"):
        shards = ShardSet(folder, split)
        for place in range(len(shards)):
            row = shards.row(place)
            number = numbers[row["key"]]
            found.add(number)
            assert row["group"] == hashed_name(key, f"patient_{number // 4}").encode()
            assert manifest.classes[row["label"]] == "ab"[number // 4 % 2]
            if payload == "txt":
                tokenizer = load_tokenizer(folder / "tokenizer.json")
                assert shards.read(place).tolist() == tokenizer.encode(text(number)).ids[: SIZE.text]
                assert shards.text(place) == text(number)
            elif payload == "jpg":
                assert np.abs(shards.read(place).astype(int) - array(payload, number)).mean() < 3
                assert row["scale"] == np.float32(1 / 255)
            else:
                np.testing.assert_array_equal(shards.read(place), array(payload, number))
    assert found == set(range(SAMPLES))
    assert [split.groups for split in manifest.splits.values()] == [1, 1], "two patients, each in one split"
    assert verify_set(folder, workers=1).sound


def test_no_name_of_the_tars_reaches_manifest_or_index(tmp_path):
    folder = tmp_path / "tars"
    write_own_tars(folder, "npy")
    run(folder, "ct")
    for name, content in files(folder).items():
        if not name.endswith(".tar"):
            assert b"secret" not in content and b"patient" not in content and b"clinic" not in content, name


def test_the_same_tars_give_the_same_set_and_another_key_other_names(tmp_path):
    kept = []
    for name, secret in (("one", b"k" * 32), ("two", b"k" * 32), ("three", b"l" * 32)):
        write_own_tars(tmp_path / name / "tars", "txt")
        (tmp_path / name / "own key").write_bytes(secret)
        run(tmp_path / name / "tars", "report", key_file=tmp_path / name / "own key")
        kept.append(files(tmp_path / name / "tars"))
    assert kept[0] == kept[1]
    keys = [{*contents(tmp_path / name / "tars")} for name in ("one", "three")]
    assert not keys[0] & keys[1]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_tokenizer_is_told_in_one_sentence(tmp_path, workers):
    """It is the set's fault and no sample's: none may be skipped for it, in a reading process either."""
    folder = tmp_path / "tars"
    write_own_tars(folder, "txt")
    run(folder, "report")
    content = bytearray((folder / "tokenizer.json").read_bytes())
    content[-9] ^= 1
    (folder / "tokenizer.json").write_bytes(content)
    places = np.arange(2)
    plan = partial(iter, [Request(step=0, member=0, samples=places, places=places)])
    with pytest.raises(UserError, match=r"tokenizer\.json is damaged") as caught:
        list(stream([ShardSet(folder, "train")], plan, on_skip=lambda *_: None, workers=workers, pin=False))
    assert "\n" not in str(caught.value)


def test_a_name_in_own_texts_does_not_enter_the_vocabulary(tmp_path):
    """One patient's reports name them a dozen times: enough for a merge of its own, if patients were not counted."""
    members = {}
    for number in range(60):
        words = " Quodlibetius said so" if number < 12 else ""
        members[f"{number}.txt"] = (text(number) + words).encode()
        group = "one" if number < 12 else f"other-{number}"
        members[f"{number}.json"] = json.dumps({"group": group}).encode()
    folder = tmp_path / "tars"
    write_tar(folder / "a.tar", members)
    run(folder, "report", val_fraction=0.0)
    vocabulary = load_tokenizer(folder / "tokenizer.json").get_vocab()
    assert "\u0120pneumothorax" in vocabulary and not [piece for piece in vocabulary if "quod" in piece]


def test_stored_payloads_ours_among_them(tmp_path):
    folder = tmp_path / "vol"
    write_tar(folder / "a.tar", {f"{n}.vol": encode_volume(array("vol", n)) for n in range(4)})
    run(folder, "ct")
    assert len(contents(folder)) == 4 and load_manifest(folder).payload == "vol"
    file = write_tokenizer(tmp_path / "given.json")
    tokenizer, folder = load_tokenizer(file), tmp_path / "ids"
    ids = {f"{n}.ids": encode_ids(np.array(tokenizer.encode(text(n)).ids)) for n in range(4)}
    write_tar(folder / "a.tar", ids)
    with pytest.raises(UserError, match="--tokenizer"):
        run(folder, "report")
    run(folder, "report", tokenizer=file)
    assert sorted(tokenizer.decode(row[0].tolist()) for row in contents(folder).values()) == sorted(
        tokenizer.decode(tokenizer.encode(text(n)).ids) for n in range(4)
    )
    ours = write_small_set(tmp_path / "ours", "ids")
    expected = sorted(row[0].tolist() for row in contents(ours).values())
    for name in ("manifest.json", "train/index.npz", "val/index.npz"):  # lost
        (ours / name).unlink()
    run(ours, "report")
    assert sorted(row[0].tolist() for row in contents(ours).values()) == expected
    assert verify_set(ours, workers=1).sound


def test_labels_from_cls_and_scales_from_json(tmp_path):
    values = np.arange(256, dtype=np.int16).reshape(SIZE.volume)
    buffer = io.BytesIO()
    np.save(buffer, values)
    members = {}
    for number, label in enumerate(["10", "9", "2", "10"]):
        members |= {f"{number}.npy": buffer.getvalue(), f"{number}.cls": label.encode()}
    members["3.json"] = json.dumps({"scale": 0.25, "shift": -2}).encode()
    write_tar(tmp_path / "tars" / "a.tar", members)
    manifest = run(tmp_path / "tars", "mri", val_fraction=0).manifest
    assert manifest.classes == ("2", "9", "10") and manifest.splits["train"].labels["10"] == 2
    shards = ShardSet(tmp_path / "tars", "train")
    assert shards.labels.tolist() == [2, 1, 0, 2] and len(ShardSet(tmp_path / "tars", "val")) == 0
    scaled = values * shards.index["scale"][0] + shards.index["shift"][0]
    np.testing.assert_allclose([scaled.mean(), scaled.std()], [0, 1], atol=1e-5)
    assert (shards.index["scale"][3], shards.index["shift"][3]) == (0.25, -2)


def test_folders_for_both_splits(tmp_path):
    folder = tmp_path / "tars"
    write_tar(folder / "train" / "a.tar", volumes(3))
    write_tar(folder / "val" / "a.tar", volumes(2, start=5))
    splits = run(folder, "ct").manifest.splits
    assert (splits["train"].samples, splits["val"].samples) == (3, 2)
    assert [shard.name for shard in splits["val"].shards] == ["val/a.tar"]
    (folder / "manifest.json").unlink()
    described = {"scan7.npy": own_payload("npy", 1), "scan7.json": b'{"group": "scan0"}'}
    write_tar(folder / "val" / "b.tar", described)
    with pytest.raises(DataError, match="its group lies in train and val"):
        run(folder, "ct")
    write_tar(folder / "c.tar", volumes(1, start=9))
    with pytest.raises(UserError, match="keep them in one way"):
        run(folder, "ct")


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_tar_is_refused_by_its_name(tmp_path, name, capsys):
    write, told = HOSTILE[name]
    folder = tmp_path / "tars"
    write(folder / "bad.tar")
    before = files(folder)
    with small_preset():
        options = ["--preset", "small", "--key-file", str(tmp_path / "key"), "--workers", "1"]
        assert index.main(["ct", str(folder), *options]) in (2, 65)
    said = capsys.readouterr().err
    assert told in said and "bad.tar" in said and said.count("\n") == 1
    assert files(folder) == before and sorted(folder.iterdir()) == [folder / "bad.tar"]


def test_long_names_and_stamps_of_every_dialect_are_fine(tmp_path):
    for dialect in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        folder = tmp_path / str(dialect)
        folder.mkdir()
        with tarfile.open(folder / "a.tar", "w", format=dialect) as tar:
            for number in range(4):
                deep = "/".join(["folder" * 9] * 2)  # in ustar through the prefix
                add_member(tar, f"./{deep}/{number}.NPY", own_payload("npy", number))
            tar.addfile(tarfile.TarInfo("README"))
            folder_entry = tarfile.TarInfo("empty")
            folder_entry.type = tarfile.DIRTYPE
            tar.addfile(folder_entry)
        assert run(folder, "ct").others == {"README": 1}
        assert len(contents(folder)) == 4 and verify_set(folder, workers=1).sound


def test_pickles_are_never_opened(tmp_path):
    trap = tmp_path / "sprung"

    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(trap),)

    parts = {}
    for number in range(3):
        parts |= {f"{number}.npy": own_payload("npy", number)}
        parts |= {f"{number}.{name}": pickle.dumps(Trap()) for name in ("pkl", "pyd", "pth", "npz")}
    write_tar(tmp_path / "tars" / "a.tar", parts)
    assert run(tmp_path / "tars", "ct").others == {"pkl": 3, "pyd": 3, "pth": 3, "npz": 3}
    assert len(contents(tmp_path / "tars")) == 3 and verify_set(tmp_path / "tars", workers=1).sound
    assert not trap.exists()


@pytest.mark.parametrize("how", ["by name", "by content"])
def test_a_compressed_tar_is_refused(tmp_path, how):
    path = write_tar(tmp_path / "tars" / "a.tar", volumes(2))
    packed = gzip.compress(path.read_bytes())
    if how == "by name":
        path = path.with_name("a.tar.gz")
    path.write_bytes(packed)
    with pytest.raises(UserError, match="gunzip"):
        run(tmp_path / "tars", "ct")


def test_samples_of_another_size_are_counted_and_refused(tmp_path):
    buffer = io.BytesIO()
    np.save(buffer, np.zeros((4, 8, 9), np.int16))
    parts = volumes(18) | {f"wide{number}.npy": buffer.getvalue() for number in range(2)}
    write_tar(tmp_path / "tars" / "a.tar", parts)
    with pytest.raises(DataError, match=r"2 of 20 samples do not fit.*a\.tar:wide0.*sharding\.build ct"):
        run(tmp_path / "tars", "ct")
    with pytest.raises(DataError, match="2 of 20"):
        run(tmp_path / "tars", "ct", max_broken=0.05)
    report = run(tmp_path / "tars", "ct", max_broken=0.1)
    assert report.unfit == 2 and len(contents(tmp_path / "tars")) == 18
    assert report.manifest.skipped == {"sample that does not fit": 2}
    assert verify_set(tmp_path / "tars", workers=1).sound, "what is left out lies between the samples"
    content = bytearray((tmp_path / "tars" / "a.tar").read_bytes())
    content[18 * 1536 + 512 + 200] ^= 1  # in the first of them
    (tmp_path / "tars" / "a.tar").write_bytes(content)
    assert not verify_set(tmp_path / "tars", workers=1).sound


@pytest.mark.parametrize("mode", ["I;16", "RGBA", "LA"])
def test_pictures_that_would_lose_something_are_refused(tmp_path, mode):
    buffer = io.BytesIO()
    Image.new(mode, SIZE.image[::-1]).save(buffer, format="PNG")
    write_tar(tmp_path / "tars" / "a.tar", {"film.png": buffer.getvalue()})
    with pytest.raises(DataError, match="not 8-bit grey or RGB"):
        run(tmp_path / "tars", "xray")


def test_payloads_of_two_kinds_are_refused(tmp_path):
    parts = {"a.jpg": own_payload("jpg", 0), "b.png": own_payload("png", 1)}
    write_tar(tmp_path / "tars" / "a.tar", parts)
    with pytest.raises(DataError, match=r"b: it has \.png in a set of \.jpg"):
        run(tmp_path / "tars", "pathology")


def test_a_key_of_two_tars_is_refused(tmp_path):
    for name in ("a", "b"):
        write_tar(tmp_path / "tars" / f"{name}.tar", volumes(2))
    with pytest.raises(DataError, match=r"b\.tar:scan0: a second sample of this key.*a\.tar"):
        run(tmp_path / "tars", "ct")


def test_mistakes_are_told_in_one_sentence(tmp_path, capsys):
    folder = tmp_path / "tars"
    folder.mkdir()

    def refused(modality: str = "ct", *options: str) -> str:
        assert index.main([modality, str(folder), "--key-file", str(tmp_path / "key"), *options]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        return said

    assert "holds no *.tar" in refused()
    write_tar(folder / "a.tar", {"1.mp4": b"film"})
    assert "hold no .vol or .npy" in refused()
    assert "modality 'pet' is unknown" in refused("pet")
    assert "preset 'tiny' is unknown" in refused("ct", "--preset", "tiny")
    assert "--val-fraction is 1" in refused("ct", "--val-fraction", "1")
    (folder / "empty.tar").touch()
    (folder / "a.tar").unlink()
    assert "is empty" in refused()
    (folder / "empty.tar").unlink()
    write_tar(folder / "a.tar", volumes(2))
    assert "only texts have one" in refused("ct", "--tokenizer", "x.json")
    (folder / "a:b.tar").write_bytes((folder / "a.tar").read_bytes())
    assert "rename it" in refused()
    (folder / "a:b.tar").unlink()
    run(folder, "ct")
    assert "has a manifest.json already" in refused()
    key = folder / "key"
    (folder / "manifest.json").unlink()
    assert index.main(["ct", str(folder), "--key-file", str(key)]) == 2
    assert "inside the shard set" in capsys.readouterr().err


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    folder = tmp_path / "tars"
    write_own_tars(folder, "txt")
    before = files(folder)

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mnemos.sharding.upkeep.index_files.write_manifest", full)
    with pytest.raises(UserError, match="No space left"):
        run(folder, "report")
    assert files(folder) == before and len(list(folder.iterdir())) == 2


def test_several_processes_find_the_same(tmp_path):
    kept = []
    for workers in (1, 2):
        folder = tmp_path / str(workers) / "tars"
        write_own_tars(folder, "npy")
        run(folder, "ct", workers=workers)
        kept.append(files(folder))
    assert kept[0] == kept[1]


def test_the_summary_says_what_to_do_next(tmp_path, capsys):
    write_own_tars(tmp_path / "tars", "npy")
    with small_preset():
        options = ["--preset", "small", "--key-file", str(tmp_path / "key")]
        assert index.main(["ct", str(tmp_path / "tars"), *options]) == 0
    said = capsys.readouterr().out
    assert "CT: 8 samples of .npy, 4x8x8 voxels" in said and "not used  8 .note" in said
    assert "python -m mnemos.sharding.show" in said and "names inside the tars are not hidden" in said


def test_the_payload_kinds_of_the_helper_are_all():
    assert set(MODALITY) < set(PAYLOADS)
