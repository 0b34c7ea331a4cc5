"""Draw the report's plots. They read without color: markers, line styles and fillings tell the series apart."""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from udrl.evaluate.document import (
    EvaluationDocument,
    Interval,
    LengthLevel,
    Number,
    PolicyProfile,
    PolicyScores,
    RewardLevel,
    TaskScope,
)
from udrl.evaluate.outputs import STUDENT, TEACHER
from udrl.evaluate.report.selection import kind_of, order_policies

DARK, MIDDLE, LIGHT = "#1b4965", "#d1495b", "#c9d6df"
POINTS = 400  # of the loss curve; more are averaged, so that the page stays small
COSTS = (
    ("dollars_per_1000", "dollars per 1,000 prompts"),
    ("core_seconds_per_1000", "core-seconds per 1,000 prompts"),
    ("prompts_per_second", "seconds per 1,000 prompts"),
)

CAPTIONS = {
    "relevance": "Read: the student's filled square against the others, per task; bars are 95% intervals over intents, the "
    "dotted line marks 90% of the teacher's mean. Grey crosses are trivial baselines, which show how a metric can be fooled.",
    "length_control": "Read: marks on the dashed diagonal mean that the student writes as many words as commanded; in the grey "
    "band the mean is within two. Filled dots lie inside the lengths of training, open squares outside. Bars hold the middle "
    "80% of the prompts.",
    "reward_control": "Read: a line that climbs from left to right means that a higher commanded bin scores higher; above the "
    "dashed line the student beats its teacher's mean. Relevance made the training reward, a judge did not. Bars are 95% "
    "intervals over intents.",
    "quality_cost": "Read: up is better, left is cheaper (logarithmic). No cheaper policy beats one on the stepped line; "
    "a cheaper policy beats one below it. Bars are 95% intervals over intents.",
    "training_loss": "Read: loss on prompt tokens by optimizer step, thin as logged, thick smoothed. Still falling at the "
    "end means more steps would help.",
}
ALTS = {
    "relevance": "Mean relevance of every policy, by task",
    "length_control": "Commanded words against achieved words, by task",
    "reward_control": "Commanded reward bin against achieved relevance and judges' scores, by task",
    "quality_cost": "Quality of every policy against its cost",
    "training_loss": "Training loss by optimizer step",
}


class Drawing(NamedTuple):
    """One plot: an SVG element for a page, and the bytes of a PNG file."""

    svg: str
    png: bytes


def draw(document: EvaluationDocument, judges: Sequence[str] = ()) -> dict[str, Drawing]:
    """Return all plots that there are numbers for, by name; validated ``judges``, best first, are drawn next to relevance."""
    tasks = document.tasks
    plots: dict[str, Drawing] = {}
    if any(task.policies for task in tasks.values()):
        plots["relevance"] = _render("relevance", _relevance(tasks, document.policies))
    if any(task.length.levels or task.reach.levels for task in tasks.values()):
        figure = _panels(tasks, [_length_panel], "commanded words", ["achieved words"], share=False)
        plots["length_control"] = _render("length_control", figure)
    if any(task.reward.levels for task in tasks.values()):
        scored = [judge for judge in judges if any(_is_scored_by(task, judge) for task in tasks.values())][:2]
        panels = [_reward_panel(judge) for judge in (None, *scored)]
        labels = ["relevance", *(_shorten(judge, 16) for judge in scored)]
        plots["reward_control"] = _render("reward_control", _panels(tasks, panels, "commanded reward bin", labels))
    if (costs := select_costs(document.policies)) is not None:
        plots["quality_cost"] = _render("quality_cost", _quality_cost(document, *costs, list(judges)[:1]))
    if len(document.losses) > 1:
        plots["training_loss"] = _render("training_loss", _losses(document.losses))
    return plots


