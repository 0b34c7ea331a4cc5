"""The words of a request that carry its meaning, and the forms under which two English words count as the same."""

from collections.abc import Iterator, Sequence
from functools import cache, lru_cache
from typing import Any

from udrl.intents import composer
from udrl.text import words

FUNCTION_WORDS = frozenset(
    (  # noqa: SIM905
        "a about across after against all also an and any are around as at be been before behind being between "
        "both but by can could did do does down during each every for from get give had has have he her here him his how "
        "i if in into is it its just like make me more most my near need no not now of off on one onto or other our out "
        "over own please same she should so some such than that the their them then there these they this those through "
        "to toward towards under up us very want was we were what when where which while who will with without would you "
        "your"
    ).split()
)


def content_words(text: str) -> list[str]:
    """Return the distinct case-folded words that carry meaning, in their order; all words if none does."""
    distinct = list(dict.fromkeys(words(text))) or text.split()
    return [word for word in distinct if word not in FUNCTION_WORDS] or distinct


def singulars(word: str) -> Iterator[str]:
    """Yield possible singulars of ``word``; wrong guesses are not words, so they match nothing."""
    if word in _known_singulars():
        yield _known_singulars()[word]
    for ending, singular in (("s", ""), ("es", ""), ("ies", "y"), ("ves", "f"), ("ves", "fe")):
        if len(word) > len(ending) + 1 and word.endswith(ending):
            yield word.removesuffix(ending) + singular


@lru_cache(maxsize=1 << 16)
def word_forms(word: str) -> frozenset[str]:
    """Return the stems (Porter2) of a case-folded word and of its possible singulars; words with a common one are the same."""
    stem = _stemmer().stemWord
    base = without_possessive(word)
    return frozenset(stem(form) for form in (base, *singulars(base)))


def naming_words(intent: str) -> list[str]:
    """Return the words that a prompt must hold to be about the intent: its subject's, or all content words without one."""
    return content_words(" ".join(composer.find_subjects(intent)) or intent)


def coverage(wanted: Sequence[str], prompt: str) -> float:
    """Return the share of the ``wanted`` words that the prompt holds in any inflection; 1 if none is wanted."""
    held = {form for word in words(prompt) for form in word_forms(word)}
    return sum(not held.isdisjoint(word_forms(word)) for word in wanted) / len(wanted) if wanted else 1.0


def without_possessive(word: str) -> str:
    """Return the word without its possessive ending."""
    return word.removesuffix("'s").removesuffix("’s")


def singular_and_plural(word: str) -> tuple[str, str]:
    """Return both numbers of a case-folded word that may be in either, as the composer and the spelling tell them."""
    if word in _known_singulars():
        return _known_singulars()[word], word
    if word in _known_plurals():
        return word, _known_plurals()[word]
    if not word.endswith("s") or word.endswith(("ss", "us", "is")):
        return composer.inflect(word)
    if word.endswith("ies") and len(word) > 4:
        return word.removesuffix("ies") + "y", word
    is_hissing = word.endswith(("xes", "zes", "ches", "shes", "sses"))
    return word.removesuffix("es" if is_hissing else "s"), word


@cache
def _stemmer() -> Any:
    import snowballstemmer

    return snowballstemmer.stemmer("english")


@cache
def _known_singulars() -> dict[str, str]:
    """Return the singulars of the plurals in the composer's grammar, such as mice and geese, and of common irregular ones."""
    known = {"children": "child", "men": "man", "women": "woman", "people": "person", "teeth": "tooth", "feet": "foot"}
    for singular, plural in composer.subject_plurals().items():
        pairs = zip(plural.casefold().split(), singular.casefold().split(), strict=False)
        known |= {many: one for many, one in pairs if many != one}
    return known


@cache
def _known_plurals() -> dict[str, str]:
    return {one: many for many, one in _known_singulars().items()}
