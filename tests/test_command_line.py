"""engine/train.py as users call it: whole runs, and every mistake as one sentence with exit code 2."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from launching import deepspeed_command
from PIL import Image
from tiny_data import TINY, tiny_settings

from mnemos.engine.metrics_log import read_metrics
from mnemos.engine.rehearsal.budget import set_bytes
from mnemos.engine.run_directory import RunDirectory, write_atomically
from mnemos.engine.settings import as_flat
from mnemos.sharding.manifest import load_manifest
from mnemos.sharding.modalities import DEFAULT_ORDER
from mnemos.sharding.reader import ShardSet
from mnemos.sharding.upkeep.verify_set import verify_set

TRAIN = Path(__file__).resolve().parents[1] / "engine" / "train.py"
PYTHON = [sys.executable, str(TRAIN)]
LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in LAUNCHED} | {
    "OMP_NUM_THREADS": "1"
}
LAST = DEFAULT_ORDER[1]  # two stages: one of texts, one of images that rehearses it
SMALL = [part for text in [*TINY, "training.steps=60", "training.log_every=1"] for part in ("--set", text)]
BOUND = 1e-5  # between one and two ranks, see tests/test_zero.py


def call(
    launcher: list[str], *arguments: object, cwd: Path, expect: int = 0
) -> subprocess.CompletedProcess[str]:
    """Run the command and check its exit code."""
    command = [*launcher, *(str(argument) for argument in arguments)]
    done = subprocess.run(
        command, check=False, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == expect, done.stdout[-3000:] + done.stderr[-3000:]
    assert "Traceback" not in done.stdout + done.stderr
    return done


def errors(done: subprocess.CompletedProcess[str]) -> list[str]:
    """Return the sentences that were printed as errors."""
    return [line for line in done.stderr.splitlines() if line.startswith("error:")]


def losses(run: Path) -> dict[str, list[tuple[int, str, str, str]]]:
    """Return (step, modality, phase, exact loss) of every update, by stage folder."""
    keys = ("step", "modality", "phase", "loss_hex")
    return {
        stage.name: [tuple(line[key] for key in keys) for line in read_metrics(stage)]
        for stage in sorted((run / "stages").iterdir())
    }


def listing(*folders: Path) -> dict[str, int]:
    """Return every path below the folders with its time of change."""
    return {str(path): path.stat().st_mtime_ns for folder in folders for path in folder.rglob("*")}


# Whole runs


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def one_rank(place: Path, tiny_sets: Path) -> Path:
    """Return a run of two stages by plain python."""
    call(PYTHON, "--stage", LAST, "--data", tiny_sets, "--run", "one", *SMALL, cwd=place)
    return place / "one"


@pytest.fixture(scope="module")
def two_ranks(place: Path, tiny_sets: Path) -> tuple[Path, str]:
    """Return the same run by two ranks under ZeRO-2, and what was printed."""
    zero = ("--set", "parallel.zero=2")
    done = call(
        deepspeed_command(TRAIN, ranks=2),
        "--stage",
        LAST,
        "--data",
        tiny_sets,
        "--run",
        "two",
        *SMALL,
        *zero,
        cwd=place,
    )
    return place / "two", done.stdout


@pytest.fixture
def finished(one_rank: Path, tmp_path: Path) -> Path:
    """Return a copy of the finished run, to be spoiled."""
    return shutil.copytree(one_rank, tmp_path / "run")


def test_a_run_leaves_what_it_promises(two_ranks: tuple[Path, str], tiny_sets: Path) -> None:
    run, printed = two_ranks
    config = yaml.safe_load((run / "config.yaml").read_text())
    expected = tiny_settings(training__steps=60, training__log_every=1, parallel__zero=2)
    assert config == expected.model_dump(mode="json")
    ledger = json.loads((run / "ledger.json").read_text())
    assert [(entry["name"], entry["status"]) for entry in ledger["stages"]] == [
        (name, "complete" if name in DEFAULT_ORDER[:2] else "pending") for name in DEFAULT_ORDER
    ]
    text, images = ledger["stages"][:2]
    assert text["steps"] == text["pretext_steps"] == images["pretext_steps"] == 60
    assert images["steps"] >= 60 / 0.9, "every earlier modality has a tenth of the updates"
    assert (text["zero"], text["ranks"], text["samples"]) == (2, 2, 32)
    assert (text["buffer"], text["clusters"], text["strategy"]) == (3, 1, "kmeans"), "a tenth of 32 samples"
    assert text["buffer_bytes"] == set_bytes(run / "stages" / f"01-{text['name']}" / "buffer")
    assert text["data"] == load_manifest(tiny_sets / text["name"]).fingerprint
    assert {"loss", "unigram", "bigram", "ratio"} <= text["validation"].keys()
    assert {"loss", "constant", "ratio"} <= images["validation"].keys()
    assert images["drift"].keys() == {text["name"]} and images["drift"][text["name"]] > 0
    assert not list(run.rglob("*.partial")) and not list(run.rglob("checkpoints"))
    table = printed[printed.index("val loss") :]
    assert table.count("complete") == 2 and table.count("pending") == 3
    assert printed.index("encoder blocks") < printed.index("val loss"), "the plan comes first"


def test_a_stage_leaves_encoder_pictures_metrics_and_a_buffer(
    two_ranks: tuple[Path, str], tiny_sets: Path
) -> None:
    from mnemos.engine.weights import load_encoder

    run, _ = two_ranks
    for number, name in enumerate(DEFAULT_ORDER[:2], start=1):
        stage = RunDirectory(run).stage(number, name)
        encoder = load_encoder(stage)
        assert encoder.modalities == list(DEFAULT_ORDER[:number])
        assert encoder.features(DEFAULT_ORDER[0], "no effusion").isfinite().all()
        with Image.open(stage / "reconstructions" / f"{name}.png") as picture:
            assert min(picture.size) > 100 and len(picture.convert("L").getcolors()) > 3
        assert list((stage / "tensorboard").glob("events*"))
        buffer, source = ShardSet(stage / "buffer", "train"), ShardSet(tiny_sets / name, "train")
        assert len(buffer) == 3 and set(buffer.index["key"]) <= set(source.index["key"])
        place = {key: number for number, key in enumerate(source.index["key"].tolist())}
        for row, key in enumerate(buffer.index["key"].tolist()):
            assert buffer.payload(row) == source.payload(place[key]), "bytes as they were"
            assert buffer.text(row) == source.text(place[key])
        assert {"cluster", "distance", "embedding"} <= buffer.index.keys()
        assert buffer.index["embedding"].shape == (3, 32)
        facts = buffer.manifest.facts
        assert (facts["strategy"], facts["budget"], facts["samples"]) == ("kmeans", 3, 32)
        assert facts["set"] == source.manifest.fingerprint and facts["backend"] == "faiss"
        assert verify_set(stage / "buffer", workers=1).sound
        assert not (stage / "embedding").exists(), "nobody asked to keep it"


def test_metrics_hold_every_update(two_ranks: tuple[Path, str]) -> None:
    stage = RunDirectory(two_ranks[0]).stage(2, LAST)
    lines = read_metrics(stage)
    updates = [line for line in lines if line["phase"] != "validation"]
    assert [line["step"] for line in updates] == list(range(1, len(updates) + 1))
    assert {(line["modality"], line["phase"]) for line in updates} == {
        (LAST, "pretext"),
        (DEFAULT_ORDER[0], "rehearsal"),
    }
    for line in updates:
        assert list(line) == ["stage", "step", "modality", "phase", "loss", "loss_hex", "lr", "samples_per_s"]
        assert float.fromhex(str(line["loss_hex"])) == line["loss"] and line["stage"] == LAST
        assert float(line["lr"] or 0) > 0 and float(line["samples_per_s"] or 0) > 0
    last = lines[-1]
    assert (last["phase"], last["step"]) == ("validation", len(updates)) and float(
        last["constant"] or 0
    ) > 0.5


def test_one_and_two_ranks_do_the_same(one_rank: Path, two_ranks: tuple[Path, str]) -> None:
    ours, theirs = losses(one_rank), losses(two_ranks[0])
    assert ours.keys() == theirs.keys()
    for stage, lines in ours.items():
        assert [line[:3] for line in lines] == [line[:3] for line in theirs[stage]]
        pairs = [
            (float.fromhex(a[3]), float.fromhex(b[3])) for a, b in zip(lines, theirs[stage], strict=True)
        ]
        assert max(abs(a - b) / abs(a) for a, b in pairs) <= BOUND
        buffers = [ShardSet(run / "stages" / stage / "buffer", "train") for run in (one_rank, two_ranks[0])]
        assert set(buffers[0].index["key"]) == set(buffers[1].index["key"])


def test_a_finished_run_has_nothing_to_do(finished: Path, tiny_sets: Path) -> None:
    before = listing(finished / "stages")
    done = call(deepspeed_command(TRAIN, ranks=None), "--stage", LAST, "--run", finished, cwd=finished.parent)
    assert "nothing to do" in done.stdout and done.stdout.count("complete") >= 4
    assert listing(finished / "stages") == before


def test_a_moved_run_goes_on_without_the_data_of_its_stages(
    finished: Path, tiny_sets: Path, tmp_path: Path
) -> None:
    moved, third = tmp_path / "elsewhere" / "mine", DEFAULT_ORDER[2]
    moved.parent.mkdir()
    finished.rename(moved)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / third).symlink_to(tiny_sets / third)
    buffers = [
        moved / "stages" / f"{number:02d}-{name}" / "buffer"
        for number, name in enumerate(DEFAULT_ORDER[:2], 1)
    ]
    before = [buffer_files(buffer) for buffer in buffers]
    done = call(
        PYTHON, "--stage", third, "--data", "data", "--run", moved, "--steps", 8, cwd=tmp_path, expect=2
    )
    assert "training.steps is 60 there and 8" in errors(done)[0]
    call(PYTHON, "--stage", third, "--data", "data", "--run", moved, cwd=tmp_path)
    assert [buffer_files(buffer) for buffer in buffers] == before, "carried on, never chosen anew"
    entry = RunDirectory(moved).ledger()["stages"][2]
    assert (entry["name"], entry["status"], entry["buffer"]) == (third, "complete", 3)
    rehearsed = {
        line["modality"]
        for line in read_metrics(RunDirectory(moved).stage(3, third))
        if line["phase"] == "rehearsal"
    }
    assert rehearsed == set(DEFAULT_ORDER[:2])


def buffer_files(buffer: Path) -> dict[str, bytes]:
    """Return path -> bytes of every file of a buffer."""
    return {str(path.relative_to(buffer)): path.read_bytes() for path in buffer.rglob("*") if path.is_file()}


def test_buffers_share_the_disk_they_may_take(tiny_sets: Path, tmp_path: Path) -> None:
    names = DEFAULT_ORDER[1:3]
    bound = [
        "--set",
        "buffer.budget_gb=0.0003",
        "--set",
        "buffer.percent=100",
        "--set",
        "buffer.strategy=random",
    ]
    flags = ["--stage", names[1], "--data", tiny_sets, "--run", "run", *SMALL, "--steps", 2, *bound]
    flags += ["--set", f"curriculum.stages=[{','.join(names)}]", "--set", "buffer.keep_embeddings=true"]
    call(PYTHON, *flags, cwd=tmp_path)
    stages = [RunDirectory(tmp_path / "run").stage(number, name) for number, name in enumerate(names, 1)]
    sizes = [set_bytes(stage / "buffer") for stage in stages]
    assert sizes[0] <= 150_000 and sizes[1] <= 300_000 - sizes[0] and sum(sizes) > 200_000
    second = ShardSet(stages[1] / "buffer", "train")
    assert second.manifest.facts["most_bytes"] == 300_000 - sizes[0] and 1 <= len(second) < 32
    assert all((stage / "embedding" / "embedding.npy").exists() for stage in stages), "they were to be kept"
    ledger = RunDirectory(tmp_path / "run").ledger()["stages"]
    assert [entry["buffer_bytes"] for entry in ledger] == sizes
    assert [entry["strategy"] for entry in ledger] == ["random"] * 2 and "clusters" not in ledger[0]


def test_a_stopped_run_goes_on_as_if_nothing_had_happened(
    one_rank: Path, tiny_sets: Path, tmp_path: Path
) -> None:
    flags = ["--stage", LAST, "--data", str(tiny_sets), "--run", "run", *SMALL]
    stage = RunDirectory(tmp_path / "run").stage(2, LAST)
    with subprocess.Popen(
        [*deepspeed_command(TRAIN, ranks=1), *flags],
        cwd=tmp_path,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        deadline = time.monotonic() + 120
        while len(read_metrics(stage)) < 5:
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()
            time.sleep(0.002)
        _rank(process.pid).send_signal(signal.SIGTERM)
        _, told = process.communicate(timeout=60)
    assert process.returncode == 75, told
    assert "start the same command again" in told and "Traceback" not in told
    ledger = RunDirectory(tmp_path / "run").ledger()
    assert [entry["status"] for entry in ledger["stages"][:2]] == ["complete", "training"]
    stopped = len(read_metrics(stage))
    assert 5 <= stopped < 60
    file = stage / "checkpoints" / "current.json"
    pointer = json.loads(file.read_text())
    phases = [line["phase"] for line in read_metrics(stage)]
    counts = {LAST: phases.count("pretext") * 8, DEFAULT_ORDER[0]: phases.count("rehearsal") * 8}
    assert pointer["taken"] == counts, "the state of the data is one number a modality"
    write_atomically(file, json.dumps(pointer | {"taken": {**counts, LAST: counts[LAST] + 8}}))
    (error,) = errors(call(PYTHON, *flags, cwd=tmp_path, expect=2))
    assert "samples after" in error and "remove" in error
    write_atomically(file, json.dumps(pointer))
    call(PYTHON, *flags, cwd=tmp_path)
    assert losses(tmp_path / "run") == losses(one_rank), "bit for bit"
    assert not (stage / "checkpoints").exists()
    weights = [
        (run / "stages" / stage.name / "encoder.safetensors").read_bytes()
        for run in (one_rank, tmp_path / "run")
    ]
    assert weights[0] == weights[1]


def test_a_run_stopped_at_its_last_update_is_measured_all_the_same(tiny_sets: Path, tmp_path: Path) -> None:
    stop_at_once = """
