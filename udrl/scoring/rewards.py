"""Reward components of one prompt, each 0 (bad) to 1 (good), and the mix that makes its reward.

Relevance alone is easily gamed: echoing the intent scores 1.0. Novelty, repetition and format bound it.
"""

import re
from functools import lru_cache
from itertools import pairwise

import numpy as np

from udrl.episodes import COMPONENTS
from udrl.recipe import RewardWeights

_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")


def words(text: str) -> list[str]:
    """Case-folded words without punctuation, for comparing (not for counting: see ``episodes.count_words``)."""
    return _WORD.findall(text.casefold())


def novelty(intent: str, prompt: str) -> float:
    """Share of the prompt's distinct words that the intent does not have: 0 for an echo."""
    said, written = _said(intent), set(words(prompt))
    return len(written - said) / len(written) if written else 0.0


@lru_cache(maxsize=16)
def _said(intent: str) -> frozenset[str]:
    """The intent's words: its prompts come one after another, and an intent may be long."""
    return frozenset(words(intent))


def repetition(prompt: str) -> float:
    """1 where no word pair comes twice; the share of distinct pairs otherwise (distinct-2)."""
    w = words(prompt)
    pairs = list(pairwise(w))
    return len(set(pairs)) / len(pairs) if pairs else 1.0


def length(n_words: int, commanded: int) -> float:
    """Closeness to the commanded length; 1 where none was commanded (``commanded`` < 1)."""
    return 1.0 if commanded < 1 else max(0.0, 1 - abs(n_words - commanded) / commanded)


def mix(components: dict[str, np.ndarray], weights: RewardWeights) -> np.ndarray:
    """Weighted mean of the components, float32 of shape (prompts,)."""
    shares = np.array([getattr(weights, c) for c in COMPONENTS], dtype=np.float64)
    if shares.sum() == 0:
        raise ValueError("all reward weights are 0")
    stacked = np.stack([np.asarray(components[c], dtype=np.float64) for c in COMPONENTS])
    return (shares @ stacked / shares.sum()).astype(np.float32)
