"""Swapped copies of episodes, which teach a small student to carry an intent's rare words into the prompt.

A rare word that occurs in both intent and prompt is replaced in both by another intent's rare word. Task, length and the
relation of prompt and intent do not change, so the episode's command still labels the copy. Data-to-text generation knows the
idea as delexicalization or entity replacement (Wen et al. 2015, arXiv 1508.01745). Replacement words come only from training
intents, so that held-out subjects stay unseen.
"""

import re
from collections import Counter
from collections.abc import Iterable

import numpy as np

from udrl.text import words

# Share of the intents. A word in at most this many of them names a subject or a detail; more frequent ones ("poster", "with")
# frame the request.
RARE = 0.02


def rare_words(intents: Iterable[str]) -> list[str]:
    """Return the words of the intents that are rare enough to be swapped, sorted."""
    counts: Counter[str] = Counter()
    n_intents = 0
    for intent in intents:
        n_intents += 1
        counts.update({word for word in words(intent) if len(word) > 2 and not word.isdigit()})
    return sorted(word for word, count in counts.items() if count <= max(1, RARE * n_intents))


def shared_words(intent: str, prompt: str, rare: frozenset[str]) -> list[str]:
    """Return the rare words that occur in both texts, sorted."""
    return sorted(rare.intersection(words(intent)).intersection(words(prompt)))


def swap_words(intent: str, prompt: str, shared: list[str], pool: list[str], rng: np.random.Generator) -> tuple[str, str]:
    """Replace each of the ``shared`` words by a random one of ``pool``, the same in both texts.

    The number of words does not change.
    """
    replacements = {word: pool[i] for word, i in zip(shared, rng.integers(len(pool), size=len(shared)), strict=True)}
    pattern = re.compile(r"(?<!\w)(" + "|".join(map(re.escape, shared)) + r")(?!\w)", re.IGNORECASE)

    def replace(match: re.Match[str]) -> str:
        word = match.group(0)
        # re.IGNORECASE equates a few more letters than case folding does (such as dotted and dotless i).
        replacement = replacements.get(word.casefold(), word)
        return replacement.capitalize() if word[0].isupper() else replacement

    return pattern.sub(replace, intent), pattern.sub(replace, prompt)
