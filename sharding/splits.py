"""Which units train and which validate: by group, never within one."""

from mnemos.sharding.keys import hashed_name
from mnemos.sharding.sources.units import Unit

TAIL = "tail"  # a single unit: its last samples validate


def assign_splits(units: list[Unit], fraction: float, key: bytes) -> list[str]:
    """Assign every unit to a split.

    Groups are ranked by their keyed hash and the first share of the ranks validates, so that the result
    depends on the groups and the key, not on the order of files. With two groups or more each split has at
    least one.

    Args:
        units: what was found; a unit without a group is its own.
        fraction: share of the groups that validates, 0 <= fraction < 1; 0: none does.
        key: secret bytes.

    Returns:
        "train" or "val" for each unit. With a single group the last units by name validate, which is not
        independent of training; with a single unit the word is "tail": its last samples do.
    """
    groups = [unit.group or unit.name for unit in units]
    ranked = sorted(set(groups), key=lambda group: hashed_name(key, f"split:{group}"))
    if fraction == 0:
        return ["train"] * len(units)
    if len(units) == 1:
        return [TAIL]
    if len(ranked) == 1:
        names = sorted(unit.name for unit in units)
        validating = set(names[-num_validating(len(names), fraction) :])
        return ["val" if unit.name in validating else "train" for unit in units]
    validating = set(ranked[: num_validating(len(ranked), fraction)])
    return ["val" if group in validating else "train" for group in groups]


def num_validating(total: int, fraction: float) -> int:
    """Return the share of a total, at least one and never all; 0 of a total of one."""
    return min(max(1, round(total * fraction)), total - 1)
