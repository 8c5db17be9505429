"""Report texts on their way into a set: a scrubber by pattern, then every word that only few patients share.

A pattern finds names in their usual surroundings. A name that stands alone is found because it is rare: a word of
fewer than N patients' reports is masked, so neither a shard nor the tokenizer's vocabulary can spell it.
"""

import importlib
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from mnemos.sharding.errors import UserError

if TYPE_CHECKING:
    from mnemos.sharding.sources.units import Unit

Scrubber = Callable[[str], str]
MARK = "___"  # what MIMIC puts in place of what was taken out
BASIC, NONE = "basic", "none"
LEAST_GROUPS = 5
MUCH_MASKED = 0.1
_WORD = re.compile(r"[^\W\d_]{2,}")  # letters; a single one names nobody


@dataclass(frozen=True, kw_only=True)
class ScrubbedTexts:
    """Texts that may be stored, and that a tokenizer may learn from.

    Attributes:
        texts: as given, in their order, scrubbed and masked.
        words: number of words in the texts after the scrubber.
        masked: how many of them were masked as rare.
    """

    texts: list[str]
    words: int
    masked: int


@dataclass(frozen=True, kw_only=True)
class ScrubbedUnits:
    """Units whose texts may be stored.

    Attributes:
        units: as given, in their order, with the texts replaced.
        recipe: what was done, a readable sentence for the manifest.
        notes: sentences for the user's screen.
    """

    units: "list[Unit]"
    recipe: dict[str, str]
    notes: tuple[str, ...]


def scrub_units(
    units: "list[Unit]", *, scrubber: str = "", least_groups: int | None = None, public: bool = False
) -> ScrubbedUnits:
    """Scrub the texts of units and mask the words of few groups; the same units give the same texts.

    Args:
        units: of texts, with their groups. A unit without a group is one of its own.
        scrubber: as for `load_scrubber`; "": basic, or none for public texts.
        least_groups: a word in the texts of fewer groups is masked; 0: none is; None: 5, or 0 for public texts.
        public: the texts were published by their authors.

    Raises:
        UserError: the scrubber is unknown or fails, or `least_groups` is negative.
    """
    name = scrubber or (NONE if public else BASIC)
    least = least_groups if least_groups is not None else 0 if public else LEAST_GROUPS
    done = scrub_texts([(unit.text, unit.group or unit.name) for unit in units], name, least)
    # The user's own function may bear the name of a hospital: the recipe only says that it is one.
    said = f"scrubber: {name if name in (BASIC, NONE) else 'of the user'}; "
    said += f"words of fewer than {least} groups masked" if least else "no rare words masked"
    return ScrubbedUnits(
        units=[replace(unit, text=text) for unit, text in zip(units, done.texts, strict=True)],
        recipe={"identifiers": said},
        notes=_notes(units, least, done) if least and done.words else (),
    )


def scrub_texts(
    texts_with_groups: Sequence[tuple[str, str]], scrubber: str = BASIC, least_groups: int = LEAST_GROUPS
) -> ScrubbedTexts:
    """Scrub texts one by one, then mask the words that the texts of fewer than `least_groups` groups hold.

    Args:
        texts_with_groups: (text, group); a text "" stays.
        scrubber: as for `load_scrubber`.
        least_groups: 0: no word is masked.

    Raises:
        UserError: the scrubber is unknown or fails, or `least_groups` is negative.
    """
    from tqdm import tqdm

    if least_groups < 0:
        raise UserError(f"--rare-words is {least_groups}; 0 (mask none) or more is allowed")
    clean = load_scrubber(scrubber)
    bar = tqdm(texts_with_groups, desc="scrubbing", unit="text", disable=None)
    texts = [clean(text) if text else text for text, _ in bar]
    groups = (group for _, group in texts_with_groups)
    rare = rare_words(zip(texts, groups, strict=True), least_groups)
    words = masked = 0
    for number, text in enumerate(texts):
        found = [word.casefold() in rare for word in _WORD.findall(text)]
        words, masked = words + len(found), masked + sum(found)
        if any(found):
            texts[number] = mask_rare(text, rare)
    return ScrubbedTexts(texts=texts, words=words, masked=masked)


