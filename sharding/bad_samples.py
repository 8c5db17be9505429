"""What could not be read: skipped, told with its address, and too much of it ends the run."""

import sys
from collections.abc import Mapping, Sequence

from mnemos.sharding.errors import DataError, num_allowed_broken
from mnemos.sharding.reader import ShardSet, Skipped


class BadSamples:
    """The samples a process met and could not read, each counted once.

    Args:
        share: of a set that may be broken before reading ends.

    Attributes:
        reasons: by (root, split, number of the sample).
    """

    def __init__(self, share: float) -> None:
        self.share = share
        self.reasons: dict[tuple[str, str, int], str] = {}

    def __len__(self) -> int:
        return len(self.reasons)

    def note(self, shards: ShardSet, skipped: Skipped) -> None:
        """Count a skipped sample and tell its shard and key.

        Raises:
            DataError: more samples of this set are broken than may be.
        """
        place = (shards.store.root, shards.split, skipped.place)
        if place in self.reasons:
            return
        self.reasons[place] = skipped.reason
        self.check(self.reasons, [shards])
        print(f"skipped {skipped.reason}", file=sys.stderr, flush=True)

    def check(self, reasons: Mapping[tuple[str, str, int], str], sets: Sequence[ShardSet]) -> None:
        """Raise DataError where more samples of a set are broken than may be."""
        for shards in sets:
            here = [reason for key, reason in reasons.items() if key[:2] == (shards.store.root, shards.split)]
            allowed = num_allowed_broken(len(shards), self.share)
            if len(here) > allowed:
                raise DataError(
                    f"{here[-1]}; {len(here)} of {len(shards)} samples of this set are broken, {allowed} may be (data.max_bad)"
                )
