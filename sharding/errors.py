"""The two kinds of mistakes the data side reports in one sentence instead of a traceback."""

from pathlib import Path

FEW = 10  # below this number of files or samples none may be broken; from it on, one always may


class UserError(ValueError):
    """What the user gave cannot be used: a flag, a path, a file of the wrong kind.

    The message says what came, what is allowed and what to do. Command lines print it alone and exit 2.
    """


class DataError(ValueError):
    """One sample (or one shard) is broken: unreadable, truncated, of the wrong size.

    Args:
        reason: what is wrong, as a sentence without the address.
        source: the file or shard it was found in.
        key: the sample's key inside a shard; empty for a source file.
    """

    def __init__(self, reason: str, *, source: Path | str = "", key: str = "") -> None:
        address = ":".join(part for part in (str(source), key) if part)
        super().__init__(f"{address}: {reason}" if address else reason)
        self.reason = reason


class LeftOut(ValueError):
    """A sound file that is left out on purpose, counted apart from the broken ones.

    The message is a reason without any name in it, because it is counted in the manifest.
    """


class StoreError(OSError):
    """A file system or an object store that failed after every retry; the message names the shard.

    Worth another try later: command lines exit 75.
    """


def num_allowed_broken(total: int, fraction: float) -> int:
    """Return how many of ``total`` files or samples may be broken: the share, at least one; none of fewer than ten."""
    return max(1, int(total * fraction)) if fraction and total >= FEW else 0
