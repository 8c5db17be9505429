"""A run's folder: written once, contradicted never, replaced whole, nothing deleted."""

import json
from pathlib import Path
from typing import Any

import pytest

from mnemos.engine.run_directory import CONFIG, LEDGER, RunDirectory, write_atomically
from mnemos.engine.settings import FREE, resolve
from mnemos.sharding.errors import UserError

BATCH_64 = {"training.batch": 64, "rehearsal.weight": 2.0}


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    run = RunDirectory(tmp_path / "runs" / "mine")
    run.create(resolve("sample", BATCH_64))
    return run


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_settings_are_written_once(run: RunDirectory) -> None:
    assert run.exists
    before = contents(run.path)
    run.create(resolve("sample", {"training.batch": 8}))
    assert contents(run.path) == before
    assert list(before) == [CONFIG], "no partial file is left"
    assert run.settings(None, {}) == resolve("sample", BATCH_64)
    assert run.settings("sample", {"training.batch": 64}) == resolve("sample", BATCH_64)


@pytest.mark.parametrize(
    ("preset", "overrides", "words"),
    [
        (None, {"training.batch": 32}, ["training.batch is 64 there and 32 in this call"]),
        ("sample", {"training.seed": 1}, ["training.seed is 0 there and 1"]),
        ("base", {}, ["preset is 'sample' there and 'base'", "more)"]),
        (None, {"curriculum.stages": ["xray", "ct"]}, ["curriculum.stages"]),
    ],
    ids=["batch", "seed", "preset", "stages"],
)
def test_a_call_that_contradicts_the_run_is_refused(
    run: RunDirectory, preset: str | None, overrides: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(UserError) as caught:
        run.settings(preset, overrides)
    assert all(word in str(caught.value) for word in [*words, str(run.path), "--run", "--fresh"])


def test_a_misspelt_key_is_not_a_contradiction(run: RunDirectory) -> None:
    with pytest.raises(UserError, match="did you mean"):
        run.settings(None, {"training.bach": 64})


def test_where_and_how_fast_may_change_from_call_to_call(run: RunDirectory) -> None:
    free = {"training.micro_batch": 4, "parallel.zero": 2, "training.log_every": 1}
    assert set(free) <= FREE
    assert run.settings(None, free) == resolve("sample", {**BATCH_64, **free})
    assert run.settings(None, {}) == resolve("sample", BATCH_64), "of one call only"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"preset: [",
        b"\xff\xfe",
        b"- 1\n",
        b"training: {batch: 64}\n",
        b"preset: nope\n",
        b"preset: sample\nx: 1\n",
    ],
    ids=["empty", "torn", "binary", "list", "no preset", "unknown preset", "unknown key"],
)
def test_damaged_settings_are_named(run: RunDirectory, content: bytes) -> None:
    (run.path / CONFIG).write_bytes(content)
    with pytest.raises(UserError, match="is damaged") as caught:
        run.settings(None, {})
    assert str(run.path / CONFIG) in str(caught.value) and "--fresh" in str(caught.value)
    assert "--config" not in str(caught.value), "nobody gave that flag"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b'{"stages": [',
        b"\xff\xfe\x00",
        b"[]",
        b"{}",
        b'{"stages": 3}',
        b'{"stages": [3]}',
        b'{"stages": [{"name": "ct"}]}',
        b'{"stages": [{"name": "ct", "status": "almost"}]}',
        b'{"stages": [{"name": 3, "status": "pending"}]}',
    ],
)
def test_a_damaged_ledger_is_named(run: RunDirectory, content: bytes) -> None:
    (run.path / LEDGER).write_bytes(content)
    with pytest.raises(UserError, match="is damaged") as caught:
        run.ledger()
    assert str(run.path / LEDGER) in str(caught.value) and "--fresh" in str(caught.value)


def test_the_ledger_keeps_what_was_recorded(run: RunDirectory, tmp_path: Path) -> None:
    assert run.ledger() == {"run": "mine", "stages": []}
    run.set_stages(["report", "xray"], tmp_path)
    run.record("report", status="training", data="abc")
    run.record("report", status="complete", steps=7)
    run.set_stages(["report", "xray", "ct"], tmp_path / "elsewhere")
    ledger = json.loads((run.path / LEDGER).read_text())
    assert ledger["data"] == str(tmp_path / "elsewhere")
    assert ledger["stages"] == [
        {"name": "report", "modality": "report", "status": "complete", "data": "abc", "steps": 7},
        {"name": "xray", "modality": "xray", "status": "pending"},
        {"name": "ct", "modality": "ct", "status": "pending"},
    ]


def test_files_are_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "ledger.json"
    write_atomically(file, "old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(file, "new")
    assert file.read_text() == "old"


def test_an_old_run_is_moved_and_nothing_is_deleted(run: RunDirectory) -> None:
    first = contents(run.path)
    aside = run.move_aside()
    assert aside == run.path.with_name("mine.old-1") and not run.path.exists()
    assert contents(aside) == first
    run.create(resolve("base", {}))
    second = contents(run.path)
    again = run.move_aside()
    assert again == run.path.with_name("mine.old-2")
    assert (contents(aside), contents(again)) == (first, second)
    assert run.move_aside() is None


def test_a_folder_of_other_things_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "letters").mkdir()
    RunDirectory(tmp_path / "letters").check()  # empty: may become one
    RunDirectory(tmp_path / "nothing").check()
    (tmp_path / "letters" / "to_mother.txt").touch()
    with pytest.raises(UserError, match=r"to_mother\.txt") as caught:
        RunDirectory(tmp_path / "letters").check()
    assert "no run" in str(caught.value) and "empty folder" in str(caught.value)
    with pytest.raises(UserError, match="is a file"):
        RunDirectory(tmp_path / "letters" / "to_mother.txt").check()


def test_a_run_that_died_before_its_first_file_is_begun_again(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    run.path.mkdir()
    (run.path / (CONFIG + ".partial")).write_text("pres")
    run.check()
    run.create(resolve("sample", {}))
    assert run.settings(None, {}) == resolve("sample", {})


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="nothing can be written in"):
        RunDirectory(tmp_path / "file" / "run").check()
    with pytest.raises(UserError, match="cannot be made") as caught:
        RunDirectory(tmp_path / "file" / "run").create(resolve("sample", {}))
    assert "--run" in str(caught.value)
