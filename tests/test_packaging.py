"""The wheel holds every file of the four layers under one import root, nothing else, and works alone."""

import subprocess
import sys
import zipfile
from pathlib import Path
from shutil import copytree, ignore_patterns

import pytest

REPO = Path(__file__).resolve().parents[1]
LAYERS = ("engine", "kernels", "sharding", "bench")
NOT_SHIPPED = ("__pycache__", "results*", ".*")  # bytecode, measured numbers, editors' leftovers


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command and return its standard output; its standard error is the failure's message."""
    done = subprocess.run(
        [str(part) for part in command], check=False, cwd=cwd, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy what a wheel is built from; setuptools would otherwise leave build/ in the tree."""
    source = tmp_path_factory.mktemp("source")
    for name in ("setup.py", "pyproject.toml", "LICENSE", "README.md"):
        if (REPO / name).exists():
            (source / name).write_bytes((REPO / name).read_bytes())
    for layer in LAYERS:
        copytree(REPO / layer, source / layer, ignore=ignore_patterns(*NOT_SHIPPED))
    return source


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("setuptools", minversion="70.1", reason="needs setuptools: pip install -e '.[test]'")
    out = tmp_path_factory.mktemp("wheel")
    pip = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-index")
    run(*pip, "--no-build-isolation", "--no-deps", "--wheel-dir", out, source, cwd=out)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def members(wheel: Path) -> set[str]:
    return {name for name in zipfile.ZipFile(wheel).namelist() if not name.endswith("/")}


def test_wheel_holds_one_import_root(members: set[str]) -> None:
    # a bare `kernels` or `sharding` would overwrite another project's package of that name
    tops = {name.partition("/")[0] for name in members}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"mnemos"}
    (info,) = tops - {"mnemos"}
    assert f"{info}/licenses/LICENSE" in members


def test_wheel_holds_every_file_of_the_layers(source: Path, members: set[str]) -> None:
    expected = {
        f"mnemos/{path.relative_to(source)}"
        for layer in LAYERS
        for path in (source / layer).rglob("*")
        if path.is_file()
    }
    shipped = {name for name in members if name.startswith("mnemos/")}
    assert shipped == expected, "setup.py: package_data names the kinds of data files that are shipped"


def test_wheel_works_outside_the_tree(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    program = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from mnemos.sharding import modalities\n"
        "print(modalities.__file__, *modalities.MODALITIES)"
    )
    # -I -S: neither the working folder nor an editable install may lend a hand
    printed = run(sys.executable, "-I", "-S", "-c", program, tmp_path, cwd=tmp_path.parent)
    place, *names = printed.split()
    assert Path(place) == tmp_path / "mnemos" / "sharding" / "modalities.py"
    assert names == ["report", "xray", "ct", "mri", "pathology"]


def test_editable_install_is_what_the_tests_run() -> None:
    from mnemos.sharding import modalities

    assert Path(modalities.__file__).resolve() == REPO / "sharding" / "modalities.py", (
        "another copy of mnemos is imported; run pip install -e . in this clone"
    )
