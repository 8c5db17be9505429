"""Scrubbing of report texts: what must go, what must stay, which words are rare, what a user's own function may do."""

import re._parser as parser
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mnemos.sharding.building.identifiers import RULES, hide_identifiers
from mnemos.sharding.building.scrubbing import load_scrubber, mask_rare, rare_words, scrub_texts, scrub_units
from mnemos.sharding.errors import UserError
from mnemos.sharding.sources.units import Unit

GONE = [  # text, and what is left of it
    ("Dr. Jane Roe was notified at 3:45 PM.", "___ was notified at ___."),
    ("DR. ROE REVIEWED THE CHEST", "___ REVIEWED THE CHEST"),
    ("dr. roe called", "___ called"),
    ("Discussed with Mrs. O'Brien-Roe, who agreed.", "Discussed with ___, who agreed."),
    ("Prof. Dr. med. Müller saw it.", "___ saw it."),
    ("Mr. Jan van der Roe is here.", "___ is here."),
    ("Ms Roe and Miss Doe", "___ and ___"),
    ("MR. ROE IS A 45 YEAR OLD", "___ IS A 45 YEAR OLD"),
    ("seen by Jane Q. Roe, MD.", "seen by ___"),
    ("Patient: John Q. Roe. Lungs are clear.", "Patient: ___. Lungs are clear."),
    ("PATIENT NAME: ROE, JOHN SEX: M", "PATIENT NAME: ___ SEX: M"),
    ("name: jane roe age: 45", "name: ___ age: 45"),
    ("Dictated by: Jane Roe", "Dictated by: ___"),
    ("signed by jane roe", "signed by ___"),
    ("Attending: Roe", "Attending: ___"),
    (
        "Electronically signed by Jane Roe on 12/31/2001 at 15:45",
        "Electronically signed by ___ on ___ at ___",
    ),
    ("Electronically signed: Roe, Jane", "Electronically signed: ___"),
    ("ROE^JOHN^Q", "___"),
    ("DOB: 03/04/1950", "DOB: ___"),
    ("from 12/31/2001 to 2002-01-05", "from ___ to ___"),
    ("on 3.4.15 and 31-12-1999", "on ___ and ___"),
    ("2015-03-04T10:15:00Z", "___"),
    ("taken March 3, 2015.", "taken ___."),
    ("3 March 2015, later 4th of May", "___, later ___"),
    ("3-Mar-15 or MAR 3 2015", "___ or ___"),
    ("in July, since 2012", "in ___, since ___"),
    ("CT of 12/2014, compared to 3/12", "CT of ___, compared to ___"),
    ("at 9:30, 10:15, 3 p.m. and at 1545 hours", "at ___ and at ___ hours"),
    ("call (555) 123-4567 or +49 30 1234567", "call ___ or ___"),
    ("pager 1234; fax: 555-1234; ext. 5512", "pager ___; fax: ___; ext. ___"),
    ("mail jane.roe@clinic.example now", "mail ___ now"),
    ("see https://pacs.example/x?id=3 there", "see ___ there"),
    ("MRN 1234, MRN: AB-12", "MRN ___, MRN: ___"),
    ("Medical record number 12-34-56", "Medical record number ___"),
    ("accession number A1-22; Acc# 77", "accession number ___; Acc# ___"),
    ("patient ID 77; ID: roe-jane; case no. 12", "patient ID ___; ID: ___; case no. ___"),
    ("SSN 123-45-6789", "SSN ___"),
    ("social security number 123 45 6789", "social security number ___"),
    ("number 1234567 of S15-1234 and AB1234", "number ___ of ___ and ___"),
    ("lives at 123 Main Street, Boston MA 02115", "lives at ___, Boston ___"),
    ("zip code 02115-1234, P.O. Box 12", "zip code ___"),
    ("Address: 12 Elm Rd, Springfield. Clear.", "Address: ___. Clear."),
    ("92-year-old, aged 101; 95 y/o; 93F with cough", "___-year-old, aged ___; ___ y/o; ___ with cough"),
    ("ninety-two year old", "___ year old"),
    ("study 1.2.840.113619.2.55.3 of 1.2.840", "study ___ of ___"),
    ("[**Known lastname 123**] and ___ ___ on _____.", "___ and ___ on ___."),
    (r"C:\scans\roe.dcm \\server\share", "___"),
    ("from /archive/ct/roe/ and roe_jane.nii.gz", "from ___ and ___"),
    ("St. Mary's Hospital, Roe Medical Center", "___"),
]
STAYS = [
    "There is a 3.5 x 2.1 cm nodule in the right upper lobe (series 3, image 45).",
    "T2 signal at L4-L5, C5-6 and T10-12; ribs 3, 4, 5; grade 3 of 5.",
    "Mrs alone, Dr. alone? The doctor to call. Patient: stable. Patient: Intubated.",
    "MR brain without contrast. Prior MR. There is no change. HISTORY OF MS. NEW LESIONS.",
    "MR Spine and DR Chest; MS Lesions; compare with MR. Lesions are stable.",
    "Murmur 3/6, strength 5/5, ratio 1:10, 1/2 of the lobe, 5-10-15 minutes, 60 ml/min.",
    "b1000 images, TR 2500, TE 80, CA125, Tc99m, 18F-FDG, 99mTc-MDP, C50.911, G2P1, BI-RADS 4.",
    "1200 HU, 2000 mL, 120-140 kVp, 0.625 mm, 512 x 512, in 2000 patients, SUV 4.5, 10^3 cells.",
    "This may represent 2 nodules. NODULE 2 MAY REPRESENT A CYST. Nodes may 5 mm measure.",
    "A mass at 10:00, 3 cm from the nipple; the 12:00 position; left breast 10:15 mass.",
    "A/P and lateral, and/or AP/PA, +/- 3 mm, w/o contrast, s/p CABG.",
    "An 85-year-old man, 45F with cough, aged 89, 95% stenosis, 92 mm long, age 9.",
    "CHEST, DO NOT REPEAT. LUNGS, LIVER. Transferred from hospital. Seen in clinic.",
    "Reviewed by radiology; read by night staff; signed by all.",
    "FINDINGS: The heart is normal. IMPRESSION: No acute cardiopulmonary process.",
]


