"""The built-in composer: short creative requests from the grammar in ``grammar.yaml``.

Every template is expanded into *variants* (one choice of each alternative), and a variant is a product of word lists. Its
members are visited in a pseudo-random order that needs no memory, so only the duplicate check grows with the number drawn.
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
from udrl.intents.split import Intent

MIN_WORDS, MAX_WORDS = 3, 16
_SLOT = re.compile(r"\{(\w+)(?::(a|pl))?(!)?\}")
_CHOICE = re.compile(r"\(([^()]*)\)|\[([^\[\]]*)\]")
# Vowel letters that sound like consonants, and the reverse.
_SAYS_A = re.compile(r"uni|uku|use|eu|one\b", re.IGNORECASE)
_SAYS_AN = re.compile(r"[aeiou]|hour|heir|honest", re.IGNORECASE)

Piece = tuple[str, str | None]  # words, and the subject that they name, if they do


@dataclass(frozen=True)
class Variant:
    """One flat form of a template: what may stand at each place, in order."""

    pieces: tuple[tuple[Piece, ...], ...]
    weight: float
    size: int

    def member(self, index: int) -> Intent:
        """The ``index``-th intent of this variant, 0 <= index < size."""
        text, subject = "", ""
        for piece in self.pieces:
            index, place = divmod(index, len(piece))
            words, term = piece[place]
            text, subject = text + words, term or subject
        return Intent(text, subject)


def compose(limit: int, seed: int) -> Iterator[Intent]:
    """Yield ``limit`` distinct intents (distinct when case is folded), the same ones for the same seed.

    A smaller limit gives a prefix of a larger one. Words per intent: 3 to 16.

    Raises:
        UserError: ``limit`` is more than the grammar can give.
    """
    if limit > capacity():
        raise _exhausted(limit, capacity())
    return _compose(limit, seed)


def capacity() -> int:
    """How many intents the grammar has, counting twice the few that two templates both give."""
    return sum(variant.size for variant in variants())


def subjects() -> list[str]:
    """Every subject of the grammar, sorted: what the held-out split chooses from."""
    return sorted({_forms(term)[0] for kind in grammar()["subjects"].values() for term in _items(kind["terms"])})


@cache
def grammar() -> dict[str, Any]:
    """The parsed grammar file."""
    text = importlib.resources.files(__package__).joinpath("grammar.yaml").read_text(encoding="utf-8")
    return yaml.safe_load(text)


@cache
def variants() -> list[Variant]:
    """All variants of all templates; a template weighs as much as it has subjects, whatever the number of its variants."""
    found = []
    for template in itertools.chain.from_iterable(grammar()["templates"].values()):
        texts = list(_expand(template))
        for text in texts:
            pieces = tuple(_pieces(text))
            # Every member must fit, so that nothing is drawn in vain.
            lengths = [[len(words.split()) for words, _ in piece] for piece in pieces if piece]
            size = math.prod(map(len, pieces))
            if size and sum(map(min, lengths)) >= MIN_WORDS and sum(map(max, lengths)) <= MAX_WORDS:
                n_subjects = max(len({subject for _, subject in piece}) for piece in pieces)
                found.append(Variant(pieces, n_subjects / len(texts), size))
    return found


def _compose(limit: int, seed: int) -> Iterator[Intent]:
    rng = random.Random(seed)
    live = list(variants())
    keys = {id(variant): rng.getrandbits(64) for variant in live}
    drawn = dict.fromkeys(keys, 0)
    edges = list(itertools.accumulate(variant.weight for variant in live))
    seen: set[int] = set()
    while live and len(seen) < limit:
        variant = live[bisect.bisect_right(edges, rng.random() * edges[-1], hi=len(live) - 1)]
        turn = drawn[id(variant)]
        if turn == variant.size:
            live = [other for other in live if other is not variant]
            edges = list(itertools.accumulate(other.weight for other in live))
            continue
        drawn[id(variant)] = turn + 1
        intent = variant.member(_shuffled(turn, variant.size, keys[id(variant)]))
        key = stable_id(intent.text.casefold())
        if key not in seen:
            seen.add(key)
            yield intent
    if len(seen) < limit:
        raise _exhausted(limit, len(seen))


def _exhausted(limit: int, found: int) -> UserError:
    return UserError(f"intents.limit={limit}: the built-in composer has {found} intents; ask for fewer or set intents.source")


def _shuffled(index: int, size: int, key: int) -> int:
    """The image of ``index`` under a keyed permutation of 0..size-1: a Feistel network that walks until it lands inside."""
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


def _expand(template: str) -> Iterator[str]:
    """Every choice of ``(x|y)`` and ``[x|y]``; ``+`` becomes nothing or ``!``, which stands for an adjective."""
    if choice := _CHOICE.search(template):
        options = choice[1].split("|") if choice[1] is not None else ["", *choice[2].split("|")]
    elif choice := re.search(r"\+(?=\})", template):
        options = ["", "!"]
    else:
        yield template
        return
    for option in options:
        yield from _expand(template[: choice.start()] + option + template[choice.end() :])


def _pieces(text: str) -> Iterator[tuple[Piece, ...]]:
    """Split a flat template into plain text and what may fill each slot."""
    end = 0
    for slot in _SLOT.finditer(text):
        yield ((text[end : slot.start()], None),)
        yield _fill(slot[1], slot[2], adjective=slot[3] == "!")
        end = slot.end()
    yield ((text[end:], None),)


@cache
def _fill(name: str, form: str | None, adjective: bool) -> tuple[Piece, ...]:
    """What may stand in the slot ``name``: words, and the subject where the name is a kind or a group of kinds."""
    tables = grammar()
    if name in tables["lists"]:
        return tuple((_with_article(item) if form == "a" else item, None) for item in _items(tables["lists"][name]))
    found: list[Piece] = []
    for kind in tables["groups"].get(name, [name]):
        entry = tables["subjects"][kind]
        before = [f"{word} " for word in _items(entry["with"])] if adjective else [""]
        for singular, plural in map(_forms, _items(entry["terms"])):
            for word in before:
                phrase = word + (plural if form == "pl" else singular)
                found.append((_with_article(phrase) if form == "a" else phrase, singular))
    return tuple(found)


def _items(text: str) -> list[str]:
    return [item.strip() for item in text.split(",") if item.strip()]


def _forms(term: str) -> tuple[str, str]:
    """Singular and plural of a term as the grammar writes it."""
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


def _with_article(phrase: str) -> str:
    return f"an {phrase}" if _SAYS_AN.match(phrase) and not _SAYS_A.match(phrase) else f"a {phrase}"
