"""Command vocabularies fitted to a few fake episodes."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from udrl.commands import CommandVocabulary
from udrl.train import hindsight

SETTINGS: dict[str, Any] = {"max_words": 16, "reward_bins": 5, "rank_within": "task"}


def fit_to(tasks: Sequence[str], columns: dict[str, Any], **settings: Any) -> CommandVocabulary:
    """Fit a vocabulary to episodes in memory; ``columns`` are named as in ``hindsight.COUNTED_COLUMNS``."""
    settings = SETTINGS | settings
    return hindsight.fit_vocabulary(hindsight.count_episodes(columns, settings["rank_within"]), tasks, **settings)


def fake_vocabulary(tasks: Sequence[str] = ("paint", "find"), **settings: Any) -> CommandVocabulary:
    """Fit a vocabulary to 40 episodes of 3 to 14 words, whose rewards rise from 0 to 1."""
    n = 40
    columns = {
        "task": np.resize(np.array(tasks), n),
        "intent_id": np.arange(n),
        "n_words": np.arange(n) % 12 + 3,
        "reward": np.linspace(0, 1, n),
        "relevance": np.linspace(0, 1, n),
    }
    return fit_to(tasks, columns, **settings)
