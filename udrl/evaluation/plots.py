"""The report's plots, drawn from its numbers to PNG bytes. They read without colour: markers and line styles carry them."""

import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from udrl.evaluation.metrics import STUDENT, TEACHER

DARK, MIDDLE, LIGHT = "#1b4965", "#d1495b", "#c9d6df"

CAPTIONS = {
    "length_control.png": "Read: dots on the dashed diagonal mean the student writes as many words as it is told; in the grey "
    "band the mean is within two. Bars hold the middle 80% of the prompts.",
    "reward_control.png": "Read: a line that climbs from left to right means a higher commanded bin buys more relevance; above "
    "the dashed line the student beats its teacher's mean. Bars are 95% intervals over intents.",
    "relevance.png": "Read: the student's square against the teacher's circle, per task; bars are 95% intervals over intents, "
    "the dotted line marks 90% of the teacher's mean.",
    "training_loss.png": "Read: loss on prompt tokens by optimizer step, thin as logged, thick smoothed. Still falling at the "
    "end means more steps would help.",
}


def draw(metrics: dict[str, Any], losses: Sequence[tuple[float, float]] = ()) -> dict[str, bytes]:
    """All plots that there are numbers for, by file name."""
    tasks = metrics["tasks"]
    plots: dict[str, bytes] = {}
    if any(task["length"]["levels"] for task in tasks.values()):
        plots["length_control.png"] = _panels(tasks, _length_panel, "commanded words", "achieved words", share=False)
    if any(task["reward"]["levels"] for task in tasks.values()):
        plots["reward_control.png"] = _panels(tasks, _reward_panel, "commanded reward bin", "achieved relevance")
    if any(task["policies"] for task in tasks.values()):
        plots["relevance.png"] = _relevance(tasks)
    if len(losses) > 1:
        plots["training_loss.png"] = _losses(losses)
    return plots


