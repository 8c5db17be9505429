"""What a sample's members are: its payload, and what says more of it: `.json` (label, group, scale, shift), `.cls`."""

from dataclasses import dataclass
from typing import Any

from mnemos.sharding.tar_members import Member, Sample, small_json

_EXTENSIONS = {"jpg": ("jpg", "jpeg")}  # of a payload kind, where it has others than its own name

_LARGEST = 1e38  # of float32, which the index stores
_NAME_CHARACTERS = 100  # most of a class or a group


@dataclass(frozen=True, kw_only=True, slots=True)
class Description:
    """Label and group, "" where there is none; scale and shift, None where they are not said; the whole JSON."""

    label: str
    group: str
    scale: float | None
    shift: float | None
    record: dict[str, Any]


def payload_members(sample: Sample, payload: str) -> list[Member]:
    """Return the members of a sample that could be its payload, of this kind."""
    extensions = _EXTENSIONS.get(payload, (payload,))
    return [sample.members[extension] for extension in extensions if extension in sample.members]


def describe(tar: memoryview, sample: Sample) -> Description:
    """Read the members that describe a sample.

    Raises:
        ValueError: one of them is too large, cannot be read, or says something of another type.
    """
    member, label = sample.members.get("json"), ""
    record = small_json(tar[member.offset : member.offset + member.size]) if member else {}
    if member := sample.members.get("cls"):
        if member.size > 4 * _NAME_CHARACTERS:
            raise ValueError(f"its .cls has {member.size} bytes, more than a class name")
        label = bytes(tar[member.offset : member.offset + member.size]).decode("utf-8").strip()
        if not label.isprintable():
            raise ValueError("its .cls holds no class name")
    return Description(
        label=_name(record, "label") or label,
        group=_name(record, "group"),
        scale=_number(record, "scale"),
        shift=_number(record, "shift"),
        record=record,
    )


def _name(record: dict[str, Any], field: str) -> str:
    value = record.get(field)
    if value is None:
        return ""
    name = str(value).strip() if isinstance(value, str | int) else "\n"
    if len(name) <= _NAME_CHARACTERS and name.isprintable():  # no half of a surrogate pair among it
        return name
    raise ValueError(
        f"its JSON has {field} {str(value)[:40]!r}, not a name of up to {_NAME_CHARACTERS} characters"
    )


def _number(record: dict[str, Any], field: str) -> float | None:
    value = record.get(field)
    if value is None:
        return None
    # NaN is not below anything
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _LARGEST:
        return float(value)
    raise ValueError(f"its JSON has {field} {str(value)[:40]!r}, not a finite number")
