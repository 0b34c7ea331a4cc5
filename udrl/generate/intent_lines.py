"""What becomes of one line that a teacher wrote as a new intent: kept, or dropped with a reason."""

import re
import unicodedata
from collections.abc import Iterable, Iterator
from enum import StrEnum
from functools import cache

from udrl.hashing import stable_id
from udrl.intents import composer
from udrl.scoring.parsing import clean


class Reason(StrEnum):
    """Why a line is not a new intent."""

    ENGINE_ERROR = "engine error"
    TRUNCATED = "truncated"
    FRAME = "frame of the list"
    TOO_SHORT = "too short"
    TOO_LONG = "too long"
    REFUSAL = "refusal"
    MARKUP = "markup"
    HELD_OUT_SUBJECT = "held-out subject"
    DUPLICATE = "known"
    NEAR_DUPLICATE = "near a known one"
    NEAR_HELD_OUT = "near a held-out one"
    SURPLUS = "more than wanted"


MOSTLY = 0.8  # share of letters (and the marks and blanks between them) in plain text
_NUMBERED = re.compile(r"\s*(\d{1,4})\s*[.)]\s*(.*)")
_TAIL = re.compile(r"(,\s*\d+|[\s.;,])+$")  # a teacher counts on within the line: "a red barn, 4"
_REFUSAL = re.compile(
    r"\b(i'?m sorry|i am sorry|i (can'?t|cannot|won'?t) |as an ai|language model|unable to|i apologi[sz]e)"
    r"|^(sure|certainly|of course)\b",
    re.IGNORECASE,
)
# The frame of a list or a chat, a field's name, markup, links, code, control characters.
_MARKUP = re.compile(
    r"[{}<>|`\\*_#\[\]=~^\x00-\x1f\x7f\ufffd]|https?:|www\."
    r"|\b(intent|request|prompt|answer|note|example|output|input)s?\s*\d*\s*:|\d+\.\s",
    re.IGNORECASE,
)


def lines_of(completion: str, first: int, n: int, headless: bool, whole: bool) -> Iterator[tuple[str, Reason | None]]:
    """The lines of a continued list as (text, reason); a reason already tells that the frame was not kept.

    ``first`` is the number of the first new line, which a completion lacks (``headless``: it stood in the prompt). Where
    the completion is not ``whole``, its last line broke off.
    """
    lines = [line for line in completion.split("\n") if line.strip()]
    due = first
    for i, line in enumerate(lines):
        numbered = _NUMBERED.fullmatch(line)
        text = _TAIL.sub("", clean(numbered[2] if numbered else line))
        in_turn = (headless and i == 0 and not numbered) or (numbered is not None and int(numbered[1]) == due)
        if not in_turn or due >= first + n:
            yield text, Reason.FRAME if not in_turn else Reason.SURPLUS
            continue
        due += 1
        yield text, Reason.TRUNCATED if i == len(lines) - 1 and not whole else None


def problem_of(text: str) -> Reason | None:
    """What keeps a line from being an intent like the composer's, or None: 3 to 16 words of plain text."""
    if _REFUSAL.search(text):
        return Reason.REFUSAL
    if _MARKUP.search(text) or sum(unicodedata.category(c)[0] in "LMZ" for c in text) < MOSTLY * len(text):
        return Reason.MARKUP
    words = len(text.split())
    if words < composer.MIN_WORDS:
        return Reason.TOO_SHORT
    return Reason.TOO_LONG if words > composer.MAX_WORDS else None


class HeldOut:
    """The held-out subjects, as the set of their hashes. ``text in held`` asks whether a text names one as whole words,
    whatever the case, in singular or plural."""

    def __init__(self) -> None:
        self._hashes: set[int] = set()
        self._longest = 0

    def add(self, subjects: Iterable[str]) -> None:
        for subject in subjects:
            words = _words(subject)
            if words:
                self._hashes.update(_variants(words))
                self._longest = max(self._longest, len(words))

    def __contains__(self, text: str) -> bool:
        words = _words(text)
        return any(
            not self._hashes.isdisjoint(_variants(words[i:j]))
            for i in range(len(words))
            for j in range(i + 1, min(i + self._longest, len(words)) + 1)
        )


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold().replace("'s", "").replace("’s", ""))


def _variants(words: list[str]) -> Iterator[int]:
    """Hashes of the words as they are, and with one of them in singular: no subject is plural in two places."""
    yield stable_id(" ".join(words))
    for i, word in enumerate(words):
        for singular in _singulars(word):
            yield stable_id(" ".join([*words[:i], singular, *words[i + 1 :]]))


def _singulars(word: str) -> Iterator[str]:
    """What may be the singular of ``word``; wrong guesses are no words, so they match nothing."""
    if word in _irregular():
        yield _irregular()[word]
    for ending, singular in (("s", ""), ("es", ""), ("ies", "y"), ("ves", "f"), ("ves", "fe")):
        if len(word) > len(ending) + 1 and word.endswith(ending):
            yield word.removesuffix(ending) + singular


@cache
def _irregular() -> dict[str, str]:
    """Return the singular of irregular plurals: those of the composer's grammar, such as mice and geese, and common ones."""
    singulars = {"children": "child", "men": "man", "women": "woman", "people": "person", "teeth": "tooth", "feet": "foot"}
    for singular, plural in composer.subject_plurals().items():
        pairs = zip(plural.casefold().split(), singular.casefold().split(), strict=False)
        singulars |= {many: one for many, one in pairs if many != one}
    return singulars
