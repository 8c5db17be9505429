"""The settings of reading from afar."""

from dataclasses import dataclass
from pathlib import Path

from mnemos.sharding.errors import UserError

FIRST_RETRIES = 5


@dataclass(frozen=True, kw_only=True)
class StoreOptions:
    """How remote roots are read.

    Raises:
        UserError: a number is out of its range.
    """

    cache_dir: Path | None = None
    """Folder of the shard cache; None: mnemos/shards in the user's cache folder."""
    cache_bytes: int = 20 << 30
    """Most bytes in the cache, over all sets and processes that use it."""
    retries: int = 10
    """Attempts after the first one, for each ranged read.

    Where three requests in ten fail, one range in half a million fails eleven times; a server may be away for two
    minutes. Small files, read first, are given up after `FIRST_RETRIES`: a wrong address shows within seconds.
    """
    timeout_s: float = 30.0
    """Longest wait for a connection and for the next bytes, seconds."""
    backoff_s: float = 0.5
    """Longest wait before the second attempt, seconds; doubles with every further one, up to 30."""
    range_bytes: int = 8 << 20
    """What is asked for at once, bytes."""
    pipe: bool = False
    """Whether `pipe:` roots may run their command."""

    def __post_init__(self) -> None:
        for name, least in (("cache_bytes", 1), ("retries", 0), ("backoff_s", 0.0), ("range_bytes", 1)):
            if getattr(self, name) < least:
                raise UserError(f"{name} is {getattr(self, name)}; at least {least} is needed")
        if not self.timeout_s > 0:
            raise UserError(f"timeout_s is {self.timeout_s}; a positive number of seconds is needed")
