"""bench/gpu.sh: its plan, its refusals, and that nothing stops it: no failure, no hanging step, no signal."""

import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
SCRIPT = REPO / "bench" / "gpu.sh"
STUB = """#!/usr/bin/env bash
echo "${PYTHONPATH:-}|$*" >>"$TRACE"
case "$*" in
    *"-m pip"*) while [[ $1 != --target ]]; do shift; done; mkdir -p "$2" ;;
    *DEFAULT_ORDER*) echo first second ;;
    *import\\ os,\\ torch*) echo "a machine"; [[ -z ${HANG:-} ]] || { echo "$$" >"$TRACE.pid"; sleep 60; } ;;
    *gemm.py*) printf ' 10%%|###\\rthe result\\n\\n'; [[ -z ${PYTHONPATH:-} ]] || ls "$PYTHONPATH/mnemos" >>"$TRACE" ;;
    *ops.py*) echo broken >&2; exit 3 ;;
    *--out*) while [[ $1 != --out ]]; do shift; done; [[ $2 != *.jsonl ]] || echo '{"bench": "x"}' >>"$2" ;;
esac
"""


@pytest.fixture
def stub(tmp_path: Path) -> dict[str, str]:
    """Return an environment with a python3 and a deepspeed that only write down how they are called."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in ("python3", "deepspeed", "nvidia-smi"):
        (programs / name).write_text(STUB, encoding="utf-8")
        (programs / name).chmod(0o755)
    (tmp_path / "temporary").mkdir()
    kept = {key: value for key, value in os.environ.items() if key not in ("OUT", "PYTHONPATH")}
    return {
        **kept,
        "PATH": f"{programs}:{os.environ['PATH']}",
        "PYTHON": str(programs / "python3"),
        "TRACE": str(tmp_path / "trace"),
        "TMPDIR": str(tmp_path / "temporary"),
    }


def run(
    environment: dict[str, str], *arguments: object, cwd: Path = REPO
) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(SCRIPT), *map(str, arguments)]
    return subprocess.run(
        command, env=environment, cwd=cwd, capture_output=True, text=True, check=False, timeout=600
    )


def called(environment: dict[str, str]) -> list[str]:
    return Path(environment["TRACE"]).read_text(encoding="utf-8").splitlines()


def test_a_dry_run_prints_the_plan_and_touches_nothing(stub: dict[str, str], tmp_path: Path) -> None:
    done = run(stub, "--dry-run", "--out", tmp_path / "out")
    assert done.returncode == 0 and not (tmp_path / "out").exists() and not Path(stub["TRACE"]).exists()
    assert list((tmp_path / "temporary").iterdir()) == []
    plan = [line.split(maxsplit=3) for line in done.stdout.splitlines()]
    names = [name for name, *_ in plan]
    assert names[:2] == ["machine", "gemm"] and len(set(names)) == len(names) >= 11
    assert names.index("tests") < names.index("step-512") < names.index("kmeans") < names.index("attention")
    for _, seconds, unit, command in plan:
        assert unit == "s" and 0 < int(seconds) <= 120
        for file in re.findall(r"\b(?:bench|engine)/\w+\.py", command):
            assert (REPO / file).is_file(), file


def test_limits_follow_the_minutes(stub: dict[str, str]) -> None:
    def limits(*arguments: object) -> list[int]:
        return [int(line.split()[1]) for line in run(stub, "--dry-run", *arguments).stdout.splitlines()]

    assert [half * 2 for half in limits("--minutes", 4)] == pytest.approx(limits("--minutes", 8), abs=1)


def test_every_step_has_a_quick_form(stub: dict[str, str]) -> None:
    def files(*arguments: object) -> set[str]:
        return set(
            re.findall(r"bench/\w+\.py|pytest|train|attention", run(stub, "--dry-run", *arguments).stdout)
        )

    assert files("--quick") | {"bench/attention.py"} == files() | {"bench/attention.py"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--nope"], "--nope is no flag"),
        (["--minutes", "0"], "--minutes 0"),
        (["--minutes", "soon"], "--minutes soon"),
        (["--minutes"], "--minutes needs a value"),
        (["nowhere"], "nowhere: is no folder of wheels"),
        ([".", "."], "one folder of wheels is enough"),
        (["--only", "gemm,foo"], "--only foo: there is no such step"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_it_refuses(arguments: list[str], said: str, stub: dict[str, str]) -> None:
    done = run(stub, *arguments)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and said in done.stderr
    assert done.stderr.count("\n") == 1 and not Path(stub["TRACE"]).exists()


def test_a_missing_python_is_refused(stub: dict[str, str]) -> None:
    done = run({**stub, "PYTHON": "no-such-python"})
    assert done.returncode == 2 and "no-such-python" in done.stderr


def test_a_failure_stops_nothing_and_all_of_it_is_told(stub: dict[str, str], tmp_path: Path) -> None:
    done = run({**stub, "OUT": "found"}, cwd=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    folder = tmp_path / "found"
    assert sorted(path.name for path in folder.iterdir()) == ["logs.tar.gz", "results.jsonl", "summary.txt"]
    summary = (folder / "summary.txt").read_text(encoding="utf-8")
    assert summary in done.stdout + "\n"
    codes = {line.split()[0]: line.split()[3] for line in summary.splitlines()[1:]}
    assert codes.pop("ops") == "3" and set(codes.values()) == {"0"}, summary
    assert list(codes) == [name for name in planned(stub) if name != "ops"], "in their order, after it too"
    assert "gemm" in summary and summary.splitlines()[2].endswith("the result"), "no bar, no empty line"
    assert "    | broken" in done.stdout
    assert all(json.loads(line) for line in (folder / "results.jsonl").read_text("utf-8").splitlines())
    with tarfile.open(folder / "logs.tar.gz") as logs:
        assert {f"./{name}.log" for name in planned(stub)} <= set(logs.getnames())
    assert list((tmp_path / "temporary").iterdir()) == [], "nothing is left behind"


def planned(environment: dict[str, str]) -> list[str]:
    return [line.split()[0] for line in run(environment, "--dry-run").stdout.splitlines()]


def test_wheels_are_installed_beside_and_the_tree_is_linked(stub: dict[str, str], tmp_path: Path) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    (wheels / "a-1-py3-none-any.whl").write_bytes(b"")
    done = run(stub, "--out", tmp_path / "out", "--only", "install,gemm", wheels)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = called(stub)
    (pip,) = [line for line in lines if "-m pip" in line]
    assert "--no-index" in pip and "--no-deps" in pip and pip.endswith(f"{wheels}/a-1-py3-none-any.whl")
    path, _, _ = next(line for line in lines if "gemm.py" in line).partition("|")
    assert f"--target {path} " in pip, "what is installed is what is imported"
    assert lines[-4:] == ["bench", "engine", "kernels", "sharding"]


def test_a_step_that_hangs_is_cut_off(stub: dict[str, str], tmp_path: Path) -> None:
    start = time.monotonic()
    done = run({**stub, "HANG": "yes"}, "--minutes", 1, "--only", "machine,gemm", "--out", tmp_path / "out")
    assert done.returncode == 1 and time.monotonic() - start < 40
    machine, gemm = (tmp_path / "out" / "summary.txt").read_text("utf-8").splitlines()[1:]
    assert machine.split()[3] == "124" and "cut off after 3 s" in machine and gemm.split()[3] == "0"


def test_a_signal_ends_the_step_under_way(stub: dict[str, str], tmp_path: Path) -> None:
    command = ["bash", str(SCRIPT), "--only", "machine", "--out", str(tmp_path / "out")]
    running = subprocess.Popen(command, env={**stub, "HANG": "yes"}, stdout=subprocess.PIPE)
    file = Path(stub["TRACE"] + ".pid")
    while not file.exists() or not file.read_text("utf-8").strip():
        assert running.poll() is None
        time.sleep(0.05)
    running.send_signal(signal.SIGTERM)
    running.communicate(timeout=30)
    assert running.returncode == 143
    step = Path("/proc") / file.read_text("utf-8").strip()
    for _ in range(100):
        if not step.exists():
            break
        time.sleep(0.05)
    assert not step.exists(), "the step goes on"
    assert list((tmp_path / "temporary").iterdir()) == []


def make_wheel(folder: Path) -> None:
    """Write the smallest wheel there can be."""
    about = "tiny_thing-1.0.dist-info"
    with zipfile.ZipFile(folder / "tiny_thing-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tiny_thing.py", "")
        wheel.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: tiny-thing\nVersion: 1.0\n")
        wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{about}/RECORD", "")


@pytest.mark.slow
def test_every_step_starts_on_a_cpu(tmp_path: Path) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    make_wheel(wheels)
    environment = {**os.environ, "PYTHON": sys.executable}
    done = run(environment, "--quick", "--out", tmp_path / "out", wheels)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = (tmp_path / "out" / "results.jsonl").read_text("utf-8").splitlines()
    assert {"gemm", "kmeans", "ops", "loader", "scaling", "step"} <= {
        json.loads(line).get("bench") for line in lines
    }


def test_an_environment_without_the_project_is_refused(stub: dict[str, str], tmp_path: Path) -> None:
    bare = tmp_path / "programs" / "bare"
    bare.write_text("#!/usr/bin/env bash\nexit 1\n", encoding="utf-8")
    bare.chmod(0o755)
    done = run({**stub, "PYTHON": str(bare)}, "--out", tmp_path / "out")
    assert done.returncode == 2 and "no torch or no mnemos" in done.stderr
    assert not (tmp_path / "out").exists(), "nothing was begun"
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    assert "no torch" not in run({**stub, "PYTHON": str(bare)}, "--out", tmp_path / "out", wheels).stderr
