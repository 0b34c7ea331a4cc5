"""Commands: what is desired of a prompt (task, length, reward), as control tokens, and the hindsight that labels episodes.

A training sequence is ``intent, task, words, reward, prompt, <|end|>``: the command stands directly before the text it
governs. Length is exact words (it is free of noise); reward is a quantile bin (it is not), 0 the lowest.
The vocabulary, bin edges, what each bin achieved and the default command travel with the model in ``commands.json``.

Bins are learnt from counts: each file's episodes are counted into cells of reward (:func:`tally`), the counts of all files
are added up (:func:`merge`), and :func:`fit_vocabulary` derives edges, means and
defaults from the sum. No episode is kept on the way.
"""

import json
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict, Field

END = "<|end|>"
PAD = "<|pad|>"
ANY = -1  # "I do not mind": the command an unconditioned request carries

FILE = "commands.json"
LONGEST = 512  # words; a longer prompt is counted there
# Cells of reward keep the sign, the exponent and 12 of the 23 mantissa bits of a float32: 4,096 cells between 0.5 and 1, each
# 1.2e-4 wide. They need no range, and a file's count has at most a row an episode.
_DROPPED_BITS = 11


class Command(BaseModel):
    """What is asked for. ``words`` and ``reward`` may be :data:`ANY`."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    task: str
    words: int = Field(ANY, ge=ANY)
    reward: int = Field(ANY, ge=ANY)


class TaskCommands(BaseModel):
    """What a task's episodes achieved: the ground for a default command and for what is in distribution."""

    model_config = ConfigDict(extra="forbid")
    edges: list[float] = Field(
        description="reward_bins - 1 inner edges (of reward, or of its rank within the intent); a value on one lies above it"
    )
    achieved_reward: list[float] = Field(description="mean reward of the training episodes per bin")
    achieved_relevance: list[float]
    counts: list[int]
    words: list[int] = Field(description="p5, median, p95 of the training episodes' lengths")
    default_words: int
    default_reward: int


class CommandVocabulary(BaseModel):
    """The command vocabulary of one student: which control tokens there are and what they mean."""

    model_config = ConfigDict(extra="forbid")
    version: int = 1
    max_words: int
    reward_bins: int
    rank_within: str
    lowercase: bool = False
    objective: str = Field("udrl", description="what the student was trained for; only 'udrl' knows words and rewards")
    tasks: dict[str, TaskCommands]

    def control_tokens(self) -> list[str]:
        """All special tokens, in the order of their ids: first in a tokenizer made here, last in a pretrained one."""
        words = [word_token(n) for n in [ANY, *range(1, self.max_words + 1)]]
        rewards = [reward_token(b) for b in [ANY, *range(self.reward_bins)]]
        return [END, PAD, *(task_token(t) for t in self.tasks), *words, *rewards]

    def tokens(self, command: Command) -> list[str]:
        """The control tokens of a command.

        Raises:
            ValueError: the task, length or bin is not in this vocabulary.
        """
        if command.task not in self.tasks:
            raise ValueError(f"task {command.task!r} is not one of {', '.join(self.tasks)}")
        if command.words > self.max_words or command.words == 0:
            raise ValueError(f"words {command.words} lies outside 1..{self.max_words}")
        if command.reward >= self.reward_bins:
            raise ValueError(f"reward bin {command.reward} lies outside 0..{self.reward_bins - 1}")
        return [task_token(command.task), word_token(command.words), reward_token(command.reward)]

    def default(self, task: str) -> Command:
        """The best in-distribution command of a task: the task alone where the student was trained on nothing else."""
        learnt = self.tasks[task]
        return Command(task=task, words=learnt.default_words, reward=learnt.default_reward)

    def save(self, folder: str) -> None:
        with open(os.path.join(folder, FILE), "w", encoding="utf-8") as out:
            json.dump(self.model_dump(), out, indent=2)

    @classmethod
    def load(cls, folder: str) -> "CommandVocabulary":
        with open(os.path.join(folder, FILE), encoding="utf-8") as source:
            return cls.model_validate_json(source.read())


def task_token(task: str) -> str:
    return f"<|task:{task}|>"


def word_token(words: int) -> str:
    return f"<|words:{'any' if words == ANY else words}|>"


