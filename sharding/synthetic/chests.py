"""Chest films: X-ray-like projections of lungs, heart, ribs and what may be wrong with them.

A film is a sum of attenuations in the coordinates of the chest (x to the patient's left, which is the right of the
image, y from head to foot; the lungs fill about [-0.8, 0.8] x [-0.75, 0.6]) seen through a random pose, and is then
exposed: its grey values are given, by rank, a film curve drawn without regard to the class. So brightness and
histogram say nothing about the finding, as on a detector with automatic exposure; its shape does.

Legend: N samples, Y, X pixels.
"""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import numpy.typing as npt

from mnemos.sharding.synthetic.drawing import F32, by_rank, edge, ellipse, mix, smooth_field, turn, uniform
from mnemos.sharding.synthetic.studies import Finding, Study

Draw = Callable[[float, float], F32]  # (low, high) -> [N, 1, 1], uniform
LUNG_X = 0.42  # middle of a lung, from the midline
ZONE_Y = {"upper": -0.38, "mid": -0.05, "lower": 0.27}


def draw_chests(studies: Sequence[Study], rng: np.random.Generator, size: int = 64) -> npt.NDArray[np.uint8]:
    """Draw one film of each study: uint8 [N, size, size]."""
    num = len(studies)
    patients = {group: place for place, group in enumerate(dict.fromkeys(study.group for study in studies))}
    of_N = np.array([patients[study.group] for study in studies])

    def person(low: float, high: float) -> F32:
        return np.asarray(uniform(rng, low, high, len(patients))[of_N])

    def visit(low: float, high: float) -> F32:
        return uniform(rng, low, high, num)

    axis = ((np.arange(size) + 0.5) / size * 2 - 1).astype(np.float32)
    x, y = _pose(studies, axis, person, visit)
    x = x - _column(study.spine for study in studies) * np.cos(4 * y)
    side = np.abs(x)

    # Lungs: a tall half ellipse each, cut by the mediastinum and the diaphragm's dome, which is lower on the left.
    breath = 0.07 * np.clip(_column(study.volume for study in studies), -1.3, 1.3)
    base = 0.48 + breath + np.where(x > 0, person(0.0, 0.08), np.float32(0))
    dome = np.asarray(base + person(0.5, 1.1) * (1 - 4 * breath) * (side - 0.36) ** 2 - 0.06, np.float32)
    wall = ellipse(side - 0.29, y - 0.52, person(0.49, 0.54), person(1.2, 1.36) + breath)
    inner = 0.13 + 0.03 * np.cos(5 * y)
    lung = edge(wall, 0.06) * edge(inner - side, 0.06) * edge(y - dome, 0.05)

    # The trunk: thick in the middle and below, thin at the flanks and above the shoulders.
    outline = 0.98 - 0.75 * edge(y + 0.86 - 0.12 * side, 0.3)
    trunk = edge(side - outline, 0.16)
    thick = 1.17 + 0.3 * y + 0.3 * np.exp(-((x / 0.45) ** 2)) - 0.15 * side**2
    middle = _mediastinum(studies, x, y)
    film = trunk * (thick + 0.22 * middle) - lung * (1 - 0.75 * middle) * person(0.55, 0.7)
    film = film + _bones(x, y, person, visit) + _vessels(x, y, lung, person)
    for slot in range(2):
        film = _add_findings(film, studies, slot, (x, y, lung, dome, trunk), visit)

    # The stomach's gas under the left dome; breasts; scatter and the heel of the beam; a little noise.
    gas = edge(ellipse(x - 0.4, y - dome - 0.14, person(0.06, 0.2), 0.07), 0.08) * (y > dome)
    film = film - 0.25 * gas * (person(0, 1) > 0.4)
    film = film + trunk * edge(ellipse(side - 0.42, y - 0.34, 0.34, 0.3), 0.12) * person(0.0, 0.14)
    tilt = visit(0, 2 * np.pi)
    heel = axis * np.cos(tilt) + axis[:, None] * np.sin(tilt)
    film = film + visit(0.08, 0.3) * heel + 0.03 * smooth_field(rng, num, size, 3)
    film = film + visit(0.001, 0.005) * rng.standard_normal((num, size, size), np.float32)
    return _expose(np.asarray(film, np.float32), rng)


