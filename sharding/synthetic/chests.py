"""Chest films: X-ray-like projections of lungs, heart, ribs and what may be wrong with them.

A film is a sum of attenuations in the coordinates of the chest (x to the patient's left, which is the right of the
image, y from head to foot; the lungs fill about [-0.8, 0.8] x [-0.75, 0.6]) seen through a random pose, and is then
exposed: its grey values are given, by rank, a film curve drawn without regard to the class. So brightness and
histogram say nothing about the finding, as on a detector with automatic exposure; its shape does.

Legend: N samples, Y, X pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from mnemos.sharding.synthetic.drawing import F32, edge, ellipse, mix, smooth_field, stream, turn, uniform

CLASSES = ("clear", "opacity", "effusion")
Side = Literal["right", "left"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing to see on a chest film and to say in its report.

    Attributes:
        kind: "consolidation", "nodule" or "effusion".
        side: of the patient.
        zone: "upper", "mid" or "lower"; an effusion is "lower".
        size: 0 (just visible) to 1 (large).
    """

    kind: Literal["consolidation", "nodule", "effusion"]
    side: Side
    zone: Literal["upper", "mid", "lower"]
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
        aorta: above 0.5 tortuous.
        spine: sideways curve in units of the chest; above 0.05 in size a scoliosis.
        earlier: size of the first finding at the previous visit; None at the first visit.
    """

    label: str
    group: int
    findings: tuple[Finding, ...]
    heart: float
    volume: float
    aorta: float
    spine: float
    earlier: float | None


def draw_studies(seed: int, split: str, groups: int, visits: int) -> list[Study]:
    """Draw ``groups`` patients with ``visits`` studies each; the classes take turns, so that they are balanced."""
    studies = []
    for group in range(groups):
        rng = stream(seed, "studies", split, group)
        label = CLASSES[group % len(CLASSES)]
        kinds: tuple[Literal["consolidation", "nodule", "effusion"], ...] = {
            "clear": (),
            "opacity": ((("consolidation",), ("nodule",), ("consolidation", "nodule"))[rng.choice(3, p=[0.5, 0.35, 0.15])]),
            "effusion": ((("effusion",), ("effusion", "consolidation"))[rng.choice(2, p=[0.75, 0.25])]),
        }[label]
        return_side: tuple[Side, Side] = ("right", "left")
        places = [
            (kind, return_side[rng.integers(2)], "lower" if kind == "effusion" else ("upper", "mid", "lower")[rng.integers(3)])
            for kind in kinds
        ]
        heart, volume = float(rng.normal(0.05, 0.13)), float(rng.normal(0, 0.55))
        aorta, spine = float(rng.uniform()), float(rng.normal(0, 0.035))
        earlier = None
        for _ in range(visits):
            findings = tuple(Finding(kind=k, side=s, zone=z, size=float(rng.uniform())) for k, s, z in places)
            studies.append(Study(label=label, group=group, findings=findings, heart=heart, volume=volume, aorta=aorta,
                                 spine=spine, earlier=earlier))
            earlier = findings[0].size if findings else None
    return studies


def draw_chests(studies: Sequence[Study], rng: np.random.Generator, size: int = 64) -> npt.NDArray[np.uint8]:
    """Draw one film of each study: uint8 [N, size, size]."""
    num = len(studies)
    groups = {group: place for place, group in enumerate(dict.fromkeys(study.group for study in studies))}
    of_N = np.array([groups[study.group] for study in studies])

    def person(low: float, high: float) -> F32:
        return uniform(rng, low, high, len(groups))[of_N]

    def visit(low: float, high: float) -> F32:
        return uniform(rng, low, high, num)

    def column(values: Sequence[float]) -> F32:
        return np.array(values, np.float32)[:, None, None]

    heart = 1 + column([study.heart for study in studies])
    breath = 0.07 * np.clip(column([study.volume for study in studies]), -1.3, 1.3)
    tortuous = np.clip(2 * column([study.aorta for study in studies]) - 1, 0, 1)
    bend = column([study.spine for study in studies])

    # Pose: field of view, place in the field, a turn and the build of the patient.
    axis = ((np.arange(size) + 0.5) / size * 2 - 1).astype(np.float32)
    zoom = np.exp(visit(np.log(0.5), np.log(0.95)))
    x, y = turn(axis[None, None, :] * zoom, axis[None, :, None] * zoom, visit(-0.16, 0.16))
    room = 1.15 - zoom
    x = x / person(0.88, 1.12) + visit(-0.35, 0.35) * (0.35 + room)
    y = y + visit(-0.35, 0.35) * (0.35 + room) - 0.05
    x = x - bend * np.cos(4.0 * y)
    side = np.abs(x)
    left = x > 0  # of the patient

    # Lungs: a tall half ellipse each, cut by the mediastinum and the diaphragm's dome.
    base = 0.48 + breath + np.where(left, person(0.0, 0.08), 0.0)
    dome = base + person(0.5, 1.1) * (1 - 4 * breath) * (side - 0.36) ** 2 - 0.06
    wall = ellipse(side - 0.29, y - 0.52, person(0.49, 0.54), person(1.2, 1.36) + breath)
    inner = 0.13 + 0.03 * np.cos(5 * y)
    lung = edge(wall, 0.06) * edge(inner - side, 0.06) * edge(y - dome, 0.05)

    # Heart and great vessels, drawn over the lungs.
    hx, hy = turn(x - 0.13, y - 0.3, 0.5)
    heart_shape = edge(ellipse(hx, hy, 0.36 * heart, 0.27 * heart), 0.09)
    knob = edge(ellipse(x - 0.12 - 0.03 * tortuous, y + 0.26, 0.1 + 0.04 * tortuous, 0.11), 0.07)
    descending = edge(ellipse(x - 0.14 - 0.05 * tortuous * np.sin(4 * y), y - 0.2, 0.07, 0.7), 0.07)
    cava = edge(ellipse(x + 0.13, y + 0.2, 0.08, 0.3), 0.07)
    middle = np.maximum.reduce([heart_shape, 0.8 * knob, 0.5 * descending, 0.6 * cava])

    # The trunk: thick in the middle and below, thin at the flanks and above the shoulders.
    outline = 0.98 - 0.75 * edge(y + 0.86 - 0.12 * side, 0.3)
    trunk = edge(side - outline, 0.16)
    thick = 0.62 + 0.3 * y + 0.3 * np.exp(-((x / 0.45) ** 2)) - 0.15 * side**2
    film = trunk * (thick + 0.55)
    air = lung * (1 - 0.75 * middle) * person(0.55, 0.7)
    film = film - air + 0.22 * middle * trunk

    # Ribs run down and outwards behind, down and inwards in front; clavicles and shoulder blades cross the tops.
    pitch, phase = person(0.125, 0.155), person(0, 1)
    cage = edge(ellipse(side - 0.27, y - 0.5, 0.6, 1.38), 0.08) * edge(0.05 - side, 0.08) * edge(y - 0.72, 0.15)
    behind = np.cos(2 * np.pi * ((y - 0.42 * side**2 + 0.12 * side) / pitch + phase))
    front = np.cos(2 * np.pi * ((y - 0.75 * side + 0.25 * side**2) / (1.25 * pitch) - phase))
    film = film + cage * (person(0.04, 0.08) * behind + person(0.01, 0.03) * edge(0.3 - side, 0.3) * front)
    clavicle = y + 0.6 + 0.16 * side - 0.04 * np.sin(7 * side) + visit(-0.06, 0.06)
    film = film + 0.16 * edge(np.abs(clavicle) - 0.03, 0.05) * edge(0.1 - side, 0.06) * edge(side - 0.85, 0.1)
    blade = side - 0.74 + 0.2 * y + visit(-0.04, 0.06)
    film = film + 0.1 * edge(-blade, 0.05) * edge(np.abs(y + 0.35) - 0.4, 0.2)
    spine = edge(side - 0.085, 0.05)
    film = film + spine * (0.14 + 0.05 * np.cos(2 * np.pi * y / person(0.13, 0.16)))
    film = film - 0.16 * edge(np.abs(x + 0.01) - 0.045, 0.05) * edge(y + 0.12, 0.15)

    # Hila and the vessels that fan out of them.
    for sign in (-1.0, 1.0):
        vx, vy = sign * x - 0.2, y - 0.02 - 0.03 * sign
        radius = np.sqrt(vx * vx + vy * vy) + 1e-3
        angle = np.arctan2(vy, vx) + 0.5 * np.sin(7 * radius + person(0, 6))
        fan = np.cos(7 * angle + person(0, 6)) + 0.6 * np.cos(12 * angle + person(0, 6))
        here = lung * (sign * x > 0)
        film = film + here * person(0.05, 0.09) * np.exp(-radius / 0.28) * (1.2 + fan)

    film = _add_findings(film, studies, x, y, lung, dome, trunk, visit)

    # Below the diaphragm: the stomach's gas under the left dome; then breasts, scatter and the heel of the beam.
    gas = edge(ellipse(x - 0.4, y - dome - 0.14, person(0.06, 0.2), 0.07), 0.08) * (y > dome)
    film = film - 0.25 * gas * (person(0, 1) > 0.4)
    breast = edge(ellipse(side - 0.42, y - 0.34, 0.34, 0.3), 0.12) * person(0.0, 0.14)
    film = film + breast * trunk
    tilt = visit(0, 2 * np.pi)
    ramp = axis[None, None, :] * np.cos(tilt) + axis[None, :, None] * np.sin(tilt)
    film = film + visit(0.08, 0.3) * ramp + 0.03 * smooth_field(rng, num, size, 3)
    film = film + visit(0.001, 0.005) * rng.standard_normal((num, size, size), np.float32)
    return _expose(film.astype(np.float32), rng)


def _add_findings(film: F32, studies: Sequence[Study], x: F32, y: F32, lung: F32, dome: F32, trunk: F32, visit) -> F32:
    """Return the films with their findings drawn in, each in the lung its record names."""
    for slot in range(2):
        for kind in ("consolidation", "nodule", "effusion"):
            rows = [i for i, s in enumerate(studies) if len(s.findings) > slot and s.findings[slot].kind == kind]
            if not rows:
                continue
            found = [studies[i].findings[slot] for i in rows]
            size = np.array([f.size for f in found], np.float32)[:, None, None]
            sign = np.array([-1.0 if f.side == "right" else 1.0 for f in found], np.float32)[:, None, None]
            high = np.array([{"upper": -0.38, "mid": -0.05, "lower": 0.27}[f.zone] for f in found], np.float32)[:, None, None]
            jitter = [visit(-1, 1)[rows] for _ in range(4)]
            xs, ys, lungs, domes = sign * x[rows], y[rows], lung[rows], dome[rows]
            same = xs > 0.05
            if kind == "nodule":
                radius = 0.07 + 0.07 * size
                shape = edge(ellipse(xs - 0.42 - 0.12 * jitter[0], ys - high - 0.06 * jitter[1], radius, radius), 0.05)
                film[rows] += 0.34 * shape * np.minimum(1, 0.4 + lungs)
            elif kind == "consolidation":
                dx, dy = turn(xs - 0.42 - 0.1 * jitter[0], ys - high - 0.06 * jitter[1], 1.5 * jitter[2])
                ragged = 0.05 * np.sin(13 * dx + 5 * jitter[0]) + 0.05 * np.sin(11 * dy + 5 * jitter[3])
                shape = edge(ellipse(dx, dy, 0.22 + 0.1 * size, 0.16 + 0.08 * size) + ragged, 0.2)
                film[rows] += 0.42 * shape * lungs * same
            else:
                level = domes - 0.08 - 0.24 * size - 0.9 * np.maximum(xs - 0.35, 0) ** 2 - 0.25 * np.maximum(xs - 0.35, 0)
                shape = edge(level - ys, 0.1) * same * edge(xs - 0.84, 0.06)
                film[rows] = mix(film[rows], np.maximum(film[rows], 1.25), 0.85 * shape * trunk[rows])
    return film


def _expose(film: F32, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """Give every film, by rank, the grey values of a curve drawn at random: uint8 [N, Y, X]."""
    num, height, width = film.shape
    p = (np.arange(height * width, dtype=np.float32) + 0.5) / (height * width)
    shadows = uniform(rng, 0.1, 1.0, num, 1)
    curve = shadows * p + (1 - shadows) * (p * p * (3 - 2 * p))
    curve = curve ** np.exp(uniform(rng, -0.5, 0.5, num, 1))
    low = uniform(rng, 0, 45, num, 1)
    curve = low + (uniform(rng, 190, 255, num, 1) - low) * curve
    grey = np.empty((num, height * width), np.uint8)
    np.put_along_axis(grey, np.argsort(film.reshape(num, -1), axis=1, kind="stable"), np.rint(curve).astype(np.uint8), axis=1)
    return grey.reshape(num, height, width)
