"""Hindsight: label each episode with the command that it turned out to fulfill, and fit the reward bins that this needs.

Bins are fitted to counts, so that no process holds all episodes: :func:`count_episodes` counts one file's episodes by task,
cell of reward and length, :func:`merge_counts` adds the counts of all files, and :func:`fit_vocabulary` derives bin edges,
means and default commands from the sum.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from udrl.commands import ANY, CommandVocabulary, TaskCommands

COUNTED_COLUMNS = ["task", "intent_id", "n_words", "reward", "relevance"]
MAX_COUNTED_WORDS = 512  # words; longer prompts are counted here
# A cell of reward keeps the sign, the exponent and 12 of the 23 mantissa bits of a float32: 4,096 cells between 0.5 and 1, each
# 1.2e-4 wide. Cells need no range in advance, and the counts of a file have at most one row per episode.
_DROPPED_BITS = 11


class RewardHistogram(NamedTuple):
    """The counts of one task; the arrays have one entry for each pair of cell and length that occurs."""

    cells: np.ndarray  # int32: reward, or rank of the reward, with the low bits dropped
    words: np.ndarray  # int32
    episodes: np.ndarray  # int64
    rewards: np.ndarray  # float64: summed over the episodes
    relevances: np.ndarray  # float64: summed over the episodes

    @classmethod
    def of_task(cls, counts: pa.Table, task: str) -> "RewardHistogram":
        """Select one task's rows of ``counts``.

        Raises:
            ValueError: the task has no episodes.
        """
        rows = counts.filter(pc.equal(counts.column("task"), task))
        if not rows.num_rows:
            raise ValueError(f"no episodes of task {task!r}")
        return cls(*(rows.column(name).to_numpy() for name in ("cell", "words", "n", "reward", "relevance")))


# ---- counting


def rank_within_groups(values: np.ndarray, groups: np.ndarray, seed: int | Sequence[int] = 0) -> np.ndarray:
    """Rank each value within its group, as mid-quantiles in (0, 1); ties are broken at random by ``seed``.

    Ranking within an intent removes the intent's difficulty from the label; it needs several samples per intent.
    """
    noise = np.random.default_rng(seed).random(len(values))
    order = np.lexsort((noise, values, groups))
    ordered = groups[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]]) if len(values) else np.array([], dtype=int)
    sizes = np.diff(np.r_[starts, len(values)])
    position = np.arange(len(values)) - np.repeat(starts, sizes)
    ranks = np.empty(len(values))
    ranks[order] = (position + 0.5) / np.repeat(sizes, sizes)
    return ranks


def rank_values(columns: Mapping[str, np.ndarray], rank_within: str, seed: int | Sequence[int] = 0) -> np.ndarray:
    """Return the values that reward bins are cut from: rewards, or their ranks within intent and task; float32 (episodes,).

    Ranks are computed among the given episodes. In one file of a run those are all samples of an intent, because an intent's
    requests belong to one shard, which becomes one file. Only an intent on the border of two shards, or one that a later round
    repeats, is ranked in parts.
    """
    rewards = np.asarray(columns["reward"], dtype=np.float32)
    if rank_within == "task":
        return rewards
    _, tasks = np.unique(np.asarray(columns["task"], dtype=str), return_inverse=True)
    _, groups = np.unique(np.stack([tasks, np.asarray(columns["intent_id"])]), axis=1, return_inverse=True)
    return rank_within_groups(rewards, groups, seed).astype(np.float32)


def count_episodes(columns: Mapping[str, np.ndarray], rank_within: str, seed: int | Sequence[int] = 0) -> pa.Table:
    """Count the episodes of one file by task, cell and length.

    Args:
        columns: arrays of equal length, named as in :data:`COUNTED_COLUMNS`.
        rank_within: ``task`` or ``intent``, see :func:`rank_values`.
        seed: breaks ties between ranks.

    Returns:
        One row for each task, cell (of :func:`rank_values`) and length that occur: ``n`` episodes and the sums of ``reward``
        and ``relevance``.
    """
    episodes = {
        "task": pa.array(columns["task"], pa.string()),
        "cell": pa.array(_cells(rank_values(columns, rank_within, seed)), pa.int32()),
        "words": pa.array(np.clip(columns["n_words"], 0, MAX_COUNTED_WORDS), pa.int32()),
        "n": pa.array(np.ones(len(columns["task"]), dtype=np.int64)),
        "reward": pa.array(columns["reward"], pa.float64()),
        "relevance": pa.array(columns["relevance"], pa.float64()),
    }
    return merge_counts([pa.table(episodes)])


def merge_counts(tables: Sequence[pa.Table]) -> pa.Table:
    """Add tables of counts; their order changes at most the last bits of the sums."""
    keys, sums = ["task", "cell", "words"], ["n", "reward", "relevance"]
    # With one thread, rows come out in the order in which their keys came in, and sums are added in that order.
    merged = pa.concat_tables(tables).group_by(keys, use_threads=False).aggregate([(name, "sum") for name in sums])
    return merged.rename_columns({f"{name}_sum": name for name in sums}).select([*keys, *sums])


# ---- fitting


def fit_vocabulary(
    counts: pa.Table,
    tasks: Sequence[str],
    *,
    max_words: int,
    reward_bins: int,
    rank_within: str,
    lowercase: bool = False,
    objective: str = "udrl",
) -> CommandVocabulary:
    """Fit bin edges, achieved means and default commands of each task to the counts of all episodes.

    Raises:
        ValueError: a task has no episodes.
    """
    fitted: dict[str, TaskCommands] = {}
    for task in tasks:
        cells, words, episodes, rewards, relevances = RewardHistogram.of_task(counts, task)
        edges = _cut_cells(cells, episodes, np.arange(1, reward_bins) / reward_bins)
        bins = find_bins(_cell_floors(cells), edges)
        per_bin = np.bincount(bins, episodes, reward_bins)
        achieved = [np.bincount(bins, sums, reward_bins) / np.maximum(per_bin, 1) for sums in (rewards, relevances)]
        top = bins == reward_bins - 1  # never empty: the last edge lies on or below the highest cell
        median = int(_weighted_quantiles(words[top], episodes[top], [0.5])[0])
        is_commanded = objective == "udrl"
        fitted[task] = TaskCommands(
            edges=edges.tolist(),
            # Rounded, because the last bits of a sum depend on the order in which files were counted.
            achieved_reward=[round(float(mean), 6) for mean in achieved[0]],
            achieved_relevance=[round(float(mean), 6) for mean in achieved[1]],
            counts=[int(n) for n in per_bin],
            words=[int(q) for q in _weighted_quantiles(words, episodes, [0.05, 0.5, 0.95])],
            default_words=min(max(median, 1), max_words) if is_commanded else ANY,
            default_reward=reward_bins - 1 if is_commanded else ANY,
        )
    return CommandVocabulary(
        max_words=max_words,
        reward_bins=reward_bins,
        rank_within=rank_within,
        lowercase=lowercase,
        objective=objective,
        tasks=fitted,
    )


def top_share_thresholds(counts: pa.Table, tasks: Sequence[str], share: float) -> dict[str, float]:
    """Return for each task the value of :func:`rank_values` that ``share`` (0 to 1) of its episodes reach."""
    thresholds = {}
    for task in tasks:
        histogram = RewardHistogram.of_task(counts, task)
        thresholds[task] = float(_cut_cells(histogram.cells, histogram.episodes, np.array([1 - share]))[0])
    return thresholds


# ---- labeling


def find_bins(values: np.ndarray, edges: Sequence[float] | np.ndarray) -> np.ndarray:
    """Return the bin of each value, 0 to len(edges); a value on an edge belongs to the bin above it."""
    return np.searchsorted(edges, values, side="right")


def find_reward_bins(vocabulary: CommandVocabulary, tasks: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return the reward bin of each episode from its task and its value of :func:`rank_values`; int64 (episodes,)."""
    bins = np.zeros(len(values), dtype=np.int64)
    for task, task_commands in vocabulary.tasks.items():
        of_task = tasks == task
        bins[of_task] = find_bins(values[of_task], task_commands.edges)
    return bins


