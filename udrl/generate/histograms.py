"""Histograms of a run's episodes and counts of its rejects, added up file by file, and the dataset card's plots of them."""

import io
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from udrl import storage
from udrl.episodes import COMPONENTS
from udrl.run import ScoringPaths

BINS = 40  # of a reward or component, over 0..1
MAX_WORDS = 256  # words; longer prompts are counted in the last bin

CAPTIONS = {
    "reward.png": "The distribution of each task's rewards, 0 to 1; the dashed line is the median. A reward-conditioned student"
    " learns from the spread; a single spike teaches it nothing.",
    "components.png": "One row per task, one column per component of the reward. A component that is 1 for nearly every prompt"
    " does not distinguish good prompts from bad ones in that task.",
    "length.png": "Prompts by length in words; the dashed line is the median. A student can't learn lengths that hardly occur.",
}


@dataclass
class CardStatistics:
    """Counts and histograms over all rows of a run; no rows."""

    writers: Counter[tuple[str, str, str, int]] = field(default_factory=Counter)  # policy, model, revision, round
    values: dict[tuple[str, str], np.ndarray] = field(default_factory=dict)  # (task, component or "reward") -> BINS counts
    words: dict[str, np.ndarray] = field(default_factory=dict)  # task -> prompts of each length
    reasons: Counter[str] = field(default_factory=Counter)
    rejected: Counter[str] = field(default_factory=Counter)  # by task

    @property
    def n_accepted(self) -> int:
        return self.writers.total()

    @property
    def n_rejected(self) -> int:
        return self.reasons.total()

    def n_accepted_of(self, task: str) -> int:
        return int(self.words[task].sum()) if task in self.words else 0


def collect_statistics(paths: ScoringPaths) -> CardStatistics:
    """Add up the episodes and rejects of a run, with one Parquet file in memory at a time."""
    statistics = CardStatistics()
    writer_columns = ["policy", "model", "model_revision", "round"]
    for table in storage.iter_tables(paths.episodes, [*writer_columns, "task", "n_words", "reward", *COMPONENTS]):
        for row in table.group_by(writer_columns).aggregate([([], "count_all")]).to_pylist():
            policy, model, revision, round_ = (row[name] for name in writer_columns)
            statistics.writers[policy, model, revision, round_] += row["count_all"]
        tasks = table.column("task").combine_chunks().dictionary_encode()
        codes = tasks.indices.to_numpy()
        for code, task in enumerate(tasks.dictionary.to_pylist()):
            of_task = codes == code
            words = np.minimum(table.column("n_words").to_numpy()[of_task], MAX_WORDS)
            statistics.words[task] = statistics.words.get(task, 0) + np.bincount(words, minlength=MAX_WORDS + 1)
            for name in ("reward", *COMPONENTS):
                bins = np.clip(table.column(name).to_numpy()[of_task] * BINS, 0, BINS - 1).astype(np.int64)
                statistics.values[task, name] = statistics.values.get((task, name), 0) + np.bincount(bins, minlength=BINS)
    for table in storage.iter_tables(paths.rejects, ["reason", "task"]):
        for name, counts in (("reason", statistics.reasons), ("task", statistics.rejected)):
            for entry in table.column(name).value_counts().to_pylist():
                counts[entry["values"]] += entry["counts"]
    return statistics


def median_of_bins(counts: np.ndarray, width: float | None = None) -> float:
    """Return the median of counted integers, or of values in bins of ``width``: the middle of the median's bin."""
    index = int(np.searchsorted(np.cumsum(counts), counts.sum() / 2))
    return index if width is None else (index + 0.5) * width


def draw_plots(statistics: CardStatistics) -> dict[str, bytes]:
    """Return the plots as PNG files, by file name; none if there is no episode. They are readable without color."""
    tasks = sorted(statistics.words)
    if not tasks:
        return {}
    longest = max(int(np.nonzero(statistics.words[task])[0].max()) for task in tasks)

    def draw_reward(axis: Any, task: str) -> None:
        counts = statistics.values[task, "reward"]
        _draw_bars(axis, counts, 1 / BINS)
        axis.axvline(median_of_bins(counts, 1 / BINS), linestyle="--", color="black", linewidth=1.2)

    def draw_length(axis: Any, task: str) -> None:
        counts = statistics.words[task][: longest + 1]
        _draw_bars(axis, counts, 1.0, -0.5)
        axis.axvline(median_of_bins(counts), linestyle="--", color="black", linewidth=1.2)

    return {
        "reward.png": _draw_panels(tasks, draw_reward, "reward"),
        "components.png": _draw_components(statistics, tasks),
        "length.png": _draw_panels(tasks, draw_length, "words"),
    }


def _draw_panels(tasks: Sequence[str], draw: Callable[[Any, str], None], x_label: str) -> bytes:
    columns = min(len(tasks), 4)
    rows = -(-len(tasks) // columns)
    figure, axes = _create_figure(max(2.7 * columns, 4.0), 2.4 * rows + 0.3, rows, columns)
    for axis, task in zip(axes.flat, tasks, strict=False):
        draw(axis, task)
        axis.set_title(_shorten(task), fontsize=10)
    for axis in list(axes.flat)[len(tasks) :]:
        axis.set_visible(False)
    figure.supxlabel(x_label, fontsize=10)
    figure.supylabel("% of the task's prompts", fontsize=10)
    return _encode_png(figure)


def _draw_components(statistics: CardStatistics, tasks: Sequence[str]) -> bytes:
    figure, axes = _create_figure(2.0 * len(COMPONENTS) + 0.6, 1.35 * len(tasks) + 0.6, len(tasks), len(COMPONENTS))
    for row, task in zip(axes, tasks, strict=True):
        for axis, component in zip(row, COMPONENTS, strict=True):
            _draw_bars(axis, statistics.values[task, component].reshape(-1, 2).sum(axis=1), 2 / BINS)  # panels are narrow
            axis.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
            axis.tick_params(labelsize=8)
        row[0].set_ylabel(_shorten(task), fontsize=8)
    for axis, component in zip(axes[0], COMPONENTS, strict=True):
        axis.set_title(component, fontsize=10)
    figure.supylabel("% of the task's prompts", fontsize=10)
    return _encode_png(figure)


def _draw_bars(axis: Any, counts: np.ndarray, width: float, start: float = 0.0) -> None:
    edges = start + width * np.arange(len(counts))
    axis.bar(
        edges, 100 * counts / max(counts.sum(), 1), width=width, align="edge", color="#8a99a6", edgecolor="black", linewidth=0.4
    )
    axis.set_xlim(start, start + width * len(counts))


def _create_figure(width: float, height: float, rows: int, columns: int) -> tuple[Any, Any]:
    """Return a figure and its axes, without pyplot, which keeps global state and picks a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25, linewidth=0.6, axis="y")
        axis.set_axisbelow(True)
    return figure, axes


def _encode_png(figure: Any) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()


def _shorten(name: str) -> str:
    return name if len(name) <= 22 else name[:21] + "…"
