"""A build killed at any moment goes on by the same command to the bytes of a build that was never stopped."""

import fcntl
import itertools
import json
import os
import re
import signal
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image
from sample_files import grey_film, head, key_file, write_csv, write_films, write_nifti

from mnemos.sharding import build
from mnemos.sharding.building import build_fill, prepare
from mnemos.sharding.building.journal import Head, Journal
from mnemos.sharding.errors import DataError
from mnemos.sharding.keys import hashed_name
from mnemos.sharding.manifest import load_manifest
from mnemos.sharding.modalities import MODALITIES
from mnemos.sharding.reader import ShardSet
from mnemos.sharding.sample import Sample
from mnemos.sharding.sources import samples
from mnemos.sharding.sources.units import Unit
from mnemos.sharding.writer import ShardSetWriter

CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir")  # and files opened to be written


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    """What a killed process wrote is there all the same; syncing guards against power cuts, and takes its time."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def command(tmp_path: Path, modality: str, source: Path, *flags: object, out: str = "set") -> list[str]:
    """Return a build command of many small shards, with the tests' key."""
    key = tmp_path / "key"
    return [
        modality,
        str(source),
        "--out",
        str(tmp_path / out),
        "--key-file",
        str(key) if key.exists() else key_file(tmp_path),
        "--shard-mb",
        "0.012",
        "--workers",
        "1",
        *map(str, flags),
    ]


def in_child(run) -> bool:
    """Run a function in a forked process; tell whether it lived to the end. It may kill itself."""
    child = os.fork()
    if not child:
        try:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.dup2(null, 2)
            run()
        finally:
            os._exit(0)
    return os.WIFEXITED(os.waitpid(child, 0)[1])


