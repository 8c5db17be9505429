"""Break the kernels on purpose, one line at a time, and see that their tests notice.

    python bench/mutants.py                       every mutant of bench/mutants.toml
    python bench/mutants.py --only gather_tokens  those of one file of kernels/; again for more

Each mutant is put alone into a copy of the tree, where its tests must then fail. Before that they must pass there
without any. Exits 1 when a mutant survives, when its run ends in any other way than by a failed test, or when a
file that launches device code has fewer than six mutants.
"""

import argparse
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import tomllib
from collections import Counter
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path

from tqdm import tqdm

from mnemos.engine.plain_table import format_table
from mnemos.sharding.command import Parser, run_command
from mnemos.sharding.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[1]
LIST = Path("bench/mutants.toml")
LEAST = 6  # mutants of a file that launches device code
PASSED, FAILED = 0, 1  # exit codes of pytest
TIMEOUT_S = 900  # of one run of tests: a mutant may loop for ever


@dataclass(frozen=True, kw_only=True)
class Mutant:
    """One breakage.

    Attributes:
        file: of the tree.
        tests: files of tests that must notice.
        what: the breakage in words.
        old: text that stands in the file exactly once.
        new: what takes its place.
    """

    file: str
    tests: tuple[str, ...]
    what: str
    old: str
    new: str

    @property
    def kernel(self) -> str:
        return Path(self.file).stem


def read_mutants(path: Path) -> list[Mutant]:
    """Return the mutants of a list.

    Raises:
        UserError: the list is missing, is no TOML, or an entry has other keys than a mutant.
    """
    try:
        entries = tomllib.loads(path.read_text(encoding="utf-8")).get("mutant", [])
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); it lists the mutants") from None
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path}: is not TOML ({error}); correct it") from None
    wanted = {field.name for field in fields(Mutant)}
    for number, entry in enumerate(entries, start=1):
        if set(entry) != wanted:
            names = ", ".join(sorted(set(entry) ^ wanted))
            raise UserError(
                f"{path}: mutant {number} lacks or should not have {names}; an entry has exactly {sorted(wanted)}"
            )
    if not entries:
        raise UserError(f"{path}: holds no [[mutant]]; write some")
    return [Mutant(**{**entry, "tests": tuple(entry["tests"])}) for entry in entries]


def check_mutants(mutants: Sequence[Mutant], tree: Path, only: Collection[str] = ()) -> None:
    """Refuse mutants that cannot be put into the tree, and kernels with too few.

    Args:
        mutants: those to be tried.
        tree: the repository.
        only: the kernels they are of; nothing for all there are.

    Raises:
        UserError: naming all that is wrong.
    """
    wrong = []
    for mutant in mutants:
        file = tree / mutant.file
        times = file.read_text(encoding="utf-8").count(mutant.old) if file.is_file() else 0
        if times != 1 or mutant.old == mutant.new:
            wrong.append(f"{mutant.file} ({mutant.what}): the old text stands there {times} times")
        lost = [test for test in mutant.tests if not (tree / test).is_file()]
        wrong += [f"{mutant.file} ({mutant.what}): there is no {test}" for test in lost]
    counted = Counter(mutant.file for mutant in mutants)
    for file in sorted((tree / "kernels").glob("*.py")):
        name = str(file.relative_to(tree))
        text = file.read_text(encoding="utf-8")
        launches = (
            "@triton.jit" in text and "\ndef launch_" in text
        )  # without: a part of other files' kernels
        if launches and counted[name] < LEAST and (not only or file.stem in only):
            wrong.append(
                f"{name} launches device code and has {counted[name]} of the {LEAST} mutants it needs"
            )
    if wrong:
        raise UserError(f"{LIST} does not fit the tree: {'; '.join(wrong)}; correct the list")


def copy_tree(source: Path, target: Path) -> None:
    """Copy the files git knows or would add; links stay links."""
    command = ["git", "-C", str(source), "ls-files", "-z", "-co", "--exclude-standard"]
    listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    for name in filter(None, listed.split("\0")):
        if not os.path.lexists(source / name):
            continue  # deleted, but still listed
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source / name, target / name, follow_symlinks=False)


