"""Chest reports from a grammar: findings, then an impression that follows from them.

Report i of a split is written from study i, the same record film i is drawn from: what the film shows is said, with
its side, zone and size, and nothing else is. The wording is drawn at random; the facts are not. Facts come back in
the impression in other words, so that a word can be told from far away on either side.
"""

from collections.abc import Sequence

import numpy as np

from mnemos.sharding.synthetic.chests import Finding, Study

MOST_WORDS = 54  # words and punctuation marks; leaves room for words of two tokens below 64 tokens

_REGION = {
    ("right", "upper"): ("right upper lobe", "right upper lung zone", "right apex"),
    ("right", "mid"): ("right middle lobe", "right mid lung", "right perihilar region"),
    ("right", "lower"): ("right lower lobe", "right lung base", "right infrahilar region"),
    ("left", "upper"): ("left upper lobe", "left upper lung zone", "left apex"),
    ("left", "mid"): ("lingula", "left mid lung", "left perihilar region"),
    ("left", "lower"): ("left lower lobe", "left lung base", "left retrocardiac region"),
}
_AMOUNT = (("trace", "tiny", "minimal"), ("small", "mild", "slight"), ("moderate", "medium sized"), ("large", "extensive", "sizable"))
_RIBS = {"upper": ("second", "third"), "mid": ("fourth", "fifth", "sixth"), "lower": ("seventh", "eighth", "ninth")}
_BEFORE = ("compared with the prior study", "since the previous examination", "in comparison to the prior radiograph", "in the interval")


def write_report(study: Study, rng: np.random.Generator) -> str:
    """Return the report of one study: one paragraph of at most MOST_WORDS words and punctuation marks."""

    def say(*choices: str) -> str:
        return choices[int(rng.integers(len(choices)))]

    told = [_Told(finding, say) for finding in study.findings]
    must = [_heart(study, say), *[_describe(fact, study, say, first=i == 0) for i, fact in enumerate(told)], _absent(told, say)]
    rng.shuffle(must)
    extra = _extras(study, say)
    rng.shuffle(extra)
    impression = _impression(study, told, say)
    closing = "impression: " + impression
    opening = say("findings:", "findings:", "pa and lateral views of the chest. findings:", "portable ap view of the chest. findings:")
    body = list(must)
    for sentence in extra:
        if _words(opening, *body, sentence, closing) <= MOST_WORDS:
            body.insert(int(rng.integers(len(body) + 1)), sentence)
    if _words(opening, *body, closing) > MOST_WORDS:
        opening = "findings:"
    return " ".join([opening, *body, closing])


class _Told:
    """A finding with the words this report uses for it throughout."""

    def __init__(self, finding: Finding, say) -> None:
        self.finding = finding
        self.region = say(*_REGION[finding.side, finding.zone])
        self.amount = say(*_AMOUNT[min(3, int(4 * finding.size))])
        self.millimetres = str(6 + round(18 * finding.size))
        self.rib = say(*_RIBS[finding.zone])


def _heart(study: Study, say) -> str:
    if study.heart > 0.3:
        return say("the heart is moderately enlarged.", "there is moderate cardiomegaly.", "the cardiac silhouette is markedly widened.")
    if study.heart > 0.18:
        return say("the heart is mildly enlarged.", "there is mild cardiomegaly.", "the cardiac silhouette is slightly widened.")
    return say("the heart size is normal.", "the cardiomediastinal silhouette is within normal limits.", "heart and mediastinum are unremarkable.",
               "the cardiac silhouette is not enlarged.", "normal cardiac contour.")


def _trend(study: Study, finding: Finding, say) -> str:
    """Return how the first finding changed since the earlier visit, or nothing at the first visit."""
    if study.earlier is None:
        return ""
    change = finding.size - study.earlier
    if abs(change) < 0.15:
        return say("unchanged", "stable", "not significantly changed")
    if change > 0:
        return say("increased", "progressed", "larger", "worsened")
    return say("decreased", "improved", "smaller", "partially resolved")


def _describe(told: _Told, study: Study, say, *, first: bool) -> str:
    finding = told.finding
    trend = _trend(study, finding, say) if first else ""
    tail = f", {trend} {say(*_BEFORE)}" if trend else ""
    if finding.kind == "effusion":
        return say(
            f"there is a {told.amount} {finding.side} pleural effusion{tail}.",
            f"blunting of the {finding.side} costophrenic angle is consistent with a {told.amount} effusion{tail}.",
            f"layering fluid in the {finding.side} hemithorax, {told.amount} in volume{tail}.",
            f"a meniscus at the {finding.side} base indicates {told.amount} pleural fluid{tail}.",
        )
    if finding.kind == "nodule":
        return say(
            f"a {told.millimetres} mm nodule projects over the {told.region}{tail}.",
            f"there is a rounded {told.millimetres} mm opacity in the {told.region} near the {told.rib} rib{tail}.",
            f"well circumscribed nodular density in the {told.region} measuring {told.millimetres} mm{tail}.",
            f"solitary pulmonary nodule of {told.millimetres} mm at the level of the {told.rib} {finding.side} rib{tail}.",
        )
    return say(
        f"there is a {told.amount} airspace opacity in the {told.region}{tail}.",
        f"{told.amount} consolidation with air bronchograms involves the {told.region}{tail}.",
        f"ill defined {told.amount} infiltrate is seen within the {told.region}{tail}.",
        f"patchy parenchymal opacification of the {told.region}, {told.amount} in extent{tail}.",
    )


