"""bench/mutants.py on a made-up tree: what is killed, what is reported, what is refused."""

import subprocess
from pathlib import Path

import pytest

from mnemos.bench import mutants
from mnemos.bench.mutants import Mutant
from mnemos.sharding.errors import UserError

CODE = """\
def add(a, b):
    return a + b

def twice(a):
    return 2 * a
"""
TEST = """\
from kernels.sums import add

def test_add():
    assert add(2, 3) == 5
"""
MUTANT = {
    "file": "kernels/sums.py",
    "tests": ("tests/test_sums.py",),
    "what": "a minus",
    "old": "a + b",
    "new": "a - b",
}


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a repository with one function, one test, and a file that git ignores."""
    tree = tmp_path / "tree"
    files = {
        "kernels/sums.py": CODE,
        "tests/test_sums.py": TEST,
        "pyproject.toml": '[tool.pytest.ini_options]\npythonpath = ["."]\n',
        ".gitignore": "ignored.txt\n",
        "ignored.txt": "",
    }
    for name, text in files.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(text)
    subprocess.run(["git", "init", "-q", str(tree)], check=True)
    monkeypatch.setattr(mutants, "REPOSITORY", tree)
    return tree


def mutant(**changes: object) -> Mutant:
    return Mutant(**{**MUTANT, **changes})  # type: ignore[arg-type]


def write_list(tree: Path, *entries: Mutant) -> None:
    (tree / "bench").mkdir(exist_ok=True)
    lines = [
        f"[[mutant]]\nfile = '{one.file}'\ntests = {list(one.tests)}\nwhat = '{one.what}'\n"
        f"old = '''{one.old}'''\nnew = '''{one.new}'''\n"
        for one in entries
    ]
    (tree / mutants.LIST).write_text("".join(lines))


def test_killed_survived_and_broken_are_told_apart(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_list(
        tree,
        mutant(),
        mutant(what="nobody looks", old="2 * a", new="3 * a"),
        mutant(what="no Python", old="return a + b", new="return a +"),
    )
    assert mutants.main(["--jobs", "1"]) == 1
    said = capsys.readouterr().out
    assert "not noticed: kernels/sums.py: nobody looks (survived)" in said
    assert "not noticed: kernels/sums.py: no Python (exit code 2" in said  # the tests never ran
    assert "a minus" not in said
    assert [line.split() for line in said.splitlines() if line.startswith("sums")] == [["sums", "3", "1"]]
    assert (tree / "kernels" / "sums.py").read_text() == CODE


def test_all_killed_is_success(tree: Path) -> None:
    write_list(tree, mutant())
    assert mutants.main(["--only", "sums", "--jobs", "1"]) == 0


def test_a_copy_leaves_out_what_git_ignores(tree: Path, tmp_path: Path) -> None:
    mutants.copy_tree(tree, tmp_path / "copy")
    assert (tmp_path / "copy" / "kernels" / "sums.py").exists()
    assert not (tmp_path / "copy" / "ignored.txt").exists()


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"old": "return"}, "stands there 2 times"),
        ({"old": "a * b"}, "stands there 0 times"),
        ({"tests": ("tests/test_other.py",)}, "there is no tests/test_other.py"),
        ({"file": "kernels/other.py"}, "stands there 0 times"),
    ],
    ids=["twice", "never", "no test", "no file"],
)
def test_a_mutant_that_does_not_fit_is_refused(
    tree: Path, changes: dict[str, object], complaint: str
) -> None:
    with pytest.raises(UserError, match=complaint):
        mutants.check_mutants([mutant(**changes)], tree)


def test_device_code_needs_six(tree: Path) -> None:
    (tree / "kernels" / "sums.py").write_text(
        CODE + "@triton.jit\ndef kernel(): ...\n\ndef launch_kernel(): ...\n"
    )
    few = [mutant(new=f"a - {number}") for number in range(5)]
    with pytest.raises(UserError, match="5 of the 6 mutants it needs"):
        mutants.check_mutants(few, tree)
    mutants.check_mutants(few, tree, only=["another"])
    mutants.check_mutants([*few, mutant()], tree)
    (tree / "kernels" / "sums.py").write_text(CODE + "@triton.jit\ndef part_of_others(): ...\n")
    mutants.check_mutants(few, tree)


def test_red_tests_without_a_mutant_are_refused(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tree / "tests" / "test_sums.py").write_text("def test_it(): assert False\n")
    write_list(tree, mutant())
    assert mutants.main(["--jobs", "1"]) == 2
    assert "fails without any mutant" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "complaint"),
    [("", "no [[mutant]]"), ("[[mutant]]\nfile = 'x'\n", "lacks or should not have"), ("[[", "not TOML")],
    ids=["empty", "keys", "no TOML"],
)
def test_a_wrong_list_is_one_sentence(
    tree: Path, text: str, complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tree / "bench").mkdir()
    (tree / mutants.LIST).write_text(text)
    assert mutants.main([]) == 2
    said = capsys.readouterr().err
    assert complaint in said and said.count("\n") == 1


def test_a_kernel_without_mutants_is_not_known(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_list(tree, mutant())
    assert mutants.main(["--only", "nothing"]) == 2
    assert "choose from sums" in capsys.readouterr().err
