"""Objects that a command of the user's prints, for stores nothing else here speaks to (`pipe:` roots)."""

import contextlib
import os
import re
import select
import shlex
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import IO

from mnemos.sharding.errors import UserError
from mnemos.sharding.stores.roots import PLACE
from mnemos.sharding.stores.transfer import Passing, TooBig, Unranged

PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_./=+@-]*")
CHUNK_BYTES = 1 << 20


class CommandReader:
    """Runs a shell command for every object; see `transfer.Reader`.

    Args:
        command: a line for the shell in which `{name}` stands for the object's name, without quotes of its own.
        timeout_s: longest wait for the next bytes, seconds.

    Raises:
        UserError: the line has no `{name}`.
    """

    ranged = False

    def __init__(self, command: str, timeout_s: float) -> None:
        if PLACE not in command:
            raise UserError(f"a pipe: command needs {PLACE} where the shard's name goes; this one has none")
        self.command = command
        self.timeout_s = timeout_s

    def exists(self, name: str) -> bool:
        """Say whether the command prints anything: why it failed, a command cannot say."""
        try:
            return self._run(name, None, 0) > 0
        except TooBig:
            return True
        except Passing:
            return False

    def copy(self, name: str, path: Path, most_bytes: int) -> int:
        with path.open("r+b") as file:
            return self._run(name, file, most_bytes)

    def fetch(self, name: str, start: int, stop: int, path: Path) -> None:
        raise Unranged

    def _run(self, name: str, file: IO[bytes] | None, most_bytes: int) -> int:
        # names come out of a manifest; a quote around {name} in the command would undo ours
        if not PLAIN_NAME.fullmatch(name):
            raise UserError(
                f"the name {name!r} is not given to a shell; letters, digits and _ . / = + @ - are allowed"
            )
        line = self.command.replace(PLACE, shlex.quote(name))
        with tempfile.TemporaryFile() as errors:
            started = subprocess.Popen(
                line,
                shell=True,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,  # so that the whole pipeline can be ended
            )
            try:
                num_bytes = self._drain(started, file, most_bytes)
                code = started.wait(self.timeout_s)
            except subprocess.TimeoutExpired:
                raise Passing(f"the command did not end within {self.timeout_s:g} s of its output") from None
            finally:
                _end(started)
            if code:
                raise Passing(f"the command ended with code {code}{_last_line(errors)}")
            return num_bytes

    def _drain(self, started: subprocess.Popen[bytes], file: IO[bytes] | None, most_bytes: int) -> int:
        assert started.stdout is not None
        num_bytes = 0
        while True:
            ready, _, _ = select.select([started.stdout], [], [], self.timeout_s)
            if not ready:
                raise Passing(f"the command printed nothing for {self.timeout_s:g} s")
            chunk = os.read(started.stdout.fileno(), CHUNK_BYTES)
            if not chunk:
                return num_bytes
            num_bytes += len(chunk)
            if num_bytes > most_bytes:
                raise TooBig(f"the command prints more than {most_bytes} bytes")
            if file is not None:
                file.write(chunk)


def _end(started: subprocess.Popen[bytes]) -> None:
    """End a command with everything it started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):  # nothing of it is left
        os.killpg(started.pid, signal.SIGKILL)
    started.wait()
    if started.stdout is not None:
        started.stdout.close()


def _last_line(errors: IO[bytes]) -> str:
    errors.seek(max(0, errors.seek(0, os.SEEK_END) - 400))
    lines = errors.read().decode("utf-8", "replace").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return f": {last[:200]}" if last else ""