def _column(values: Iterable[float]) -> F32:
    column: F32 = np.array(list(values), np.float32)[:, None, None]
    return column


def _spot(finding: Finding) -> tuple[float, float]:
    """Return where a finding lies: x, y."""
    return (-LUNG_X if finding.side == "right" else LUNG_X), 0.42 if finding.kind == "effusion" else ZONE_Y[
        finding.zone
    ]


def _pose(studies: Sequence[Study], axis: F32, person: Draw, visit: Draw) -> tuple[F32, F32]:
    """Return chest coordinates of the pixels: random field of view, turn and place, the first finding inside."""
    zoom = np.exp(visit(np.log(0.45), np.log(0.88)))
    x, y = turn(axis * zoom, axis[:, None] * zoom, visit(-0.2, 0.2))
    reach = 0.55 * (1.4 - zoom)
    centre_x, centre_y = visit(-1, 1) * reach, visit(-1, 1) * reach
    # A film without a finding is aimed like the others, at some place in a lung.
    aim_x, aim_y = np.sign(visit(-1, 1)) * LUNG_X, visit(-0.4, 0.45)
    found = _column(bool(study.findings) for study in studies) > 0
    spots = [_spot(study.findings[0]) if study.findings else (0.0, 0.0) for study in studies]
    aim_x = np.where(found, _column(spot[0] for spot in spots), aim_x)
    aim_y = np.where(found, _column(spot[1] for spot in spots), aim_y)
    centre_x = np.clip(centre_x, aim_x - 0.75 * zoom, aim_x + 0.75 * zoom)
    centre_y = np.clip(centre_y, aim_y - 0.75 * zoom, aim_y + 0.75 * zoom)
    return np.asarray(x / person(0.88, 1.12) + centre_x, np.float32), np.asarray(y + centre_y, np.float32)


def _mediastinum(studies: Sequence[Study], x: F32, y: F32) -> F32:
    """Return the shadow of heart and great vessels, 0 to 1."""
    heart = 1 + _column(study.heart for study in studies)
    tortuous = np.clip(2 * _column(study.aorta for study in studies) - 1, 0, 1)
    hx, hy = turn(x - 0.13, y - 0.3, 0.5)
    ventricles = edge(ellipse(hx, hy, 0.36 * heart, 0.27 * heart), 0.09)
    knob = edge(ellipse(x - 0.12 - 0.03 * tortuous, y + 0.26, 0.1 + 0.04 * tortuous, 0.11), 0.07)
    descending = edge(ellipse(x - 0.14 - 0.05 * tortuous * np.sin(4 * y), y - 0.2, 0.07, 0.7), 0.07)
    cava = edge(ellipse(x + 0.13, y + 0.2, 0.08, 0.3), 0.07)
    return np.asarray(np.maximum.reduce([ventricles, 0.8 * knob, 0.5 * descending, 0.6 * cava]), np.float32)


def _bones(x: F32, y: F32, person: Draw, visit: Draw) -> F32:
    """Return the attenuation of ribs, clavicles, shoulder blades and spine, less the trachea's air."""
    side = np.abs(x)
    # Ribs run down and outwards behind, down and inwards in front.
    pitch, phase = person(0.125, 0.155), person(0, 1)
    cage = (
        edge(ellipse(side - 0.27, y - 0.5, 0.6, 1.38), 0.08) * edge(0.05 - side, 0.08) * edge(y - 0.72, 0.15)
    )
    behind = np.cos(2 * np.pi * ((y - 0.42 * side**2 + 0.12 * side) / pitch + phase))
    front = np.cos(2 * np.pi * ((y - 0.75 * side + 0.25 * side**2) / (1.25 * pitch) - phase))
    bones = cage * (person(0.03, 0.07) * behind + person(0.01, 0.03) * edge(0.3 - side, 0.3) * front)
    clavicle = y + 0.6 + 0.16 * side - 0.04 * np.sin(7 * side) + visit(-0.06, 0.06)
    bones = bones + 0.16 * edge(np.abs(clavicle) - 0.03, 0.05) * edge(0.1 - side, 0.06) * edge(
        side - 0.85, 0.1
    )
    blade = side - 0.74 + 0.2 * y + visit(-0.04, 0.06)
    bones = bones + 0.1 * edge(-blade, 0.05) * edge(np.abs(y + 0.35) - 0.4, 0.2)
    vertebrae = 0.14 + 0.05 * np.cos(2 * np.pi * y / person(0.13, 0.16))
    bones = bones + vertebrae * edge(side - 0.085, 0.05)
    return np.asarray(bones - 0.16 * edge(np.abs(x + 0.01) - 0.045, 0.05) * edge(y + 0.12, 0.15), np.float32)