def label_episodes(
    vocabulary: CommandVocabulary, n_words: np.ndarray, bins: np.ndarray, dropout: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Return words and reward bin of the command that each episode turned out to fulfill; two arrays (episodes,).

    With probability ``dropout`` both become :data:`ANY`, and each on its own equally often, so that the student also learns
    partial commands. If the objective is not ``udrl``, both always are: only the task is commanded. A length that has no token
    becomes ANY as well.
    """
    if vocabulary.objective != "udrl":
        return np.full(len(bins), ANY), np.full(len(bins), ANY)
    drop_both, drop_words, drop_reward = rng.random((3, len(bins))) < dropout
    has_token = (n_words >= 1) & (n_words <= vocabulary.max_words)
    words = np.where(has_token & ~drop_both & ~drop_words, n_words, ANY)
    return words, np.where(~drop_both & ~drop_reward, bins, ANY)


# ---- cells


def _cells(values: np.ndarray) -> np.ndarray:
    """Return the cell of each value; int32, in the order of the values."""
    bits = (np.asarray(values, dtype=np.float32) + np.float32(0)).view(np.int32)  # adding 0 turns -0.0 into 0.0
    return np.where(bits < 0, bits ^ 0x7FFFFFFF, bits) >> _DROPPED_BITS  # read as integers, negative floats run backwards


def _cell_floors(cells: np.ndarray) -> np.ndarray:
    """Return the lowest value of each cell; float64."""
    bits = cells.astype(np.int32) << _DROPPED_BITS
    return np.where(bits < 0, bits ^ 0x7FFFFFFF, bits).astype(np.int32).view(np.float32).astype(np.float64)


def _cut_cells(cells: np.ndarray, episodes: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """Return for each of ``shares`` the floor of the cell below which the closest possible share of all episodes lies.

    Equal values stay together, and at least one episode lies on or above the last cut.
    """
    distinct, index = np.unique(cells, return_inverse=True)
    per_cell = np.bincount(index, episodes)
    below = np.cumsum(per_cell) - per_cell
    nearest = np.abs(below - shares[:, None] * per_cell.sum()).argmin(axis=1)
    return _cell_floors(distinct[nearest])


def _weighted_quantiles(values: np.ndarray, weights: np.ndarray, shares: list[float]) -> np.ndarray:
    return np.quantile(values, shares, weights=weights, method="inverted_cdf")