def _absent(told: Sequence[_Told], say) -> str:
    """Return what is not there: never a thing the study shows."""
    kinds = {fact.finding.kind for fact in told}
    sides = {fact.finding.side for fact in told}
    if not kinds:
        return say("the lungs are clear without focal consolidation, effusion or pneumothorax.", "no airspace disease, pleural fluid or pneumothorax.",
                   "both lungs are well aerated and clear.", "no focal opacity is identified and the costophrenic angles are sharp.")
    other = {"right": "left", "left": "right"}
    if len(sides) == 1 and int(say("0", "1")):
        opposite = other[next(iter(sides))]
        return say(f"the {opposite} lung is clear.", f"no abnormality on the {opposite}.", f"the {opposite} hemithorax is unremarkable.")
    if "effusion" in kinds:
        return say("no pneumothorax.", "there is no evidence of pneumothorax.", "no pneumothorax is seen.")
    return say("no pleural effusion or pneumothorax.", "the costophrenic angles are sharp.", "no pleural fluid or pneumothorax is seen.")


def _extras(study: Study, say) -> list[str]:
    """Return sentences about the rest of the film, left out where the report would grow too long."""
    volume = study.volume
    lungs = (
        say("low lung volumes with crowding of the bronchovascular markings.", "shallow inspiration.", "lung volumes are low.") if volume < -0.5
        else say("the lungs are hyperinflated with flattened diaphragms.", "hyperexpansion suggests emphysema.") if volume > 0.5
        else say("lung volumes are normal.", "adequate inspiration.", "the lungs are normally expanded.")
    )
    aorta = say("the thoracic aorta is tortuous.", "unfolded aorta with a prominent knob.", "ectatic aortic arch.") if study.aorta > 0.6 else say(
        "the aorta is normal in caliber.", "hilar contours are normal.", "pulmonary vasculature is unremarkable.", "the trachea is midline.")
    bend = "dextroscoliosis" if study.spine < 0 else "levoscoliosis"
    spine = say(f"there is {bend} of the thoracic spine.", f"mild {bend} is noted.") if abs(study.spine) > 0.05 else say(
        "osseous structures are intact.", "no acute bony abnormality.", "the visualized skeleton is unremarkable.",
        "degenerative changes are present in the spine.", "soft tissues are normal.")
    return [lungs, aorta, spine]


def _impression(study: Study, told: Sequence[_Told], say) -> str:
    parts = []
    for place, fact in enumerate(told):
        finding = fact.finding
        trend = _trend(study, finding, say) if place == 0 else ""
        lead = f"{trend} " if trend in ("stable", "unchanged", "increased", "decreased", "larger", "smaller") else ""
        parts.append(
            {
                "effusion": lambda f=finding, t=fact, w=lead: say(f"{w}{t.amount} {f.side} pleural effusion", f"{w}{f.side} sided effusion, {t.amount}"),
                "nodule": lambda f=finding, t=fact, w=lead: say(f"{w}{f.side} lung nodule, {t.millimetres} mm", f"{w}{t.millimetres} mm nodule in the {f.side} lung"),
                "consolidation": lambda f=finding, t=fact, w=lead: say(f"{w}{t.region} pneumonia", f"{w}{t.region} consolidation", f"{w}{t.region} infection or aspiration"),
            }[finding.kind]()
        )
    if study.heart > 0.18:
        parts.append(say("cardiomegaly", "enlarged heart"))
    if not told:
        clear = say("no acute cardiopulmonary process", "no acute disease", "clear lungs", "no radiographic evidence of pneumonia")
        return ". ".join([clear, *parts]) + "."
    advice = {
        "effusion": ("consider thoracentesis", "decubitus views may help", "upright films are suggested"),
        "nodule": ("chest ct is recommended", "follow up in three months", "correlate with prior imaging"),
        "consolidation": ("follow up in six weeks to document resolution", "clinical correlation is advised", "treat and repeat the radiograph"),
    }[told[0].finding.kind]
    return ". ".join([*parts, *([say(*advice)] if int(say("0", "1")) else [])]) + "."


def _words(*sentences: str) -> int:
    text = " ".join(sentences)
    return len(text.split()) + sum(text.count(mark) for mark in ".,:")
