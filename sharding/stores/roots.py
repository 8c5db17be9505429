"""Roots and names as users and manifests write them: which kind, what is refused, and how two are joined."""

import os
import re
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from mnemos.sharding.errors import UserError

PIPE = "pipe:"
PLACE = "{name}"  # where a pipe: command has the file's name
REMOTE_SCHEMES = ("http", "https", "s3", "gs", "az")
ALLOWED = "a folder, file://, http(s)://, s3://, gs://, az:// and pipe: are read"
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")


def as_root(text: str) -> str | Path:
    """Return a root as it is written on a command line: a path, or the text where it is a URL or a pipe."""
    return text if text.startswith(PIPE) or _SCHEME.match(text) else Path(text)


def local_folder(root: str | Path) -> Path | None:
    """Return the folder a root names, None for a remote root.

    Raises:
        UserError: a file:// URL of another machine.
    """
    if isinstance(root, str):
        root = as_root(root)
    if isinstance(root, Path):
        return root
    if not root.startswith("file://"):
        return None
    parts = urlsplit(root)
    if parts.netloc not in ("", "localhost"):
        raise UserError("a file:// root names a folder of this machine: file:///FOLDER, without a host")
    return Path(url2pathname(parts.path))


def checked_url(url: str) -> str:
    """Return a remote URL without a slash at its end; its secrets never get into a message.

    Raises:
        UserError: it is of another kind, holds credentials or a query, or names no host or bucket.
    """
    scheme = url.partition("://")[0]
    if scheme not in REMOTE_SCHEMES:
        raise UserError(f"{scheme}:// is no kind of root; {ALLOWED}")
    try:
        parts = urlsplit(url)
    except ValueError:
        raise UserError(
            f"the {scheme}:// root is no valid URL; give {scheme}://HOST-OR-BUCKET/FOLDER"
        ) from None
    shown = f"{scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
    if "@" in parts.netloc:
        raise UserError(
            f"the root {shown} came with a user or a password; leave them out: object stores take credentials from "
            "the environment"
        )
    if parts.query or parts.fragment or url.endswith(("?", "#")):
        raise UserError(
            f"the root {shown} came with a ? or # part; leave it out: names of files follow a root"
        )
    if not parts.netloc:
        raise UserError(f"the root {url} has no host or bucket; give {scheme}://HOST-OR-BUCKET/FOLDER")
    return url.rstrip("/")


def checked_name(name: str, shown: str) -> str:
    """Return a name that stays below its root.

    Args:
        name: relative, "/" between folders.
        shown: the root, for the message.

    Raises:
        UserError: it is absolute, has a "..", a backslash, a scheme, an empty part or a control character.
    """
    parts = name.split("/")
    if (
        any(part in ("", ".", "..") for part in parts)
        or "\\" in name
        or ":" in parts[0]
        or not name.isprintable()
    ):
        raise UserError(f"the name {name!r} leads out of {shown}; names are relative, like train/000000.tar")
    return name


def join_root(root: str | Path, name: str) -> str:
    """Return the root of a folder below a root.

    Raises:
        UserError: the name leads out of it.
    """
    if isinstance(root, str):
        if root.startswith(PIPE):
            return root.replace(PLACE, f"{checked_name(name, 'the root')}/{PLACE}")
        if _SCHEME.match(root):
            return f"{root.rstrip('/')}/{checked_name(name, 'the root')}"
    return str(Path(root) / checked_name(name, "the root"))


def default_cache_dir() -> Path:
    """Return mnemos/shards in the user's cache folder.

    Raises:
        UserError: there is no home folder.
    """
    chosen = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        caches = chosen if chosen.is_absolute() else Path("~/.cache").expanduser()
    except RuntimeError as error:
        raise UserError("there is no home folder for the shard cache: set XDG_CACHE_HOME") from error
    return caches / "mnemos" / "shards"
