"""Qualities of a prompt that a reader sees at once: the subject is named, and nothing is said twice.

Pure functions of one text, and the columns of the outputs that they make.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np

from udrl.evaluate.outputs import Columns
from udrl.intents.content_words import coverage
from udrl.text import words

# Columns, float (rows,): 0 for a rejected output.
COVERAGE = "coverage"  # share of the subject's words that the prompt holds; of the intent's content words without a subject
CLEAN = "clean"  # 1 if no word comes twice in a row, and no word pair or trigram twice


def doubles_word(prompt: str) -> bool:
    """Whether a word comes twice in a row."""
    return any(one == other for one, other in pairwise(words(prompt)))


def repeats_ngram(prompt: str, n: int) -> bool:
    """Whether ``n`` words in a row come twice."""
    all_words = words(prompt)
    grams = [tuple(all_words[i : i + n]) for i in range(len(all_words) - n + 1)]
    return len(set(grams)) < len(grams)


def is_clean(prompt: str) -> bool:
    """Whether nothing is said twice: no word in a row, no word pair (and so no longer run of words)."""
    return not doubles_word(prompt) and not repeats_ngram(prompt, 2)


def add_wording_columns(rows: Columns, subject_words: Mapping[int, Sequence[str]]) -> Columns:
    """Return the rows with :data:`COVERAGE` and :data:`CLEAN`; ``subject_words`` are those of each intent, by id."""
    outputs = list(zip(rows["prompt"], rows["intent_id"].tolist(), rows["rejected"], strict=True))
    covered = [0.0 if rejected else coverage(subject_words.get(intent, ()), prompt) for prompt, intent, rejected in outputs]
    clean = [0.0 if rejected else float(is_clean(prompt)) for prompt, _, rejected in outputs]
    return {**rows, COVERAGE: np.array(covered, dtype=float), CLEAN: np.array(clean, dtype=float)}
