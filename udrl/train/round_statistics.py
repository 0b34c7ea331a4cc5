"""Statistics of a round's episodes: rewards achieved, the best of the buffer, and how well commands were followed.

Everything is computed from counts and sums, file by file; no list of episodes is held.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from udrl import storage
from udrl.episodes import EPISODES
from udrl.run import CommandStatistics, RewardStatistics, RoundRecord
from udrl.tables import text_table
from udrl.train import hindsight

# ---- rewards


class BestEpisodes(NamedTuple):
    """Rewards and lengths of a task's best episodes; ``lengths[n]`` counts those of n words."""

    mean: float
    sd: float
    lengths: np.ndarray


def count_folders(folders: Sequence[str]) -> pa.Table:
    """Count the episodes of all files in ``folders``; cells are of reward, see :func:`hindsight.count_episodes`."""
    files = [uri for folder in folders for uri in storage.parquet_files(folder)]
    # Added up in batches: the counts of thousands of single files would fill the driver's memory.
    counts = _count_table(EPISODES.empty_table())
    for start in range(0, len(files), storage.READ_THREADS):
        batch = storage.map_files(_count_file, files[start : start + storage.READ_THREADS])
        counts = hindsight.merge_counts([counts, *batch])
    return counts


def _count_file(uri: str) -> pa.Table:
    return _count_table(storage.read_table(uri, hindsight.COUNTED_COLUMNS))


def _count_table(episodes: pa.Table) -> pa.Table:
    columns = {name: episodes.column(name).to_numpy() for name in hindsight.COUNTED_COLUMNS}
    return hindsight.count_episodes(columns, rank_within="task")


def best_episodes(counts: pa.Table, task: str, share: float) -> BestEpisodes:
    """Return statistics of the best ``share`` (0 to 1) of a task's episodes; ties at the threshold count in part.

    Raises:
        ValueError: the task has no episodes.
    """
    cells, words, episodes, reward_sums, _ = hindsight.RewardHistogram.of_task(counts, task)
    distinct, index = np.unique(cells, return_inverse=True)
    per_cell = np.bincount(index, episodes, len(distinct))
    above = per_cell[::-1].cumsum()[::-1] - per_cell
    weights = np.clip((share * episodes.sum() - above) / per_cell, 0, 1)[index] * episodes
    rewards = reward_sums / episodes  # within one cell they differ by less than a thousandth
    mean = float(np.average(rewards, weights=weights))
    sd = float(np.average((rewards - mean) ** 2, weights=weights)) ** 0.5
    return BestEpisodes(mean, sd, np.bincount(words, weights))


def reward_statistics(folder: str) -> dict[str, RewardStatistics]:
    """Return the statistics of each task's rewards over the episodes in ``folder``."""
    counts = count_folders([folder])
    statistics = {}
    for task in sorted(counts.column("task").unique().to_pylist()):
        episodes = int(hindsight.RewardHistogram.of_task(counts, task).episodes.sum())
        all_episodes = best_episodes(counts, task, 1.0)
        statistics[task] = RewardStatistics(episodes=episodes, mean=round(all_episodes.mean, 4), sd=round(all_episodes.sd, 4))
    return statistics


# ---- commands


@dataclass
class _CommandCounts:
    """One task's commands, and how well its accepted prompts kept to the commanded length."""

    requests: int = 0
    requests_with_length: int = 0
    commanded_words: int = 0  # summed
    reward_bins: Counter[int] = field(default_factory=Counter)  # bin -> requests
    accepted_with_length: int = 0
    words_off: int = 0  # summed distance from the commanded length, in words
    within_2: int = 0  # accepted prompts within two words of the commanded length

    def add(self, other: "_CommandCounts") -> None:
        for name in ("requests", "requests_with_length", "commanded_words", "accepted_with_length", "words_off", "within_2"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.reward_bins.update(other.reward_bins)

    def statistics(self) -> CommandStatistics:
        n_commanded, n_accepted = self.requests_with_length, self.accepted_with_length
        return CommandStatistics(
            requests=self.requests,
            mean_words=round(self.commanded_words / n_commanded, 2) if n_commanded else None,
            reward_bins={str(b): self.reward_bins[b] for b in sorted(self.reward_bins)},
            words_off=round(self.words_off / n_accepted, 3) if n_accepted else None,
            within_2=round(self.within_2 / n_accepted, 3) if n_accepted else None,
        )


def command_statistics(episodes: str, rejects: str) -> dict[str, CommandStatistics]:
    """Return the statistics of each task's commands, over the folders of accepted and rejected prompts."""
    totals: dict[str, _CommandCounts] = {}
    for folder in (episodes, rejects):
        count = partial(_count_commands, accepted=folder == episodes)
        for by_task in storage.map_files(count, storage.parquet_files(folder)):
            for task, counts in by_task.items():
                totals.setdefault(task, _CommandCounts()).add(counts)
    return {task: totals[task].statistics() for task in sorted(totals)}


def _count_commands(uri: str, accepted: bool) -> dict[str, _CommandCounts]:
    by_task = {}
    table = storage.read_table(uri, ["task", "command_words", "command_reward", *(["n_words"] if accepted else [])])
    for task, rows in split_by_task(table).items():
        words, rewards = (rows.column(name).to_numpy() for name in ("command_words", "command_reward"))
        has_length = words > 0
        off = np.abs(rows.column("n_words").to_numpy() - words)[has_length] if accepted else np.zeros(0, dtype=np.int64)
        bins, requests = np.unique(rewards, return_counts=True)
        by_task[task] = _CommandCounts(
            requests=len(words),
            requests_with_length=int(has_length.sum()),
            commanded_words=int(words[has_length].sum()),
            reward_bins=Counter(dict(zip(bins.tolist(), requests.tolist(), strict=True))),
            accepted_with_length=len(off),
            words_off=int(off.sum()),
            within_2=int((off <= 2).sum()),
        )
    return by_task


def split_by_task(table: pa.Table) -> dict[str, pa.Table]:
    """Return the rows of each task in ``table``."""
    column = table.column("task")
    return {task: table.filter(pc.equal(column, task)) for task in column.unique().to_pylist()}


# ---- report


def rounds_table(rounds: Sequence[RoundRecord]) -> str:
    """Return a table with one line per round; rewards, lengths and diversity are averaged over tasks."""
    header = ["round", "episodes", "accepted", "reward (before)", "words off", "distinct-2", "trained on", "student"]
    rows = []
    for record in rounds:
        reward = _mean([statistics.mean for statistics in record.achieved.values()])
        before = _mean([statistics.mean for statistics in record.before.values()])
        words_off = _mean([statistics.words_off for statistics in record.commands.values()])
        ratio = _mean([statistics.ratio for statistics in record.diversity.values()])
        rows.append(
            [
                str(record.round),
                f"{record.accepted:,}",
                f"{record.accepted / record.requested:.0%}" if record.requested else "-",
                ("-" if reward is None else f"{reward:.3f}") + ("" if before is None else f" ({before:.3f})"),
                "-" if words_off is None else f"{words_off:.1f}",
                "-" if ratio is None else f"{ratio:.0%}",
                "-" if record.keep is None else f"{record.keep:.0%}",
                f"not trained on: {record.refused}" if record.refused else "trained",
            ]
        )
    return text_table(header, rows, left_columns=0, ragged_last=True)


def _mean(values: Sequence[float | None]) -> float | None:
    """Return the mean of the values that are not None."""
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present else None
