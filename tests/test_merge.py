"""`merge` joins sets without touching a sample, never splits a group, and leaves nothing half-done."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import webdataset
from small_sets import (
    PAYLOADS,
    SIZE,
    array,
    change_index,
    copied,
    files,
    own_options,
    shape_of,
    small_preset,
    text,
    write_own_tars,
    write_small_set,
    write_tokenizer,
)

from mnemos.sharding import merge
from mnemos.sharding.keys import hashed_name
from mnemos.sharding.manifest import load_manifest
from mnemos.sharding.modalities import MODALITIES
from mnemos.sharding.reader import ShardSet
from mnemos.sharding.tokenizer import train_tokenizer
from mnemos.sharding.upkeep.index_set import index_set
from mnemos.sharding.upkeep.merge_sets import Merged, merge_sets
from mnemos.sharding.upkeep.verify_set import verify_set

LATER = range(8, 14)  # samples of a second set: 8..13, other files and other patients than 0..7


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sets")
    for payload in PAYLOADS:
        write_small_set(folder / payload, payload)
        if payload in ("npy", "txt"):
            continue
        write_small_set(folder / f"{payload}-later", payload, LATER, classes=("b", "c", "a"))
    return folder


def join(out: Path, *sets: Path) -> Merged:
    return merge_sets([str(path) for path in sets], out)


@pytest.mark.parametrize("payload", ["jpg", "png", "vol", "ids"])
def test_every_sample_comes_over_as_it_is(sets, tmp_path, payload):
    parts = [sets / payload, sets / f"{payload}-later"]
    merged = join(tmp_path / "out", *parts)
    manifest = load_manifest(tmp_path / "out")
    assert manifest == merged.manifest and manifest.source == "merge" and manifest.payload == payload
    assert manifest.classes == ("a", "b", "c")
    assert merged.dropped == merged.moved == 0
    for split in ("train", "val"):
        new, place = ShardSet(tmp_path / "out", split), 0
        for old in (ShardSet(part, split) for part in parts):
            for other in range(len(old)):
                assert new.payload(place) == old.payload(other) and new.text(place) == old.text(other)
                for column in ("key", "group", "scale", "shift"):
                    assert new.index[column][place] == old.index[column][other]
                was = old.labels[other]
                name = old.manifest.classes[was] if was >= 0 else None
                assert (manifest.classes[new.labels[place]] if new.labels[place] >= 0 else None) == name
                place += 1
        assert place == len(new)
    assert verify_set(tmp_path / "out", workers=1).sound
    for part in parts:
        assert load_manifest(part).fingerprint in manifest.recipe["joined"]
    assert manifest.recipe["made"] == "by a test"


def test_the_same_sets_give_the_same_bytes_and_webdataset_reads_them(sets, tmp_path):
    for name in ("one", "two"):
        join(tmp_path / name, sets / "vol", sets / "vol-later")
    assert files(tmp_path / "one") == files(tmp_path / "two")
    shards = ShardSet(tmp_path / "one", "train")
    urls = [str(tmp_path / "one" / shard.name) for shard in shards.manifest.splits["train"].shards]
    found = [sample["__key__"].encode() for sample in webdataset.WebDataset(urls, shardshuffle=False)]
    assert found == shards.index["key"].tolist()


def test_a_sample_of_two_sets_is_kept_once(sets, tmp_path):
    write_small_set(tmp_path / "again", "vol", range(6, 10))
    merged = join(tmp_path / "out", sets / "vol", tmp_path / "again")
    assert merged.dropped == 2 and merged.manifest.skipped == {"sample of another set, too": 2}
    keys = np.concatenate([ShardSet(tmp_path / "out", split).index["key"] for split in ("train", "val")])
    assert len(keys) == len(set(keys.tolist())) == 10
    assert verify_set(tmp_path / "out", workers=1).sound


def test_two_samples_of_one_key_are_refused(sets, tmp_path):
    def differ(row: int) -> Callable[[dict[str, np.ndarray]], None]:
        stolen = ShardSet(sets / "vol", "train").index["key"][1]
        return lambda index: index["key"].__setitem__(row, stolen)

    folder = copied(sets / "vol-later", tmp_path / "later")
    change_index(folder, "train", differ(0))
    with pytest.raises(ValueError, match="have the key") as caught:
        join(tmp_path / "out", sets / "vol", folder)
    assert str(folder) in str(caught.value) and not (tmp_path / "out").exists()


def test_a_group_never_lies_in_both_splits(sets, tmp_path):
    folder = copied(sets / "vol-later", tmp_path / "later")
    group = ShardSet(sets / "vol", "val").index["group"][0]  # validates there with two samples
    change_index(folder, "train", lambda index: index["group"].__setitem__(slice(0, 2), group))
    merged = join(tmp_path / "out", sets / "vol", folder)
    assert (merged.moved, merged.moved_groups) == (2, 1)
    groups = [set(ShardSet(tmp_path / "out", split).index["group"].tolist()) for split in ("train", "val")]
    assert group in groups[0] and not groups[0] & groups[1]
    assert merged.manifest.splits["train"].samples == 4 + 6 + 2
    assert "2 validating samples train" in merged.manifest.recipe["groups"]
    assert verify_set(tmp_path / "out", workers=1).sound


def test_extra_columns_stay_where_all_sets_have_them(sets, tmp_path):
    for name, split_rows in (("vol", (4, 4)), ("vol-later", (6, 0))):
        folder = copied(sets / name, tmp_path / name)
        for split, rows in zip(("train", "val"), split_rows, strict=True):
            extra = {"embedding": np.arange(rows * 3, dtype=np.float32).reshape(rows, 3)}
            if name == "vol":
                extra["rank"] = np.arange(rows)
            if rows:
                change_index(folder, split, lambda index, extra=extra: index.update(extra))
    merged = join(tmp_path / "out", tmp_path / "vol", tmp_path / "vol-later")
    assert merged.left_columns == ("rank",)
    index = ShardSet(tmp_path / "out", "train").index
    assert "rank" not in index and index["embedding"].tolist() == [
        *np.arange(12).reshape(4, 3).tolist(),
        *np.arange(18).reshape(6, 3).tolist(),
    ]


def test_a_users_own_tars_become_a_set_of_ours(sets, tmp_path):
    for payload, stored in (("npy", "vol"), ("txt", "ids")):
        folder = tmp_path / payload
        write_own_tars(folder, payload, LATER)
        with small_preset():
            tokenizer = sets / "txt" / "tokenizer.json" if payload == "txt" else None
            modality = load_manifest(sets / payload).name
            index_set(own_options(folder, modality, tokenizer=tokenizer))
        out = tmp_path / f"{payload}-out"
        assert join(out, sets / payload, folder).manifest.payload == stored
        key = (folder.parent / "key").read_bytes()
        expected = {hashed_name(key, f"clinic/{'long' * 30}/secret_{number}"): number for number in range(14)}
        seen = 0
        for split in ("train", "val"):
            shards = ShardSet(out, split)
            for place in range(len(shards)):
                number = expected[shards.index["key"][place].decode()]
                if payload == "txt":
                    assert shards.text(place) == text(number)
                else:
                    np.testing.assert_array_equal(shards.read(place), array(payload, number))
                seen += 1
        assert seen == 14 and verify_set(out, workers=1).sound


def test_a_merged_set_merges_again(sets, tmp_path):
    write_small_set(tmp_path / "last", "vol", range(14, 16))
    join(tmp_path / "two", sets / "vol", sets / "vol-later")
    manifest = join(tmp_path / "three", tmp_path / "two", tmp_path / "last").manifest
    assert sum(split.samples for split in manifest.splits.values()) == 16
    for part in ("vol", "vol-later"):
        assert load_manifest(sets / part).fingerprint in manifest.recipe["joined"]


def another_tokenizer(folder: Path) -> Path:
    file = folder / "other.json"
    train_tokenizer(["other words than those of the first set, seen often"] * 9, 300).save(str(file))
    return file


def test_what_does_not_fit_together_is_refused(sets, tmp_path, capsys):
    wide = write_small_set(tmp_path / "wide", "vol", LATER, spacing_mm=(5.0, 3.0, 3.0))
    modality = replace(MODALITIES["ct"], augment="none")
    changed = write_small_set(tmp_path / "changed", "vol", LATER, modality=modality)
    long = write_small_set(tmp_path / "long", "ids", LATER, shape=(40,))
    lossless = write_small_set(tmp_path / "lossless", "jpg", LATER, lossless=True)
    words = write_small_set(tmp_path / "words", "ids", LATER, tokenizer_file=another_tokenizer(tmp_path))
    assert shape_of("ids") == (SIZE.text,) != (40,)
    for one, other, told in (
        ("jpg", sets / "png", "has modality pathology where"),
        ("vol", changed, "modality record"),
        ("vol", wide, "spacing in mm (5.0, 3.0, 3.0)"),
        ("ids", long, "size (40,)"),
        ("jpg", lossless, "payload png"),
        ("ids", words, "the same ids would mean other words"),
        ("vol", sets / "vol", "given twice"),
        ("vol", tmp_path / "absent", "does not exist"),
    ):
        assert merge.main([str(sets / one), str(other), "--out", str(tmp_path / "out")]) == 2
        said = capsys.readouterr().err
        assert told in said and said.count("\n") == 1
        assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))
    assert merge.main([str(sets / "vol"), "--out", str(tmp_path / "out")]) == 2
    assert merge.main([str(sets / "vol"), str(wide), "--out", str(sets / "vol")]) == 2
    assert "not empty" in capsys.readouterr().err


def test_a_damaged_sample_stops_it_and_leaves_nothing(sets, tmp_path, capsys):
    folder = copied(sets / "jpg-later", tmp_path / "later")
    shards = ShardSet(folder, "train")
    path = folder / shards.manifest.splits["train"].shards[int(shards.index["shard"][3])].name
    content = bytearray(path.read_bytes())
    content[int(shards.index["offset"][3])] ^= 1
    path.write_bytes(content)
    assert merge.main([str(sets / "jpg"), str(folder), "--out", str(tmp_path / "out")]) == 65
    assert shards.index["key"][3].decode() in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["later"]


def test_a_full_disk_is_told_before_anything_is_written(sets, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    assert merge.main([str(sets / "jpg"), str(sets / "jpg-later"), "--out", str(tmp_path / "out")]) == 75
    assert "GB are needed" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_summary_tells_what_became_of_the_sets(sets, tmp_path, capsys):
    again = write_small_set(tmp_path / "again", "vol", range(6, 10))
    group = ShardSet(sets / "vol", "val").index["group"][0]
    change_index(again, "train", lambda index: index["group"].__setitem__(0, group))
    assert merge.main([str(sets / "vol"), str(again), "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "kept once  2 samples" in said and "moved  2 samples of 1 groups from val to train" in said
    record = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert record["source"] == "merge" and f"fingerprint {record['fingerprint'][:16]}" in said


def test_the_tokenizer_comes_along(sets, tmp_path):
    join(tmp_path / "out", sets / "ids", sets / "ids-later")
    stored = (tmp_path / "out" / "tokenizer.json").read_bytes()
    assert stored == write_tokenizer(tmp_path / "again.json").read_bytes()