def _vessels(x: F32, y: F32, lung: F32, person: Draw) -> F32:
    """Return the attenuation of the vessels that fan out of both hila."""
    total = np.zeros_like(lung)
    for sign in (-1.0, 1.0):
        vx, vy = sign * x - 0.2, y - 0.02 - 0.03 * sign
        radius = np.sqrt(vx * vx + vy * vy)
        angle = np.arctan2(vy, vx) + 0.5 * np.sin(7 * radius + person(0, 6))
        fan = np.cos(7 * angle + person(0, 6)) + 0.6 * np.cos(12 * angle + person(0, 6))
        total += lung * (sign * x > 0) * person(0.05, 0.09) * np.exp(-radius / 0.28) * (1.2 + fan)
    return total


def _add_findings(
    film: F32, studies: Sequence[Study], slot: int, thorax: tuple[F32, F32, F32, F32, F32], visit: Draw
) -> F32:
    """Return the films with finding number ``slot`` of each study drawn in, in the lung its record names.

    ``thorax`` holds x, y, the lungs' shape, the height of the diaphragm and the trunk's shape.
    """
    wander = [visit(-1, 1) for _ in range(4)]
    for kind in ("consolidation", "nodule", "effusion"):
        rows = [
            i
            for i, study in enumerate(studies)
            if len(study.findings) > slot and study.findings[slot].kind == kind
        ]
        if not rows:
            continue
        x, y, lung, dome, trunk = (part[rows] for part in thorax)
        found = [studies[i].findings[slot] for i in rows]
        size = _column(finding.size for finding in found)
        centre_x, centre_y = (_column(_spot(finding)[axis] for finding in found) for axis in (0, 1))
        a, b, c, d = (values[rows] for values in wander)
        xs = x * np.sign(centre_x)  # positive on the finding's side
        dx, dy = xs - LUNG_X - 0.1 * a, y - centre_y - 0.06 * b
        if kind == "nodule":
            radius = 0.07 + 0.07 * size
            film[rows] += 0.34 * edge(ellipse(dx, dy, radius, radius), 0.05) * np.minimum(1, 0.4 + lung)
        elif kind == "consolidation":
            dx, dy = turn(dx, dy, 1.5 * c)
            ragged = 0.05 * np.sin(13 * dx + 5 * a) + 0.05 * np.sin(11 * dy + 5 * d)
            film[rows] += (
                0.42
                * lung
                * (xs > 0)
                * edge(ellipse(dx, dy, 0.22 + 0.1 * size, 0.16 + 0.08 * size) + ragged, 0.2)
            )
        else:
            rise = np.maximum(xs - 0.35, 0)  # the meniscus climbs the lateral wall
            level = dome - 0.08 - 0.24 * size - 0.9 * rise**2 - 0.25 * rise
            fluid = edge(level - y, 0.1) * (xs > 0.05) * edge(xs - 0.84, 0.06) * trunk
            film[rows] = mix(film[rows], np.maximum(film[rows], 1.25), 0.85 * fluid)
    return film


def _expose(film: F32, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """Give every film, by rank, the grey values of a curve drawn at random: uint8 [N, Y, X]."""
    num = len(film)
    p = np.linspace(0, 1, film[0].size, dtype=np.float32)
    straight = uniform(rng, 0.1, 1.0, num, 1)
    curve = (straight * p + (1 - straight) * (p * p * (3 - 2 * p))) ** np.exp(uniform(rng, -0.5, 0.5, num, 1))
    black, white = uniform(rng, 0, 45, num, 1), uniform(rng, 190, 255, num, 1)
    return np.asarray(np.rint(by_rank(film, black + (white - black) * curve)), np.uint8)
