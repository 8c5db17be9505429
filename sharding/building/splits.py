"""Which units train and which validate: by group, never within one."""

from collections.abc import Iterable

from mnemos.sharding.keys import hashed_name
from mnemos.sharding.sources.units import Unit

TAIL = "tail"  # a single unit: its last samples validate


def assign_splits(units: list[Unit], fraction: float, key: bytes) -> list[str]:
    """Assign every unit to a split.

    Groups whose publisher names a split keep it. The others are ranked by their keyed hash and the first share of
    the ranks validates, so that the result depends on the groups and the key, not on the order of files. With two
    such groups or more each split has at least one.

    Args:
        units: what was found; a unit without a group is its own; those left out have no say.
        fraction: share of the groups that validates, 0 <= fraction < 1; 0: none does but those published so.
        key: secret bytes.

    Returns:
        "train" or "val" for each unit. With a single group the last units by name validate, which is not
        independent of training; with a single unit the word is "tail": its last samples do.
    """
    groups = [unit.group or unit.name for unit in units]
    kept = [(unit, group) for unit, group in zip(units, groups, strict=True) if not unit.left_out]
    published = _published(kept)
    free = [(unit, group) for unit, group in kept if group not in published]
    ranked = sorted({group for _, group in free}, key=lambda group: hashed_name(key, f"split:{group}"))
    if fraction and not published and len(ranked) == 1:
        if len(free) == 1:
            return [TAIL] * len(units)
        names = sorted(unit.name for unit, _ in free)
        tail = set(names[-num_validating(len(names), fraction) :])
        return ["val" if unit.name in tail else "train" for unit in units]
    validating = {group for group, split in published.items() if split == "val"}
    if fraction and ranked:
        validating.update(ranked[: num_validating(len(ranked), fraction)])
    return ["val" if group in validating else "train" for group in groups]


def num_validating(total: int, fraction: float) -> int:
    """Return the share of a total, at least one and never all; 0 of a total of one."""
    return min(max(1, round(total * fraction)), total - 1)


def _published(kept: Iterable[tuple[Unit, str]]) -> dict[str, str]:
    """Return the split of every group that has a published one; a group on both sides validates as a whole."""
    splits: dict[str, str] = {}
    for unit, group in kept:
        if unit.split and splits.get(group) != "val":
            splits[group] = unit.split
    return splits