def _figure(width: float, height: float, rows: int = 1, columns: int = 1, share: bool = True) -> tuple[Any, Any]:
    """A figure without pyplot, which keeps global state and picks a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False, sharey=share)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25, linewidth=0.6)
    return figure, axes


def _png(figure: Any) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()


def _panels(tasks: dict[str, Any], panel: Callable[[Any, dict[str, Any]], None], x: str, y: str, share: bool = True) -> bytes:
    """One small panel a task, up to four side by side; one legend for all. ``share`` gives them one y axis."""
    across = min(len(tasks), 4)
    down = -(-len(tasks) // across)
    figure, axes = _figure(max(3.1 * across, 5.2), 3.0 * down + 0.5, down, across, share)
    for axis, (name, task) in zip(axes.flat, tasks.items(), strict=False):
        panel(axis, task)
        axis.set_title(_short(name), fontsize=10)
    for axis in list(axes.flat)[len(tasks) :]:
        axis.set_visible(False)
    figure.supxlabel(x, fontsize=10)
    figure.supylabel(y, fontsize=10)
    entries = {label: handle for axis in axes.flat for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(entries.values(), entries.keys(), loc="outside upper center", ncols=len(entries), fontsize=9, frameon=False)
    return _png(figure)


def _length_panel(axis: Any, task: dict[str, Any]) -> None:
    levels = task["length"]["levels"]
    if not levels:
        return _nothing(axis)
    words = np.array([level["words"] for level in levels])
    means = np.array([level["mean"] for level in levels])
    spread = np.array([[level["mean"] - level["p10"], level["p90"] - level["mean"]] for level in levels]).T.clip(min=0)
    ends = np.array([max(0, words.min() - 2), words.max() + 2])
    axis.fill_between(ends, ends - 2, ends + 2, color=LIGHT, alpha=0.6, linewidth=0, label="within 2 words")
    axis.plot(ends, ends, linestyle="--", color="black", linewidth=1, label="as commanded")
    axis.errorbar(
        words, means, yerr=spread, fmt="o", color=DARK, markersize=5, capsize=3, linewidth=1.2, label="student (mean, 10-90%)"
    )
    axis.set_xticks(words)
    axis.set_xlim(*ends)
    axis.set_ylim(0, max(ends[1], (means + spread[1]).max()) + 2)


def _reward_panel(axis: Any, task: dict[str, Any]) -> None:
    levels = [level for level in task["reward"]["levels"] if not np.isnan(level["relevance"]["value"])]
    if not levels:
        return _nothing(axis)
    bins = [level["bin"] for level in levels]
    means, bars = _bars([level["relevance"] for level in levels])
    axis.errorbar(
        bins, means, yerr=bars, fmt="s-", color=DARK, markersize=5, capsize=3, linewidth=1.4, label="student (95% interval)"
    )
    teacher = task["policies"].get(TEACHER, {}).get("relevance", {}).get("value", np.nan)
    if not np.isnan(teacher):
        axis.axhline(teacher, linestyle="--", color="black", linewidth=1.2, label="teacher's mean")
    axis.set_xticks(bins)
    axis.margins(x=0.08)


def _relevance(tasks: dict[str, Any]) -> bytes:
    figure, axes = _figure(max(2.0 * len(tasks) + 1.6, 5.2), 3.8)
    axis = axes[0, 0]
    known = {policy for task in tasks.values() for policy in task["policies"]}
    policies = [p for p in (TEACHER, STUDENT) if p in known] + sorted(known - {TEACHER, STUDENT})
    styles = {TEACHER: ("o", MIDDLE), STUDENT: ("s", DARK)}
    for place, policy in enumerate(policies):
        shift = 0.24 * (place - (len(policies) - 1) / 2)
        found = [
            (i, task["policies"][policy]["relevance"]) for i, task in enumerate(tasks.values()) if policy in task["policies"]
        ]
        means, bars = _bars([interval for _, interval in found])
        marker, colour = styles.get(policy, ("D^vP*X"[place % 6], "black"))
        at = np.array([i for i, _ in found]) + shift
        looks: Any = {"color": colour, "markersize": 7, "capsize": 4, "linewidth": 1.4}
        looks |= {"markerfacecolor": "white"} if policy == TEACHER else {}
        axis.errorbar(at, means, yerr=bars, fmt=marker, label=policy, **looks)
        for x, mean in zip(at, means, strict=True):
            axis.annotate(f"{mean:.2f}", (x, mean), xytext=(7, 0), textcoords="offset points", fontsize=8, va="center")
        if policy == TEACHER:
            axis.hlines(0.9 * means, at - shift - 0.4, at - shift + 0.4, color="black", linestyle=":", label="90% of teacher")
    axis.set_xticks(range(len(tasks)), [_short(name) for name in tasks], fontsize=9)
    axis.set_xlim(-0.6, len(tasks) - 0.4)
    axis.set_ylim(bottom=min(0, axis.get_ylim()[0]))
    axis.set_ylabel("mean relevance (rejected = 0)")
    axis.grid(visible=False, axis="x")
    figure.legend(loc="outside upper center", ncols=len(policies) + 1, fontsize=9, frameon=False)
    return _png(figure)


def _losses(losses: Sequence[tuple[float, float]]) -> bytes:
    figure, axes = _figure(6.0, 3.2)
    axis = axes[0, 0]
    steps, values = np.array(losses, dtype=float).T
    window = max(1, len(values) // 30)
    kernel = np.ones(window) / window
    smooth = np.convolve(values, kernel, mode="valid")
    axis.plot(steps, values, color=DARK, alpha=0.35, linewidth=0.8, label="as logged")
    axis.plot(
        steps[window // 2 :][: len(smooth)], smooth, color="black", linewidth=1.6, linestyle="-", label=f"mean of {window}"
    )
    axis.set_xlabel("optimizer step")
    axis.set_ylabel("training loss (nats a token)")
    axis.legend(frameon=False, fontsize=9)
    return _png(figure)


def _bars(found: list[dict[str, float]]) -> tuple[np.ndarray, np.ndarray]:
    """Means, shape (n,), and distances to the interval's ends, shape (2, n)."""
    values, low, high = (np.array([one[name] for one in found], dtype=float) for name in ("value", "low", "high"))
    return values, np.stack([values - low, high - values])


def _nothing(axis: Any) -> None:
    axis.text(0.5, 0.5, "no outputs", ha="center", va="center", transform=axis.transAxes, fontsize=9)


def _short(name: str) -> str:
    """A task's name that fits a panel and holds no mathtext."""
    return (name if len(name) <= 24 else name[:23] + "…").replace("$", r"\$")
