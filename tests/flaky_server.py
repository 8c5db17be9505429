"""An HTTP server that fails on purpose, reproducibly, and remembers what it was asked."""

import re
import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from random import Random
from typing import Any, Self
from urllib.parse import unquote

FAULTS = ("drop", "short", "500", "503", "429")  # connection cut half-way, half of a body, errors, throttling


@dataclass
class FlakyServer:
    """Serve files from memory or from a folder on a port of this machine; a context manager.

    Args:
        files: path below the root -> content, or a folder.
        rate: share of requests that fail; which ones depends on the seed, the path, the range and how often this was
            asked before, not on the order of requests.
        faults: what may happen to them, see `FAULTS`.
        seed: of the choice.
        always: path -> fault or status that every request for it meets.
        ranges: False: a server that ignores Range, as many simple ones do.
        delay_s: before every answer, seconds.

    Attributes:
        url: the root.
        requests: (path, range, fault or "") of every request so far.
    """

    files: Mapping[str, bytes] | Path
    rate: float = 0.0
    faults: tuple[str, ...] = FAULTS
    seed: int = 0
    always: dict[str, str] = field(default_factory=dict)
    ranges: bool = True
    delay_s: float = 0.0
    requests: list[tuple[str, str, str]] = field(default_factory=list)

    def __enter__(self) -> Self:
        self._asked: Counter[tuple[str, str]] = Counter()
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"flaky": self}))
        self.url = f"http://127.0.0.1:{self._server.server_port}/sets"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *failure: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def count(self, path: str) -> int:
        """Return how often a path was asked for."""
        return sum(asked == path for asked, _, _ in self.requests)

    def content(self, path: str) -> bytes | None:
        """Return a file's content, None when there is none."""
        if isinstance(self.files, Path):
            file = self.files / path
            return file.read_bytes() if file.is_file() else None
        return self.files.get(path)

    def fault(self, path: str, place: str) -> str:
        """Return what this request meets ("" for nothing), and remember it."""
        with self._lock:
            number = self._asked[path, place]
            self._asked[path, place] += 1
            chance = Random(f"{self.seed} {path} {place} {number}")
            fault = self.always.get(path, "")
            if not fault and chance.random() < self.rate:
                fault = chance.choice(self.faults)
            self.requests.append((path, place, fault))
        return fault


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing: a reader that was killed resets its connection."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    flaky: FlakyServer

    def do_GET(self) -> None:
        flaky = self.flaky
        path = unquote(self.path).removeprefix("/sets/")
        asked = self.headers.get("Range", "")
        fault = flaky.fault(path, asked if self.command == "GET" else "HEAD")
        content = flaky.content(path)
        time.sleep(flaky.delay_s)
        if fault.isdigit() or content is None:
            self._answer(int(fault or 404), b"")
            return
        status, headers, body = 200, {}, content
        place = re.fullmatch(r"bytes=(\d+)-(\d+)", asked)
        if place and flaky.ranges:
            start, stop = int(place[1]), min(int(place[2]) + 1, len(content))
            if start >= stop:
                self._answer(416, b"", {"Content-Range": f"bytes */{len(content)}"})
                return
            status, body = 206, content[start:stop]
            headers = {"Content-Range": f"bytes {start}-{stop - 1}/{len(content)}"}
        if fault == "short":  # an honest length of too little
            body = body[: len(body) // 2]
        self._answer(status, body, headers, drop=fault == "drop", stall=fault == "stall")

    do_HEAD = do_GET

    def _answer(
        self, status: int, body: bytes, headers: Any = None, *, drop: bool = False, stall: bool = False
    ) -> None:
        try:
            self.send_response(status)
            for name, value in {**(headers or {}), "Content-Length": len(body)}.items():
                self.send_header(name, str(value))
            self.end_headers()
            if self.command == "HEAD":
                return
            if drop or stall:
                body = body[: len(body) // 2]
                self.close_connection = True
            self.wfile.write(body)
            self.wfile.flush()
            if stall:
                time.sleep(2)
        except OSError:  # the other side has had enough
            self.close_connection = True

    def log_message(self, format: str, *arguments: object) -> None:
        """Say nothing."""