def killed_before_change(number: int, argv: list[str]) -> bool:
    """Build in a process that is killed just before its n-th change of the file system; tell whether it was."""

    def run():
        changes = itertools.count()

        def hook(event, args):
            writes = event == "open" and (args[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if (writes or event in CHANGES) and next(changes) == number:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        build.main(argv)

    return not in_child(run)


def killed_after_record(number: int, argv: list[str]) -> None:
    """Build in a process that is killed when the n-th shard is finished and recorded."""

    def run():
        records, record = itertools.count(1), Journal.record

        def recorded(*args):
            record(*args)
            if next(records) == number:
                os.kill(os.getpid(), signal.SIGKILL)

        Journal.record = recorded
        build.main(argv)

    assert not in_child(run), "the build ended before it was killed"


def stored(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def num_finished(folder: Path) -> int:
    return len(list((folder / ".set.partial" / "records").glob("*.npz")))


def write_reports(folder: Path) -> Path:
    """Write reports with a copy, an empty one and a broken line among them."""
    lines = [
        json.dumps({"text": f"The heart is normal in case {n}.", "group": f"g{n % 9}"}) for n in range(16)
    ]
    lines[11], lines[12], lines[13] = lines[3], json.dumps({"text": " "}), "{no json"
    file = folder / "reports.jsonl"
    file.write_text("\n".join(lines))
    return file


def write_scans(folder: Path, num: int) -> Path:
    folder.mkdir()
    for number in range(num):
        values = head(number, (40, 40, 40)).transpose(2, 1, 0)
        write_nifti(folder / f"{number}.nii.gz", values, np.diag([-3.0, -3.0, 4.0, 1.0]))
    return folder


def test_killed_at_every_change_of_the_disk(tmp_path, capsys):
    """Each kill lies between two steps: files half written, written but not renamed, renamed but not recorded."""
    argv = command(tmp_path, "report", write_reports(tmp_path), "--rare-words", 0)
    assert build.main([*argv, "--out", str(tmp_path / "reference")]) == 0
    expected = stored(tmp_path / "reference")
    assert sum(name.endswith(".tar") for name in expected) >= 4
    number, resumed, refused = 0, 0, 0
    while killed_before_change(number, argv):
        finished = num_finished(tmp_path)
        there = (tmp_path / "set").exists()
        capsys.readouterr()
        code = build.main(argv)
        printed = capsys.readouterr()
        if there and code:  # the last that was missing were the hidden folder's lock and itself
            assert code == 2 and "not empty" in printed.err
            refused += 1
        else:
            assert code == 0, printed.err
            resumed += "samples were there from a stopped run" in printed.out
            assert there or ("stopped run" in printed.out) == (finished > 0)
        assert stored(tmp_path / "set") == expected, f"killed before change {number}"
        assert sorted(path.name for path in tmp_path.iterdir()) == [
            "key",
            "reference",
            "reports.jsonl",
            "set",
        ]
        remove(tmp_path / "set")
        number += 1
    assert number > 30 and resumed > 10 and refused <= 2


def remove(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    folder.rmdir()


def test_what_gets_its_name_has_reached_the_disk(tmp_path, monkeypatch):
    synced, renamed, replace = set(), [], Path.replace
    monkeypatch.setattr(
        os, "fsync", lambda descriptor: synced.add(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
    )

    def noted(path, target):
        manifest = path.name == ".manifest.json.partial"  # synced under its own name, before the set appears
        assert manifest or str(path) in synced, f"{path} is renamed before its content is on the disk"
        if path.name == "set":
            assert {str(path / name) for name in ("manifest.json", "train/index.npz", "train")} <= synced
        renamed.append(path.name)
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", noted)
    assert build.main(command(tmp_path, "report", write_reports(tmp_path), "--rare-words", 0)) == 0
    assert {"000000.tar.partial", ".train-000000.npz.partial", ".head.json.partial", "set"} <= set(renamed)


def test_killed_again_and_again(tmp_path):
    argv = command(tmp_path, "report", write_reports(tmp_path), "--rare-words", 0)
    assert build.main([*argv, "--out", str(tmp_path / "reference")]) == 0
    kills = 0
    while killed_before_change(22, argv):
        kills += 1
        assert kills < 20, "no step forward between two kills"
    assert kills >= 3
    assert stored(tmp_path / "set") == stored(tmp_path / "reference")


def test_killed_while_it_begins_again(tmp_path):
    argv = command(tmp_path, "report", write_reports(tmp_path), "--rare-words", 0)
    assert build.main([*argv, "--out", str(tmp_path / "reference")]) == 0
    for number in range(14):
        killed_after_record(2, argv)
        assert killed_before_change(number, [*argv, "--fresh"])
        assert build.main(argv) == 0
        assert stored(tmp_path / "set") == stored(tmp_path / "reference")
        remove(tmp_path / "set")


@pytest.mark.parametrize("after", [1, 4])
@pytest.mark.parametrize("flags", [(), ("--val-fraction", "0.4")], ids=["", "half validates"])
def test_films_read_again_are_those_of_the_open_shards(tmp_path, monkeypatch, after, flags):
    films = write_films(tmp_path / "films", 30, groups=30)
    for number, copy in ((1, 2), (3, 4), (5, 29)):
        (films / f"film_{copy:03d}.jpg").write_bytes((films / f"film_{number:03d}.jpg").read_bytes())
    (films / "film_010.jpg").write_bytes(b"rubbish")
    argv = command(tmp_path, "xray", films, *flags)
    assert build.main([*argv, "--out", str(tmp_path / "reference")]) == 0
    killed_after_record(after, argv)
    assert num_finished(tmp_path) == after
    kept = 0
    for record in (tmp_path / ".set.partial" / "records").glob("*.npz"):
        with np.load(record) as arrays:
            kept += len(arrays["column_key"])
    reads, read_unit = [], prepare.read_unit
    monkeypatch.setattr(
        prepare, "read_unit", lambda unit, *rest: reads.append(unit) or read_unit(unit, *rest)
    )
    assert build.main(argv) == 0
    # the copies that were dropped and the broken film may lie on either side
    assert 30 - kept - 4 <= len(reads) <= 30 - kept + 1
    assert stored(tmp_path / "set") == stored(tmp_path / "reference")
    assert load_manifest(tmp_path / "set").skipped == {"broken file": 1, "duplicate": 3}


@pytest.mark.parametrize("scans", [1, 4])
def test_volumes_that_lie_across_shards(tmp_path, scans):
    """With one volume alone its last samples validate, so that both splits go on in the middle of it."""
    source = write_scans(tmp_path / "scans", scans)
    argv = command(tmp_path, "mri", source, "--shard-mb", 0.06)
    assert build.main([*argv, "--out", str(tmp_path / "reference")]) == 0
    shards = load_manifest(tmp_path / "reference").splits["train"].shards
    assert len(shards) > 1 and all(shard.samples > 1 for shard in shards[:-1])
    for after in range(1, len(shards) + 1):
        killed_after_record(after, argv)
        assert build.main(argv) == 0
        assert stored(tmp_path / "set") == stored(tmp_path / "reference")
        remove(tmp_path / "set")


def test_what_is_left_out_is_counted_once(tmp_path, monkeypatch):
    """One volume gives all samples; the units that its table leaves out lie before and behind it in the order."""
    find = samples.find_units

    def found(*args):
        none = [Unit(name=f"other {n}", reader="nifti", files=(), left_out="another type") for n in range(6)]
        return [*find(*args), *none]

    monkeypatch.setattr(samples, "find_units", found)
    source = write_scans(tmp_path / "scans", 1)
    argv = command(tmp_path, "mri", source, "--shard-mb", 0.03, "--val-fraction", 0.5)
    assert build.main([*argv, "--out", str(tmp_path / "reference")]) == 0
    manifest = load_manifest(tmp_path / "reference")
    assert manifest.skipped == {"another type": 6}
    shards = [len(split.shards) for split in manifest.splits.values()]
    assert min(shards) > 1
    for after in range(1, sum(shards) + 1):
        killed_after_record(after, argv)
        assert build.main(argv) == 0
        assert stored(tmp_path / "set") == stored(tmp_path / "reference")
        remove(tmp_path / "set")


def test_workers_make_no_difference_and_go_with_a_killed_build(tmp_path):
    films = write_films(tmp_path / "films", 70)
    argv = command(tmp_path, "xray", films, "--shard-mb", 0.05)
    assert build.main([*argv, "--out", str(tmp_path / "reference")]) == 0

    def run():
        record = Journal.record

        def die(journal, split, finished):
            record(journal, split, finished)
            if len(journal.finished[split]) == 2:
                workers = psutil.Process().children()
                (tmp_path / "workers").write_text(" ".join(str(one.pid) for one in workers))
                os.kill(os.getpid(), signal.SIGKILL)

        Journal.record = die
        build.main([*argv, "--workers", "2"])

    assert not in_child(run)
    assert num_finished(tmp_path) > 1
    workers = [int(pid) for pid in (tmp_path / "workers").read_text().split()]
    assert len(workers) >= 2
    until = time.monotonic() + 30
    while any(map(psutil.pid_exists, workers)) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(map(psutil.pid_exists, workers)), "a killed build left its workers behind"
    assert build.main([*argv, "--workers", "2"]) == 0
    assert stored(tmp_path / "set") == stored(tmp_path / "reference")


def changed_film(films):
    Image.fromarray(grey_film(99)).save(films / "film_003.jpg", quality=95)


def new_film(films):
    Image.fromarray(grey_film(99)).save(films / "film_999.jpg", quality=95)


def other_label(films):
    rows = (films / "labels.csv").read_text()
    (films / "labels.csv").write_text(rows.replace("film_003.jpg,ill", "film_003.jpg,healthy"))


OTHER = {
    "another key": (None, ["--key-file", "{}/other"], "secret key"),
    "another preset": (None, ["--preset", "base"], "another --preset"),
    "another share": (None, ["--val-fraction", "0.5"], "another --val-fraction"),
    "other shards": (None, ["--shard-mb", "3"], "another --shard-mb"),
    "duplicates": (None, ["--keep-duplicates"], "another --keep-duplicates"),
    "a changed file": (changed_film, [], "sizes or dates of files"),
    "a new file": (new_film, [], "names of files"),
    "another label": (other_label, [], "labels, groups or texts"),
}


@pytest.mark.parametrize("case", OTHER)
def test_another_build_is_refused_until_it_begins_again(tmp_path, capsys, case):
    change, flags, told = OTHER[case]
    films = write_films(tmp_path / "films", 20)
    (tmp_path / "other").write_bytes(b"another key of enough bytes")
    argv = command(tmp_path, "xray", films)
    killed_after_record(2, argv)
    before = stored(tmp_path / ".set.partial")
    if change:
        change(films)
    argv += [flag.format(tmp_path) for flag in flags]
    assert build.main(argv) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and told in message and "--fresh" in message, message
    assert stored(tmp_path / ".set.partial") == before, "a refusal costs nothing"
    assert build.main([*argv, "--fresh"]) == 0
    assert "stopped run" not in capsys.readouterr().out
    assert build.main([*argv, "--out", str(tmp_path / "reference")]) == 0
    assert stored(tmp_path / "set") == stored(tmp_path / "reference")


def test_another_version_is_refused(tmp_path, capsys):
    argv = command(tmp_path, "xray", write_films(tmp_path / "films", 20))
    killed_after_record(2, argv)
    file = tmp_path / ".set.partial" / "head.json"
    file.write_text(re.sub(r'"Pillow": "[^"]*"', '"Pillow": "1.0"', file.read_text()))
    assert build.main(argv) == 2
    assert "other versions (Pillow 1.0, now " in capsys.readouterr().err


def test_more_workers_and_another_share_of_broken_files_may_go_on(tmp_path, capsys):
    argv = command(tmp_path, "xray", write_films(tmp_path / "films", 20))
    killed_after_record(2, argv)
    (tmp_path / ".set.partial" / "set" / "train" / "000099.tar").touch()
    assert build.main([*argv, "--workers", "3", "--max-broken", "0.5"]) == 0
    assert "from a stopped run" in capsys.readouterr().out
    assert not (tmp_path / "set" / "train" / "000099.tar").exists()


def test_a_finished_shard_that_was_damaged_is_met(tmp_path, capsys):
    argv = command(tmp_path, "xray", write_films(tmp_path / "films", 20))
    killed_after_record(2, argv)
    shard = next((tmp_path / ".set.partial" / "set").rglob("000000.tar"))
    shard.write_bytes(shard.read_bytes()[:-1024])
    assert build.main(argv) == 2
    assert "damaged" in capsys.readouterr().err
    assert build.main([*argv, "--fresh"]) == 0


def test_a_name_stored_before_the_stop_is_known(tmp_path):
    told, shape = Head(key="", tools={}, options={}, contents={}), (8, 64, 64)
    known = {"source": "", "preset": "sample", "classes": (), "recipe": {}, "key": b"", "shard_bytes": 40_000}
    noise = np.random.default_rng(0).integers(-1000, 1000, shape).astype(np.int16)
    for stopped in (True, False):
        with pytest.raises(KeyboardInterrupt if stopped else DataError), Journal(tmp_path / "set") as journal:
            journal.open(told)
            with ShardSetWriter(
                tmp_path / "set",
                modality=MODALITIES["ct"],
                shape=shape,
                spacing_mm=None,
                journal=journal,
                **known,
            ) as writer:
                assert writer.samples == (not stopped)
                writer.add("train", Sample(array=noise, source="one"))
                writer.add("train", Sample(array=noise, source="two"))
                raise KeyboardInterrupt


def test_a_second_build_of_the_same_set_is_refused(tmp_path, capsys):
    argv = command(tmp_path, "xray", write_films(tmp_path / "films", 20))
    killed_after_record(2, argv)
    with (tmp_path / ".set.partial" / "lock").open("r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for flags in ([], ["--fresh"]):
            assert build.main([*argv, *flags]) == 2
            assert "another build is writing" in capsys.readouterr().err
    assert build.main(argv) == 0


def terminated():
    os.kill(os.getpid(), signal.SIGTERM)


def disk_full():
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(("trouble", "code"), [(terminated, 130), (disk_full, 75)])
def test_what_a_stopped_build_says(tmp_path, monkeypatch, capsys, trouble, code):
    argv = command(tmp_path, "xray", write_films(tmp_path / "films", 20))
    assert build.main([*argv, "--out", str(tmp_path / "reference")]) == 0
    capsys.readouterr()
    record, records = Journal.record, itertools.count(1)

    def stop(*args):
        if next(records) == 3:
            trouble()
        record(*args)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "record", stop)
        assert build.main(argv) == code
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert re.search("2 finished shards with [0-9]+ samples are kept .* the same command goes on", message)
    assert build.main(argv) == 0
    assert stored(tmp_path / "set") == stored(tmp_path / "reference")


def test_interrupted_when_all_is_done(tmp_path, monkeypatch, capsys):
    argv = command(tmp_path, "xray", write_films(tmp_path / "films", 20))
    close = ShardSetWriter.close

    def interrupted(writer):
        close(writer)
        raise KeyboardInterrupt

    monkeypatch.setattr(ShardSetWriter, "close", interrupted)
    assert build.main(argv) == 130
    assert f"the set {tmp_path / 'set'} is finished" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["films", "key", "set"]


def test_a_file_system_without_locks(tmp_path, monkeypatch, capsys):
    def refused(*args):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refused)
    assert build.main(command(tmp_path, "xray", write_films(tmp_path / "films", 4))) == 0
    assert "knows no locks" in capsys.readouterr().out


def test_too_many_broken_files_keep_what_is_finished(tmp_path, monkeypatch, capsys):
    films = write_films(tmp_path / "films", 40)
    argv = command(tmp_path, "xray", films)
    read, reads = prepare.read_unit, itertools.count()

    def hiccup(unit, *rest):
        if next(reads) >= 30:
            raise_broken = films / "gone.jpg"
            unit = type(unit)(name=unit.name, reader=unit.reader, files=(raise_broken,))
        return read(unit, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(prepare, "read_unit", hiccup)
        assert build.main(argv) == 2
    message = capsys.readouterr().err
    assert "--max-broken" in message and "finished shards" in message
    assert build.main(argv) == 0
    printed = capsys.readouterr().out
    assert "stopped run" in printed
    assert sum(split.samples for split in load_manifest(tmp_path / "set").splits.values()) >= 38


def test_nothing_that_is_kept_names_the_source(tmp_path):
    secret = "Quodlibetia"
    films = write_films(tmp_path / secret / "films", 24)
    for path in sorted(films.glob("*.jpg")):
        path.rename(films / f"{secret}_{path.name}")
    table = (films / "labels.csv").read_text()
    (films / "labels.csv").write_text(table.replace("film_", f"{secret}_film_").replace("patient", secret))
    (films / f"{secret}_film_003.jpg").write_bytes(b"rubbish")
    argv = command(tmp_path, "xray", films, "--text-column", secret)
    killed_after_record(4, argv)
    kept = stored(tmp_path / ".set.partial")
    assert len(kept) > 8
    digests = [hashed_name(b"", secret), secret]
    for name, content in kept.items():
        assert not any(word.lower().encode() in content.lower() for word in digests), name
        assert secret.lower() not in name.lower()
        assert (tmp_path / "key").read_bytes() not in content


def test_copies_are_dropped_across_the_splits(tmp_path, capsys):
    films = write_films(tmp_path / "films", 24)
    for number in range(12):
        (films / f"film_{number + 12:03d}.jpg").write_bytes((films / f"film_{number:03d}.jpg").read_bytes())
    flags = ("--val-fraction", "0.5")
    assert build.main(command(tmp_path, "xray", films, *flags)) == 0
    assert "left out  12: duplicate" in capsys.readouterr().out
    sets = [ShardSet(tmp_path / "set", split) for split in ("train", "val")]
    payloads = [shards.payload(place) for shards in sets for place in range(len(shards))]
    assert len(payloads) == len(set(payloads)) == 12
    assert all(len(shards) > 2 for shards in sets)
    assert sets[0].manifest.skipped == {"duplicate": 12}
    assert build.main(command(tmp_path, "xray", films, *flags, "--keep-duplicates", out="all")) == 0
    manifest = load_manifest(tmp_path / "all")
    assert sum(split.samples for split in manifest.splits.values()) == 24 and not manifest.skipped


def test_texts_are_copies_where_the_words_are_the_same(tmp_path):
    rows = [("No  effusion.", "a"), ("No effusion.", "b"), ("no effusion.", "c")]
    source = write_csv(tmp_path / "r.csv", ["text", "group"], rows)
    assert build.main(command(tmp_path, "report", source, "--rare-words", 0)) == 0
    assert load_manifest(tmp_path / "set").skipped == {"duplicate": 1}


def test_an_unfinished_build_without_a_finished_shard_is_begun_again(tmp_path, capsys):
    argv = command(tmp_path, "xray", write_films(tmp_path / "films", 20))
    assert killed_before_change(12, argv)
    assert (tmp_path / ".set.partial" / "head.json").exists() and not num_finished(tmp_path)
    assert build.main([*argv, "--preset", "base"]) == 0
    assert "stopped run" not in capsys.readouterr().out


def test_a_broken_unit_keeps_its_place_and_its_reason(tmp_path, capsys):
    films = write_films(tmp_path / "films", 30)
    (films / "film_011.jpg").write_bytes(b"rubbish")
    argv = command(tmp_path, "xray", films)
    assert build.main([*argv, "--out", str(tmp_path / "reference")]) == 0
    first = re.findall("broken  film_011.jpg: .*", capsys.readouterr().out)
    shards = len(list((tmp_path / "reference").rglob("*.tar")))
    killed_after_record(shards, argv)
    assert build.main(argv) == 0
    assert re.findall("broken  film_011.jpg: .*", capsys.readouterr().out) == first != []
    assert stored(tmp_path / "set") == stored(tmp_path / "reference")
    assert build_fill.num_allowed_broken(30, 0.01) == 1
