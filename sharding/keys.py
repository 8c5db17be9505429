"""Keyed hashes: a shard set tells samples and patients apart without naming them.

The key is a secret of the place that holds the originals. It is in no shard, manifest, log or message.
"""

import hashlib
import hmac
import os
import secrets
import stat
from dataclasses import dataclass, field
from pathlib import Path

from mnemos.sharding.errors import UserError

SYNTHETIC_KEY = b"mnemos synthetic data: names nobody, so this key is public"
LEAST_BYTES = 16
_MADE_BYTES = 32
_CHECKED = "mnemos: is it the same key?"


@dataclass(frozen=True, kw_only=True)
class OpenedKey:
    """A key as read from its file.

    Attributes:
        key: the secret; left out of repr, so that no traceback or log shows it.
        notes: sentences for the user's own screen: a key was made, a key lies open.
    """

    key: bytes = field(repr=False)
    notes: tuple[str, ...] = ()


def hashed_name(key: bytes, name: str) -> str:
    """Return HMAC-SHA256(key, name) as 16 hexadecimal characters."""
    return _hmac(key, name)[:16]


def key_check(key: bytes) -> str:
    """Return what a resumed build compares to notice another key: HMAC-SHA256(key, a fixed phrase), hexadecimal.

    It belongs into the journal of an unfinished build and nowhere else.
    """
    return _hmac(key, _CHECKED)


def default_key_file() -> Path:
    """Return where the user's key lives unless a flag says otherwise."""
    config = os.environ.get("XDG_CONFIG_HOME", "")
    return (Path(config) if config else Path.home() / ".config") / "mnemos" / "key"


def open_key(path: Path | None = None, out: Path | None = None) -> OpenedKey:
    """Read the secret key, making the file (mode 600) on first use.

    Args:
        path: the key file; None for the default one.
        out: the shard set's folder: no key may lie in there, because sets are passed on.

    Raises:
        UserError: the file lies inside `out`, is no file, holds fewer than 16 bytes, or cannot be made or read.
    """
    file = path or default_key_file()
    if out is not None and file.resolve().is_relative_to(out.resolve()):
        raise UserError(
            f"key file {file} would lie inside the shard set {out}, which is passed on with it; "
            "name a place outside with --key-file FILE"
        )
    notes = []
    try:
        if _made(file):
            notes.append(f"a new secret key was made at {file}; the same key gives the same shards: keep it")
        key, mode = file.read_bytes().strip(), stat.S_IMODE(file.stat().st_mode)
    except OSError as error:
        raise UserError(
            f"key file {file}, which hides patients' names, cannot be made or read ({error.strerror}); "
            "name one of your own with --key-file FILE"
        ) from error
    if len(key) < LEAST_BYTES:
        raise UserError(
            f"key file {file} holds {len(key)} bytes; at least {LEAST_BYTES} secret bytes are needed: "
            "name another one, which is made where it does not exist"
        )
    if mode & 0o077:
        notes.append(
            f"key file {file} can be read by others (mode {mode:o}), and with it names can be guessed from shards; "
            f"close it: chmod 600 {file}"
        )
    return OpenedKey(key=key, notes=tuple(notes))


def _made(file: Path) -> bool:
    """Make a key file unless there is one; tell whether it was made."""
    if file.exists():
        return False
    file.parent.mkdir(parents=True, exist_ok=True)
    # Written beside and linked into place: another build that starts now meets the whole key or none.
    beside = file.with_name(f".{file.name}.{os.getpid()}.{secrets.token_hex(4)}")
    descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w") as out:
            out.write(secrets.token_hex(_MADE_BYTES) + "\n")
        os.link(beside, file)
    except FileExistsError:
        return False  # another build was quicker; its key serves
    finally:
        beside.unlink()
    return True


def _hmac(key: bytes, text: str) -> str:
    # surrogateescape: a file system may hold names that are not UTF-8
    return hmac.new(key, text.encode("utf-8", "surrogateescape"), hashlib.sha256).hexdigest()
