"""The findings and the impression of a radiologist's report, cut from its free text.

The rules are those of the section parser that comes with MIMIC-CXR (MIT-LCP/mimic-cxr, txt/section_parser.py), which
the paper's reports went through by way of MGCA: a heading stands in capitals at the start of a line and ends with a
colon; of several sections of a kind the last that is not empty counts; a heading that only names the views ("CHEST,
TWO VIEWS:") opens the findings. Four of our own:
- only what follows the last line "FINAL REPORT" is read, so that a preliminary reading (WET READ) above it is not;
- the lists of single reports with rules of their own are not used: those reports are left out, as they are by MGCA;
- misspelt headings are known by their likeness, not by a list;
- a list's numbers are dropped at the start of a line only, so that 4.1 cm keeps its 4 (MGCA cuts wherever a digit
  meets a full stop), and words keep their case and punctuation, which our tokenizer can read.
"""

import re
from difflib import get_close_matches

from mnemos.sharding.building.scrubbing import MARK
from mnemos.sharding.sources.texts import clean_text

_FINAL = re.compile(r"^[ \t]*FINAL REPORT[ \t]*$", re.MULTILINE)
_HEADING = re.compile(r"^[ \t]*([A-Z][A-Z ()/,&.-]{0,80}):(?=\s|$)", re.MULTILINE)
_RULE = re.compile(r"^[ \t]*_{10,}[ \t]*$", re.MULTILINE)  # drawn across the page between a report's versions
_OTHER = re.compile(
    r"exam|histor|indication|reason|technique|compari|addend|recommend|notif|wet|clinical|information|procedure|date"
)
_VIEWS = re.compile(
    r"chest|portable|views?\b|(pa|ap|frontal) and|lateral and|pa and lat|upright|ribs|bone window"
)
_NUMBER = re.compile(r"^[ \t]*\d{1,2}[.)][ \t]+(?=\S)", re.MULTILINE)
_MARKS = re.compile(r"_{2,}(?:\s+_{2,})*")  # where the publisher took names, dates and places out
_SPACE_BEFORE = re.compile(r"\s+([,;:.?!)])")
_WORD = re.compile(r"[^\W_]+")
_ALIKE = 0.8  # difflib's ratio: one letter lost, doubled or swapped


def findings_and_impression(report: str) -> tuple[str, str]:
    """Return the texts of the two sections as they stand, "" for one that the report does not have."""
    text = _RULE.sub("", report.replace("\r\n", "\n"))
    text = text[max((mark.end() for mark in _FINAL.finditer(text)), default=0) :]
    headings = list(_HEADING.finditer(text))
    ends = [*(heading.start() for heading in headings), len(text)][1:]
    found = {"findings": "", "impression": ""}
    for heading, end in zip(headings, ends, strict=True):
        kind, body = section_kind(heading[1]), text[heading.end() : end].strip()
        if kind in found and body:
            found[kind] = body
    return found["findings"], found["impression"]


def section_kind(heading: str) -> str:
    """Return "findings", "impression" or "other" for a heading in capitals."""
    name = " ".join(heading.lower().split())
    words = re.split(r"[^a-z]+", name)
    if "conclusion" in name or any(get_close_matches(word, ["impression"], 1, _ALIKE) for word in words):
        return "impression"  # "FINDINGS AND IMPRESSION" too
    if any(get_close_matches(word, ["findings"], 1, _ALIKE) for word in words):
        return "findings"
    return "findings" if _VIEWS.search(name) and not _OTHER.search(name) else "other"


def report_text(findings: str, impression: str) -> str:
    """Join and clean the sections: the impression first, as in the paper, all of it on one line.

    "___", where the publisher took something out, stays, one for several in a row: the scrubber writes the same mark.
    """
    joined = " ".join(_NUMBER.sub("", part) for part in (impression, findings))
    return _SPACE_BEFORE.sub(r"\1", clean_text(_MARKS.sub(MARK, joined.replace("\ufffd", " "))))


def num_words(text: str) -> int:
    """Count the words of a text; a mark is none."""
    return len(_WORD.findall(text))
