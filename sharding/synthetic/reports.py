"""Chest reports from a grammar: findings, then an impression that follows from them.

Report i of a split is written from study i, the same record film i is drawn from: what the film shows is said, with
its side, zone and size, and nothing that it does not show. The wording is drawn at random, with the habits of one of
a few readers; the facts are not. Facts come back in the impression in other words, so that a word can be told from
far away on either side.
"""

from collections.abc import Callable, Sequence

import numpy as np

from mnemos.sharding.synthetic.studies import Finding, Study

MOST_WORDS = 57  # words and punctuation marks; a frequent word is one token, so 64 tokens hold them
HABIT = 0.75  # how often a reader falls back on a wording or an order of their own

Say = Callable[..., str]  # chooses one of its arguments

_REGION = {
    ("right", "upper"): ("right upper lobe", "right upper lung zone", "right apex"),
    ("right", "mid"): ("right middle lobe", "right mid lung", "right perihilar region"),
    ("right", "lower"): ("right lower lobe", "right lung base", "right infrahilar region"),
    ("left", "upper"): ("left upper lobe", "left upper lung zone", "left apex"),
    ("left", "mid"): ("left mid lung", "left perihilar region", "lingula on the left"),
    ("left", "lower"): ("left lower lobe", "left lung base", "left infrahilar region"),
}
_AMOUNT = (
    ("trace", "tiny", "minimal"),
    ("small", "mild", "slight"),
    ("moderate", "medium sized"),
    ("large", "sizable", "substantial"),
)
_RIBS = {
    "upper": ("second", "third"),
    "mid": ("fourth", "fifth", "sixth"),
    "lower": ("seventh", "eighth", "ninth"),
}
_OTHER = {"right": "left", "left": "right"}


def write_report(study: Study, rng: np.random.Generator) -> str:
    """Return the report of one study: one paragraph of at most MOST_WORDS words and punctuation marks."""
    habit = HABIT

    def say(*choices: str) -> str:
        own = rng.random() < habit
        return choices[study.reader % len(choices) if own else int(rng.integers(len(choices)))]

    def arrange(sentences: list[str]) -> list[str]:
        """Return the sentences in the reader's order, or now and then in any."""
        if rng.random() < habit:
            first = study.reader % len(sentences)
            return sentences[first:] + sentences[:first]
        return [sentences[place] for place in rng.permutation(len(sentences))]

    while True:
        told = [
            _Told(finding, study if place == 0 else None, say) for place, finding in enumerate(study.findings)
        ]
        body = [_heart(study, say), *[_describe(fact, say) for fact in told], _absent(told, say)]
        opening = (
            say("", "", "pa and lateral views. ", "portable ap view. ", "upright chest radiograph. ")
            + "findings:"
        )
        closing = f"impression: {_impression(study, told, say)}"
        if _length(opening, *body, closing) <= MOST_WORDS:
            break
        habit = 0.0  # too long: draw again, in any words
    for sentence in arrange(_extras(study, say)):
        if _length(opening, *body, sentence, closing) <= MOST_WORDS:
            body.append(sentence)
    return " ".join([opening, *arrange(body), closing])


class _Told:
    """A finding with the words this report uses for it throughout; ``study`` where it is compared with a visit before."""

    def __init__(self, finding: Finding, study: Study | None, say: Say) -> None:
        self.finding = finding
        self.region = say(*_REGION[finding.side, finding.zone])
        self.amount = say(*_AMOUNT[min(3, int(4 * finding.size))])
        self.rib = say(*_RIBS[finding.zone])
        millimetres = 6 + round(18 * finding.size)
        self.measured = f"{'an' if millimetres in (8, 11, 18) else 'a'} {millimetres} mm"
        self.trend = self.since = ""
        if study is not None and study.earlier is not None:
            change = finding.size - study.earlier
            words = (
                ("unchanged", "stable", "not significantly changed")
                if abs(change) < 0.15
                else ("increased", "larger", "more prominent", "worsened")
                if change > 0
                else ("decreased", "smaller", "less conspicuous", "improved")
            )
            self.trend = say(*words)
            before = (
                "compared with the prior study",
                "since the previous examination",
                "in the interval",
                "from last week",
            )
            self.since = f", {self.trend} {say(*before)}"


def _describe(told: _Told, say: Say) -> str:
    side, region, amount, since = told.finding.side, told.region, told.amount, told.since
    if told.finding.kind == "effusion":
        return say(
            f"there is a {amount} {side} pleural effusion{since}.",
            f"blunting of the {side} costophrenic angle is consistent with a {amount} effusion{since}.",
            f"layering fluid in the {side} hemithorax, {amount} in volume{since}.",
            f"a meniscus at the {side} base indicates {amount} pleural fluid{since}.",
            f"{amount} {side} sided effusion with adjacent atelectasis{since}.",
        )
    if told.finding.kind == "nodule":
        return say(
            f"{told.measured} nodule projects over the {region}{since}.",
            f"there is {told.measured} rounded opacity in the {region} near the {told.rib} rib{since}.",
            f"well circumscribed nodular density in the {region}, {told.measured} lesion{since}.",
            f"solitary pulmonary nodule at the level of the {told.rib} {side} rib, {told.measured} focus{since}.",
        )
    return say(
        f"there is a {amount} airspace opacity in the {region}{since}.",
        f"{amount} consolidation with air bronchograms involves the {region}{since}.",
        f"ill defined {amount} infiltrate is seen within the {region}{since}.",
        f"patchy parenchymal opacification of the {region}, {amount} in extent{since}.",
        f"hazy {amount} density obscures the {region}{since}.",
    )


