"""Objects of http(s), s3, gs and az roots, read by a process of their own (`object_process` says why).

One such process serves every root a process reads from. It starts with the first request, again after it died, and
anew in a forked child; it ends with the process that asked.
"""

import atexit
import contextlib
import json
import os
import subprocess
import sys
import threading
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NoAnswerError
from pathlib import Path
from typing import Any

from mnemos.sharding.stores.object_process import longest_s
from mnemos.sharding.stores.transfer import Gone, Passing, Refused, TooBig, Unranged

SETTINGS = ("AWS_", "AZURE_", "GOOGLE_", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "SSL_CERT_")
GRACE_S = 10.0  # on top of the times the process keeps itself
FAULTS = {"passing": Passing, "refused": Refused, "gone": Gone, "too big": TooBig, "unranged": Unranged}


class ObjectReader:
    """Reads one root; see `transfer.Reader`.

    Args:
        root: http://, https://, s3://, gs:// or az:// URL without credentials.
        timeout_s: longest wait for a connection, and for the next bytes, seconds.
    """

    ranged = True

    def __init__(self, root: str, timeout_s: float) -> None:
        self.root = root
        self.timeout_s = timeout_s

    def exists(self, name: str) -> bool:
        return bool(self._ask("exists", name, 0))

    def copy(self, name: str, path: Path, most_bytes: int) -> int:
        return int(self._ask("copy", name, most_bytes, most_bytes=most_bytes, path=str(path)))

    def fetch(self, name: str, start: int, stop: int, path: Path) -> None:
        self._ask("fetch", name, stop - start, start=start, stop=stop, path=str(path))

    def _ask(self, do: str, name: str, num_bytes: int, **request: object) -> Any:
        request |= {"do": do, "name": name, "root": self.root, "timeout_s": self.timeout_s}
        return _process().ask(request, longest_s(self.timeout_s, 2 * num_bytes) + GRACE_S)


class _Process:
    """The asking end of one reading process; any thread may ask."""

    def __init__(self) -> None:
        # -P: the folder a run was started in must not lend its files as modules
        command = [sys.executable, "-P", "-m", "mnemos.sharding.stores.object_process"]
        self.started = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
        self.lock = threading.Lock()
        self.number = 0
        self.waiting: dict[int, Future[dict[str, Any]]] = {}
        self.alive = True
        threading.Thread(target=self._listen, daemon=True).start()

    def ask(self, request: dict[str, Any], longest: float) -> Any:
        """Return the answer to one request.

        Raises:
            Passing, Refused, Unranged, OSError: what the process reports; `Passing` also when it ended or is silent.
        """
        future: Future[dict[str, Any]] = Future()
        with self.lock:
            self.number += 1
            line = json.dumps({"id": self.number, **request}).encode() + b"\n"
            self.waiting[self.number] = future
            try:
                assert self.started.stdin is not None
                while line:
                    line = line[self.started.stdin.write(line) or 0 :]
            except OSError as error:
                self.end()
                raise Passing("the reading process has ended") from error
        if not self.alive:  # it ended in between: nobody would answer
            self._give_up()
        try:
            answer = future.result(longest)
        except NoAnswerError:
            self.end()
            raise Passing(f"no answer within {longest:.0f} s") from None
        if "fault" not in answer:
            return answer["value"]
        if answer["fault"] == "disk":
            raise OSError(answer["number"], answer["reason"])
        raise FAULTS[answer["fault"]](answer["reason"])

    def _listen(self) -> None:
        assert self.started.stdout is not None
        left = b""
        # not through a buffered file: a fork at the wrong moment would leave the child its lock
        while chunk := os.read(self.started.stdout.fileno(), 1 << 16):
            *lines, left = (left + chunk).split(b"\n")
            for line in lines:
                answer = json.loads(line)
                if future := self.waiting.pop(answer["id"], None):
                    future.set_result(answer)
        self.alive = False
        self.started.wait()
        self._give_up()

    def _give_up(self) -> None:
        while self.waiting:
            with contextlib.suppress(KeyError):  # another thread took the last one
                _, future = self.waiting.popitem()
                future.set_result({"fault": "passing", "reason": "the reading process has ended"})

    def end(self) -> None:
        """End the process; its listening thread answers whoever still waits."""
        self.alive = False
        self.started.kill()
        self.started.wait()

    def disown(self) -> None:
        """Let go of a process that belongs to the parent of this forked one."""
        self.started.returncode = 0
        for pipe in (self.started.stdin, self.started.stdout):
            if pipe is not None:
                pipe.close()


_processes: dict[tuple[tuple[str, str], ...], _Process] = {}  # by the settings they were started with
_starting = threading.Lock()


def _process() -> _Process:
    # a process keeps the environment it was started with
    settings = tuple(sorted(item for item in os.environ.items() if item[0].upper().startswith(SETTINGS)))
    with _starting:
        process = _processes.get(settings)
        if process is None or not process.alive:
            process = _processes[settings] = _Process()
        return process


def _after_fork() -> None:
    global _starting
    _starting = threading.Lock()  # the parent's may have been held by another of its threads
    for process in _processes.values():
        process.disown()
    _processes.clear()


def _at_exit() -> None:
    for process in _processes.values():
        process.end()


os.register_at_fork(after_in_child=_after_fork)
atexit.register(_at_exit)