@pytest.mark.parametrize(("text", "left"), GONE, ids=[text[:30] for text, _ in GONE])
def test_identifiers_go(text: str, left: str) -> None:
    assert hide_identifiers(text) == left
    assert hide_identifiers(left) == left


@pytest.mark.parametrize("text", STAYS, ids=[text[:30] for text in STAYS])
def test_findings_stay(text: str) -> None:
    assert hide_identifiers(text) == text


PIECES = [word for text, _ in GONE for word in text.split()] + [
    word for text in STAYS for word in text.split()
]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(PIECES), max_size=14).map(" ".join) | st.text(max_size=60))
@example("[**" * 20 + "**]" * 20)
@example("ID: the 92-year-old")  # a mark that makes another pattern fit
def test_a_second_time_changes_nothing(text: str) -> None:
    once = hide_identifiers(text)
    assert hide_identifiers(once) == once


def unbounded(parsed: Any, *, last: bool) -> Iterator[object]:
    """Yield every repetition without an upper limit, unless nothing follows it."""
    for place, (operation, argument) in enumerate(parsed):
        at_end = last and place == len(parsed) - 1
        if operation in (parser.MAX_REPEAT, parser.MIN_REPEAT, parser.POSSESSIVE_REPEAT):
            if argument[1] is parser.MAXREPEAT and not at_end:
                yield argument
            yield from unbounded(argument[2], last=False)
        elif operation is parser.BRANCH:
            for branch in argument[1]:
                yield from unbounded(branch, last=at_end)
        elif operation in (parser.SUBPATTERN, parser.ASSERT, parser.ASSERT_NOT):
            yield from unbounded(argument[-1], last=at_end)


def test_no_pattern_takes_more_than_linear_time() -> None:
    """A bounded repetition can be tried from every place at a bounded cost; two unbounded ones could not."""
    for pattern, _ in RULES:
        assert not list(unbounded(parser.parse(pattern.pattern), last=True)), pattern.pattern
    assert list(unbounded(parser.parse(r"(?:a|b+)c|d"), last=True)), "such a pattern is found"


# Rare words

GROUPS = [
    ("The Heart is normal, says Zanetti.", "a"),
    ("the heart IS large", "b"),
    ("Heart: zanetti ZANETTI", "a"),
]


@pytest.mark.parametrize(
    ("least", "rare"),
    [
        (0, set()),
        (1, set()),
        (2, {"normal", "says", "zanetti", "large"}),
        (3, {"the", "heart", "is", "normal", "says", "zanetti", "large"}),
    ],
)
def test_a_word_is_rare_by_its_groups(least: int, rare: set[str]) -> None:
    assert rare_words(GROUPS, least) == rare
    assert rare_words(reversed(GROUPS), least) == rare


def test_exactly_the_least_number_of_groups_is_enough() -> None:
    texts = [(f"common {'seldom' if number < 4 else ''}", f"patient {number}") for number in range(5)] * 3
    assert rare_words(texts, 5) == {"seldom"}


