"""Parse the lines that a teacher writes as new intents: each is an intent, or is dropped for a reason."""

import re
import unicodedata
from collections.abc import Iterable, Iterator
from enum import StrEnum
from functools import cache

from udrl.hashing import stable_id
from udrl.intents import composer
from udrl.scoring.parsing import clean
from udrl.text import count_words


class LineProblem(StrEnum):
    """Why a line is not a new intent."""

    ENGINE_ERROR = "engine error"
    TRUNCATED = "truncated"
    FRAME = "not a line of the list"
    TOO_SHORT = "too short"
    TOO_LONG = "too long"
    REFUSAL = "refusal"
    MARKUP = "markup"
    HELD_OUT_SUBJECT = "held-out subject"
    DUPLICATE = "duplicate"
    NEAR_DUPLICATE = "near-duplicate"
    NEAR_HELD_OUT = "near a held-out intent"
    SURPLUS = "more than requested"


MIN_LETTER_SHARE = 0.8  # share of letters (and the marks and blanks between them) in plain text
_NUMBERED = re.compile(r"\s*(\d{1,4})\s*[.)]\s*(.*)")
_TAIL = re.compile(r"(,\s*\d+|[\s.;,])+$")  # a teacher may count on within the line: "a red barn, 4"
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


def parse_lines(completion: str, first: int, n: int, headless: bool, whole: bool) -> Iterator[tuple[str, LineProblem | None]]:
    """Yield (text, problem) for each line of a continued list of ``n`` lines that are numbered from ``first``.

    ``headless``: the completion lacks the first number, which ends the prompt. Unless ``whole``, the last line is truncated.
    """
    lines = [line for line in completion.split("\n") if line.strip()]
    next_number = first
    for i, line in enumerate(lines):
        numbered = _NUMBERED.fullmatch(line)
        text = _TAIL.sub("", clean(numbered[2] if numbered else line))
        in_order = (headless and i == 0 and not numbered) or (numbered is not None and int(numbered[1]) == next_number)
        if not in_order:
            yield text, LineProblem.FRAME
        elif next_number >= first + n:
            yield text, LineProblem.SURPLUS
        else:
            next_number += 1
            yield text, LineProblem.TRUNCATED if i == len(lines) - 1 and not whole else None


def find_problem(text: str) -> LineProblem | None:
    """Return why a line is not an intent like the composer's, 3 to 16 words of plain text; None if it is one."""
    if _REFUSAL.search(text):
        return LineProblem.REFUSAL
    if _MARKUP.search(text) or sum(unicodedata.category(c)[0] in "LMZ" for c in text) < MIN_LETTER_SHARE * len(text):
        return LineProblem.MARKUP
    n_words = count_words(text)
    if n_words < composer.MIN_WORDS:
        return LineProblem.TOO_SHORT
    return LineProblem.TOO_LONG if n_words > composer.MAX_WORDS else None


class HeldOutSubjects:
    """The held-out subjects, as a set of hashes.

    ``text in subjects`` is true if the text names one of them in whole words, in singular or plural, ignoring case.
    """

    def __init__(self) -> None:
        self._hashes: set[int] = set()
        self._longest = 0  # words

    def add(self, subjects: Iterable[str]) -> None:
        for subject in subjects:
            words = _split_words(subject)
            if words:
                self._hashes.update(_hash_variants(words))
                self._longest = max(self._longest, len(words))

    def __contains__(self, text: str) -> bool:
        words = _split_words(text)
        return any(
            not self._hashes.isdisjoint(_hash_variants(words[i:j]))
            for i in range(len(words))
            for j in range(i + 1, min(i + self._longest, len(words)) + 1)
        )


def _split_words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold().replace("'s", "").replace("’s", ""))


def _hash_variants(words: list[str]) -> Iterator[int]:
    """Yield hashes of the words, and of the words with one in the singular: no subject has two plurals."""
    yield stable_id(" ".join(words))
    for i, word in enumerate(words):
        for singular in _singulars(word):
            yield stable_id(" ".join([*words[:i], singular, *words[i + 1 :]]))


def _singulars(word: str) -> Iterator[str]:
    """Yield possible singulars of ``word``; wrong guesses are not words, so they match nothing."""
    if word in _known_singulars():
        yield _known_singulars()[word]
    for ending, singular in (("s", ""), ("es", ""), ("ies", "y"), ("ves", "f"), ("ves", "fe")):
        if len(word) > len(ending) + 1 and word.endswith(ending):
            yield word.removesuffix(ending) + singular


@cache
def _known_singulars() -> dict[str, str]:
    """Return the singulars of the plurals in the composer's grammar, such as mice and geese, and of common irregular ones."""
    singulars = {"children": "child", "men": "man", "women": "woman", "people": "person", "teeth": "tooth", "feet": "foot"}
    for singular, plural in composer.subject_plurals().items():
        pairs = zip(plural.casefold().split(), singular.casefold().split(), strict=False)
        singulars |= {many: one for many, one in pairs if many != one}
    return singulars
