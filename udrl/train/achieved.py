"""What episodes achieved, from counts by reward and length (``hindsight.count_episodes``): nothing is kept of an episode."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from udrl import storage
from udrl.episodes import EPISODES
from udrl.train import hindsight

COLUMNS = ["task", "intent_id", "n_words", "reward", "relevance"]
THREADS = 16  # what they wait for is storage


class Best(NamedTuple):
    """Rewards and lengths of a task's best episodes. ``lengths`` counts those of 0, 1, 2, ... words."""

    mean: float
    sd: float
    lengths: np.ndarray


def counted(folders: Sequence[str]) -> pa.Table:
    """The tally of all episodes in the Parquet files of ``folders``, by reward whatever bins are ranked within."""
    files = [storage.join(uri, name) for uri in folders for name in storage.list_files(uri) if name.endswith(".parquet")]

    def some(mine: Sequence[str]) -> pa.Table:
        total = _tally(EPISODES.empty_table())
        for uri in mine:
            total = hindsight.merge_counts([total, _tally(storage.read_table(uri, COLUMNS))])
        return total

    # A total a thread, not a tally a file: those of thousands of files would fill the driver's memory.
    with ThreadPoolExecutor(THREADS) as pool:
        return hindsight.merge_counts(list(pool.map(some, [files[i::THREADS] for i in range(THREADS)])))


def _tally(episodes: pa.Table) -> pa.Table:
    columns = {name: episodes.column(name).to_numpy() for name in COLUMNS}
    return hindsight.count_episodes(columns, rank_within="task")


def best(counts: pa.Table, task: str, share: float) -> Best:
    """The best ``share`` (0 to 1) of a task's episodes by reward; of equal ones at the edge, each in part.

    Raises:
        ValueError: the task has no episode.
    """
    mine = counts.filter(pc.equal(counts.column("task"), task))
    if not mine.num_rows:
        raise ValueError(f"no episode of task {task!r}")
    cells, words, n, sums = (mine.column(name).to_numpy() for name in ("cell", "words", "n", "reward"))
    distinct, place = np.unique(cells, return_inverse=True)
    of_cell = np.bincount(place, n, len(distinct))
    above = of_cell[::-1].cumsum()[::-1] - of_cell
    weights = np.clip((share * n.sum() - above) / of_cell, 0, 1)[place] * n
    rewards = sums / n  # within one cell they differ by less than a thousandth
    mean = float(np.average(rewards, weights=weights))
    sd = float(np.average((rewards - mean) ** 2, weights=weights)) ** 0.5
    return Best(mean, sd, np.bincount(words, weights))


def rewards_of(folder: str) -> dict[str, dict[str, Any]]:
    """Number, mean and standard deviation of the rewards of each task's episodes in ``folder``."""
    counts = counted([folder])
    found = {}
    for task in sorted(counts.column("task").unique().to_pylist()):
        n = pc.sum(counts.filter(pc.equal(counts.column("task"), task)).column("n")).as_py()
        whole = best(counts, task, 1.0)
        found[task] = {"episodes": n, "mean": round(whole.mean, 4), "sd": round(whole.sd, 4)}
    return found


def by_task(table: pa.Table) -> dict[str, pa.Table]:
    """The rows of each task that ``table`` holds."""
    column = table.column("task")
    return {task: table.filter(pc.equal(column, task)) for task in column.unique().to_pylist()}
