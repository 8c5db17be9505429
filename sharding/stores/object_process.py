"""The process that talks to object stores and HTTP servers, through obstore.

obstore runs on threads of its own that do not survive a fork: in a forked child its first call waits for ever (tried
with 0.12.1), and loaders fork. So no process of a run uses obstore itself; each one asks a process like this
(`objects`), which never forks. It also writes what it reads straight into the file it is told, so shards do not pass
through Python twice.

One JSON line in, one out::

    {"id": 1, "do": "exists" | "copy" | "fetch", "root": URL, "name": str, "timeout_s": float, ...}
    {"id": 1, "value": ...}   or   {"id": 1, "fault": "passing" | "refused" | "gone" | ..., "reason": str}

Every request is one attempt: repeating is the asking side's affair.
"""

import configparser
import functools
import json
import os
import re
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any, Self

THREADS = 16
CHUNK_BYTES = 1 << 20
LEAST_BYTES_PER_S = 64 << 10  # an answer slower than this is given up, however steadily it drips
PASSING_STATUS = frozenset({408, 425, 429})  # and every 5xx
KEYS_ELSEWHERE = (  # variables with which obstore finds its keys itself
    "AWS_ACCESS_KEY_ID",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    "AWS_SKIP_SIGNATURE",
)
KEYS_BY_PROGRAM = ("sso_", "role_arn", "credential_process")
FILE_SETTINGS = {  # name in the AWS command line's files -> obstore's, and the variables that go before it
    "aws_access_key_id": ("access_key_id", ()),
    "aws_secret_access_key": ("secret_access_key", ()),
    "aws_session_token": ("session_token", ()),
    "region": ("region", ("AWS_REGION", "AWS_DEFAULT_REGION")),
    "endpoint_url": ("endpoint", ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT")),
}

_without_ranges: set[str] = set()  # roots whose server answers a range with the whole


class Fault(Exception):
    """A failure with its kind, as it goes back to the asking process."""

    def __init__(self, kind: str, reason: str, number: int = 0) -> None:
        super().__init__(reason)
        self.kind, self.number = kind, number


def longest_s(timeout_s: float, num_bytes: int) -> float:
    """Return how long an answer of so many bytes may take in all, seconds."""
    return timeout_s + num_bytes / LEAST_BYTES_PER_S


def classify(error: Exception) -> Fault:
    """Return the kind of an obstore error, with one line of reason that holds no credentials.

    obstore has one class for most failures; the status and the cause stand in its text.
    """
    text, _, debug = str(error).partition("\n\nDebug source")
    status = re.search(r"status code: (\d{3})(?: [\w ]+)?", text)
    causes = re.findall(
        r'(?:message|error): "([^"]+)"|\b(TimedOut|IncompleteBody|InvalidCertificate)\b', debug
    )
    reason = f"HTTP {status[0].removeprefix('status code: ')}" if status else " ".join(text.split())
    if named := re.search(r"<Code>(\w+)</Code>", text):  # what S3 calls it
        reason += f" {named[1]}"
    for cause in dict.fromkeys(part for pair in causes for part in pair if part and not status):
        reason += f" ({cause})"
    reason = re.sub(r"(https?://[^\s?]*)\?\S+", r"\1?...", reason)[:300]  # a query may be a signature
    if isinstance(error, FileNotFoundError):
        return Fault("gone", reason)
    if status:
        code = int(status[1])
        return Fault("passing" if code >= 500 or code in PASSING_STATUS else "refused", reason)
    # sound errors of obstore have classes of their own: permission, sign-in, path, setting
    generic = type(error).__name__ in ("GenericError", "JoinError") and "InvalidCertificate" not in debug
    unset = "must be specified" in text or "Missing" in debug.partition("source:")[2][:40]
    return Fault("passing" if generic and not unset else "refused", reason)


def aws_settings() -> dict[str, str]:
    """Return keys, region and endpoint of the AWS command line's files, which obstore does not read.

    Without those that the environment has, too; empty when it says where keys are.

    Raises:
        Fault: the profile's keys come from a program (single sign-on, roles), or a file cannot be understood.
    """
    if any(os.environ.get(name) for name in KEYS_ELSEWHERE):
        return {}
    profile = os.environ.get("AWS_PROFILE", "default")
    folder = Path("~/.aws").expanduser()
    files = (
        (os.environ.get("AWS_CONFIG_FILE", folder / "config"), f"profile {profile}"),
        (os.environ.get("AWS_SHARED_CREDENTIALS_FILE", folder / "credentials"), profile),
    )
    found: dict[str, str] = {}
    for file, section in files:
        parser = configparser.RawConfigParser()
        try:
            parser.read(file)
        except configparser.Error:  # its message quotes the line, which may be a key
            raise Fault("refused", f"{file} is not written as the AWS command line writes it") from None
        section = "default" if profile == "default" else section
        found |= dict(parser[section]) if parser.has_section(section) else {}
    if "aws_access_key_id" not in found and any(name.startswith(KEYS_BY_PROGRAM) for name in found):
        raise Fault(
            "refused",
            f"the AWS profile {profile!r} has no static keys: put temporary ones into the environment "
            f"(aws configure export-credentials --profile {profile} --format env)",
        )
    return {
        setting: found[name]
        for name, (setting, variables) in FILE_SETTINGS.items()
        if name in found and not any(os.environ.get(variable) for variable in variables)
    }


@functools.lru_cache(maxsize=64)
def store_of(root: str, timeout_s: float, whole_s: float) -> Any:
    """Return obstore's store of a root; ours is the only repeating.

    Args:
        root: the URL.
        timeout_s: longest wait for the connection, and for the next bytes, seconds.
        whole_s: longest time for a whole answer, seconds.
    """
    from obstore.store import HTTPStore, from_url

    settings = aws_settings() if root.startswith("s3://") else {}
    endpoints = [value for name, value in os.environ.items() if "ENDPOINT" in name]
    places = [root, settings.get("endpoint", ""), *endpoints]
    options: Any = {
        "allow_http": any(place.startswith("http://") for place in places),
        "connect_timeout": timedelta(seconds=timeout_s),
        "read_timeout": timedelta(seconds=timeout_s),
        "timeout": timedelta(seconds=whole_s),
    }
    retry: Any = {"max_retries": 0, "retry_timeout": timedelta(seconds=whole_s)}
    if root.startswith(("http://", "https://")):
        # from_url would take some hosts for their owner's object store, and sign
        return HTTPStore(root, client_options=options, retry_config=retry)
    arguments: Any = {"client_options": options, "retry_config": retry, **settings}
    return from_url(root, **arguments)


def do_exists(request: dict[str, Any]) -> bool:
    import obstore

    try:
        obstore.head(_store(request, 0), request["name"])
    except FileNotFoundError:
        return False
    return True


def do_copy(request: dict[str, Any]) -> int:
    most_bytes = request["most_bytes"]
    answer = _get(request, most_bytes)
    size = answer.meta["size"]
    if size > most_bytes:
        raise Fault("too big", f"it has {size} bytes where {most_bytes} are allowed")
    place = 0
    with _opened(request["path"]) as file:
        for chunk in answer.stream(min_chunk_size=CHUNK_BYTES):
            if place + len(chunk) > size:
                raise Fault("passing", f"more than the {size} announced bytes came")
            place += file.write_at(chunk, place)
    if place != size:
        raise Fault("passing", f"{place} of {size} bytes came")
    return place


def _get(request: dict[str, Any], most_bytes: int) -> Any:
    """Begin to read an object; as a range, because the answer to that tells its whole length beside its own."""
    import obstore
    from obstore.exceptions import GenericError, NotSupportedError

    store, name = _store(request, most_bytes), request["name"]
    if request["root"] not in _without_ranges:
        try:
            return obstore.get(store, name, options={"range": (0, max(1, most_bytes))})
        except NotSupportedError:
            _without_ranges.add(request["root"])
        except GenericError as error:
            if "status code: 416" not in str(error):  # an empty object has no range
                raise
    return obstore.get(store, name)


def do_fetch(request: dict[str, Any]) -> None:
    import obstore
    from obstore.exceptions import NotSupportedError

    start, stop = request["start"], request["stop"]
    try:
        data = obstore.get_range(_store(request, stop - start), request["name"], start=start, end=stop)
    except NotSupportedError as error:
        raise Fault("unranged", "it does not give parts of a file") from error
    if len(data) != stop - start:
        raise Fault("passing", f"{len(data)} of {stop - start} bytes came")
    with _opened(request["path"]) as file:
        file.write_at(data, start)


DO = {"exists": do_exists, "copy": do_copy, "fetch": do_fetch}


class _opened:
    """A local file that exists, opened for writing anywhere; its failures become faults of the disk."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __enter__(self) -> Self:
        try:
            self.number = os.open(self.path, os.O_WRONLY)
        except OSError as error:
            raise _disk_fault(error) from error
        return self

    def write_at(self, data: Any, place: int) -> int:
        """Write all of a buffer and return its length, bytes."""
        view = memoryview(data).cast("B")
        done = 0
        try:
            while done < len(view):
                done += os.pwrite(self.number, view[done:], place + done)
        except OSError as error:
            raise _disk_fault(error) from error
        return done

    def __exit__(self, *failure: object) -> None:
        os.close(self.number)


def _disk_fault(error: OSError) -> Fault:
    return Fault("disk", error.strerror or str(error), error.errno or 0)


def _store(request: dict[str, Any], num_bytes: int) -> Any:
    # doubling steps keep the number of stores, each with connections of its own, small
    steps = 1 << max(0, num_bytes - 1).bit_length()
    return store_of(request["root"], request["timeout_s"], longest_s(request["timeout_s"], steps))


def answer(line: bytes) -> dict[str, Any]:
    """Do what one line asks; never raises."""
    request = json.loads(line)
    try:
        return {"id": request["id"], "value": DO[request["do"]](request)}
    except Exception as error:  # noqa: BLE001  # whatever it is, somebody waits for the answer
        fault = error if isinstance(error, Fault) else classify(error)
        return {"id": request["id"], "fault": fault.kind, "reason": str(fault), "number": fault.number}


def main() -> None:
    """Answer requests until the other side closes its end."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # whoever asks decides; launchers signal grandchildren, too
    lock = threading.Lock()

    def serve(line: bytes) -> None:
        text = json.dumps(answer(line)).encode() + b"\n"
        with lock:
            sys.stdout.buffer.write(text)
            sys.stdout.buffer.flush()

    pool = ThreadPoolExecutor(THREADS)
    for line in sys.stdin.buffer:
        pool.submit(serve, line)
    os._exit(0)  # what is under way was asked for by nobody who still listens


if __name__ == "__main__":
    main()