def pareto_front(costs: Sequence[float], values: Sequence[float]) -> list[int]:
    """Return the indices of the Pareto front, cheapest first: no other point has a higher value at the same cost or less."""
    best, indices = -np.inf, []
    for i in sorted(range(len(costs)), key=lambda i: (costs[i], -values[i])):
        if values[i] > best:
            best = values[i]
            indices.append(i)
    return indices


def _figure(
    width: float, height: float, rows: int = 1, columns: int = 1, share: Literal["row"] | bool = False
) -> tuple[Any, Any]:
    """Make a figure without pyplot, which keeps global state and picks a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False, sharey=share)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25, linewidth=0.6)
    return figure, axes


def _render(name: str, figure: Any) -> Drawing:
    """Render a figure as PNG and as an SVG element with unique ids, so that several fit in one page."""
    from matplotlib import rc_context

    png, svg = io.BytesIO(), io.BytesIO()
    figure.savefig(png, format="png", metadata={"Software": None})
    with rc_context({"svg.fonttype": "path", "svg.hashsalt": name}):  # paths do not depend on the reader's fonts
        figure.savefig(svg, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = svg.getvalue().decode()
    text = text[text.index("<svg") :]
    text = re.sub(
        r"<(defs|metadata)>\s*(<style.*?</style>)?\s*</\1>|<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.S
    )
    text = re.sub(r"<!--.*?-->", "", text, flags=re.S)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'href="#', f'href="#{name}-', text)
    text = re.sub(r"url\(#", f"url(#{name}-", text)
    # From matplotlib's style sheet, which in a page would apply to everything.
    text = text.replace("<svg ", '<svg style="stroke-linejoin: round; stroke-linecap: butt" ', 1)
    return Drawing(text.strip(), png.getvalue())


def _panels(
    tasks: Mapping[str, TaskScope],
    panels: Sequence[Callable[[Any, TaskScope], None]],
    x: str,
    ys: Sequence[str],
    share: bool = True,
) -> Any:
    """Make one column per task and one row per panel; a single row wraps after four tasks. ``share``: one y axis per row."""
    across = min(len(tasks), 4) if len(panels) == 1 else len(tasks)
    down = -(-len(tasks) // across) * len(panels)
    figure, axes = _figure(max(3.0 * across, 5.4), 2.7 * down + 0.6, down, across, "row" if share else False)
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
    return figure


def _legend(figure: Any, axes: Any) -> None:
    """Draw one legend above all panels, in as many columns as its longest entry allows."""
    entries = {label: handle for axis in axes.flat for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    if entries:
        widest = 0.55 + 0.075 * max(map(len, entries))  # inches of a handle and its label in 9 points
        across = min(len(entries), max(1, int(figure.get_figwidth() / widest)))
        figure.legend(entries.values(), entries.keys(), loc="outside upper center", ncols=across, fontsize=9, frameon=False)


def _length_panel(axis: Any, task: TaskScope) -> None:
    usual, outside = task.length.levels or [], task.reach.levels or []
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
        means, low, high = (_array([getattr(level, name) for level in levels]) for name in ("mean", "p10", "p90"))
        spread = np.nan_to_num(np.stack([means - low, high - means])).clip(min=0)
        style = {"markerfacecolor": face, "markersize": 5, "capsize": 3, "linewidth": 1.2, "label": label}
        axis.errorbar([level.words for level in levels], means, yerr=spread, fmt=marker, color=color, **style)
        top = max(top, float(np.nanmax(means + spread[1], initial=0)))
    axis.locator_params(axis="x", nbins=6, integer=True)
    axis.set_xlim(*ends)
    axis.set_ylim(0, top + 2)


def _reward_panel(judge: str | None) -> Callable[[Any, TaskScope], None]:
    """Return a function that draws the curve of relevance, or of one judge."""

    def panel(axis: Any, task: TaskScope) -> None:
        estimates = [(level.bin, estimate) for level in task.reward.levels if (estimate := _estimate(level, judge))]
        if not estimates:
            return _mark_empty(axis)
        means, bars = _bars([estimate for _, estimate in estimates])
        fmt, style = "s-", {"color": DARK, "markersize": 5, "capsize": 3, "linewidth": 1.4}
        axis.errorbar([level for level, _ in estimates], means, yerr=bars, fmt=fmt, label="student (95% interval)", **style)
        teacher = _estimate(task.policies[TEACHER], judge) if TEACHER in task.policies else None
        if teacher:
            axis.axhline(_float(teacher.value), linestyle="--", color="black", linewidth=1.2, label="teacher's mean")
        axis.set_xticks([level for level, _ in estimates])
        axis.margins(x=0.08)

    return panel


def _relevance(tasks: Mapping[str, TaskScope], profiles: Mapping[str, PolicyProfile]) -> Any:
    policies = order_policies({policy for task in tasks.values() for policy in task.policies}, profiles)
    figure, axes = _figure(max((0.28 * len(policies) + 1.1) * len(tasks) + 1.2, 5.4), 4.0)
    axis = axes[0, 0]
    step = min(0.24, 0.8 / max(1, len(policies)))
    for place, policy in enumerate(policies):
        shift = step * (place - (len(policies) - 1) / 2)
        estimates = [
            (column, estimate)
            for column, task in enumerate(tasks.values())
            if policy in task.policies and (estimate := _estimate(task.policies[policy], None))
        ]
        if not estimates:
            continue
        means, bars = _bars([estimate for _, estimate in estimates])
        xs = np.array([column for column, _ in estimates]) + shift
        fmt, style = _marker_style(policy, policies, profiles)
        axis.errorbar(xs, means, yerr=bars, fmt=fmt, label=policy, capsize=3, linewidth=1.3, **style)
        if policy == TEACHER:
            axis.hlines(0.9 * means, xs - shift - 0.42, xs - shift + 0.42, color="black", linestyle=":", label="90% of teacher")
    axis.set_xticks(range(len(tasks)), [_shorten(name) for name in tasks], fontsize=9)
    axis.set_xlim(-0.6, len(tasks) - 0.4)
    axis.set_ylim(bottom=min(0, axis.get_ylim()[0]))
    axis.set_ylabel("mean relevance (rejected = 0)")
    axis.grid(visible=False, axis="x")
    _legend(figure, axes)
    return figure


def _marker_style(policy: str, policies: Sequence[str], profiles: Mapping[str, PolicyProfile]) -> tuple[str, dict[str, Any]]:
    """Return a policy's marker and style, the same in every plot of the page."""
    own = kind_of(policy, profiles)
    if own == STUDENT:
        return "s", {"color": DARK, "markersize": 7}
    if own == TEACHER:
        return "o", {"color": MIDDLE, "markersize": 7, "markerfacecolor": "white"}
    peers = [peer for peer in policies if kind_of(peer, profiles) == own]
    markers = "x+12" if own == "trivial baseline" else "D^vPp*"
    return markers[peers.index(policy) % len(markers)], {
        "color": "#555" if own == "trivial baseline" else "black",
        "markersize": 7,
    }


