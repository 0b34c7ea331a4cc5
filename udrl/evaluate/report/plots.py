"""Draw the report's control curves. They read without color: markers, line styles and fillings tell the series apart."""

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from udrl.evaluate.document import EvaluationDocument, Interval, LengthLevel, TaskScope
from udrl.evaluate.outputs import TEACHER

DARK, MIDDLE, LIGHT = "#1b4965", "#d1495b", "#c9d6df"

CAPTIONS = {
    "length_control": "Read: marks on the dashed diagonal mean that the student writes as many words as commanded; in the grey "
    "band the mean is within two. Filled dots lie inside the lengths of training, open squares outside. Bars hold the middle "
    "80% of the prompts.",
    "reward_control": "Read: a line that climbs from left to right means that a higher commanded bin scores higher; above the "
    "dashed line the student beats its teacher's mean. Relevance made the training reward, a judge did not. Bars are 95% "
    "intervals over intents.",
}
ALTS = {
    "length_control": "Commanded words against achieved words, by task",
    "reward_control": "Commanded reward bin against achieved relevance and judges' scores, by task",
}


def draw(document: EvaluationDocument, judges: Sequence[str] = ()) -> dict[str, bytes]:
    """Return the plots that there are numbers for, as PNG files by name.

    Validated ``judges``, best first, are drawn next to relevance.
    """
    tasks = document.tasks
    plots: dict[str, bytes] = {}
    if any(task.length.levels or task.reach.levels for task in tasks.values()):
        plots["length_control"] = _panels(tasks, [_length_panel], "commanded words", ["achieved words"], share=False)
    if any(task.reward.bins for task in tasks.values()):
        scorers = [None, *(judge for judge in judges if any(judge in task.reward.judges for task in tasks.values()))][:3]
        labels = ["relevance" if scorer is None else _shorten(scorer, 16) for scorer in scorers]
        panels = [_reward_panel(scorer) for scorer in scorers]
        plots["reward_control"] = _panels(tasks, panels, "commanded reward bin", labels, share=True)
    return plots


def _panels(
    tasks: Mapping[str, TaskScope],
    panels: Sequence[Callable[[Any, TaskScope], None]],
    x: str,
    ys: Sequence[str],
    share: bool,
) -> bytes:
    """Draw one column per task and one row per panel; a single row wraps after four tasks. ``share``: one y axis per row."""
    # Without pyplot, which keeps global state and picks a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    across = min(len(tasks), 4) if len(panels) == 1 else len(tasks)
    down = -(-len(tasks) // across) * len(panels)
    figure = Figure(figsize=(max(3.0 * across, 5.4), 2.7 * down + 0.6), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(down, across, squeeze=False, sharey="row" if share else False)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25, linewidth=0.6)
    for axis in axes.flat[len(tasks) * len(panels) :]:
        axis.set_visible(False)
    for i, (name, task) in enumerate(tasks.items()):
        for row, panel in enumerate(panels):
            axis = axes[i // across + row, i % across]
            panel(axis, task)
            if row == 0:
                axis.set_title(_shorten(name), fontsize=10)
            if i % across == 0:
                axis.set_ylabel(ys[row], fontsize=10)
    figure.supxlabel(x, fontsize=10)
    _legend(figure, axes)
    png = io.BytesIO()
    figure.savefig(png, format="png", metadata={"Software": None})
    return png.getvalue()


def _legend(figure: Any, axes: Any) -> None:
    """Draw one legend above all panels, in as many columns as its longest entry allows."""
    entries = {label: handle for axis in axes.flat for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    if entries:
        widest = 0.55 + 0.075 * max(map(len, entries))  # inches of a handle and its label in 9 points
        across = min(len(entries), max(1, int(figure.get_figwidth() / widest)))
        figure.legend(entries.values(), entries.keys(), loc="outside upper center", ncols=across, fontsize=9, frameon=False)


def _length_panel(axis: Any, task: TaskScope) -> None:
    usual, outside = task.length.levels, task.reach.levels
    if not usual and not outside:
        return _mark_empty(axis)
    words = np.array([level.words for level in [*usual, *outside]])
    ends = np.array([max(0, words.min() - 2), words.max() + 2])
    axis.fill_between(ends, ends - 2, ends + 2, color=LIGHT, alpha=0.6, linewidth=0, label="within 2 words")
    axis.plot(ends, ends, linestyle="--", color="black", linewidth=1, label="as commanded")
    top = float(ends[1])
    series: list[tuple[list[LengthLevel], str, str, str, str]] = [
        (usual, "o", DARK, DARK, "usual lengths (mean, 10-90%)"),
        (outside, "s", MIDDLE, "white", "outside training"),
    ]
    for levels, marker, color, face, label in series:
        if not levels:
            continue
        means, spread = _bars([Interval(value=level.mean, low=level.p10, high=level.p90) for level in levels])
        style = {"markerfacecolor": face, "markersize": 5, "capsize": 3, "linewidth": 1.2, "label": label}
        axis.errorbar([level.words for level in levels], means, yerr=spread, fmt=marker, color=color, **style)
        top = max(top, float(np.nanmax(means + spread[1], initial=0)))
    axis.locator_params(axis="x", nbins=6, integer=True)
    axis.set_xlim(*ends)
    axis.set_ylim(0, top + 2)


def _reward_panel(judge: str | None) -> Callable[[Any, TaskScope], None]:
    """Return a function that draws the curve of relevance, or of one judge."""

    def panel(axis: Any, task: TaskScope) -> None:
        curve = task.reward.relevance if judge is None else task.reward.judges.get(judge)
        if curve is None or all(mean.value is None for mean in curve.means):
            return _mark_empty(axis)
        means, bars = _bars(curve.means)
        fmt, style = "s-", {"color": DARK, "markersize": 5, "capsize": 3, "linewidth": 1.4}
        axis.errorbar(task.reward.bins, means, yerr=bars, fmt=fmt, label="student (95% interval)", **style)
        teacher = task.policies.get(TEACHER)
        mean = (teacher.relevance if judge is None else teacher.judges.get(judge)) if teacher else None
        if mean is not None and mean.value is not None:
            axis.axhline(mean.value, linestyle="--", color="black", linewidth=1.2, label="teacher's mean")
        axis.set_xticks(task.reward.bins)
        axis.margins(x=0.08)

    return panel


def _bars(estimates: Sequence[Interval]) -> tuple[np.ndarray, np.ndarray]:
    """Return means, shape (n,), and distances to the interval's ends, shape (2, n); 0 without an interval."""
    ends = [[estimate.value, estimate.low, estimate.high] for estimate in estimates]
    values, low, high = np.array(ends, dtype=float).T  # None becomes NaN
    return values, np.nan_to_num(np.stack([values - low, high - values])).clip(min=0)


def _mark_empty(axis: Any) -> None:
    axis.text(0.5, 0.5, "no outputs", ha="center", va="center", transform=axis.transAxes, fontsize=9)


def _shorten(name: str, length: int = 24) -> str:
    """Shorten a name to fit a panel, and escape mathtext."""
    return (name if len(name) <= length else name[: length - 1] + "…").replace("$", r"\$")
