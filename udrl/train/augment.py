"""Swapped copies of episodes, which teach a small student to carry an intent's subject into the prompt.

A word that names the subject in both intent and prompt is replaced in both, in the same number and with the right article, by
a word from a large pool. Task, length and the relation of prompt and intent do not change, so the episode's command still
labels the copy. Data-to-text generation knows the idea as delexicalization or entity replacement (Wen et al. 2015,
arXiv 1508.01745). The pool must be large: a student memorizes a few thousand words, and copies only if it can't.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass

import numpy as np

from udrl.intents import composer
from udrl.intents.content_words import FUNCTION_WORDS, content_words, singular_and_plural, without_possessive
from udrl.text import words

# Share of the intents. Words in more of them ("poster") frame the request instead of naming its subject.
FREQUENT = 0.02
_NUMBERS = frozenset("two three four five six seven eight nine ten eleven twelve hundred thousand".split())  # noqa: SIM905
_VOCABULARY_WORD = re.compile(r"[Ġ▁]([a-z]{4,12})")  # a whole lower-case word of a byte-level or SentencePiece vocabulary


@dataclass(frozen=True)
class SwapWords:
    """The words that are never swapped, because they frame requests, and the words that replace others."""

    frequent: frozenset[str]
    pool: tuple[str, ...]


def frequent_words(intents: Iterable[str]) -> frozenset[str]:
    """Return the words that occur in more than :data:`FREQUENT` of the intents."""
    counts: Counter[str] = Counter()
    n_intents = 0
    for intent in intents:
        n_intents += 1
        counts.update(set(words(intent)))
    return frozenset(word for word, count in counts.items() if count > max(1, FREQUENT * n_intents))


def whole_words(vocabulary: Iterable[str], excluded: Collection[str] = ()) -> tuple[str, ...]:
    """Return the lower-case words of 4 to 12 letters that are one piece of a tokenizer's vocabulary, sorted.

    Words that name one of the ``excluded`` subjects, such as those held out of training, are left out.
    """
    pieces = {match[1] for piece in vocabulary if (match := _VOCABULARY_WORD.fullmatch(piece))}
    unwanted = {form for subject in excluded for word in words(subject) for form in singular_and_plural(word)}
    return tuple(sorted(pieces - unwanted - FUNCTION_WORDS))


def subject_words(intent: str, frequent: frozenset[str] = frozenset()) -> list[str]:
    """Return the case-folded words that name what the intent is about, in their order.

    They are those of the composer's subjects and, for requests that people wrote, all content words that are neither
    ``frequent`` nor the composer's words for framing or describing a request.
    """
    subjects = " ".join(composer.find_subjects(intent))
    named = {form for word in content_words(subjects) for form in singular_and_plural(word)}
    framing = composer.framing_words() | frequent | _NUMBERS
    return [
        word
        for word in dict.fromkeys(map(without_possessive, content_words(intent)))
        if word in named or (word not in framing and len(word) > 2 and word.isalpha() and word.isascii())
    ]


def shared_words(intent: str, prompt: str, frequent: frozenset[str]) -> list[str]:
    """Return the subject's words that the prompt holds in singular or plural, in the order of the intent."""
    held = set(map(without_possessive, words(prompt)))
    return [word for word in subject_words(intent, frequent) if not held.isdisjoint(singular_and_plural(word))]


def swap_words(intent: str, prompt: str, shared: list[str], pool: tuple[str, ...], rng: np.random.Generator) -> tuple[str, str]:
    """Replace each of the ``shared`` words by a random one of ``pool``, the same in both texts, in singular and plural.

    The article before a replaced word is adapted; the number of words does not change.
    """
    replacements: dict[str, str] = {}
    for word, i in zip(shared, rng.integers(len(pool), size=len(shared)), strict=True):
        (singular, plural), (new_singular, new_plural) = singular_and_plural(word), singular_and_plural(pool[i])
        replacements |= {plural: new_plural, singular: new_singular}
    longest_first = sorted(map(re.escape, replacements), key=len, reverse=True)
    pattern = re.compile(rf"(?:(?<!\w)(an?)(\s+))?(?<!\w)({'|'.join(longest_first)})(?!\w)", re.IGNORECASE)

    def replace(match: re.Match[str]) -> str:
        article, space, word = match.groups()
        # re.IGNORECASE equates a few more letters than case folding does (such as dotted and dotless i).
        replacement = replacements.get(word.casefold(), word)
        if word[0].isupper():
            replacement = replacement.capitalize()
        if article is None:
            return replacement
        new_article = composer.article(replacement)
        return f"{new_article.capitalize() if article[0].isupper() else new_article}{space}{replacement}"

    return pattern.sub(replace, intent), pattern.sub(replace, prompt)
