"""What a made-up patient's visits show: the records both the films and the reports are made from."""

from dataclasses import dataclass
from typing import Literal

from mnemos.sharding.synthetic.drawing import stream

READERS = 6
CLASSES = ("clear", "opacity", "effusion")
Kind = Literal["consolidation", "nodule", "effusion"]
Side = Literal["right", "left"]
Zone = Literal["upper", "mid", "lower"]
SIDES: tuple[Side, ...] = ("right", "left")
ZONES: tuple[Zone, ...] = ("upper", "mid", "lower")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing to see on a chest film and to say in its report.

    Attributes:
        kind: "consolidation", "nodule" or "effusion".
        side: of the patient.
        zone: "upper", "mid" or "lower"; an effusion is "lower".
        size: 0 (just visible) to 1 (large).
    """

    kind: Kind
    side: Side
    zone: Zone
    size: float


@dataclass(frozen=True, kw_only=True)
class Study:
    """What one visit of one patient shows; film i and report i of a split are both made from study i.

    Attributes:
        label: one of CLASSES.
        group: the patient, a number within the split.
        findings: none for "clear".
        heart: share by which the heart is wider than usual; above 0.2 it is enlarged.
        volume: depth of breath; below -0.5 low, above 0.5 hyperinflated.
        aorta: from 0 to 1; above 0.75 tortuous.
        spine: sideways curve in units of the chest; above 0.05 in size a scoliosis.
        reader: who reads the films of this patient, 0 to READERS - 1; readers differ in wording.
        earlier: size of the first finding at the previous visit; None at the first visit.
    """

    label: str
    group: int
    findings: tuple[Finding, ...]
    heart: float
    volume: float
    aorta: float
    spine: float
    reader: int
    earlier: float | None


# Which findings a class may show, and how often.
_PATTERNS: dict[str, tuple[tuple[tuple[Kind, ...], float], ...]] = {
    "clear": (((), 1.0),),
    "opacity": ((("consolidation",), 0.5), (("nodule",), 0.35), (("consolidation", "nodule"), 0.15)),
    "effusion": ((("effusion",), 0.75), (("effusion", "consolidation"), 0.25)),
}


def draw_studies(seed: int, split: str, groups: int, visits: int) -> list[Study]:
    """Draw ``groups`` patients with ``visits`` studies each; the classes take turns, so that they are balanced.

    A patient keeps build and findings; what changes from visit to visit is the findings' size.
    """
    studies = []
    for group in range(groups):
        rng = stream(seed, "studies", split, group)
        label = CLASSES[group % len(CLASSES)]
        patterns = _PATTERNS[label]
        kinds = patterns[rng.choice(len(patterns), p=[share for _, share in patterns])][0]
        places = [
            (kind, SIDES[rng.integers(2)], "lower" if kind == "effusion" else ZONES[rng.integers(3)])
            for kind in kinds
        ]
        build = {
            "heart": float(rng.normal(0.05, 0.13)),
            "volume": float(rng.normal(0, 0.55)),
            "aorta": float(rng.uniform()),
            "spine": float(rng.normal(0, 0.035)),
        }
        reader = int(rng.integers(READERS))
        earlier = None
        for _ in range(visits):
            findings = tuple(
                Finding(kind=kind, side=side, zone=zone, size=float(rng.uniform()))
                for kind, side, zone in places
            )
            studies.append(
                Study(label=label, group=group, findings=findings, reader=reader, earlier=earlier, **build)
            )
            earlier = findings[0].size if findings else None
    return studies
