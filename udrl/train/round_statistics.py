"""Statistics of a round's episodes: rewards achieved, the best of the buffer, commands followed, and diversity kept.

Everything is computed from counts and sums, file by file; no list of episodes is held.

A student that learns from its own prompts narrows (Shumailov et al. 2024, doi 10.1038/s41586-024-07566-y); mixing in earlier
data prevents it (Gerstgrasser et al., arXiv 2404.01413; RiC, arXiv 2402.10207). So earlier episodes stay in the mix, and a
round that lost diversity is not trained on.
"""

import math
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from udrl import storage
from udrl.episodes import EPISODES
from udrl.run import CommandStatistics, DiversityStatistics, RewardStatistics, RoundRecord
from udrl.text import text_table
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


SAMPLE_INTENTS = 10_000  # of each task, on which diversity is measured
_HASH_BUCKETS = 1 << 20

PromptSample = dict[str, dict[int, str]]  # task -> intent id -> one prompt


def share_to_train_on(earlier: int, new: int, replay: float) -> float:
    """Return the share of ``new`` episodes to train on, so that ``earlier`` ones are at least ``replay`` of the mix."""
    max_new = earlier * (1 - replay)
    if new * replay <= max_new:
        return 1.0
    # Rounded down, because more new episodes would break the promise.
    return math.floor(1e4 * max_new / (new * replay)) / 1e4


def reason_to_refuse(accepted: int, diversity: Mapping[str, DiversityStatistics], min_diversity: float) -> str:
    """Return why a round must not be trained on, or an empty string."""
    if not accepted:
        return "no prompt was accepted"
    ratios = {task: statistics.ratio for task, statistics in diversity.items() if statistics.ratio is not None}
    too_low = [f"{task} {ratio:.2f}" for task, ratio in ratios.items() if ratio < min_diversity]
    if not too_low:
        return ""
    return f"distinct word pairs relative to round 0: {', '.join(too_low)}; explore.min_diversity={min_diversity:g}"


def measure_diversity(first: str, new: str, n_intents: int) -> dict[str, DiversityStatistics]:
    """Compare the diversity of the prompts in two folders of episodes, task by task.

    Longer texts and more texts on one subject repeat more, so the comparison takes one prompt of each intent that both folders
    have, cut to one length.

    Args:
        first: folder of round 0's episodes.
        new: folder of the new round's episodes.
        n_intents: intents of the new round; about ``SAMPLE_INTENTS`` of them are compared.
    """
    new_sample = sample_prompts(new, share=SAMPLE_INTENTS / max(n_intents, 1))
    first_sample = sample_prompts(first, only={task: np.array(list(prompts)) for task, prompts in new_sample.items()})
    return {task: compare_prompts(first_sample.get(task, {}), new_sample[task]) for task in sorted(new_sample)}


def compare_prompts(first: Mapping[int, str], new: Mapping[int, str]) -> DiversityStatistics:
    """Compare one task's prompts, given one per intent id, over the intents that both have.

    ``distinct_2`` is distinct over all word pairs (Li et al. 2016, arXiv 1510.03055), ``compression`` is bytes over zlib bytes
    (Shaib et al., arXiv 2403.00553). All values are None if there is nothing to compare.
    """
    pairs = [(first[i].lower().split(), new[i].lower().split()) for i in sorted(first.keys() & new.keys())]
    quantiles = [int(np.quantile([len(pair[side]) for pair in pairs], 0.25)) for side in (0, 1) if pairs]
    words = max(2, min(quantiles, default=2))
    cut = [(a[:words], b[:words]) for a, b in pairs if min(len(a), len(b)) >= words]
    if not cut:
        return DiversityStatistics(n=0, words=0, distinct_2=None, compression=None, ratio=None)
    first_texts, new_texts = [a for a, _ in cut], [b for _, b in cut]
    distinct_2 = distinct_word_pairs(first_texts), distinct_word_pairs(new_texts)
    compression = _compression_ratio(first_texts), _compression_ratio(new_texts)
    ratio = distinct_2[1] / distinct_2[0]
    return DiversityStatistics(n=len(cut), words=words, distinct_2=distinct_2, compression=compression, ratio=ratio)


def distinct_word_pairs(texts: list[list[str]]) -> float:
    """Return the share of distinct ones among all pairs of neighboring words; each text has at least two words."""
    pairs = [pair for text in texts for pair in pairwise(text)]
    return len(set(pairs)) / len(pairs)


def _compression_ratio(texts: list[list[str]]) -> float:
    data = "\n".join(map(" ".join, texts)).encode()
    return len(data) / len(zlib.compress(data, 9))


def sample_prompts(folder: str, share: float = 1.0, only: Mapping[str, np.ndarray] | None = None) -> PromptSample:
    """Return one prompt for each task and intent in a folder of episodes.

    Args:
        folder: the episodes.
        share: share of the intents, 0 to 1, selected by their ids.
        only: intent ids by task; replaces ``share``.
    """
    no_ids = np.array([], dtype=np.int64)

    def sample_file(uri: str) -> PromptSample:
        table = storage.read_table(uri, ["episode_id", "intent_id", "task", "prompt"])
        sample: PromptSample = {}
        for task, rows in split_by_task(table.sort_by("episode_id")).items():
            ids = rows.column("intent_id").to_numpy()
            # Ids are hashes already, so their last bits select at random.
            selected = ids % _HASH_BUCKETS < share * _HASH_BUCKETS if only is None else np.isin(ids, only.get(task, no_ids))
            rows = rows.filter(pa.array(selected))
            for intent_id, prompt in zip(rows.column("intent_id").to_pylist(), rows.column("prompt").to_pylist(), strict=True):
                sample.setdefault(task, {}).setdefault(intent_id, prompt)  # the prompt with the lowest episode id
        return sample

    total: PromptSample = {}
    # All prompts of an intent are in one file, so the order of files does not matter.
    for sample in storage.map_files(sample_file, storage.parquet_files(folder)):
        for task, prompts in sample.items():
            total.setdefault(task, {}).update(prompts)
    return total
