"""The command line of engine/train.py: its flags are frozen here, and asking for help costs nothing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mnemos.engine.arguments import make_parser, parse
from mnemos.engine.presets import PRESETS
from mnemos.engine.settings import known_keys
from mnemos.sharding.errors import UserError

REPO = Path(__file__).resolve().parents[1]
FLAGS = [
    "--help",
    "--stage",
    "--only",
    "--dry-run",
    "--fresh",
    "--run",
    "--data",
    "--preset",
    "--config",
    "--set",
    "--strategy",
    "--seed",
    "--epochs",
    "--steps",
    "--deepspeed_config",
    "--deepspeed",
    "--local_rank",
]
HEAVY = (
    "torch",
    "deepspeed",
    "numpy",
    "webdataset",
    "sklearn",
    "triton",
    "tokenizers",
    "nibabel",
    "pydicom",
    "PIL",
)


def test_the_flags_are_these() -> None:
    found = [action.option_strings[-1] for action in make_parser()._actions]
    assert found == FLAGS, "a changed flag breaks scripts: change this list and CHANGELOG.md with it"


def test_every_flag_and_setting_is_in_the_help() -> None:
    text = make_parser().format_help()
    assert all(flag in text for flag in FLAGS if flag not in ("--deepspeed", "--local_rank"))
    assert all(key in text for key in known_keys())
    assert all(preset in text for preset in PRESETS)
    assert "examples:" in text and "75" in text


def test_help_and_a_mistake_import_nothing_heavy(tmp_path: Path) -> None:
    # train.py ends by os._exit, so what was imported is told from inside leave()
    probe = """
import json, runpy, sys
from mnemos.engine import dist
def leave(code):
    print(json.dumps([code, sorted(sys.modules)]))
    sys.exit(0)
dist.leave = leave
script, *sys.argv[1:] = sys.argv[1:]
runpy.run_path(script, run_name="__main__")
"""
    calls = {"--help": 0, "--stage": 2}  # a flag without its value
    for flag, expected in calls.items():
        command = [sys.executable, "-c", probe, str(REPO / "engine" / "train.py"), flag]
        done = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
        code, modules = json.loads(done.stdout.splitlines()[-1])
        assert code == expected
        assert not {name.partition(".")[0] for name in modules} & set(HEAVY)
        assert "Traceback" not in done.stderr


def test_everything_may_be_said() -> None:
    given = parse(
        [
            "--stage",
            "ct",
            "--only",
            "--dry-run",
            "--fresh",
            "--run",
            "a",
            "--data",
            "b",
            "--preset",
            "base",
            "--set",
            "training.batch=64",
            "--set",
            "curriculum.stages=[xray,ct]",
            "--strategy",
            "sequential",
            "--seed",
            "3",
            "--epochs",
            "1.5",
            "--steps",
            "7",
            "--deepspeed_config",
            "c.json",
            "--deepspeed",
            "--local_rank=1",
        ]
    )
    assert (given.stage, given.only, given.dry_run, given.fresh) == ("ct", True, True, True)
    assert (given.run, given.data, given.deepspeed_config) == (Path("a"), Path("b"), Path("c.json"))
    assert given.preset == "base"
    assert given.overrides == {
        "training.batch": 64,
        "curriculum.stages": ["xray", "ct"],
        "rehearsal.strategy": "sequential",
        "training.seed": 3,
        "training.epochs": 1.5,
        "training.steps": 7,
    }


def test_little_need_be_said() -> None:
    given = parse(["--stage", "ct"])
    assert (given.run, given.data, given.preset, given.overrides) == (None, None, None, {})
    assert not (given.only or given.dry_run or given.fresh)


def test_the_command_line_overrides_the_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("preset: base\ntraining: {batch: 64, seed: 1, epochs: 2}\n")
    common = ["--stage", "ct", "--config", str(file)]
    given = parse([*common, "--set", "training.seed=2", "--epochs", "3"])
    assert given.preset == "base"
    assert given.overrides == {"training.batch": 64, "training.seed": 2, "training.epochs": 3.0}
    assert parse([*common, "--preset", "large"]).preset == "large"
    assert parse([*common, "--set", "preset=huge"]).preset == "huge"
    assert (
        parse([*common, "--set", "training.seed=2", "--set", "training.seed=4"]).overrides["training.seed"]
        == 4
    )


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], ["--stage"]),
        (["--stage", "ct", "--batch", "8"], ["--batch"]),
        (["--stage", "ct", "--seed", "x"], ["--seed", "'x'"]),
        (["--stage", "ct", "--set", "training.batch"], ["'training.batch'", "key=value"]),
        (["--stage", "ct", "--config", "nowhere.yaml"], ["nowhere.yaml", "cannot be read"]),
    ],
    ids=["no stage", "unknown flag", "no number", "no value", "no file"],
)
def test_a_wrong_call_is_a_sentence(argv: list[str], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        parse(argv)
    assert all(word in str(caught.value) for word in words), str(caught.value)
