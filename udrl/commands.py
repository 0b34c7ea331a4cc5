"""Commands: what is desired of a prompt (task, length, reward), as control tokens, and the hindsight that labels episodes.

A training sequence is ``intent, task, words, reward, prompt, <|end|>``: the command stands directly before the text it
governs. Length is exact words (it is free of noise); reward is a quantile bin (it is not), 0 the lowest.
The vocabulary, bin edges, what each bin achieved and the default command travel with the model in ``commands.json``.
"""

import json
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

END = "<|end|>"
PAD = "<|pad|>"
ANY = -1  # "I do not mind": the command an unconditioned request carries

FILE = "commands.json"


class Command(BaseModel):
    """What is asked for. ``words`` and ``reward`` may be :data:`ANY`."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    task: str
    words: int = Field(ANY, ge=ANY)
    reward: int = Field(ANY, ge=ANY)


class TaskCommands(BaseModel):
    """What a task's episodes achieved: the ground for a default command and for what is in distribution."""

    model_config = ConfigDict(extra="forbid")
    edges: list[float] = Field(description="reward_bins - 1 inner edges (of reward, or of its rank within the intent)")
    achieved_reward: list[float] = Field(description="mean reward of the training episodes per bin")
    achieved_relevance: list[float]
    counts: list[int]
    words: list[int] = Field(description="p5, median, p95 of the training episodes' lengths")
    default_words: int
    default_reward: int


class Vocabulary(BaseModel):
    """The command vocabulary of one student: which control tokens there are and what they mean."""

    model_config = ConfigDict(extra="forbid")
    version: int = 1
    max_words: int
    reward_bins: int
    rank_within: str
    lowercase: bool = False
    tasks: dict[str, TaskCommands]

    def control_tokens(self) -> list[str]:
        """All special tokens, in the order of their ids (they stand first in the tokenizer)."""
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
        """The best in-distribution command of a task."""
        learnt = self.tasks[task]
        return Command(task=task, words=learnt.default_words, reward=learnt.default_reward)

    def save(self, folder: str) -> None:
        with open(os.path.join(folder, FILE), "w", encoding="utf-8") as out:
            json.dump(self.model_dump(), out, indent=2)

    @classmethod
    def load(cls, folder: str) -> "Vocabulary":
        with open(os.path.join(folder, FILE), encoding="utf-8") as source:
            return cls.model_validate_json(source.read())


def task_token(task: str) -> str:
    return f"<|task:{task}|>"


def word_token(words: int) -> str:
    return f"<|words:{'any' if words == ANY else words}|>"


def reward_token(reward: int) -> str:
    return f"<|reward:{'any' if reward == ANY else reward}|>"


def bin_edges(values: np.ndarray, bins: int) -> np.ndarray:
    """Inner quantile edges, shape (bins - 1,), that split ``values`` into ``bins`` equally full bins."""
    return np.quantile(values, np.arange(1, bins) / bins)


def to_bin(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """The bin of each value, 0 to len(edges); a value on an edge belongs to the bin above it."""
    return np.searchsorted(edges, values, side="right")


def rank_within_groups(values: np.ndarray, groups: np.ndarray, seed: int = 0) -> np.ndarray:
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


def learn(
    tasks: Sequence[str],
    columns: dict[str, Any],
    *,
    max_words: int,
    reward_bins: int,
    rank_within: str,
    lowercase: bool = False,
    seed: int = 0,
) -> tuple[Vocabulary, np.ndarray]:
    """Make the vocabulary from episodes, and label each with the reward bin that it turned out to fulfil.

    Args:
        columns: arrays of equal length: task, intent_id, n_words, reward, relevance.

    Returns:
        The vocabulary, and the bin of each episode, int64 of shape (episodes,).
    """
    task_column, reward = np.asarray(columns["task"]), np.asarray(columns["reward"], dtype=float)
    relevance, words = np.asarray(columns["relevance"], dtype=float), np.asarray(columns["n_words"])
    labels = np.zeros(len(reward), dtype=np.int64)
    learnt: dict[str, TaskCommands] = {}
    for task in tasks:
        mine = np.flatnonzero(task_column == task)
        if not len(mine):
            raise ValueError(f"no episode of task {task!r} to learn commands from")
        values = reward[mine]
        if rank_within == "intent":
            values = rank_within_groups(values, np.asarray(columns["intent_id"])[mine], seed)
        edges = bin_edges(values, reward_bins)
        bins = to_bin(values, edges)
        labels[mine] = bins
        in_bin = [mine[bins == b] for b in range(reward_bins)]
        top = in_bin[-1] if len(in_bin[-1]) else mine
        quantiles = [int(q) for q in np.quantile(words[mine], [0.05, 0.5, 0.95])]
        learnt[task] = TaskCommands(
            edges=[float(e) for e in edges],
            achieved_reward=[float(reward[i].mean()) if len(i) else 0.0 for i in in_bin],
            achieved_relevance=[float(relevance[i].mean()) if len(i) else 0.0 for i in in_bin],
            counts=[len(i) for i in in_bin],
            words=quantiles,
            default_words=int(min(max(np.median(words[top]), 1), max_words)),
            default_reward=reward_bins - 1,
        )
    vocabulary = Vocabulary(
        max_words=max_words, reward_bins=reward_bins, rank_within=rank_within, lowercase=lowercase, tasks=learnt
    )
    return vocabulary, labels
