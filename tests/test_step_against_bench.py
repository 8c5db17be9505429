"""bench/step_against.py: its arithmetic, its stages, and that it leaves nothing behind."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mnemos.bench import step_against as step
from mnemos.sharding.errors import UserError
from mnemos.sharding.modalities import DEFAULT_ORDER, MODALITIES

REPO = Path(__file__).resolve().parents[1]


def test_ratios_are_medians_of_the_rounds_own() -> None:
    found = {  # the second round met a load on both sides
        "text pretext": [[10.0, 90.0, 11.0], [12.0, 81.0, 12.1]],
        "image rehearsal": [[30.0, 90.0, 29.0], [27.0, 99.0, 29.0]],
    }
    rows, ratio = step.summary(found)
    assert [(row["kind"], row["phase"], row["before"], row["now"]) for row in rows] == [
        ("text", "pretext", 11.0, 12.1),
        ("image", "rehearsal", 30.0, 29.0),
        ("all", "-", 40.0, 41.1),
    ]
    assert [row["ratio"] for row in rows] == pytest.approx(
        [1.1, 1.0, 1.0]
    )  # of 1.2, 0.9, 1.1; 0.9, 1.1, 1; ...
    assert ratio == rows[-1]["ratio"]


def test_the_run_has_every_kind_before_its_last_stage() -> None:
    *earlier, last = step.stages()
    assert [name for name in DEFAULT_ORDER if name in earlier] == earlier
    assert {MODALITIES[name].kind for name in earlier} == {one.kind for one in MODALITIES.values()}
    assert last not in earlier


class Answers:
    """A side that answers from a list and writes down what it was asked."""

    def __init__(self, title: str, asked: list[str], seconds: list[float]) -> None:
        self.title, self.asked, self.seconds = title, asked, seconds

    def ask(self, what: object) -> object:
        if isinstance(what, dict):
            return {"windows": ["text pretext"]}
        self.asked.append(self.title)
        return self.seconds.pop(0)


def test_sides_take_turns_and_the_quicker_counts() -> None:
    asked: list[str] = []
    sides = [Answers("A", asked, [0.002, 0.001]), Answers("B", asked, [0.003, 0.004])]
    found = step.compare(sides, [{}, {}], (0, 1, 1, 0))  # type: ignore[arg-type]
    assert asked == ["A", "B", "B", "A"] and found == {"text pretext": [1.0, 3.0]}


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a repository with one commit."""
    git = ["git", "-C", str(tmp_path / "r"), "-c", "user.name=n", "-c", "user.email=e@example.org"]
    subprocess.run(["git", "init", "-q", str(tmp_path / "r")], check=True)
    (tmp_path / "r" / "file").write_text("one\n")
    subprocess.run([*git, "add", "file"], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "one"], check=True)
    (tmp_path / "r" / "file").write_text("two\n")
    monkeypatch.setattr(step, "REPOSITORY", tmp_path / "r")
    return tmp_path / "r"


def test_a_checked_out_revision_leaves_no_trace(repository: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), step.checked_out("HEAD", tmp_path) as tree:
        assert (tree / "file").read_text() == "one\n"
        assert len(step.git("worktree", "list").splitlines()) == 2
        raise KeyboardInterrupt
    assert not tree.exists() and len(step.git("worktree", "list").splitlines()) == 1
    assert (repository / "file").read_text() == "two\n"


@pytest.mark.parametrize(
    "flags",
    [
        ["--against", "no-such-revision"],
        [],
        ["--against", "HEAD", "--rounds", "0"],
        ["--against", "HEAD", "--kinds", "x"],
    ],
    ids=["revision", "nothing", "rounds", "kinds"],
)
def test_a_wrong_call_is_one_sentence(
    repository: Path, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert step.main(flags) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("worker", "complaint"),
    [
        ("raise SystemExit('no memory left')", "its process ended: no memory left"),
        (
            """import socket, sys
print('{"failed": "AttributeError: no batches"}', file=socket.socket(fileno=int(sys.argv[1])).makefile("w"), flush=True)
""",
            "cannot be measured .AttributeError: no batches",
        ),
    ],
    ids=["ended", "lacks"],
)
def test_a_tree_that_cannot_be_measured_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, worker: str, complaint: str
) -> None:
    (tmp_path / "step_against_worker.py").write_text(worker)
    monkeypatch.setattr(step, "__file__", str(tmp_path / "step_against.py"))
    with step.Side("v0", REPO, tmp_path / "log") as side, pytest.raises(UserError, match=f"v0.*{complaint}"):
        side.ask({})
    assert side.process.returncode is not None


@pytest.mark.slow
def test_a_tree_is_not_slower_than_itself(tmp_path: Path) -> None:
    subprocess.run(["git", "clone", "-q", str(REPO), str(tmp_path / "clone")], check=True)
    flags = [
        "--against",
        "HEAD",
        "--rounds",
        "1",
        "--steps",
        "1",
        "--limit",
        "9",
        "--data",
        str(tmp_path / "data"),
    ]
    command = [sys.executable, tmp_path / "clone" / "bench" / "step_against.py", *flags]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads(done.stdout.splitlines()[-1])
    phases = [f"{kind} {phase}" for kind in step.KINDS for phase in ("pretext", "rehearsal")]
    assert sorted(record["ms"]) == sorted(phases)