def load_scrubber(name: str) -> Scrubber:
    """Return the function that takes identifiers out of one text.

    Args:
        name: "basic" (patterns of `identifiers.py`), "none", or "module:function" of the user's own, which takes a
            text and returns a text. Only the last imports anything that is not ours.

    Raises:
        UserError: unknown, not importable, not a function; also from the returned function, where the user's own
            raises or returns no text. No message holds a part of a text.
    """
    if name == NONE:
        return str
    if name == BASIC:
        from mnemos.sharding.building.identifiers import hide_identifiers

        return lambda text: hide_identifiers(unicodedata.normalize("NFC", text))
    module_name, colon, function_name = name.partition(":")
    if not (module_name and colon and function_name):
        raise UserError(
            f"--scrubber {name!r} is unknown; {BASIC}, {NONE} or a function of your own as module:function is allowed"
        )
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except Exception as error:  # importing runs the user's code, which may raise anything
        raise UserError(
            f"--scrubber {name} cannot be imported ({type(error).__name__}: {error}); the module must lie in this "
            "folder or be installed, and hold the function"
        ) from error
    if not callable(function):
        raise UserError(
            f"--scrubber {name} is a {type(function).__name__}; a function from text to text is needed"
        )

    def own(text: str) -> str:
        try:
            scrubbed = function(text)
        except Exception as error:  # noqa: BLE001 -- cut off from ours, because it may quote the text
            raise UserError(
                f"--scrubber {name} failed with {type(error).__name__}; it must take any text, try it alone"
            ) from None
        if not isinstance(scrubbed, str):
            raise UserError(f"--scrubber {name} returned {type(scrubbed).__name__}; it must return the text")
        return scrubbed

    return own


def rare_words(texts_with_groups: Iterable[tuple[str, str]], least_groups: int) -> frozenset[str]:
    """Return the words that the texts of fewer than `least_groups` different groups hold.

    A word is two letters or more in a row, whatever its case. For every word at most `least_groups` - 1 groups are
    kept in mind, so that memory grows with the vocabulary and not with the texts.

    Args:
        texts_with_groups: (text, group), groups in any order.
        least_groups: 0 or 1: no word is rare.
    """
    if least_groups <= 1:
        return frozenset()
    numbers: dict[str, int] = {}
    seen: dict[str, tuple[int, ...] | None] = {}  # None: groups enough
    for text, group in texts_with_groups:
        number = numbers.setdefault(group, len(numbers))
        for word in {word.casefold() for word in _WORD.findall(text)}:
            groups = seen.get(word, ())
            if groups is not None and number not in groups:
                seen[word] = (*groups, number) if len(groups) + 1 < least_groups else None
    return frozenset(word for word, groups in seen.items() if groups is not None)


def mask_rare(text: str, rare: frozenset[str]) -> str:
    """Put the mark in place of every rare word; several in a row are one mark."""
    masked = _WORD.sub(lambda found: MARK if found.group().casefold() in rare else found.group(), text)
    return re.sub(rf"{MARK}(?:[\s'’-]*{MARK})+", MARK, masked)


def _notes(units: "list[Unit]", least: int, done: ScrubbedTexts) -> tuple[str, ...]:
    share, notes = done.masked / done.words, []
    sentence = f"{done.masked} of {done.words} words ({share:.1%}) are masked: fewer than {least} patients' reports hold them"
    if share > MUCH_MASKED:
        sentence += (
            f"; that is much, as in a small set or with every text of one patient: --rare-words with a number below "
            f"{least} masks fewer, 0 none, and then names no pattern catches stay in"
        )
    notes.append(sentence)
    if not any(unit.group for unit in units):
        notes.append(
            "no report has a group, so each counts as a patient: a name repeated in several reports of one patient "
            "may stay in; give patients with --group-column"
        )
    return tuple(notes)
