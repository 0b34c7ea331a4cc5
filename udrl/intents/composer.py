"""The built-in composer: short creative requests from the grammar in ``grammar.yaml``.

Each template is expanded into *variants* (one choice of each alternative), and a variant is a product of word lists. Its
members are visited in a pseudo-random order that needs no memory, so only the check for duplicates grows with the number of
intents.
"""

import bisect
import importlib.resources
import itertools
import math
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import yaml

from udrl.errors import UserError
from udrl.hashing import stable_id
from udrl.intents.intent import Intent
from udrl.text import count_words, words

MAX_WORDS = 40
PROPS = "prop"  # the list of things that accompany a subject
SLOT = re.compile(r"\{(\w+)(?::(a|pl))?(!)?\}")
_CHOICE = re.compile(r"\(([^()]*)\)|\[([^\[\]]*)\]")
# Vowel letters that sound like consonants, and the reverse.
_TAKES_A = re.compile(r"uni|uku|use|eu|one\b", re.IGNORECASE)
_TAKES_AN = re.compile(r"[aeiou]|hour|heir|honest", re.IGNORECASE)

Piece = tuple[str, str | None]  # words, and the subject if they name it


@dataclass(frozen=True)
class Variant:
    """One flat form of a template: the alternatives at each position, in order."""

    positions: tuple[tuple[Piece, ...], ...]
    weight: float
    size: int

    def member(self, index: int) -> Intent:
        """Return the ``index``-th intent of this variant, 0 <= index < size."""
        text, subject = "", ""
        for pieces in self.positions:
            index, choice = divmod(index, len(pieces))
            phrase, term = pieces[choice]
            text, subject = text + phrase, term or subject
        return Intent(text, subject)


def compose(limit: int, seed: int) -> Iterator[Intent]:
    """Yield ``limit`` intents of 1 to 40 words, distinct regardless of case; the same ones for the same seed.

    A smaller limit gives a prefix of a larger one.

    Raises:
        UserError: the grammar has fewer than ``limit`` intents.
    """
    if limit > capacity():
        raise _exhausted(limit, capacity())
    return _compose(limit, seed)


def capacity() -> int:
    """Return the number of intents in the grammar; the few that two templates share count twice."""
    return sum(variant.size for variant in _variants())


def subjects() -> list[str]:
    """Return all subjects of the grammar, sorted; the held-out split chooses from them."""
    return sorted(subject_plurals())


def subject_plurals() -> dict[str, str]:
    """Return the plural of each subject of the grammar."""
    return dict(inflect(term) for kind in grammar()["subjects"].values() for term in _split_items(kind["terms"]))


def find_subjects(text: str) -> list[str]:
    """Return the grammar's subjects, in the singular, that ``text`` names in singular or plural, in their order."""
    remaining = [word.removesuffix("'s").removesuffix("’s") for word in words(text)]  # possessives
    singulars: list[str] = []
    while remaining:
        for length in range(min(_phrases().longest, len(remaining)), 0, -1):  # the longest phrase: red panda, not panda
            if singular := _phrases().singulars.get(tuple(remaining[:length])):
                singulars.append(singular)
                break
        del remaining[:length]
    return list(dict.fromkeys(singulars))


def subject_of(text: str) -> str:
    """Return the first of the grammar's subjects that a request names; without one, its own text with case folded."""
    return next(iter(find_subjects(text)), text.casefold())


@cache
def framing_words() -> frozenset[str]:
    """Return the words of the grammar that request or describe: of templates, adjectives, and lists except ``prop``."""
    tables = grammar()
    templates = [SLOT.sub(" ", template) for group in tables["templates"].values() for template in group]
    lists = [text for name, text in tables["lists"].items() if name != PROPS]
    adjectives = [kind["with"] for kind in tables["subjects"].values() if "with" in kind]
    return frozenset(word for text in [*templates, *lists, *adjectives] for word in words(text))


@cache
def grammar() -> dict[str, Any]:
    """Return the parsed grammar file."""
    text = importlib.resources.files(__package__).joinpath("grammar.yaml").read_text(encoding="utf-8")
    return yaml.safe_load(text)


def expand_template(template: str) -> Iterator[str]:
    """Yield the flat forms of a template: each choice of ``(x|y)`` and ``[x|y]``, and ``+`` as nothing or as ``!``.

    ``!`` in a slot stands for an adjective.
    """
    if choice := _CHOICE.search(template):
        options = choice[1].split("|") if choice[1] is not None else ["", *choice[2].split("|")]
    elif choice := re.search(r"\+(?=\})", template):
        options = ["", "!"]
    else:
        yield template
        return
    for option in options:
        yield from expand_template(template[: choice.start()] + option + template[choice.end() :])


