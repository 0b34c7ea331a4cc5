"""Reward components of one prompt, each 0 (bad) to 1 (good), and their weighted mean, the reward.

Relevance is easily gamed: an echo of the intent scores 1.0. Novelty, repetition and format bound it.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

import numpy as np

from udrl.episodes import COMPONENTS
from udrl.recipe import RewardWeights
from udrl.tasks import Task
from udrl.text import count_words, words


def novelty(intent: str, prompt: str) -> float:
    """Return the share of the prompt's distinct words that are not in the intent: 0 for an echo."""
    in_intent, in_prompt = _distinct_words(intent), set(words(prompt))
    return len(in_prompt - in_intent) / len(in_prompt) if in_prompt else 0.0


@lru_cache(maxsize=16)
def _distinct_words(intent: str) -> frozenset[str]:
    """Cached, because the prompts of an intent, which may be long, follow each other."""
    return frozenset(words(intent))


def repetition(prompt: str) -> float:
    """Return the share of distinct word pairs (distinct-2): 1 if none occurs twice."""
    pairs = list(pairwise(words(prompt)))
    return len(set(pairs)) / len(pairs) if pairs else 1.0


def length(n_words: int, commanded: int) -> float:
    """Return the closeness to the commanded length; 1 if none was commanded (``commanded`` < 1)."""
    return 1.0 if commanded < 1 else max(0.0, 1 - abs(n_words - commanded) / commanded)


def score_prompts(
    intents: Sequence[str],
    prompts: Sequence[str],
    tasks: Sequence[Task],
    commanded_words: Sequence[int],
    relevance: Sequence[float] | np.ndarray,
    weights: RewardWeights,
) -> dict[str, np.ndarray]:
    """Return each of :data:`COMPONENTS` and the reward of accepted prompts, float32 (prompts,) each.

    ``commanded_words`` is below 1 if no length was commanded.
    """
    pairs = list(zip(intents, prompts, strict=True))
    lengths = [length(count_words(prompt), n) for prompt, n in zip(prompts, commanded_words, strict=True)]
    values = {
        "relevance": relevance,
        "novelty": [novelty(intent, prompt) for intent, prompt in pairs],
        "repetition": [repetition(prompt) for prompt in prompts],
        "format": [task.format_score(prompt) for task, prompt in zip(tasks, prompts, strict=True)],
        "length": lengths,
    }
    arrays = {name: np.asarray(values[name], dtype=np.float32) for name in COMPONENTS}
    return {**arrays, "reward": mix(arrays, weights)}


def mix(components: dict[str, np.ndarray], weights: RewardWeights) -> np.ndarray:
    """Return the weighted mean of the components, float32 of shape (prompts,).

    Raises:
        ValueError: all weights are 0.
    """
    shares = np.array([getattr(weights, c) for c in COMPONENTS], dtype=np.float64)
    if shares.sum() == 0:
        raise ValueError("all reward weights are 0")
    stacked = np.stack([np.asarray(components[c], dtype=np.float64) for c in COMPONENTS])
    return (shares @ stacked / shares.sum()).astype(np.float32)