def _heart(study: Study, say: Say) -> str:
    if study.heart > 0.3:
        return say(
            "the heart is moderately enlarged.",
            "there is moderate cardiomegaly.",
            "markedly widened cardiac silhouette.",
        )
    if study.heart > 0.18:
        return say(
            "the heart is mildly enlarged.",
            "there is mild cardiomegaly.",
            "slightly widened cardiac silhouette.",
        )
    return say(
        "the heart size is normal.",
        "the cardiomediastinal silhouette is within normal limits.",
        "heart and mediastinum are unremarkable.",
        "the cardiac silhouette is not enlarged.",
        "normal cardiac contour.",
    )


def _absent(told: Sequence[_Told], say: Say) -> str:
    """Return what is not there: never a thing the study shows."""
    kinds = {fact.finding.kind for fact in told}
    sides = {fact.finding.side for fact in told}
    if not kinds:
        return say(
            "the lungs are clear without focal consolidation, effusion or pneumothorax.",
            "no airspace disease, pleural fluid or pneumothorax.",
            "both lungs are well aerated and clear.",
            "no focal opacity is identified and the costophrenic angles are sharp.",
            "no nodule, mass or infiltrate.",
        )
    if len(sides) == 1 and say("side", "kind") == "side":
        other = _OTHER[sides.pop()]
        return say(
            f"the {other} lung is clear.",
            f"no abnormality on the {other}.",
            f"the {other} side is unremarkable.",
        )
    if "effusion" in kinds:
        return say("no pneumothorax.", "there is no evidence of pneumothorax.", "no pneumothorax is seen.")
    return say(
        "no pleural effusion or pneumothorax.",
        "the costophrenic angles are sharp.",
        "pleural spaces are clear.",
    )


def _extras(study: Study, say: Say) -> list[str]:
    """Return sentences about the rest of the film, left out where the report would grow too long."""
    lungs: tuple[str, ...] = (
        "lung volumes are normal.",
        "adequate inspiration.",
        "the lungs are normally expanded.",
    )
    if study.volume < -0.5:
        lungs = (
            "low lung volumes with crowded bronchovascular markings.",
            "shallow inspiration.",
            "lung volumes are low.",
        )
    elif study.volume > 0.5:
        lungs = (
            "the lungs are hyperinflated with flattened diaphragms.",
            "hyperexpansion suggests emphysema.",
        )
    vessels: tuple[str, ...] = (
        "the aorta is normal in caliber.",
        "hilar contours are normal.",
        "pulmonary vasculature is unremarkable.",
        "the trachea is midline.",
    )
    if study.aorta > 0.75:
        vessels = (
            "the thoracic aorta is tortuous.",
            "unfolded aorta with a prominent knob.",
            "ectatic aortic arch.",
        )
    bones: tuple[str, ...] = (
        "osseous structures are intact.",
        "no acute bony abnormality.",
        "the visualized skeleton is unremarkable.",
        "no displaced rib fracture.",
        "soft tissues are normal.",
    )
    if abs(study.spine) > 0.05:
        bend = "right" if study.spine < 0 else "left"
        bones = (
            f"there is scoliosis of the thoracic spine, convex to the {bend}.",
            f"mild {bend} convex spinal curvature.",
        )
    return [say(*lungs), say(*vessels), say(*bones)]


def _impression(study: Study, told: Sequence[_Told], say: Say) -> str:
    parts = [_conclude(fact, say) for fact in told]
    if not told:
        parts.append(
            say(
                "no acute cardiopulmonary process",
                "no acute disease",
                "clear lungs",
                "no radiographic evidence of pneumonia",
                "negative for active infection",
            )
        )
    if study.heart > 0.18:
        parts.append(say("cardiomegaly", "enlarged heart"))
    advice = {
        "effusion": (
            "consider thoracentesis",
            "decubitus views may help",
            "ultrasound could quantify the fluid",
        ),
        "nodule": ("chest ct is recommended", "follow up in three months", "correlate with prior imaging"),
        "consolidation": ("follow up in six weeks to document resolution", "repeat after treatment"),
    }
    if told and say("advise", "end") == "advise":
        parts.append(say(*advice[told[0].finding.kind]))
    return ". ".join(parts) + "."


def _conclude(told: _Told, say: Say) -> str:
    side, region, amount = told.finding.side, told.region, told.amount
    trend = (
        f"{told.trend} "
        if told.trend in ("stable", "unchanged", "increased", "decreased", "larger", "smaller")
        else ""
    )
    if told.finding.kind == "effusion":
        return trend + say(f"{amount} {side} pleural effusion", f"{side} sided effusion, {amount}")
    if told.finding.kind == "nodule":
        size = told.measured.split(maxsplit=1)[1]
        return trend + say(f"{side} lung nodule, {size}", f"{size} nodule in the {side} lung")
    return trend + say(
        f"{region} pneumonia", f"{region} consolidation", f"infection or aspiration in the {region}"
    )


def _length(*sentences: str) -> int:
    text = " ".join(sentences)
    return len(text.split()) + sum(text.count(mark) for mark in ".,:")