def select_costs(profiles: Mapping[str, PolicyProfile]) -> tuple[str, dict[str, float]] | None:
    """Return the cost that most policies have, as its axis label and each policy's value; None if no two share one."""
    best: tuple[str, dict[str, float]] | None = None
    for name, label in COSTS:
        values = {policy: float(getattr(profile, name) or 0) for policy, profile in profiles.items()}
        costs = {policy: value for policy, value in values.items() if value > 0}
        if name == "prompts_per_second":
            costs = {policy: 1000 / rate for policy, rate in costs.items()}
        if len(costs) > max(1, len(best[1]) if best else 1):
            best = (label, costs)
    return best


def _quality_cost(document: EvaluationDocument, label: str, costs: dict[str, float], judges: list[str]) -> Any:
    """Draw relevance, and the best judge's score if there is one, against cost; policies of unknown cost are left out."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    scores = document.overall.policies
    policies = order_policies(scores, document.policies)
    scorers: list[str | None] = [None, *judges]
    figure, axes = _figure(max(4.4 * len(scorers), 5.4), 3.9, 1, len(scorers))
    for axis, judge in zip(axes.flat, scorers, strict=True):
        points = [
            (policy, costs[policy], estimate)
            for policy in policies
            if policy in costs and (estimate := _estimate(scores[policy], judge))
        ]
        if not points:
            _mark_empty(axis)
            continue
        values = [_float(estimate.value) for _, _, estimate in points]
        best = [(points[i][1], values[i]) for i in pareto_front([cost for _, cost, _ in points], values)]
        ends = [*best, (max(cost for _, cost, _ in points) * 1.6, best[-1][1])]
        axis.step(*zip(*ends, strict=True), where="post", color="black", linewidth=1, linestyle="-.", label="Pareto front")
        for policy, cost, estimate in points:
            means, bars = _bars([estimate])
            fmt, style = _marker_style(policy, policies, document.policies)
            axis.errorbar([cost], means, yerr=bars, fmt=fmt, label=policy, capsize=3, linewidth=1.3, **style)
        axis.set_xscale("log")
        wide = max(costs.values()) > 20 * min(costs.values())  # then labels between the powers of ten would overlap
        axis.xaxis.set_major_locator(LogLocator(subs=(1,) if wide else (1, 2, 5)))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.margins(x=0.15)
        axis.set_ylabel("mean relevance (rejected = 0)" if judge is None else f"{_shorten(judge)} (judge)")
        axis.set_xlabel(label)
    _legend(figure, axes)
    return figure


def _losses(losses: Sequence[tuple[int, Number]]) -> Any:
    figure, axes = _figure(6.0, 3.2)
    axis = axes[0, 0]
    steps, values = np.array([[_float(x) for x in pair] for pair in losses]).T
    if len(values) > POINTS:
        blocks = np.array_split(np.arange(len(values)), POINTS)
        steps, values = (np.array([column[block].mean() for block in blocks]) for column in (steps, values))
    window = max(1, len(values) // 30)
    smooth = np.convolve(values, np.ones(window) / window, mode="valid")
    middle = steps[window // 2 :][: len(smooth)]
    axis.plot(steps, values, color=DARK, alpha=0.45, linewidth=0.8, label="as logged")
    axis.plot(middle, smooth, color="black", linewidth=1.8, label=f"mean of {window}")
    axis.set_xlabel("optimizer step")
    axis.set_ylabel("training loss (nats a token)")
    axis.legend(frameon=False, fontsize=9)
    return figure


def _is_scored_by(task: TaskScope, judge: str) -> bool:
    return any(_estimate(level, judge) for level in task.reward.levels)


def _estimate(scores: PolicyScores | RewardLevel, judge: str | None) -> Interval | None:
    """Return the interval of relevance, or of a judge's score; None if it is unknown."""
    estimate = scores.relevance if judge is None else scores.judges.get(judge)
    return estimate if estimate is not None and estimate.value is not None else None


def _float(value: float | None) -> float:
    return float("nan") if value is None else float(value)


def _array(values: Sequence[float | None]) -> np.ndarray:
    return np.array([_float(value) for value in values])


def _bars(estimates: Sequence[Interval]) -> tuple[np.ndarray, np.ndarray]:
    """Return means, shape (n,), and distances to the interval's ends, shape (2, n); 0 without an interval."""
    values, low, high = (_array([getattr(estimate, name) for estimate in estimates]) for name in ("value", "low", "high"))
    return values, np.nan_to_num(np.stack([values - low, high - values])).clip(min=0)


def _mark_empty(axis: Any) -> None:
    axis.text(0.5, 0.5, "no outputs", ha="center", va="center", transform=axis.transAxes, fontsize=9)


def _shorten(name: str, length: int = 24) -> str:
    """Shorten a name to fit a panel, and escape mathtext."""
    return (name if len(name) <= length else name[: length - 1] + "…").replace("$", r"\$")
