"""Histograms of a run's episodes and rejects, summed up file by file, and the dataset card's pictures of them."""

import io
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from udrl import storage
from udrl.episodes import COMPONENTS

BINS = 40  # of a reward or component, over 0..1
LONGEST = 256  # words; longer prompts are counted there

CAPTIONS = {
    "reward.png": "Read: where a task's prompts lie between a reward of 0 and 1; the dashed line is the median. A spread is"
    " what a reward-conditioned student learns from; a single spike teaches it nothing.",
    "components.png": "Read: one row a task, one column a component of the reward. A component that stands at 1 for nearly"
    " every prompt does not tell good from bad in that task.",
    "length.png": "Read: prompts by their length in words; the dashed line is the median. Lengths that hardly occur can't be"
    " asked of a student either.",
}


@dataclass
class Counts:
    """What the card tells, summed up file by file: bins and counts, no rows."""

    writers: Counter[tuple[str, str, str, int]] = field(default_factory=Counter)  # policy, model, revision, round
    values: dict[tuple[str, str], np.ndarray] = field(default_factory=dict)  # (task, component or "reward") -> bins
    words: dict[str, np.ndarray] = field(default_factory=dict)  # task -> prompts of each length
    reasons: Counter[str] = field(default_factory=Counter)
    rejected: Counter[str] = field(default_factory=Counter)  # by task

    @property
    def accepted(self) -> int:
        return self.writers.total()

    def of_task(self, task: str) -> int:
        return int(self.words[task].sum()) if task in self.words else 0


def count(folder: str) -> Counts:
    """Sum up ``episodes/`` and ``rejects/`` under ``folder``, one Parquet file in memory at a time."""
    counts = Counts()
    identity = ["policy", "model", "model_revision", "round"]
    for table in storage.iter_tables(storage.join(folder, "episodes"), [*identity, "task", "n_words", "reward", *COMPONENTS]):
        for row in table.group_by(identity).aggregate([([], "count_all")]).to_pylist():
            policy, model, revision, round_ = (row[name] for name in identity)
            counts.writers[policy, model, revision, round_] += row["count_all"]
        tasks = table.column("task").combine_chunks().dictionary_encode()
        codes = tasks.indices.to_numpy()
        for code, task in enumerate(tasks.dictionary.to_pylist()):
            mine = codes == code
            words = np.minimum(table.column("n_words").to_numpy()[mine], LONGEST)
            counts.words[task] = counts.words.get(task, 0) + np.bincount(words, minlength=LONGEST + 1)
            for name in ("reward", *COMPONENTS):
                bins = np.clip(table.column(name).to_numpy()[mine] * BINS, 0, BINS - 1).astype(np.int64)
                counts.values[task, name] = counts.values.get((task, name), 0) + np.bincount(bins, minlength=BINS)
    for table in storage.iter_tables(storage.join(folder, "rejects"), ["reason", "task"]):
        for name, into in (("reason", counts.reasons), ("task", counts.rejected)):
            for entry in table.column(name).value_counts().to_pylist():
                into[entry["values"]] += entry["counts"]
    return counts


def median(bins: np.ndarray, width: float | None = None) -> float:
    """Of counted integers, or of bins of a ``width``: the middle of the bin."""
    place = int(np.searchsorted(np.cumsum(bins), bins.sum() / 2))
    return place if width is None else (place + 0.5) * width


def draw(counts: Counts) -> dict[str, bytes]:
    """The pictures, by file name; none where there is no episode. They read without colour."""
    tasks = sorted(counts.words)
    if not tasks:
        return {}
    longest = max(int(np.nonzero(counts.words[task])[0].max()) for task in tasks)

    def reward(axis: Any, task: str) -> None:
        bins = counts.values[task, "reward"]
        _bars(axis, bins, 1 / BINS)
        axis.axvline(median(bins, 1 / BINS), linestyle="--", color="black", linewidth=1.2)

    def length(axis: Any, task: str) -> None:
        bins = counts.words[task][: longest + 1]
        _bars(axis, bins, 1.0, -0.5)
        axis.axvline(median(bins), linestyle="--", color="black", linewidth=1.2)

    return {
        "reward.png": _panels(tasks, reward, "reward"),
        "components.png": _components(counts, tasks),
        "length.png": _panels(tasks, length, "words"),
    }


def _panels(tasks: Sequence[str], draw: Callable[[Any, str], None], x: str) -> bytes:
    across = min(len(tasks), 4)
    down = -(-len(tasks) // across)
    figure, axes = _figure(max(2.7 * across, 4.0), 2.4 * down + 0.3, down, across)
    for axis, task in zip(axes.flat, tasks, strict=False):
        draw(axis, task)
        axis.set_title(_short(task), fontsize=10)
    for axis in list(axes.flat)[len(tasks) :]:
        axis.set_visible(False)
    figure.supxlabel(x, fontsize=10)
    figure.supylabel("% of the task's prompts", fontsize=10)
    return _png(figure)


def _components(counts: Counts, tasks: Sequence[str]) -> bytes:
    figure, axes = _figure(2.0 * len(COMPONENTS) + 0.6, 1.35 * len(tasks) + 0.6, len(tasks), len(COMPONENTS))
    for row, task in zip(axes, tasks, strict=True):
        for axis, component in zip(row, COMPONENTS, strict=True):
            _bars(axis, counts.values[task, component].reshape(-1, 2).sum(axis=1), 2 / BINS)  # panels are narrow
            axis.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
            axis.tick_params(labelsize=8)
        row[0].set_ylabel(_short(task), fontsize=8)
    for axis, component in zip(axes[0], COMPONENTS, strict=True):
        axis.set_title(component, fontsize=10)
    figure.supylabel("% of the task's prompts", fontsize=10)
    return _png(figure)


def _bars(axis: Any, bins: np.ndarray, width: float, start: float = 0.0) -> None:
    places = start + width * np.arange(len(bins))
    axis.bar(
        places, 100 * bins / max(bins.sum(), 1), width=width, align="edge", color="#8a99a6", edgecolor="black", linewidth=0.4
    )
    axis.set_xlim(start, start + width * len(bins))


def _figure(width: float, height: float, rows: int, columns: int) -> tuple[Any, Any]:
    """A figure without pyplot, which keeps global state and picks a display."""
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


def _png(figure: Any) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()


def _short(name: str) -> str:
    return name if len(name) <= 22 else name[:21] + "…"