import runpy, sys
from mnemos.engine.stopping import StopFlag
enter = StopFlag.__enter__
StopFlag.__enter__ = lambda flag: (enter(flag), setattr(flag, "raised", True))[0]
script, *sys.argv[1:] = sys.argv[1:]
runpy.run_path(script, run_name="__main__")
"""
    flags = ["--stage", LAST, "--data", tiny_sets, "--run", "run", *SMALL]
    flags += ["--steps", 1, "--set", f"curriculum.stages=[{LAST}]"]
    call([sys.executable, "-c", stop_at_once, str(TRAIN)], *flags, cwd=tmp_path, expect=75)
    pointer = tmp_path / "run" / "stages" / f"01-{LAST}" / "checkpoints" / "current.json"
    assert json.loads(pointer.read_text())["step"] == 1
    (error,) = errors(call(PYTHON, *flags, "--set", "parallel.zero=3", cwd=tmp_path, expect=2))
    assert "'zero': 0" in error and "'zero': 3" in error and "as it was begun" in error
    whole = pointer.read_text()
    pointer.write_text(
        json.dumps({key: value for key, value in json.loads(whole).items() if key != "layout"})
    )
    (error,) = errors(call(PYTHON, *flags, cwd=tmp_path, expect=2))
    assert "another version of mnemos" in error and "remove" in error
    pointer.write_text(whole)
    call(PYTHON, *flags, cwd=tmp_path)
    (entry,) = RunDirectory(tmp_path / "run").ledger()["stages"]
    assert entry["status"] == "complete" and entry["validation"]["loss"] > 0


def test_a_damaged_checkpoint_is_named(tiny_sets: Path, tmp_path: Path) -> None:
    flags = [
        "--stage",
        LAST,
        "--data",
        tiny_sets,
        "--run",
        "run",
        *SMALL,
        "--set",
        f"curriculum.stages=[{LAST}]",
    ]
    checkpoints = tmp_path / "run" / "stages" / f"01-{LAST}" / "checkpoints"
    checkpoints.mkdir(parents=True)
    RunDirectory(tmp_path / "run").create(
        tiny_settings(training__steps=60, training__log_every=1, curriculum__stages=[LAST])
    )
    (checkpoints / "current.json").write_text(
        '{"step": 7, "name": "step-00000007", "world_size": 1, "zero": 1, "bf16": false}'
    )
    done = call(PYTHON, *flags, cwd=tmp_path, expect=2)
    (error,) = errors(done)
    assert "current.json is damaged, or the checkpoint it names is gone" in error


def _rank(launcher: int) -> psutil.Process:
    """Return the process that trains below a launcher."""
    family = psutil.Process(launcher).children(recursive=True)
    (found,) = [
        process for process in family if str(TRAIN) in process.cmdline() and "-m" not in process.cmdline()
    ]
    return found


def test_a_dry_run_makes_nothing(tiny_sets: Path, tmp_path: Path) -> None:
    done = call(PYTHON, "--stage", LAST, "--data", tiny_sets, "--dry-run", *SMALL, cwd=tmp_path)
    assert list(tmp_path.iterdir()) == []
    expected = as_flat(tiny_settings(training__steps=60, training__log_every=1))
    assert all(f"{key} = {value}" in done.stdout for key, value in expected.items())
    assert "memory a rank" in done.stdout and "estimates" in done.stdout and "whole model" in done.stdout


def test_a_fresh_run_moves_the_old_one_aside(finished: Path, tiny_sets: Path) -> None:
    before = {path.relative_to(finished): path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    flags = ["--data", tiny_sets, "--run", finished, *SMALL, "--steps", 1, "--seed", 5]
    call(PYTHON, "--stage", DEFAULT_ORDER[0], "--fresh", "--dry-run", *flags, cwd=finished.parent)
    assert [path.name for path in finished.parent.iterdir()] == ["run"]
    done = call(PYTHON, "--stage", DEFAULT_ORDER[0], "--fresh", *flags, cwd=finished.parent)
    aside = finished.with_name("run.old-1")
    assert str(aside) in done.stdout
    assert before == {
        path.relative_to(aside): path.read_bytes() for path in aside.rglob("*") if path.is_file()
    }
    assert RunDirectory(finished).settings(None, {}).training.seed == 5
    assert [entry["status"] for entry in RunDirectory(finished).ledger()["stages"]] == [
        "complete",
        *["pending"] * 4,
    ]


def test_numbers_that_go_bad_stop_the_run(tiny_sets: Path, tmp_path: Path) -> None:
    flags = ["--stage", LAST, "--data", tiny_sets, *SMALL, "--set", f"curriculum.stages=[{LAST}]"]
    done = call(PYTHON, *flags, "--set", "training.base_lr=1e30", cwd=tmp_path, expect=65)
    (error,) = errors(done)
    assert f"stage {LAST}" in error and "training.base_lr" in error


def break_samples(tiny_sets: Path, folder: Path, *places: int) -> list[str]:
    """Copy a set below `folder`, flip a bit of some samples and return their keys."""
    shutil.copytree(tiny_sets / LAST, folder / LAST)
    tar = folder / LAST / "train" / "000000.tar"
    index = ShardSet(tiny_sets / LAST, "train").index
    data = bytearray(tar.read_bytes())
    for place in places:
        data[int(index["offset"][place]) + 100] ^= 1
    tar.write_bytes(data)
    return [index["key"][place].decode() for place in places]


def test_a_broken_sample_is_skipped_told_and_kept_out_of_the_buffer(tiny_sets: Path, tmp_path: Path) -> None:
    (key,) = break_samples(tiny_sets, tmp_path / "sets", 7)
    flags = ["--stage", LAST, "--data", "sets", *SMALL, "--set", f"curriculum.stages=[{LAST}]"]
    kept = ["--set", "data.workers=2", "--set", "training.steps=8"]
    kept += ["--set", "buffer.percent=100", "--set", "buffer.per_cluster=32"]  # all that can be read
    done = call(PYTHON, *flags, *kept, "--run", "run", cwd=tmp_path)
    told = [line for line in done.stderr.splitlines() if line.startswith("skipped ")]
    assert told and all(f"000000.tar:{key}: " in line and "checksum" in line for line in told)
    stage = tmp_path / "run" / "stages" / f"01-{LAST}"
    (line,) = (stage / "skipped.jsonl").read_text().splitlines()
    assert key in json.loads(line)["skipped"]
    buffer = ShardSet(stage / "buffer", "train")
    assert len(buffer) == 31 and key.encode() not in buffer.index["key"]


def test_too_many_broken_samples_stop_the_run(tiny_sets: Path, tmp_path: Path) -> None:
    keys = break_samples(tiny_sets, tmp_path / "sets", 7, 8, 20)
    flags = ["--stage", LAST, "--data", "sets", *SMALL, "--set", f"curriculum.stages=[{LAST}]"]
    done = call(PYTHON, *flags, cwd=tmp_path, expect=65)
    (error,) = errors(done)
    assert "000000.tar" in error and any(key in error for key in keys) and "checksum" in error
    assert "2 of 32 samples of this set are broken, 1 may be" in error


# Mistakes

Prepare = Callable[[Path, Path], list[Any]]  # (working folder, tiny sets) -> arguments


def begun(folder: Path, data: Path) -> RunDirectory:
    """Return a run that was planned and no more."""
    run = RunDirectory(folder / "run")
    run.create(tiny_settings())
    run.set_stages(list(DEFAULT_ORDER), data)
    return run


def spoiled_run(file: str, content: str) -> Prepare:
    def prepare(folder: Path, data: Path) -> list[Any]:
        (begun(folder, data).path / file).write_text(content)
        return ["--stage", LAST, "--run", "run"]

    return prepare


def in_run(*arguments: str) -> Prepare:
    def prepare(folder: Path, data: Path) -> list[Any]:
        begun(folder, data)
        return ["--stage", LAST, "--run", "run", *arguments]

    return prepare


def with_file(name: str, content: str, *arguments: str) -> Prepare:
    def prepare(folder: Path, data: Path) -> list[Any]:
        (folder / name).write_text(content)
        return ["--stage", LAST, "--data", data, *arguments]

    return prepare


def plain(*arguments: str) -> Prepare:
    return lambda folder, data: ["--stage", LAST, "--data", data, *arguments]


def folder_of_pictures(folder: Path, data: Path) -> list[Any]:
    (folder / "films").mkdir()
    Image.new("L", (8, 8)).save(folder / "films" / "film.png")
    return ["--stage", LAST, "--data", "films"]


def damaged_set(folder: Path, data: Path) -> list[Any]:
    shutil.copytree(data / LAST, folder / "sets" / LAST)
    (folder / "sets" / LAST / "manifest.json").write_text('{"format": "mnemos-shards-1", "mod')
    return ["--stage", LAST, "--data", "sets", "--set", f"curriculum.stages=[{LAST}]"]


MISTAKES: dict[str, tuple[Prepare, list[str]]] = {
    "unknown stage": (lambda folder, data: ["--stage", "pet", "--data", data], ["'pet'", LAST]),
    "unknown preset": (plain("--preset", "tiny"), ["'tiny'", "sample, base"]),
    "missing data folder": (
        lambda folder, data: ["--stage", LAST, "--data", "nowhere"],
        ["nowhere", "no such folder"],
    ),
    "empty data folder": (lambda folder, data: ["--stage", LAST, "--data", "."], ["holds no shard set"]),
    "folder of the wrong kind": (folder_of_pictures, ["films", "holds no shard set", "sharding.build"]),
    "a set itself": (lambda folder, data: ["--stage", LAST, "--data", data / LAST], ["itself a shard set"]),
    "damaged manifest": (damaged_set, ["manifest.json", "damaged"]),
    "misspelt key": (plain("--set", "training.bach=8"), ["training.bach", "did you mean training.batch?"]),
    "value out of range": (plain("--epochs", "-1"), ["training.epochs=-1", "greater than 0"]),
    "no number": (plain("--seed", "lucky"), ["--seed", "'lucky'"]),
    "unknown flag": (plain("--gpus", "2"), ["--gpus", "--help"]),
    "no stage": (lambda folder, data: ["--data", data], ["--stage"]),
    "misspelt key in a file": (
        with_file("c.yaml", "trainig: {batch: 8}", "--config", "c.yaml"),
        ["trainig.batch", "did you mean"],
    ),
    "a file that is no settings": (
        with_file("c.yaml", "training: [", "--config", "c.yaml"),
        ["c.yaml", "not YAML"],
    ),
    "missing file of settings": (plain("--config", "c.yaml"), ["c.yaml", "cannot be read"]),
    "batch that does not divide": (plain("--set", "training.batch=6"), ["mix_group=4", "training.batch"]),
    "DeepSpeed file that is no JSON": (
        with_file("ds.json", "{", "--deepspeed_config", "ds.json"),
        ["ds.json", "not JSON"],
    ),
    "DeepSpeed file against a setting": (
        with_file("ds.json", '{"train_batch_size": 4}', "--deepspeed_config", "ds.json"),
        ["train_batch_size", "training.batch"],
    ),
    "DeepSpeed file with an unknown key": (
        with_file("ds.json", '{"zero_optimization": {"stagee": 2}}', "--deepspeed_config", "ds.json"),
        ["--deepspeed_config", "stagee=2"],
    ),
    "attention that no CPU has": (
        plain("--set", "training.attention=xformers"),
        ["training.attention=xformers", "cpu", "ask for sdpa"],
    ),
    "k-means that no CPU has": (
        plain("--set", "buffer.backend=cuml"),
        ["k-means backend 'cuml' was asked for, but", "and faiss"],
    ),
    "disk space that holds no sample": (
        plain("--set", "buffer.budget_gb=0.00001"),
        ["buffer.budget_gb=1e-05", "leaves 2,000 bytes", DEFAULT_ORDER[0], "raise it to at least"],
    ),
    "contradiction with the run": (in_run("--set", "training.batch=4"), ["training.batch is 8 there and 4"]),
    "other preset than the run's": (in_run("--preset", "base"), ["preset is 'sample' there"]),
    "only, with stages missing": (in_run("--only"), [f"--only {LAST}", DEFAULT_ORDER[0]]),
    "damaged settings of a run": (
        spoiled_run("config.yaml", "preset: ["),
        ["config.yaml", "damaged", "--fresh"],
    ),
    "damaged ledger": (spoiled_run("ledger.json", "{"), ["ledger.json", "damaged", "--fresh"]),
    "a run that is a file": (with_file("run", "", "--run", "run"), ["--run run", "is a file"]),
    "a run among other files": (
        lambda folder, data: [*with_file("a.txt", "", "--run", ".")(folder, data), "--fresh"],
        ["a.txt", "no run"],
    ),
    "a run below a file": (
        with_file("a.txt", "", "--run", "a.txt/run"),
        ["--run a.txt/run", "nothing can be written in"],
    ),
}


def refused(launcher: list[str], prepare: Prepare, words: list[str], folder: Path, data: Path) -> str:
    """Check that a call is refused with one sentence, and leaves everything as it was; return its output."""
    arguments = prepare(folder, data)
    before = listing(folder, data)
    done = call(launcher, *arguments, cwd=folder, expect=2)
    assert listing(folder, data) == before
    told = errors(done)
    assert len(told) == 1, done.stderr
    assert all(word in told[0] for word in words), told[0]
    return done.stdout + done.stderr


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_sentence(name: str, tiny_sets: Path, tmp_path: Path) -> None:
    prepare, words = MISTAKES[name]
    printed = refused(PYTHON, prepare, words, tmp_path, tiny_sets)
    assert len(printed.splitlines()) == 1, "and nothing else is printed"


@pytest.mark.parametrize("name", ["unknown stage", "DeepSpeed file with an unknown key"])
def test_a_mistake_is_one_sentence_with_two_ranks(name: str, tiny_sets: Path, tmp_path: Path) -> None:
    prepare, words = MISTAKES[name]
    printed = refused(deepspeed_command(TRAIN, ranks=2), prepare, words, tmp_path, tiny_sets)
    assert printed.count("error: ") == 1, "both ranks meet it, one tells"


def test_a_batch_must_divide_over_the_ranks(tiny_sets: Path, tmp_path: Path) -> None:
    printed = refused(
        deepspeed_command(TRAIN, ranks=2),
        plain("--set", "training.batch=9"),
        ["training.batch=9", "2 ranks"],
        tmp_path,
        tiny_sets,
    )
    assert printed.count("error: ") == 1


def test_a_port_that_is_taken_is_named(tiny_sets: Path, tmp_path: Path) -> None:
    with socket.socket() as other_run:
        other_run.bind(("127.0.0.1", 0))
        other_run.listen()
        port = other_run.getsockname()[1]
        variables = {
            "RANK": "0",
            "WORLD_SIZE": "2",
            "LOCAL_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        command = [*PYTHON, "--stage", LAST, "--data", str(tiny_sets)]
        done = subprocess.run(
            command,
            check=False,
            cwd=tmp_path,
            env=ENVIRONMENT | variables,
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert done.returncode == 2, done.stderr
    (error,) = errors(done)
    assert f"port {port} is taken" in error and "--master_port" in error and "Traceback" not in done.stderr
