"""The replay buffer: the episodes of all rounds, as folders."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Source:
    """One round's episodes. ``keep`` is the share that is trained on, chosen by a hash of each episode's id; the bins are
    computed over all of them, and validation is on all of its intents."""

    folder: str
    keep: float = 1.0


def kept(episode_ids: np.ndarray, share: float) -> np.ndarray:
    """Which episodes belong to ``share`` of all, bool (episodes,). A larger share only adds episodes."""
    return scrambled(episode_ids) / 2.0**64 < share if share < 1 else np.ones(len(episode_ids), dtype=bool)


def scrambled(ids: np.ndarray) -> np.ndarray:
    """Evenly spread uint64 numbers from int64 ids, different ones from different ids: the finaliser of SplitMix64 (Steele et
    al. 2014, doi 10.1145/2660193.2660195)."""
    x = ids.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