def reward_token(reward: int) -> str:
    return f"<|reward:{'any' if reward == ANY else reward}|>"


def bin_edges(values: np.ndarray, bins: int) -> np.ndarray:
    """Inner quantile edges, shape (bins - 1,), that split ``values`` into ``bins`` bins, as equally full as cells allow."""
    cells, counts = np.unique(_cells(values), return_counts=True)
    return _cuts(cells, counts, np.arange(1, bins) / bins)


def to_bin(values: np.ndarray, edges: Sequence[float] | np.ndarray) -> np.ndarray:
    """The bin of each value, 0 to len(edges); a value on an edge belongs to the bin above it."""
    return np.searchsorted(edges, values, side="right")


def rank_within_groups(values: np.ndarray, groups: np.ndarray, seed: int | Sequence[int] = 0) -> np.ndarray:
    """Rank of each value within its group, as mid-quantiles in (0, 1); ties are broken at random by ``seed``.

    Ranking within an intent takes the intent's difficulty out of the label; it needs several samples an intent.
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


def ranked(columns: dict[str, Any], rank_within: str, seed: int | Sequence[int] = 0) -> np.ndarray:
    """What an episode's bin is cut from: its reward, or its reward's rank within intent and task. Float32, (episodes,).

    Ranks are made among the episodes given. For a file of a run those are an intent's samples: its requests are one shard,
    which makes one file. Only an intent on the border of two shards, or asked again in a later round, is ranked in parts.
    """
    reward = np.asarray(columns["reward"], dtype=np.float32)
    if rank_within == "task":
        return reward
    _, task = np.unique(np.asarray(columns["task"], dtype=str), return_inverse=True)
    _, group = np.unique(np.stack([task, np.asarray(columns["intent_id"])]), axis=1, return_inverse=True)
    return rank_within_groups(reward, group, seed).astype(np.float32)


def tally(columns: dict[str, Any], rank_within: str, seed: int | Sequence[int] = 0) -> pa.Table:
    """Count the episodes of one file by task, cell and length.

    Args:
        columns: arrays of equal length: task, intent_id, n_words, reward, relevance.

    Returns:
        A row for each task, cell (of :func:`ranked`) and words that occur: n, and the sums of reward and relevance.
    """
    each = {
        "task": pa.array(columns["task"], pa.string()),
        "cell": pa.array(_cells(ranked(columns, rank_within, seed)), pa.int32()),
        "words": pa.array(np.clip(columns["n_words"], 0, LONGEST), pa.int32()),
        "n": pa.array(np.ones(len(columns["task"]), dtype=np.int64)),
        "reward": pa.array(columns["reward"], pa.float64()),
        "relevance": pa.array(columns["relevance"], pa.float64()),
    }
    return merge([pa.table(each)])


def merge(tallies: Sequence[pa.Table]) -> pa.Table:
    """Add up tallies: again a tally, the same whatever the order but for the last bits of its sums."""
    keys, sums = ["task", "cell", "words"], ["n", "reward", "relevance"]
    # One thread: rows then come out in the order in which their keys came in, and sums are added up in it.
    added = pa.concat_tables(tallies).group_by(keys, use_threads=False).aggregate([(name, "sum") for name in sums])
    return added.rename_columns({f"{name}_sum": name for name in sums}).select([*keys, *sums])


def fit_vocabulary(
    counted: pa.Table,
    tasks: Sequence[str],
    *,
    max_words: int,
    reward_bins: int,
    rank_within: str,
    lowercase: bool = False,
    objective: str = "udrl",
) -> CommandVocabulary:
    """Make the vocabulary from the tally of all episodes.

    Raises:
        ValueError: a task has no episode.
    """
    learnt: dict[str, TaskCommands] = {}
    for task in tasks:
        cells, words, n, reward, relevance = _of_task(counted, task)
        edges = _cuts(cells, n, np.arange(1, reward_bins) / reward_bins)
        bins = to_bin(_floor(cells), edges)
        in_bin = np.bincount(bins, n, reward_bins)
        achieved = [np.bincount(bins, sums, reward_bins) / np.maximum(in_bin, 1) for sums in (reward, relevance)]
        top = bins == reward_bins - 1  # never empty: the last edge lies on or below the highest cell
        median = int(_quantiles(words[top], n[top], [0.5])[0])
        commanded = objective == "udrl"
        learnt[task] = TaskCommands(
            edges=edges.tolist(),
            # Rounded: the last bits of a sum depend on the order in which files were counted.
            achieved_reward=[round(float(x), 6) for x in achieved[0]],
            achieved_relevance=[round(float(x), 6) for x in achieved[1]],
            counts=[int(x) for x in in_bin],
            words=[int(q) for q in _quantiles(words, n, [0.05, 0.5, 0.95])],
            default_words=min(max(median, 1), max_words) if commanded else ANY,
            default_reward=reward_bins - 1 if commanded else ANY,
        )
    return CommandVocabulary(
        max_words=max_words,
        reward_bins=reward_bins,
        rank_within=rank_within,
        lowercase=lowercase,
        objective=objective,
        tasks=learnt,
    )


def top_edges(counted: pa.Table, tasks: Sequence[str], share: float) -> dict[str, float]:
    """For each task, the value of :func:`ranked` that ``share`` of its episodes reach."""
    edges = {}
    for task in tasks:
        cells, _, n, *_ = _of_task(counted, task)
        edges[task] = float(_cuts(cells, n, np.array([1 - share]))[0])
    return edges


def learn(
    tasks: Sequence[str],
    columns: dict[str, Any],
    *,
    max_words: int,
    reward_bins: int,
    rank_within: str,
    lowercase: bool = False,
    objective: str = "udrl",
    seed: int = 0,
) -> tuple[CommandVocabulary, np.ndarray]:
    """Make the vocabulary from episodes in memory, and label each with the reward bin that it turned out to fulfil.

    Args:
        columns: arrays of equal length: task, intent_id, n_words, reward, relevance.

    Returns:
        The vocabulary, and the bin of each episode, int64 of shape (episodes,).
    """
    vocabulary = fit_vocabulary(
        tally(columns, rank_within, seed),
        tasks,
        max_words=max_words,
        reward_bins=reward_bins,
        rank_within=rank_within,
        lowercase=lowercase,
        objective=objective,
    )
    return vocabulary, reward_bins_of(vocabulary, np.asarray(columns["task"]), ranked(columns, rank_within, seed))


def reward_bins_of(vocabulary: CommandVocabulary, tasks: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The reward bin of each episode, int64 (episodes,), from its task and its value of :func:`ranked`."""
    bins = np.zeros(len(values), dtype=np.int64)
    for name, learnt in vocabulary.tasks.items():
        mine = tasks == name
        bins[mine] = to_bin(values[mine], learnt.edges)
    return bins


