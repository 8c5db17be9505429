"""No identifier of the originals is in shards, manifests, logs, metrics, checkpoints, pictures or exported weights.

Hundreds of canaries are planted in names, headers, tags and texts; the real commands build sets of all modalities and
train on them; then every byte of what they left is searched, containers opened, pictures and volumes decoded.
"""

import os
import re
import secrets
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from canaries import Canaries, plant_films, plant_reports, plant_scans, plant_slides
from canary_search import contents, search, vocabulary
from PIL import Image
from tiny_data import TINY

from mnemos.engine.metrics_log import read_metrics
from mnemos.engine.run_directory import RunDirectory
from mnemos.sharding import build as build_command
from mnemos.sharding import show, verify
from mnemos.sharding.building.journal import Journal
from mnemos.sharding.errors import UserError
from mnemos.sharding.keys import hashed_name, key_check, open_key
from mnemos.sharding.manifest import load_manifest
from mnemos.sharding.modalities import DEFAULT_ORDER, MODALITIES

TRAIN = Path(__file__).resolve().parents[1] / "engine" / "train.py"
LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in LAUNCHED} | {
    "OMP_NUM_THREADS": "1"
}
PLANT = {
    "report": plant_reports,
    "xray": plant_films,
    "ct": lambda folder, canaries: plant_scans(folder, canaries, "CT"),
    "mri": lambda folder, canaries: plant_scans(folder, canaries, "MR"),
    "pathology": plant_slides,
}
SOURCE = {"pathology": ("--source", "tcga")}
STAGES = [DEFAULT_ORDER[0], DEFAULT_ORDER[1], DEFAULT_ORDER[2]]  # one of texts, of images and of volumes
LONGEST_PIECE = 4  # letters of a canary that an honest vocabulary may hold in a row by chance


@dataclass(frozen=True, kw_only=True)
class Place:
    """What was planted and what was made of it: `inputs`, `sets` and what the commands printed, in `folder`."""

    folder: Path
    canaries: Canaries
    inputs: dict[str, Path]
    printed: dict[str, bytes]

    @property
    def key_file(self) -> Path:
        """Where the builds' key lies."""
        return self.folder / "keys" / "key"

    @property
    def key(self) -> bytes:
        """The builds' key."""
        return self.key_file.read_bytes().strip()


