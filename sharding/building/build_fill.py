"""Fill a set with the samples of its units, in their order, from wherever a stopped build had got to."""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from mnemos.sharding.building.journal import Journal
from mnemos.sharding.building.prepare import Preparation, Prepared, prepare_units
from mnemos.sharding.building.splits import TAIL, num_validating
from mnemos.sharding.encoding import Encoded
from mnemos.sharding.errors import UserError, num_allowed_broken
from mnemos.sharding.modalities import StoredSize
from mnemos.sharding.sources.units import Unit
from mnemos.sharding.writer import ShardSetWriter


@dataclass(kw_only=True)
class Filled:
    """What filling a set did, stopped runs included.

    Attributes:
        broken: (name, reason) of the units that could not be read; for the user's own screen.
        skipped: what was not stored, by reason, as in the manifest.
        doubtful: number of volumes whose header looks made up.
    """

    broken: list[tuple[str, str]] = field(default_factory=list)
    skipped: dict[str, int] = field(default_factory=dict)
    doubtful: int = 0


@dataclass(kw_only=True)
class SetFiller:
    """Fill one set; use once.

    A split is a stream of its own: its shards and their records say up to which unit and sample it is stored. What
    lies before is not read again, unless the unit also gives samples behind that place, or is broken and its reason
    is to be shown.

    Attributes:
        writer: open, with the journal.
        journal: open.
        units, splits: in the build's order.
        size: of the preset.
        fraction: of a single unit's samples that validate.
        max_broken: share of the units that may be broken.
        keep_duplicates: store samples of the same content, too.
    """

    writer: ShardSetWriter
    journal: Journal
    units: list[Unit]
    splits: list[str]
    size: StoredSize
    fraction: float
    max_broken: float
    keep_duplicates: bool
    _start: dict[str, tuple[int, int]] = field(init=False, repr=False)

    def fill(self, workers: int, title: str) -> Filled:
        """Read every unit that is not stored, and write its samples.

        Args:
            workers: reading processes; 0: one per core.
            title: of the progress bar.

        Raises:
            UserError: too many broken units, or no sample at all.
            OSError: the disk is full, or a reading process was killed.
        """
        from tqdm import tqdm

        filled = Filled()
        progress = self.journal.progress
        # how far stopped runs had got: progress itself moves on from there
        self._start = {split: state.position for split, state in progress.items()}
        known_broken = {number for state in progress.values() for number in state.broken}
        todo = [
            number for number in range(len(self.units)) if not self._stored(number) or number in known_broken
        ]
        preparation = Preparation(encoder=self.writer.encoder, size=self.size)
        prepared = prepare_units(
            [self.units[number] for number in todo], preparation, workers or len(os.sched_getaffinity(0))
        )
        allowed = num_allowed_broken(len(self.units), self.max_broken)
        done = len(self.units) - len(todo)
        with tqdm(total=len(self.units), initial=done, desc=title, unit="file", disable=None) as bar:
            for number, outcome in zip(todo, prepared, strict=True):
                if number in known_broken or outcome.broken:
                    reason = outcome.broken or "it was broken when this build began"
                    filled.broken.append((self.units[number].name, reason))
                    if len(filled.broken) > allowed:
                        raise UserError(_too_many_broken(filled.broken, len(self.units), allowed))
                self._take(number, outcome)
                bar.update()
        for state in progress.values():
            state.unit, state.sample = len(self.units), 0
        self._sum_up(filled)
        return filled

    def _streams(self, number: int) -> tuple[str, ...]:
        """Return the splits that a unit's samples may go to; the last one counts what it leaves out."""
        return ("train", "val") if self.splits[number] == TAIL else (self.splits[number],)

    def _stored(self, number: int) -> bool:
        return all(self._start[split] >= (number + 1, 0) for split in self._streams(number))

    def _take(self, number: int, outcome: Prepared) -> None:
        """Store the samples of a unit behind the place where its split had been stopped, and count the rest."""
        journal, places = self.journal, Counter[str]()
        for split, sample in self._dealt(number, outcome.samples):
            place = (number, places[split])
            places[split] += 1
            if place < self._start[split]:
                continue
            state = journal.progress[split]
            state.unit, state.sample = place
            if not self.keep_duplicates:
                if sample.digest in journal.seen:
                    state.duplicates += 1
                    continue
                journal.seen.add(sample.digest)
            self.writer.add(split, sample)
            journal.digests[split].append(sample.digest)
        split = self._streams(number)[-1]
        state = journal.progress[split]
        if number < self._start[split][0]:
            return  # counted before
        if outcome.broken:
            state.broken.append(number)
        passed_over = {**outcome.skipped, **({outcome.left_out: 1} if outcome.left_out else {})}
        for reason, count in passed_over.items():
            state.left_out[reason] = state.left_out.get(reason, 0) + count
        state.dropped += outcome.dropped
        state.doubtful += outcome.doubtful

    def _dealt(self, number: int, samples: tuple[Encoded, ...]) -> Iterator[tuple[str, Encoded]]:
        """Yield a unit's samples with their splits: all in one, or the last of a single unit's validate."""
        split, total = self.splits[number], len(samples)
        if split != TAIL:
            yield from ((split, sample) for sample in samples)
            return
        first_val = total - num_validating(total, self.fraction) if total > 1 else total
        for place, sample in enumerate(samples):
            yield "train" if place < first_val else "val", sample

    def _sum_up(self, filled: Filled) -> None:
        skipped, states = Counter[str](), self.journal.progress.values()
        for state in states:
            skipped.update(state.left_out)
            skipped["broken file"] += len(state.broken)
            skipped["nearly empty sub-volume"] += state.dropped
            skipped["duplicate"] += state.duplicates
        filled.skipped = {reason: number for reason, number in skipped.items() if number}
        filled.doubtful = sum(state.doubtful for state in states)
        if not self.writer.samples:
            reasons = ", ".join(f"{number} {reason}" for reason, number in filled.skipped.items())
            raise UserError(
                f"no sample could be made of {len(self.units)} files ({reasons}); check the modality and the preset"
            )


def _too_many_broken(broken: list[tuple[str, str]], total: int, allowed: int) -> str:
    listed = "; ".join(f"{name}: {reason}" for name, reason in broken[:5])
    more = f"; and {len(broken) - 5} more" if len(broken) > 5 else ""
    files = "file" if total == 1 else "files"
    return (
        f"{len(broken)} of {total} {files} cannot be read where {allowed} may be broken ({listed}{more}); "
        "mend or remove them, or allow a larger share with --max-broken"
    )