def _cells(values: np.ndarray) -> np.ndarray:
    """The cell of each value, int32, in the values' order."""
    bits = (np.asarray(values, dtype=np.float32) + np.float32(0)).view(np.int32)  # adding 0 makes -0.0 and 0.0 one
    return np.where(bits < 0, bits ^ 0x7FFFFFFF, bits) >> _DROPPED_BITS  # as integers, negative floats run backwards


def _floor(cells: np.ndarray) -> np.ndarray:
    """The lowest value of each cell, float64."""
    bits = cells.astype(np.int32) << _DROPPED_BITS
    return np.where(bits < 0, bits ^ 0x7FFFFFFF, bits).astype(np.int32).view(np.float32).astype(np.float64)


def _cuts(cells: np.ndarray, counts: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """For each of ``shares``, the floor of a cell below which nearest that share of all lies. Equal values stay together, and
    something always lies on or above the last cut."""
    distinct, place = np.unique(cells, return_inverse=True)
    counted = np.bincount(place, counts)
    below = np.cumsum(counted) - counted
    nearest = np.abs(below - shares[:, None] * counted.sum()).argmin(axis=1)
    return _floor(distinct[nearest])


def _of_task(counted: pa.Table, task: str) -> tuple[np.ndarray, ...]:
    mine = counted.filter(pc.equal(counted.column("task"), task))
    if not mine.num_rows:
        raise ValueError(f"no episode of task {task!r} to learn commands from")
    return tuple(mine.column(name).to_numpy() for name in ("cell", "words", "n", "reward", "relevance"))


def _quantiles(values: np.ndarray, counts: np.ndarray, shares: list[float]) -> np.ndarray:
    return np.quantile(values, shares, weights=counts, method="inverted_cdf")
