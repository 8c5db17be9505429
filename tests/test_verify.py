"""`verify` reads all of a set: whatever byte was changed, it finds it, and it names every fault it finds."""

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from flaky_server import FlakyServer
from small_sets import PAYLOADS, change_index, change_shard, contents, copied, files, seal, write_small_set

from mnemos.sharding import verify
from mnemos.sharding.errors import DataError, UserError
from mnemos.sharding.manifest import load_manifest, write_manifest
from mnemos.sharding.reader import ShardSet
from mnemos.sharding.upkeep.verify_set import verify_set

FLIPS = 150


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sets")
    for payload in PAYLOADS:
        write_small_set(folder / payload, payload)
    return folder


def shard_of(folder: Path, place: int = 0, split: str = "train") -> str:
    shards = ShardSet(folder, split)
    return shards.manifest.splits[split].shards[int(shards.index["shard"][place])].name


@pytest.mark.parametrize("payload", PAYLOADS)
def test_a_whole_set_has_no_fault(sets, payload, capsys):
    assert verify.main([str(sets / payload)]) == 0
    said = capsys.readouterr().out
    assert "8 of 8 samples are whole" in said and said.endswith(f"{sets / payload} is whole\n")


def regions(folder: Path) -> list[tuple[str, int]]:
    """Return (file, byte) of every kind of place a set has, the first and the last byte of each."""
    shards = ShardSet(folder, "train")
    row, name = shards.row(0), shard_of(folder)
    start, end, offset = int(row["start"]), int(row["start"] + row["span"]), int(row["offset"])
    size = (folder / name).stat().st_size
    places = [
        start,
        start + 148,
        start + 156,
        start + 500,
    ]  # name, header checksum, type, unused bytes of a header
    places += [offset, offset + int(row["size"]) - 1, offset + int(row["size"]), end - 1, end - 512]
    places += [size - 1, size - 512, size - 1024]  # the tar's closing blocks and what is behind them
    found = [(name, place) for place in places]
    for path in ("manifest.json", "train/index.npz", "val/index.npz", "tokenizer.json"):
        if (folder / path).exists():
            length = (folder / path).stat().st_size
            found += [(path, 0), (path, length // 2), (path, length - 1)]
    return found


@pytest.mark.parametrize("payload", ["ids", "vol", "npy"])
def test_one_flipped_byte_anywhere_is_found(sets, tmp_path, payload):
    folder = copied(sets / payload, tmp_path / "set")
    whole, draw = files(folder), random.Random(5)
    manifest = load_manifest(folder)
    known = [name for name in whole if not name.endswith((".png", ".partial"))]
    anywhere = [(name, draw.randrange(len(whole[name]))) for name in draw.choices(known, k=FLIPS // 3)]
    readers = {split: ShardSet(folder, split) for split in ("train", "val")}
    in_samples = 0
    for name, byte in [*regions(folder), *anywhere]:
        damaged = bytearray(whole[name])
        damaged[byte] ^= 1 << draw.randrange(8)
        (folder / name).write_bytes(damaged)
        verdict = verify_set(folder, workers=1)
        assert not verdict.sound and name in {fault.file for fault in verdict.faults}, (name, byte)
        for split, shards in readers.items():
            names = [shard.name for shard in manifest.splits[split].shards]
            if name not in names:
                continue
            index = shards.index
            inside = (index["shard"] == names.index(name)) & (index["start"] <= byte)
            inside &= byte < index["start"] + index["span"]
            for place in np.flatnonzero(inside):  # the reader meets it there, and nowhere else
                key = index["key"][place].decode()
                assert key in {fault.key for fault in verdict.faults}, (name, byte)
                with pytest.raises(DataError, match=key):
                    ShardSet(folder, split).read(int(place))
                in_samples += 1
                for other in set(range(len(shards))) - {int(place)}:
                    ShardSet(folder, split).read(other)
        (folder / name).write_bytes(whole[name])
    assert in_samples >= 15
    assert verify_set(folder, workers=1).sound


def test_every_byte_of_the_manifest_counts(sets, tmp_path):
    folder = copied(sets / "ids", tmp_path / "set")
    file = folder / "manifest.json"
    whole = file.read_bytes()
    for byte in range(0, len(whole), 5):
        damaged = bytearray(whole)
        damaged[byte] ^= 0x04
        file.write_bytes(damaged)
        with pytest.raises(UserError, match=r"manifest\.json"):
            load_manifest(folder)


def test_every_fault_is_named(sets, tmp_path, capsys):
    folder = copied(sets / "vol", tmp_path / "set")
    shards, keys = ShardSet(folder, "train"), []
    for place in (0, 1, 3):
        path, row = folder / shard_of(folder, place), shards.row(place)
        content = bytearray(path.read_bytes())
        content[int(row["offset"]) + 40] ^= 1
        path.write_bytes(content)
        keys.append(row["key"].decode())
    cut, lost = (folder / shard_of(folder, place, "val") for place in (0, 3))
    cut.write_bytes(cut.read_bytes()[:-600])
    lost.unlink()
    (folder / "notes.txt").write_text("mine")
    assert verify.main([str(folder)]) == 65
    said = capsys.readouterr()
    for key in keys:
        assert f":{key}: byte" in said.out
    assert "instead of" in said.out and "the shard is missing" in said.out
    assert "note: the manifest does not know notes.txt" in said.out
    assert said.err.startswith("error: ") and "Traceback" not in said.err
    assert verify.main([str(folder), "--json", "--most", "2"]) == 65
    record = json.loads(capsys.readouterr().out)
    assert len(record["faults"]) == 2 < record["num_faults"] and not record["whole"]
    assert record["samples"] == {"train": 4, "val": 4}
    assert verify.main([str(folder), "--most", "2"]) == 65
    assert f"and {record['num_faults'] - 2} more" in capsys.readouterr().out


@pytest.mark.parametrize("victim", ["train/index.npz", "val/index.npz", "tokenizer.json"])
def test_a_missing_file_is_a_fault_and_the_rest_is_read(sets, tmp_path, victim):
    folder = copied(sets / "ids", tmp_path / "set")
    (folder / victim).unlink()
    verdict = verify_set(folder, workers=1)
    assert [fault.file for fault in verdict.faults] == [victim] and "missing" in verdict.faults[0].what
    assert verdict.whole == (8 if victim == "tokenizer.json" else 4)
    assert any("for want of" in note for note in verdict.notes)


def header(change: Callable[[bytearray], None]) -> Callable[[bytearray], None]:
    """Change the first header of a shard and make its checksum right again."""

    def changed(content: bytearray) -> None:
        block = content[:512]
        change(block)
        block[148:156] = b" " * 8
        block[148:156] = f"{sum(block):06o}\0 ".encode()
        content[:512] = block

    return changed


def rename(name: bytes) -> Callable[[bytearray], None]:
    def change(block: bytearray) -> None:
        block[:100] = name.ljust(100, b"\0")

    return header(change)


def turn_into(kind: bytes) -> Callable[[bytearray], None]:
    return header(lambda block: block.__setitem__(slice(156, 157), kind))


def become_a_pickle(content: bytearray) -> None:
    rename(bytes(content[:16]) + b".pkl")(content)


def described(old: bytes, new: bytes) -> Callable[[bytearray], None]:
    def change(content: bytearray) -> None:
        at = content.index(old)
        content[at : at + len(old)] = new.ljust(len(old))

    return change


def close_with(byte: int) -> Callable[[bytearray], None]:
    return lambda content: content.__setitem__(-byte, 1)


CRAFTED: dict[str, tuple[str, Callable[[bytearray], None], str]] = {
    "another key": ("vol", rename(b"0123456789abcdef.json"), "2 samples lie in the place of one"),
    "upwards": ("vol", rename(b"../../evil.json"), "leads upwards"),
    "absolute": ("vol", rename(b"/evil.json"), "absolute"),
    "a pickle": ("vol", become_a_pickle, "members that are not the sample's"),
    "symbolic link": ("vol", turn_into(b"2"), "a symbolic link"),
    "hard link": ("vol", turn_into(b"1"), "a hard link"),
    "device": ("vol", turn_into(b"3"), "a device"),
    "sparse": ("vol", turn_into(b"S"), "a sparse file"),
    "header checksum": ("vol", lambda content: content.__setitem__(100, 0x37), "bad checksum"),
    "label": ("vol", described(b'"label": "a"', b'"label": "b"'), "disagree on label"),
    "scale": ("vol", described(b'"scale": 0.5', b'"scale": 9.5'), "disagree on scale"),
    "shape": ("vol", described(b'"shape": [4', b'"shape": [5'), "disagree on shape"),
    "no JSON": ("vol", described(b'{"label"', b'["label"'), "its JSON cannot be read"),
    "deep JSON": ("vol", described(b'{"label"', b"[[[[[[[["), "its JSON cannot be read"),
    "behind the end": ("vol", close_with(1), "bytes behind the tar's end"),
    "in the closing blocks": ("vol", close_with(1023), "bytes behind the tar's end"),
    "text": ("ids", described(b"heart", b"lungs"), "its ids are not its text's"),
    "no UTF-8": ("ids", described(b"heart", b"h\xff\xffrt"), "does not decode"),
}


@pytest.mark.parametrize("name", CRAFTED)
def test_a_crafted_set_is_seen_through(sets, tmp_path, name):
    """Whoever computes every hash anew still cannot hide what a shard must not hold."""
    payload, change, told = CRAFTED[name]
    folder = copied(sets / payload, tmp_path / "set")
    change_shard(folder, shard_of(folder), change)
    verdict = verify_set(folder, workers=1)
    assert not verdict.sound and told in "\n".join(map(str, verdict.faults))


def test_an_index_that_disagrees_is_seen_through(sets, tmp_path):
    def told(change: Callable[[dict[str, np.ndarray]], None], payload: str = "vol") -> str:
        shutil.rmtree(tmp_path / "set", ignore_errors=True)
        folder = copied(sets / payload, tmp_path / "set")
        change_index(folder, "train", change)
        return "\n".join(map(str, verify_set(folder, workers=1).faults))

    first = ShardSet(sets / "vol", "val").row(0)
    assert "both splits have this group" in told(lambda index: index["group"].__setitem__(0, first["group"]))
    assert "a second sample of this key" in told(lambda index: index["key"].__setitem__(0, first["key"]))
    assert "groups where the manifest counts" in told(lambda index: index["group"].__setitem__(0, b"0" * 16))
    assert "samples of a where the manifest" in told(lambda index: index["label"].__setitem__(0, 1))
    assert "none of the 2 classes" in told(lambda index: index["label"].__setitem__(0, 7))
    assert "not where the index says" in told(lambda index: index["size"].__isub__(1))
    assert "does not decode" in told(lambda index: index["offset"].__isub__(512))
    assert "another sample's, too" in told(
        lambda index: index.update(start=index["start"] * 0, offset=index["offset"] - index["start"])
    )
    assert "scale" in told(lambda index: index["scale"].__iadd__(1))
    assert "not in the tokenizer's vocabulary" in told_vocabulary(sets, tmp_path)


def told_vocabulary(sets: Path, tmp_path: Path) -> str:
    folder = copied(sets / "ids", tmp_path / "texts")
    row = ShardSet(folder, "train").row(0)
    at = int(row["offset"])
    change_shard(
        folder, shard_of(folder), lambda content: content.__setitem__(slice(at, at + 2), b"\xff\xff")
    )
    return "\n".join(map(str, verify_set(folder, workers=1).faults))


def test_wrong_counts_of_the_manifest_are_faults(sets, tmp_path):
    folder = copied(sets / "jpg", tmp_path / "set")
    seal(folder, "val", groups=9, labels={"a": 1, "b": 1})
    told = "\n".join(map(str, verify_set(folder, workers=1).faults))
    assert (
        "2 groups where the manifest counts 9" in told and "samples of a where the manifest counts 1" in told
    )


def test_several_processes_say_the_same(sets, tmp_path, capsys):
    folder = copied(sets / "ids", tmp_path / "set")
    for place in (1, 2):
        path = folder / shard_of(folder, place)
        path.write_bytes(bytes(path.stat().st_size))
    said = []
    for workers in ("1", "2"):
        assert verify.main([str(folder), "--workers", workers]) == 65
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] and "6 of 8 samples are whole" in said[0]


def test_a_remote_set_is_read_where_it_lies(sets, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = copied(sets / "vol", tmp_path / "set")
    with FlakyServer(folder) as server:
        assert len(contents_of(server.url)) == 4  # in the cache from now on
        assert verify_set(server.url, workers=1).sound
        path = folder / shard_of(folder)
        content = bytearray(path.read_bytes())
        content[700] ^= 1
        path.write_bytes(content)
        faults = verify_set(server.url, workers=1).faults
        assert shard_of(folder) in {fault.file for fault in faults} and any(fault.key for fault in faults)
        path.unlink()
        assert "the shard is missing" in {fault.what for fault in verify_set(server.url, workers=1).faults}


def contents_of(url: str) -> list[np.ndarray]:
    shards = ShardSet(url, "train")
    return [shards.read(place) for place in range(len(shards))]


def test_what_is_no_set_is_the_users_mistake(tmp_path, sets, capsys):
    assert verify.main([str(tmp_path / "absent")]) == 2
    assert "does not exist" in capsys.readouterr().err
    assert verify.main([str(sets / "jpg"), "--most", "0"]) == 2
    assert verify.main([str(sets / "jpg"), "--workers", "-1"]) == 2
    folder = copied(sets / "jpg", tmp_path / "set")
    manifest = load_manifest(folder)
    write_manifest(folder, manifest)
    assert verify.main([str(folder)]) == 0, "writing a manifest again changes nothing"
    (folder / "manifest.json").write_text("{}")
    assert verify.main([str(folder)]) == 65
    assert "manifest.json" in capsys.readouterr().out


def test_help_answers_before_anything_heavy_is_loaded():
    script = (
        "import sys; from mnemos.sharding import index, merge, verify\n"
        "for one in (index, merge, verify): one.parser().format_help()\n"
        "print(sorted({'numpy', 'torch', 'tokenizers', 'PIL'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_what_was_read_is_what_was_written(sets):
    assert len(contents(sets / "txt")) == 8
