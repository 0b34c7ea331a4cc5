"""The report's plots, drawn from its numbers. They read without colour: markers, line styles and fillings carry them."""

import io
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from udrl.evaluate.outputs import STUDENT, TEACHER
from udrl.evaluate.report.blocks import Block, Plot
from udrl.evaluate.report.reading import at, in_order, kind

DARK, MIDDLE, LIGHT = "#1b4965", "#d1495b", "#c9d6df"
POINTS = 400  # of the loss curve; more are averaged, so that the page stays small
COSTS = (
    ("dollars_per_1000", "dollars per 1,000 prompts"),
    ("core_seconds_per_1000", "core-seconds per 1,000 prompts"),
    ("prompts_per_second", "seconds per 1,000 prompts"),
)

CAPTIONS = {
    "relevance": "Read: the student's filled square against the others, per task; bars are 95% intervals over intents, the "
    "dotted line marks 90% of the teacher's mean. Grey crosses are yardsticks, which show what a metric lets through.",
    "length_control": "Read: marks on the dashed diagonal mean the student writes as many words as it is told; in the grey "
    "band the mean is within two. Filled dots lie inside the lengths of training, open squares outside. Bars hold the middle "
    "80% of the prompts.",
    "reward_control": "Read: a line that climbs from left to right means a higher commanded bin buys more; above the dashed "
    "line the student beats its teacher's mean. Relevance made the training reward, a judge did not. Bars are 95% intervals "
    "over intents.",
    "quality_cost": "Read: up is better, left is cheaper (logarithmic). A policy on the stepped line is beaten by none that "
    "costs less; one below it is. Bars are 95% intervals over intents.",
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
    """One plot: an SVG element to stand in a page, and a PNG file's bytes."""

    svg: str
    png: bytes


def draw(document: dict[str, Any], judges: Sequence[str] = ()) -> dict[str, Drawing]:
    """All plots that there are numbers for, by name. ``judges`` to believe, best first, are drawn beside relevance."""
    tasks = document.get("tasks") or {}
    plots: dict[str, Drawing] = {}
    if any(task.get("policies") for task in tasks.values()):
        plots["relevance"] = _drawing("relevance", _relevance(tasks, document.get("policies") or {}))
    if any(_levels(task, probe) for task in tasks.values() for probe in ("length", "reach")):
        figure = _panels(tasks, [_length_panel], "commanded words", ["achieved words"], share=False)
        plots["length_control"] = _drawing("length_control", figure)
    if any(_levels(task, "reward") for task in tasks.values()):
        swept = [j for j in judges if any(_judged(task, j) for task in tasks.values())][:2]
        panels = [_reward_panel(judge) for judge in (None, *swept)]
        figure = _panels(tasks, panels, "commanded reward bin", ["relevance", *(_short(j, 16) for j in swept)])
        plots["reward_control"] = _drawing("reward_control", figure)
    if (cost := _cost(document)) is not None:
        plots["quality_cost"] = _drawing("quality_cost", _quality_cost(document, *cost, list(judges)[:1]))
    if len(document.get("losses") or ()) > 1:
        plots["training_loss"] = _drawing("training_loss", _losses(document["losses"]))
    return plots


def block(name: str, drawn: Sequence[str]) -> list[Block]:
    """The block of a plot, if it is among those that were drawn."""
    return [Plot(name, CAPTIONS[name], ALTS[name])] if name in drawn else []


def front(costs: Sequence[float], values: Sequence[float]) -> list[int]:
    """Indices of the Pareto front, cheapest first: those that no other beats in value at the same cost or less."""
    best, found = -np.inf, []
    for i in sorted(range(len(costs)), key=lambda i: (costs[i], -values[i])):
        if values[i] > best:
            best = values[i]
            found.append(i)
    return found


def _figure(
    width: float, height: float, rows: int = 1, columns: int = 1, share: Literal["row"] | bool = False
) -> tuple[Any, Any]:
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


def _drawing(name: str, figure: Any) -> Drawing:
    """The figure as PNG and as an SVG element whose ids are its own, so that several can stand in one page."""
    from matplotlib import rc_context

    png, svg = io.BytesIO(), io.BytesIO()
    figure.savefig(png, format="png", metadata={"Software": None})
    with rc_context({"svg.fonttype": "path", "svg.hashsalt": name}):  # paths look alike whatever fonts the reader has
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
    # What matplotlib says in a style sheet, which in a page would hold for everything.
    text = text.replace("<svg ", '<svg style="stroke-linejoin: round; stroke-linecap: butt" ', 1)
    return Drawing(text.strip(), png.getvalue())


def _panels(
    tasks: dict[str, Any],
    panels: Sequence[Callable[[Any, dict[str, Any]], None]],
    x: str,
    ys: Sequence[str],
    share: bool = True,
) -> Any:
    """One column a task and one row a panel; a single row wraps after four tasks. ``share``: a row has one y axis."""
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
                axis.set_title(_short(name), fontsize=10)
            if i % across == 0:
                axis.set_ylabel(ys[row], fontsize=10)
    figure.supxlabel(x, fontsize=10)
    _legend(figure, axes)
    return figure


def _legend(figure: Any, axes: Any) -> None:
    """One legend above all panels, in as many columns as its longest entry lets stand side by side."""
    entries = {label: handle for axis in axes.flat for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    if entries:
        widest = 0.55 + 0.075 * max(map(len, entries))  # inches of a handle and its label in 9 points
        across = min(len(entries), max(1, int(figure.get_figwidth() / widest)))
        figure.legend(entries.values(), entries.keys(), loc="outside upper center", ncols=across, fontsize=9, frameon=False)


def _length_panel(axis: Any, task: dict[str, Any]) -> None:
    levels = _levels(task, "length") + _levels(task, "reach")
    if not levels:
        return _nothing(axis)
    words = np.array([level["words"] for level in levels])
    ends = np.array([max(0, words.min() - 2), words.max() + 2])
    axis.fill_between(ends, ends - 2, ends + 2, color=LIGHT, alpha=0.6, linewidth=0, label="within 2 words")
    axis.plot(ends, ends, linestyle="--", color="black", linewidth=1, label="as commanded")
    top = float(ends[1])
    for probe, marker, colour, face, label in (
        ("length", "o", DARK, DARK, "usual lengths (mean, 10-90%)"),
        ("reach", "s", MIDDLE, "white", "outside training"),
    ):
        if found := _levels(task, probe):
            asked = [level["words"] for level in found]
            means = _array([level["mean"] for level in found])
            low, high = (_array([level.get(end) for level in found]) for end in ("p10", "p90"))
            spread = np.nan_to_num(np.stack([means - low, high - means])).clip(min=0)
            looks = {"markerfacecolor": face, "markersize": 5, "capsize": 3, "linewidth": 1.2, "label": label}
            axis.errorbar(asked, means, yerr=spread, fmt=marker, color=colour, **looks)
            top = max(top, float(np.nanmax(means + spread[1], initial=0)))
    axis.locator_params(axis="x", nbins=6, integer=True)
    axis.set_xlim(*ends)
    axis.set_ylim(0, top + 2)


def _reward_panel(judge: str | None) -> Callable[[Any, dict[str, Any]], None]:
    """The curve of relevance, or that of one judge."""

    def panel(axis: Any, task: dict[str, Any]) -> None:
        found = [(level["bin"], _of(level, judge)) for level in _levels(task, "reward")]
        known = [(level, interval) for level, interval in found if not np.isnan(_value(interval))]
        if not known:
            return _nothing(axis)
        means, bars = _bars([interval for _, interval in known])
        fmt, looks = "s-", {"color": DARK, "markersize": 5, "capsize": 3, "linewidth": 1.4}
        axis.errorbar([level for level, _ in known], means, yerr=bars, fmt=fmt, label="student (95% interval)", **looks)
        teacher = _value(_of(at(task, "policies", TEACHER) or {}, judge))
        if not np.isnan(teacher):
            axis.axhline(teacher, linestyle="--", color="black", linewidth=1.2, label="teacher's mean")
        axis.set_xticks([level for level, _ in known])
        axis.margins(x=0.08)

    return panel


def _relevance(tasks: dict[str, Any], facts: dict[str, Any]) -> Any:
    known = {policy for task in tasks.values() for policy in task.get("policies") or {}}
    policies = in_order(known, facts)
    figure, axes = _figure(max((0.28 * len(policies) + 1.1) * len(tasks) + 1.2, 5.4), 4.0)
    axis = axes[0, 0]
    step = min(0.24, 0.8 / max(1, len(policies)))
    for place, policy in enumerate(policies):
        shift = step * (place - (len(policies) - 1) / 2)
        found = [(i, at(task, "policies", policy, "relevance")) for i, task in enumerate(tasks.values())]
        drawn = [(i, interval) for i, interval in found if not np.isnan(_value(interval))]
        if not drawn:
            continue
        means, bars = _bars([interval for _, interval in drawn])
        xs = np.array([i for i, _ in drawn]) + shift
        fmt, looks = _looks(policy, policies, facts)
        axis.errorbar(xs, means, yerr=bars, fmt=fmt, label=policy, capsize=3, linewidth=1.3, **looks)
        if policy == TEACHER:
            axis.hlines(0.9 * means, xs - shift - 0.42, xs - shift + 0.42, color="black", linestyle=":", label="90% of teacher")
    axis.set_xticks(range(len(tasks)), [_short(name) for name in tasks], fontsize=9)
    axis.set_xlim(-0.6, len(tasks) - 0.4)
    axis.set_ylim(bottom=min(0, axis.get_ylim()[0]))
    axis.set_ylabel("mean relevance (rejected = 0)")
    axis.grid(visible=False, axis="x")
    _legend(figure, axes)
    return figure


def _looks(policy: str, policies: Sequence[str], facts: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Marker and looks of a policy: its own in every plot of the page."""
    own = kind(policy, facts)
    if own == STUDENT:
        return "s", {"color": DARK, "markersize": 7}
    if own == TEACHER:
        return "o", {"color": MIDDLE, "markersize": 7, "markerfacecolor": "white"}
    peers = [p for p in policies if kind(p, facts) == own]
    markers = "x+12" if own == "trivial baseline" else "D^vPp*"
    return markers[peers.index(policy) % len(markers)], {
        "color": "#555" if own == "trivial baseline" else "black",
        "markersize": 7,
    }


def _cost(document: dict[str, Any]) -> tuple[str, dict[str, float]] | None:
    """The kind of cost that most policies tell of (its axis label), and each one's cost; None where no two have any."""
    facts = document.get("policies") or {}
    best: tuple[str, dict[str, float]] | None = None
    for key, label in COSTS:
        found = {name: told[key] for name, told in facts.items() if not np.isnan(_float(told.get(key))) and told[key] > 0}
        if key == "prompts_per_second":
            found = {name: 1000 / rate for name, rate in found.items()}
        if len(found) > max(1, len(best[1]) if best else 1):
            best = (label, found)
    return best


def _quality_cost(document: dict[str, Any], label: str, costs: dict[str, float], judges: list[str]) -> Any:
    """Relevance, and the best judge where there is one, against cost; a policy whose cost is not known is left out."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    facts, measured = document["policies"], document["overall"]["policies"]
    policies = in_order(set(measured), facts)
    shown: list[str | None] = [None, *judges]
    figure, axes = _figure(max(4.4 * len(shown), 5.4), 3.9, 1, len(shown))
    for axis, judge in zip(axes.flat, shown, strict=True):
        found = [(p, costs[p], _of(measured[p], judge)) for p in policies if p in costs]
        found = [one for one in found if not np.isnan(_value(one[2]))]
        if not found:
            _nothing(axis)
            continue
        values = [_value(interval) for _, _, interval in found]
        best = [(found[i][1], values[i]) for i in front([cost for _, cost, _ in found], values)]
        ends = [*best, (max(cost for _, cost, _ in found) * 1.6, best[-1][1])]
        axis.step(*zip(*ends, strict=True), where="post", color="black", linewidth=1, linestyle="-.", label="Pareto front")
        for policy, cost, interval in found:
            means, bars = _bars([interval])
            fmt, looks = _looks(policy, policies, facts)
            axis.errorbar([cost], means, yerr=bars, fmt=fmt, label=policy, capsize=3, linewidth=1.3, **looks)
        axis.set_xscale("log")
        wide = max(costs.values()) > 20 * min(costs.values())  # then labels between the powers of ten would overlap
        axis.xaxis.set_major_locator(LogLocator(subs=(1,) if wide else (1, 2, 5)))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.margins(x=0.15)
        axis.set_ylabel("mean relevance (rejected = 0)" if judge is None else f"{_short(judge)} (judge)")
        axis.set_xlabel(label)
    _legend(figure, axes)
    return figure


def _losses(losses: Sequence[Sequence[float]]) -> Any:
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


def _levels(task: dict[str, Any], probe: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = at(task, probe, "levels") or []
    return found


def _judged(task: dict[str, Any], judge: str) -> bool:
    return any(not np.isnan(_value(_of(level, judge))) for level in _levels(task, "reward"))


def _of(found: dict[str, Any], judge: str | None) -> Any:
    """The interval of relevance, or of a judge."""
    return found.get("relevance") if judge is None else (found.get("judges") or {}).get(judge)


def _value(interval: Any) -> float:
    return _float((interval or {}).get("value"))


def _float(value: Any) -> float:
    return float("nan") if value is None else float(value)


def _array(values: Sequence[Any]) -> np.ndarray:
    return np.array([_float(value) for value in values])


def _bars(found: Sequence[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """Means, shape (n,), and distances to the interval's ends, shape (2, n); 0 where there is no interval."""
    values, low, high = (_array([one.get(name) for one in found]) for name in ("value", "low", "high"))
    return values, np.nan_to_num(np.stack([values - low, high - values])).clip(min=0)


def _nothing(axis: Any) -> None:
    axis.text(0.5, 0.5, "no outputs", ha="center", va="center", transform=axis.transAxes, fontsize=9)


def _short(name: str, most: int = 24) -> str:
    """A name that fits a panel and holds no mathtext."""
    return (name if len(name) <= most else name[: most - 1] + "…").replace("$", r"\$")