def build(
    place: Path, modality: str, source: Path, *flags: object, out: str = ""
) -> subprocess.CompletedProcess[bytes]:
    """Build a set with the real command."""
    command = [
        sys.executable,
        "-m",
        "mnemos.sharding.build",
        modality,
        source,
        "--out",
        place / "sets" / (out or modality),
    ]
    command += ["--key-file", place / "keys" / "key", "--workers", 1, "--val-fraction", 0.25, *flags]
    words = [str(word) for word in command]
    return subprocess.run(words, check=False, capture_output=True, env=ENVIRONMENT, cwd=place, timeout=120)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Plant the canaries and build a set of every modality."""
    folder, canaries = tmp_path_factory.mktemp("privacy"), Canaries(seed=4)
    inputs = {name: PLANT[name](folder / "inputs" / name, canaries) for name in MODALITIES}
    with ThreadPoolExecutor(2) as pool:
        builds = {
            name: pool.submit(build, folder, name, inputs[name], *SOURCE.get(name, ())) for name in MODALITIES
        }
    done = {name: future.result() for name, future in builds.items()}
    for one in done.values():
        assert one.returncode == 0, one.stderr.decode()
    printed = {name: one.stdout + one.stderr for name, one in done.items()}
    return Place(folder=folder, canaries=canaries, inputs=inputs, printed=printed)


@pytest.fixture(scope="module")
def run(place: Place) -> Path:
    """Train on the sets, stop in the last stage, so that a checkpoint lies there beside finished stages."""
    flags = [part for text in [*TINY, f"curriculum.stages=[{','.join(STAGES)}]"] for part in ("--set", text)]
    flags += ["--stage", STAGES[-1], "--data", str(place.folder / "sets"), "--run", str(place.folder / "run")]
    stage = RunDirectory(place.folder / "run").stage(len(STAGES), STAGES[-1])
    endless = ["--set", "training.steps=120"]
    command = [sys.executable, str(TRAIN), *flags]
    with (place.folder / "train.log").open("wb") as log:
        options = {"env": ENVIRONMENT, "cwd": place.folder, "stdout": log, "stderr": subprocess.STDOUT}
        with subprocess.Popen([*command, *endless], **options) as process:
            try:
                deadline = time.monotonic() + 120
                while len(read_metrics(stage)) < 3:
                    assert process.poll() is None and time.monotonic() < deadline, log.name
                    time.sleep(0.01)
                process.send_signal(signal.SIGTERM)
                assert process.wait(60) == 75
            finally:
                process.kill()  # of no effect on one that has ended
    return place.folder / "run"


def assert_clean(place: Place, haystacks: Iterable[tuple[str, bytes]], *, check: bool = True) -> None:
    """Check that no canary is found, and not the key either, nor (`check`) what it is known by."""
    keys = [place.key.decode(), *([key_check(place.key)] if check else [])]
    found = search([*place.canaries.planted, *keys], haystacks)
    assert not found, {
        place.canaries.planted.get(canary, "the key"): where for canary, where in found.items()
    }


def test_every_canary_was_planted(place: Place) -> None:
    planted = place.canaries.planted
    assert len(planted) > 400
    found = search(planted, contents(place.folder / "inputs"))
    assert planted.keys() == found.keys(), {planted[canary] for canary in planted.keys() - found.keys()}


def test_shards_and_manifests_hold_none(place: Place) -> None:
    sets = place.folder / "sets"
    assert sorted(path.name for path in sets.iterdir()) == sorted(MODALITIES), (
        "nothing is left beside the sets"
    )
    assert_clean(place, contents(sets))


def test_what_a_build_prints_holds_none(place: Place) -> None:
    for name, printed in place.printed.items():
        assert b"samples" in printed
        assert_clean(place, [(name, printed.replace(os.fsencode(place.folder), b""))])


def test_a_vocabulary_holds_no_piece_of_a_canary(place: Place) -> None:
    words = {
        word.strip().lower()
        for word in vocabulary(place.folder / "sets" / DEFAULT_ORDER[0] / "tokenizer.json")
    }
    assert {"heart", "effusion", "pneumothorax"} <= words
    told = " ".join(place.canaries.planted).lower()
    assert not [word for word in words if len(word) > LONGEST_PIECE and word in told]


def test_screenshots_are_left_out(place: Place) -> None:
    skipped = load_manifest(place.folder / "sets" / DEFAULT_ORDER[1]).skipped
    assert sum(skipped.values()) == 2 and any("burned" in reason for reason in skipped)
    assert any("secondary capture" in reason for reason in skipped)


def test_a_run_holds_none(place: Place, run: Path) -> None:
    names = {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}
    for needed in (
        r"ledger\.json", r"config\.yaml", r".*/encoder\.safetensors", r".*/encoder\.json", r".*/metrics\.jsonl",
        r".*/tensorboard/events.*", r".*/reconstructions/.*\.png", r".*/buffer/manifest\.json", r".*/checkpoints/.*",
        r".*/checkpoints/.*\.pt",
    ):  # fmt: skip
        assert any(re.fullmatch(needed, name) for name in names), (needed, sorted(names))
    assert_clean(place, contents(run))


def test_what_training_prints_holds_none(place: Place, run: Path) -> None:
    log = (place.folder / "train.log").read_bytes()
    assert b"start the same command again" in log
    assert_clean(place, [("train.log", log)])


def test_the_search_finds_what_is_there(place: Place, tmp_path: Path) -> None:
    """The control: texts stored as they are, and the tokenizer trained on them, hold every canary of the texts."""
    flags = ("--scrubber", "none", "--rare-words", 0, "--key-file", tmp_path / "key")
    done = build(tmp_path, DEFAULT_ORDER[0], place.inputs[DEFAULT_ORDER[0]], *flags)
    assert done.returncode == 0, done.stderr
    planted = {canary for canary, where in place.canaries.planted.items() if "in a report" in where}
    found = search(planted, contents(tmp_path / "sets"))
    assert found.keys() == planted and len(planted) >= 12
    where = " ".join(name for names in found.values() for name in names)
    assert ".txt" in where and ".ids decoded" in where and "vocabulary" in where


def test_a_broken_file_is_named_on_the_screen_alone(place: Place, tmp_path: Path) -> None:
    secret, films = "Quodlibetia", tmp_path / "films"
    films.mkdir()
    for path in sorted(place.inputs[DEFAULT_ORDER[1]].glob("*.jpg")):
        with Image.open(path) as picture:
            picture.save(films / path.name)
    (films / "one_more.png").write_bytes(b"")
    (films / f"{secret}.jpg").write_bytes(b"no picture")
    done = build(tmp_path, DEFAULT_ORDER[1], films, "--max-broken", 0.5)
    assert done.returncode == 0 and secret.encode() in done.stdout, done.stderr
    assert not search([secret], contents(tmp_path / "sets"))


def test_what_looks_at_a_set_shows_none(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in MODALITIES:
        folder = str(place.folder / "sets" / name)
        assert show.main([folder, "--out", str(tmp_path / f"{name}.png")]) == 0
        assert verify.main([folder]) == 0
    printed = capsys.readouterr().out.replace(str(place.folder), "").encode()
    assert len(list(tmp_path.glob("*.png"))) == len(MODALITIES) and printed
    assert_clean(place, [("the screen", printed), *contents(tmp_path)])


def test_an_unfinished_build_holds_none(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = Journal.record

    def stopped(*given: Any) -> None:
        record(*given)
        raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "record", stopped)
    name = DEFAULT_ORDER[0]
    argv = [name, str(place.inputs[name]), "--out", str(tmp_path / "set"), "--shard-mb", "0.02"]
    assert build_command.main([*argv, "--key-file", str(place.key_file)]) == 130
    names = {path.name for path in tmp_path.rglob("*")}
    assert {".set.partial", "head.json", "000000.tar", "tokenizer.json"} <= names
    assert_clean(place, contents(tmp_path), check=False)
    assert key_check(place.key) in (tmp_path / ".set.partial" / "head.json").read_text()
    monkeypatch.undo()
    assert build_command.main([*argv, "--key-file", str(tmp_path / "another")]) == 2, "another key"
    assert build_command.main([*argv, "--key-file", str(place.key_file)]) == 0


# The key


def test_a_key_is_made_once_closed_to_others(tmp_path: Path) -> None:
    file = tmp_path / "new" / "folder" / "key"
    made = open_key(file)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600 and [path.name for path in file.parent.iterdir()] == [
        "key"
    ]
    assert re.fullmatch(rb"[0-9a-f]{64}", made.key) and made.key == file.read_bytes().strip()
    (note,) = made.notes
    assert str(file) in note and "a new secret key" in note
    assert made.key.decode() not in note + repr(made) + str(made)
    again = open_key(file)
    assert again.key == made.key and again.notes == ()
    assert open_key(tmp_path / "other").key != made.key


def test_of_two_builds_that_make_a_key_the_first_one_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, random_hex = tmp_path / "key", secrets.token_hex

    def meanwhile(num_bytes: int) -> str:
        if not file.exists():
            file.write_text("the key of another build")
            file.chmod(0o600)
        return random_hex(num_bytes)

    monkeypatch.setattr(secrets, "token_hex", meanwhile)
    opened = open_key(file)
    assert opened.key == b"the key of another build" and opened.notes == ()
    assert [path.name for path in tmp_path.iterdir()] == ["key"]


def test_a_key_open_to_others_is_noted(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text("sixteen bytes or more")
    for mode, notes in ((0o640, 1), (0o604, 1), (0o600, 0), (0o400, 0)):
        file.chmod(mode)
        opened = open_key(file)
        assert opened.key == b"sixteen bytes or more" and len(opened.notes) == notes
        assert all("chmod 600" in note and f"{mode:o}" in note for note in opened.notes)


@pytest.mark.parametrize("content", [b"", b"too short", b" " * 40])
def test_a_key_too_short_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "key").write_bytes(content)
    with pytest.raises(UserError, match="at least 16"):
        open_key(tmp_path / "key")


def test_no_key_lies_in_a_set(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "set")
    for file in (tmp_path / "set" / "key", tmp_path / "set" / "deeper" / "key", tmp_path / "link" / "key"):
        with pytest.raises(UserError, match="inside the shard set"):
            open_key(file, tmp_path / "set")
    assert not (tmp_path / "set").exists()
    assert open_key(tmp_path / "set.key", tmp_path / "set").key


def test_a_key_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for file in (tmp_path / "file" / "key", tmp_path):
        with pytest.raises(UserError, match="--key-file"):
            open_key(file)


def test_names_of_any_bytes_are_hashed() -> None:
    key = b"a key for tests, sixteen bytes or more"
    names = ["a", "A", "ä", os.fsdecode(b"\xff"), "", key_check(key)]
    hashes = {hashed_name(key, name) for name in names}
    assert len(hashes) == len(names) and all(re.fullmatch("[0-9a-f]{16}", found) for found in hashes)
    assert hashed_name(b"another key of sixteen bytes", "a") not in hashes
    assert len(key_check(key)) == 64 and key_check(key) != key_check(key + b"!")
