"""A process that measures for a bench: asked and answered in lines of JSON over a socket."""

import json
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from mnemos.sharding.errors import UserError


class WorkerProcess:
    """One process; killed at the end of the block.

    Args:
        title: for messages.
        script: it runs; its only argument is the descriptor of the socket.
        log: file its output goes to, in the folder it runs in.
        environment: its own.
    """

    def __init__(self, title: str, script: Path, log: Path, environment: Mapping[str, str]) -> None:
        self.title, self.log = title, log
        ours, theirs = socket.socketpair()
        with theirs, log.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, str(script), str(theirs.fileno())],
                env=environment,
                cwd=log.parent,
                stdout=file,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C is ours to act on
            )
        self.lines = ours.makefile("rw")
        ours.close()  # the file keeps it open

    def send(self, what: object) -> None:
        """Ask without waiting.

        Raises:
            UserError: the process ended.
        """
        try:
            print(json.dumps(what), file=self.lines, flush=True)
        except OSError:
            self._ended()

    def answer(self) -> Any:
        """Wait for the answer.

        Raises:
            UserError: the process ended.
        """
        try:
            line = self.lines.readline()
        except OSError:
            line = ""
        return json.loads(line) if line else self._ended()

    def _ended(self) -> Any:
        raise UserError(f"{self.title}: its process ended: {last_line(self.log)}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.wait()


def last_line(log: Path) -> str:
    """Return the last line of a file that says something."""
    lines = log.read_text(encoding="utf-8").splitlines()
    return next((line for line in reversed(lines) if line.strip()), "it said nothing")
