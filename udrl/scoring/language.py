"""Script and language of a text."""

import unicodedata
from collections import Counter
from functools import lru_cache
from typing import Any

# A text is in another language where the listed ones together are less likely than this. 0.01% of 14,900 English prompts
# (T2I-CompBench, TIFA, the bundled teacher's for images, templates and video) fall below 0.02, and 2.6% of keyword queries.
UNLIKELY = 0.02
MIN_WORDS = 4  # below, an identifier guesses

# Scripts that one language mixes.
_TOGETHER = {"HIRAGANA": "CJK", "KATAKANA": "CJK", "BOPOMOFO": "CJK", "IDEOGRAPHIC": "CJK", "HANGUL": "HANGUL"}


@lru_cache(maxsize=65_536)
def script(letter: str) -> str:
    """The script of one letter, from its Unicode name: LATIN, CYRILLIC, CJK, ..."""
    plain = unicodedata.normalize("NFKC", letter)[:1]  # full-width and mathematical letters are letters of their script
    name = unicodedata.name(plain, "UNKNOWN").split(" ", 1)[0].split("-", 1)[0]
    return _TOGETHER.get(name, name)


@lru_cache(maxsize=16)
def scripts(text: str) -> frozenset[str]:
    """The scripts of the letters of ``text``."""
    if text.isascii():
        return frozenset({"LATIN"}) if any(map(str.isalpha, text)) else frozenset()
    return frozenset(script(letter) for letter in set(text) if letter.isalpha())


def foreign_script(prompt: str, intent: str, shown: frozenset[str]) -> str | None:
    """The script that most letters of ``prompt`` have, where neither ``intent`` nor the ``shown`` scripts do; else None."""
    if prompt.isascii() and "LATIN" in shown:
        return None
    counts = Counter(script(letter) for letter in prompt if letter.isalpha())
    known = shown | scripts(intent)
    foreign = {name: n for name, n in counts.items() if name not in known}
    if 2 * sum(foreign.values()) <= counts.total():
        return None
    return max(foreign, key=lambda name: (foreign[name], name)).lower()


@lru_cache(maxsize=1)
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)  # half a second, once a process


def foreign_language(prompt: str, languages: tuple[str, ...]) -> str | None:
    """The likeliest language of ``prompt`` (ISO 639-1), where none of ``languages`` is at all likely; else None."""
    if len(prompt.split()) < MIN_WORDS:
        return None
    likely = dict(_identifier().rank(prompt))
    if sum(likely.get(language, 0.0) for language in languages) >= UNLIKELY:
        return None
    best = max(likely, key=lambda language: likely[language])
    return None if best == "zxx" else best  # zxx: no language at all, such as numbers; other rules judge those