def inflect(term: str) -> tuple[str, str]:
    """Return the singular and the plural of a term as the grammar spells it."""
    singular, _, plural = term.partition("|")
    if plural:
        return singular, plural
    # "pair of sneakers" and "ship in a bottle" take the s in the middle.
    head, joint, rest = re.split(r"( of | in | and |$)", singular, maxsplit=1)
    if head.endswith(("s", "x", "z", "ch", "sh")):
        head += "es"
    elif head.endswith("y") and head[-2:-1] not in "aeiou":
        head = head[:-1] + "ies"
    else:
        head += "s"
    return singular, head + joint + rest


def article(phrase: str) -> str:
    """Return the indefinite article of a phrase, as spelling tells it."""
    return "an" if _TAKES_AN.match(phrase) and not _TAKES_A.match(phrase) else "a"


def permute(index: int, size: int, key: int) -> int:
    """Return the image of ``index`` under a keyed permutation of 0..size-1.

    A Feistel network over the next power of four, applied until the result is below ``size`` (cycle walking).
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for turn in range(4):
            mixed = ((right + 1) * 0x9E3779B97F4A7C15 + (key >> turn) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
            mixed ^= mixed >> 29
            left, right = right, left ^ ((mixed * 0x94D049BB133111EB >> 31) & mask)
        index = left << half | right
        if index < size:
            return index


@dataclass(frozen=True)
class _Phrases:
    """The words of every subject, singular and plural, mapped to the subject in the singular."""

    singulars: dict[tuple[str, ...], str]
    longest: int  # words


@cache
def _phrases() -> _Phrases:
    singulars: dict[tuple[str, ...], str] = {}
    for singular, plural in subject_plurals().items():
        singulars |= {tuple(words(plural)): singular, tuple(words(singular)): singular}
    return _Phrases(singulars, max(map(len, singulars)))


@cache
def _variants() -> list[Variant]:
    """Return the variants of all templates. A template's weight is its number of subjects, shared among its variants."""
    variants = []
    for template in itertools.chain.from_iterable(grammar()["templates"].values()):
        texts = list(expand_template(template))
        for text in texts:
            positions = tuple(_positions(text))
            # All members must have an allowed length, so that no member is visited in vain.
            lengths = [[count_words(phrase) for phrase, _ in pieces] for pieces in positions if pieces]
            size = math.prod(map(len, positions))
            if size and sum(map(max, lengths)) <= MAX_WORDS:
                n_subjects = max(len({subject for _, subject in pieces}) for pieces in positions)
                variants.append(Variant(positions, n_subjects / len(texts), size))
    return variants


def _compose(limit: int, seed: int) -> Iterator[Intent]:
    rng = random.Random(seed)
    remaining = list(_variants())
    keys = {id(variant): rng.getrandbits(64) for variant in remaining}
    visited = dict.fromkeys(keys, 0)
    edges = list(itertools.accumulate(variant.weight for variant in remaining))
    seen: set[int] = set()
    while remaining and len(seen) < limit:
        variant = remaining[bisect.bisect_right(edges, rng.random() * edges[-1], hi=len(remaining) - 1)]
        visit = visited[id(variant)]
        if visit == variant.size:
            remaining = [other for other in remaining if other is not variant]
            edges = list(itertools.accumulate(other.weight for other in remaining))
            continue
        visited[id(variant)] = visit + 1
        intent = variant.member(permute(visit, variant.size, keys[id(variant)]))
        key = stable_id(intent.text.casefold())
        if key not in seen:
            seen.add(key)
            yield intent
    if len(seen) < limit:
        raise _exhausted(limit, len(seen))


def _exhausted(limit: int, available: int) -> UserError:
    return UserError(
        f"intents.limit: the built-in composer has only {available} intents ({limit}); lower the limit or set intents.source"
    )


def _positions(text: str) -> Iterator[tuple[Piece, ...]]:
    """Split a flat template into plain text and the alternatives of each slot."""
    end = 0
    for slot in SLOT.finditer(text):
        yield ((text[end : slot.start()], None),)
        yield _fill(slot[1], slot[2], adjective=slot[3] == "!")
        end = slot.end()
    yield ((text[end:], None),)


@cache
def _fill(name: str, form: str | None, adjective: bool) -> tuple[Piece, ...]:
    """Return the alternatives of the slot ``name``; they have a subject if the name is a kind or a group of kinds."""
    tables = grammar()
    if name in tables["lists"]:
        return tuple((_in_form(*inflect(item), form), None) for item in _split_items(tables["lists"][name]))
    pieces: list[Piece] = []
    for kind in tables["groups"].get(name, [name]):
        entry = tables["subjects"][kind]
        adjectives = [f"{word} " for word in _split_items(entry["with"])] if adjective else [""]
        for singular, plural in map(inflect, _split_items(entry["terms"])):
            for word in adjectives:
                pieces.append((_in_form(word + singular, word + plural, form), singular))
    return tuple(pieces)


def _in_form(singular: str, plural: str, form: str | None) -> str:
    return f"{article(singular)} {singular}" if form == "a" else plural if form == "pl" else singular


def _split_items(text: str) -> list[str]:
    return [item.strip() for item in text.split(",") if item.strip()]
