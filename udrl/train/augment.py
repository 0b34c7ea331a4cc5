"""Swapped copies: what a small student needs to learn to carry an intent's rare words into the prompt.

A word that stands in both intent and prompt is replaced in both by another intent's rare word. Task, length and the
relation of prompt to intent stay as they are, so the episode's command still labels it. The same idea is known as
delexicalisation or entity replacement in data-to-text generation (Wen et al. 2015, arXiv 1508.01745). The words come from
training intents alone, so held-out subjects stay unseen.
"""

import re
from collections import Counter
from collections.abc import Iterable

import numpy as np

from udrl.scoring.reward_components import words

# A word of at most this share of the intents is a subject or a detail; commoner ones ("poster", "with") frame the request.
RARE = 0.02


def rare_words(intents: Iterable[str]) -> list[str]:
    """Words of the intents that are rare enough to be swapped, sorted."""
    counts: Counter[str] = Counter()
    n = 0
    for intent in intents:
        n += 1
        counts.update({w for w in words(intent) if len(w) > 2 and not w.isdigit()})
    return sorted(w for w, c in counts.items() if c <= max(1, RARE * n))


def shared_words(intent: str, prompt: str, rare: frozenset[str]) -> list[str]:
    """The rare words that stand in both, sorted."""
    return sorted(rare.intersection(words(intent)).intersection(words(prompt)))


def swap(intent: str, prompt: str, shared: list[str], pool: list[str], rng: np.random.Generator) -> tuple[str, str]:
    """Replace each of the ``shared`` words by a random one of ``pool``, the same in both texts. The number of words does not
    change."""
    new = {old: pool[i] for old, i in zip(shared, rng.integers(len(pool), size=len(shared)), strict=True)}
    pattern = re.compile(r"(?<!\w)(" + "|".join(map(re.escape, shared)) + r")(?!\w)", re.IGNORECASE)

    def put(match: re.Match[str]) -> str:
        old = match.group(0)
        # The expression's idea of equal letters is a little wider than case folding (dotted and dotless i, say).
        word = new.get(old.casefold(), old)
        return word.capitalize() if old[0].isupper() else word

    return pattern.sub(put, intent), pattern.sub(put, prompt)
