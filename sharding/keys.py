"""Keyed hashes: a shard set tells samples and patients apart without naming them."""

import hashlib
import hmac
import os
import secrets
from pathlib import Path

from mnemos.sharding.errors import UserError

SYNTHETIC_KEY = b"mnemos synthetic data: names nobody, so this key is public"
_KEY_BYTES = 32


def hashed_name(key: bytes, name: str) -> str:
    """Return HMAC-SHA256(key, name) as 16 hexadecimal characters."""
    return hmac.new(key, name.encode("utf-8"), hashlib.sha256).hexdigest()[:16]


def default_key_file() -> Path:
    """Return where the user's key lives unless a flag says otherwise."""
    config = os.environ.get("XDG_CONFIG_HOME", "")
    return (Path(config) if config else Path.home() / ".config") / "mnemos" / "key"


def load_key(path: Path | None = None) -> bytes:
    """Read the secret key, making it (mode 600) on first use of the default place.

    Args:
        path: a key file of at least 16 bytes; None for the default one.

    Raises:
        UserError: the named file is missing or too short, or the default one cannot be written.
    """
    file = path or default_key_file()
    if path is None and not file.exists():
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "w") as out:
                out.write(secrets.token_hex(_KEY_BYTES) + "\n")
        except FileExistsError:
            pass  # another build made it between the two lines above; that key serves
        except OSError as error:
            raise UserError(
                f"the key that hides patients' names cannot be made at {file} ({error.strerror}); "
                "name a key file of your own with --key-file FILE"
            ) from error
    if not file.is_file():
        raise UserError(
            f"key file {file} does not exist; it holds at least 16 secret bytes: check --key-file"
        )
    key = file.read_bytes().strip()
    if len(key) < 16:
        raise UserError(f"key file {file} holds {len(key)} bytes; at least 16 secret bytes are needed")
    return key