def test_rare_words_are_masked_whatever_their_case_and_nothing_else_is() -> None:
    rare = frozenset({"zanetti", "müller", "straße", "brien"})
    text = "Zanetti's 3 x 2 cm ZANETTI mass; O'Brien MÜLLER STRASSE, zanettis T2 Zanetti9."
    assert (
        mask_rare(text, frozenset({*rare, "strasse"})) == "___'s 3 x 2 cm ___ mass; O'___, zanettis T2 ___9."
    )
    assert mask_rare(mask_rare(text, rare), rare) == mask_rare(text, rare)
    assert mask_rare("3.5 x 2.1 cm at L4-L5", frozenset("xcml")) == "3.5 x 2.1 cm at L4-L5"


def units(texts: list[str], *, groups: bool = True) -> list[Unit]:
    return [
        Unit(name=f"t.csv:{number}", reader="text", files=(), text=text, group=f"p{number}" if groups else "")
        for number, text in enumerate(texts)
    ]


TEXTS = [f"Dr. Roe says the heart and lungs of patient {number} are normal" for number in range(6)]


def test_units_are_scrubbed_then_masked() -> None:
    done = scrub_units(units([*TEXTS, "The heart of Zanetti", ""]))
    assert [unit.text for unit in done.units[6:]] == ["The heart of ___", ""]
    assert done.units[0].text == "___ says the heart and lungs of patient 0 are normal"
    assert [unit.name for unit in done.units] == [f"t.csv:{number}" for number in range(8)]
    assert (
        len(done.notes) == 1
        and "1 of 58 words (1.7%)" in done.notes[0]
        and "that is much" not in done.notes[0]
    )
    assert done.recipe == {"identifiers": "scrubber: basic; words of fewer than 5 groups masked"}


def test_texts_are_counted() -> None:
    done = scrub_texts(
        [(text, str(number)) for number, text in enumerate([*TEXTS, "The heart of Zanetti", ""])]
    )
    assert done.texts[-2:] == ["The heart of ___", ""] and (done.words, done.masked) == (6 * 9 + 4, 1)


def test_much_masked_is_said() -> None:
    (note,) = scrub_units(units(TEXTS[:2])).notes
    assert "that is much" in note and "--rare-words" in note
    assert [unit.text for unit in scrub_units(units(TEXTS[:2])).units] == ["___ 0 ___", "___ 1 ___"]


def test_missing_groups_are_said() -> None:
    notes = scrub_units(units(TEXTS, groups=False)).notes
    assert len(notes) == 2 and "--group-column" in notes[1]


def test_published_texts_stay_as_they_are_unless_asked() -> None:
    done = scrub_units(units(TEXTS[:2]), public=True)
    assert [unit.text for unit in done.units] == TEXTS[:2] and done.notes == ()
    assert done.recipe == {"identifiers": "scrubber: none; no rare words masked"}
    asked = scrub_units(units(TEXTS[:2]), scrubber="basic", least_groups=2, public=True)
    assert asked.units[0].text == "___ says the heart and lungs of patient 0 are normal"


def test_fewer_than_no_groups_are_refused() -> None:
    with pytest.raises(UserError, match="--rare-words is -1"):
        scrub_units(units(TEXTS), least_groups=-1)


# A function of the user's own

OWN = """
def shout(text): return text.upper()
def fail(text): raise KeyError(text)
def nothing(text): return None
word = "a string"
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "own_scrubber.py").write_text(OWN)
    (tmp_path / "own_broken.py").write_text("raise RuntimeError('on import')")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in ("own_scrubber", "own_broken"):
        sys.modules.pop(name, None)


def test_an_own_function_is_imported_only_when_asked_for(own: None) -> None:
    load_scrubber("basic")
    assert "own_scrubber" not in sys.modules
    assert load_scrubber("own_scrubber:shout")("clear") == "CLEAR"
    done = scrub_units(units(["clear"]), scrubber="own_scrubber:shout", least_groups=0)
    assert done.units[0].text == "CLEAR" and "own_scrubber" not in str(done.recipe)
    assert load_scrubber("none")("Dr. Roe") == "Dr. Roe"


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("strict", "basic, none or a function"),
        ("own_scrubber:", "basic, none or a function"),
        (":shout", "basic, none or a function"),
        ("own_missing:f", "cannot be imported"),
        ("own_broken:f", "on import"),
        ("own_scrubber:missing", "cannot be imported"),
        ("own_scrubber:word", "is a str"),
    ],
)
def test_what_is_no_scrubber_is_refused(own: None, name: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        load_scrubber(name)


@pytest.mark.parametrize(("function", "told"), [("fail", "KeyError"), ("nothing", "NoneType")])
def test_a_scrubber_that_fails_is_named_and_the_text_is_not(own: None, function: str, told: str) -> None:
    with pytest.raises(UserError, match=told) as caught:
        scrub_units(units(["Zanetti"]), scrubber=f"own_scrubber:{function}")
    assert "Zanetti" not in str(caught.value)
    assert caught.value.__cause__ is None, "a traceback would quote the text"
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
