"""The replay buffer: the files of episodes of all rounds, and the selection of those that are trained and validated on.

All draws are hashes or are seeded per file, so preparing the same buffer again gives the same rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from udrl import storage
from udrl.intents.composer import subject_of
from udrl.intents.intent import is_validation
from udrl.run import EpisodeSource


@dataclass(frozen=True)
class BufferFile:
    """One Parquet file of episodes."""

    uri: str
    keep: float  # share of the episodes that is trained on
    seed: tuple[int, int, int]  # of all draws for this file: the recipe's seed, number of the source, number of the file

    def read_columns(self, names: Sequence[str], tasks: Sequence[str]) -> dict[str, np.ndarray]:
        """Return columns of the episodes of ``tasks``."""
        table = storage.read_table(self.uri, list(names))
        table = table.filter(pc.is_in(table.column("task"), pa.array(tasks, pa.string())))
        return {name: table.column(name).to_numpy(zero_copy_only=False) for name in table.column_names}


def list_buffer_files(sources: Sequence[EpisodeSource], seed: int) -> list[BufferFile]:
    """List the files of all sources, in the order of the sources and of the files' names."""
    return [
        BufferFile(uri, source.keep, (seed, s, f))
        for s, source in enumerate(sources)
        for f, uri in enumerate(storage.parquet_files(source.folder))
    ]


def select_share(episode_ids: np.ndarray, share: float) -> np.ndarray:
    """Select ``share`` (0 to 1) of the episodes by a hash of their ids; bool (episodes,).

    A larger share selects a superset of a smaller one.
    """
    return hash_ids(episode_ids) / 2.0**64 < share if share < 1 else np.ones(len(episode_ids), dtype=bool)


def select_validation(intents: Sequence[str], share: float) -> np.ndarray:
    """Select the episodes of ``share`` (0 to 1) of the intents' subjects for validation; bool (episodes,)."""
    selected = {intent: is_validation(subject_of(intent), share) for intent in set(intents)}
    return np.array([selected[intent] for intent in intents], dtype=bool)


def hash_ids(ids: np.ndarray) -> np.ndarray:
    """Map int64 ids to evenly spread uint64 numbers, one to one.

    This is the finalizer of SplitMix64 (Steele et al. 2014, doi 10.1145/2660193.2660195).
    """
    x = ids.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
