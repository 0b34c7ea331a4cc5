"""Identify the script and the language of a text."""

import unicodedata
from collections import Counter
from functools import lru_cache
from typing import Any

from udrl.text import count_words

# A text is in another language if the allowed ones together have a lower probability. 0.01% of 14,900 English prompts
# (T2I-CompBench, TIFA, the bundled teacher's for images, templates and video) fall below 0.02, and 2.6% of keyword queries.
MIN_PROBABILITY = 0.02
MIN_WORDS = 4  # the identifier only guesses on shorter texts

# Scripts that are mixed within one language.
_SAME_SCRIPT = {"HIRAGANA": "CJK", "KATAKANA": "CJK", "BOPOMOFO": "CJK", "IDEOGRAPHIC": "CJK", "HANGUL": "HANGUL"}


@lru_cache(maxsize=65_536)
def script(letter: str) -> str:
    """Return the script of one letter from its Unicode name: LATIN, CYRILLIC, CJK, ..."""
    plain = unicodedata.normalize("NFKC", letter)[:1]  # maps full-width and mathematical letters to those of their script
    name = unicodedata.name(plain, "UNKNOWN").split(" ", 1)[0].split("-", 1)[0]
    return _SAME_SCRIPT.get(name, name)


@lru_cache(maxsize=16)
def scripts(text: str) -> frozenset[str]:
    """Return the scripts of the letters of ``text``."""
    if text.isascii():
        return frozenset({"LATIN"}) if any(map(str.isalpha, text)) else frozenset()
    return frozenset(script(letter) for letter in set(text) if letter.isalpha())


def foreign_script(prompt: str, intent: str, allowed: frozenset[str]) -> str | None:
    """Return the script of ``prompt`` if most of its letters are in neither ``intent``'s nor the ``allowed`` scripts."""
    if prompt.isascii() and "LATIN" in allowed:
        return None
    counts = Counter(script(letter) for letter in prompt if letter.isalpha())
    expected = allowed | scripts(intent)
    foreign = {name: n for name, n in counts.items() if name not in expected}
    if 2 * sum(foreign.values()) <= counts.total():
        return None
    return max(foreign, key=lambda name: (foreign[name], name)).lower()


def foreign_language(prompt: str, languages: tuple[str, ...]) -> str | None:
    """Return the most probable language of ``prompt`` (ISO 639-1) if it is in none of ``languages``, else None."""
    if count_words(prompt) < MIN_WORDS:
        return None
    probabilities = dict(_load_identifier().rank(prompt))
    if sum(probabilities.get(language, 0.0) for language in languages) >= MIN_PROBABILITY:
        return None
    best = max(probabilities, key=lambda language: probabilities[language])
    return None if best == "zxx" else best  # zxx: not a language, such as numbers; other checks cover those


@lru_cache(maxsize=1)
def _load_identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)  # half a second per process