class Runner:
    """Runs tests in a tree; a run can be ended from outside."""

    def __init__(self) -> None:
        self.running: set[subprocess.Popen[str]] = set()
        self.ended = False

    def tests(self, tree: Path, tests: Sequence[str]) -> tuple[int, str]:
        """Return pytest's exit code (-1: out of time) and its last lines."""
        if self.ended:
            return -1, "ended"
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
        process = subprocess.Popen(
            command,
            cwd=tree,
            env={**os.environ, "PYTHONPATH": str(tree / "typings"), "PYTHONDONTWRITEBYTECODE": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.running.add(process)
        try:
            output, _ = process.communicate(timeout=TIMEOUT_S)
            return process.returncode, output[-2000:]
        except subprocess.TimeoutExpired:
            self._kill(process)
            return -1, f"out of time after {TIMEOUT_S} s"
        finally:
            self.running.discard(process)

    def end(self) -> None:
        """Kill what runs and start nothing more."""
        self.ended = True
        for process in list(self.running):
            self._kill(process)

    @staticmethod
    def _kill(process: "subprocess.Popen[str]") -> None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # its own session: what the tests started, too
        process.communicate()


def try_mutant(mutant: Mutant, tree: Path, runner: Runner) -> tuple[bool, str]:
    """Return whether a failed test noticed the mutant, and how the run ended; leaves the tree as it was."""
    file = tree / mutant.file
    sound = file.read_text(encoding="utf-8")
    file.write_text(sound.replace(mutant.old, mutant.new), encoding="utf-8")
    try:
        code, output = runner.tests(tree, mutant.tests)
    finally:
        file.write_text(sound, encoding="utf-8")
    if code == PASSED:
        return False, "survived"
    last = output.strip().splitlines()[-1:] or [""]
    return code == FAILED, f"exit code {code}: {last[0]}"


def try_all(mutants: Sequence[Mutant], jobs: int) -> dict[Mutant, tuple[bool, str]]:
    """Return what became of every mutant.

    Raises:
        UserError: the tests fail without any mutant.
    """
    found: dict[Mutant, tuple[bool, str]] = {}
    runner = Runner()
    with tempfile.TemporaryDirectory(prefix="mnemos-mutants-") as folder, ThreadPoolExecutor(jobs) as pool:
        trees: queue.SimpleQueue[Path] = queue.SimpleQueue()
        for number in range(jobs):
            copy_tree(REPOSITORY, Path(folder) / str(number))
            trees.put(Path(folder) / str(number))

        def green(test: str) -> tuple[str, int, str]:
            tree = trees.get()
            try:
                return test, *runner.tests(tree, [test])
            finally:
                trees.put(tree)

        def broken(mutant: Mutant) -> tuple[Mutant, tuple[bool, str]]:
            tree = trees.get()
            try:
                return mutant, try_mutant(mutant, tree, runner)
            finally:
                trees.put(tree)

        try:
            tests = sorted({test for mutant in mutants for test in mutant.tests})
            for test, code, output in tqdm(
                pool.map(green, tests), total=len(tests), desc="as it is", unit="file"
            ):
                if code != PASSED:
                    raise UserError(f"{test} fails without any mutant; mend it first: {output[-600:]}")
            waiting = [pool.submit(broken, mutant) for mutant in mutants]
            for done in tqdm(as_completed(waiting), total=len(waiting), desc="broken", unit="mutant"):
                mutant, (killed, ending) = done.result()
                found[mutant] = killed, ending
                if not killed:
                    tqdm.write(f"NOT NOTICED {mutant.file}: {mutant.what} ({ending})")
        except BaseException:
            runner.end()
            pool.shutdown(cancel_futures=True)
            raise
    return {mutant: found[mutant] for mutant in mutants}


def main(argv: Sequence[str] | None = None) -> int:
    """Try the mutants, print the table, return the exit code."""
    missed: list[Mutant] = []

    def command(argv: Sequence[str] | None) -> None:
        parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--only", action="append", metavar="NAME", help="a file of kernels/, without .py")
        parser.add_argument("--jobs", type=int, default=2, help="mutants at a time (2)")
        given = parser.parse_args(argv)
        if given.jobs < 1:
            raise UserError(
                f"--jobs {given.jobs}: at least one mutant must be tried at a time; give 1 or more"
            )
        mutants = read_mutants(REPOSITORY / LIST)
        known = sorted({mutant.kernel for mutant in mutants})
        if unknown := sorted(set(given.only or ()) - set(known)):
            raise UserError(f"--only {unknown[0]}: has no mutants; choose from {', '.join(known)}")
        chosen = [mutant for mutant in mutants if not given.only or mutant.kernel in given.only]
        check_mutants(chosen, REPOSITORY, given.only or ())
        found = try_all(chosen, given.jobs)
        missed.extend(mutant for mutant, (killed, _) in found.items() if not killed)
        print(table(found))
        for mutant in missed:
            print(f"not noticed: {mutant.file}: {mutant.what} ({found[mutant][1]})")

    return run_command(command, argv) or int(bool(missed))


def table(found: dict[Mutant, tuple[bool, str]]) -> str:
    """Return a line for every kernel: its mutants and how many of them were noticed."""
    tried = Counter(mutant.kernel for mutant in found)
    killed = Counter(mutant.kernel for mutant, (noticed, _) in found.items() if noticed)
    rows = [{"kernel": name, "mutants": tried[name], "killed": killed[name]} for name in tried]
    rows.append({"kernel": "all", "mutants": tried.total(), "killed": killed.total()})
    return format_table(rows, ["kernel", "mutants", "killed"])


if __name__ == "__main__":
    sys.exit(main())
