"""Finished evaluations side by side, paired on the intents that all of them have; the first is the base.

Metrics of rows are measured again from each ``outputs.parquet`` on the shared intents, so that values and differences are
consistent; speeds are those of ``metrics.json``. Means over rows have paired intervals; other figures have none. A comparison
is printed as plain text and written as Markdown.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from pydantic import Field

from udrl.evaluate.compare.evaluated_runs import EvaluatedRun, find_comparable_parts
from udrl.evaluate.document import Interval, Number, Part
from udrl.evaluate.metrics import diversity
from udrl.evaluate.metrics.control import spearman
from udrl.evaluate.metrics.intervals import Bootstrap, Sample
from udrl.evaluate.outputs import JUDGE, STUDENT, Columns, select
from udrl.evaluate.report.formatting import escape_markdown, number
from udrl.text import markdown_table, text_table

ALL = "all"  # the scope of all shared tasks together


class Metric(Part):
    """The better direction of a metric, and the format of its values."""

    better: Literal["higher", "lower"] = "higher"
    form: str = ".3f"


class MetricComparison(Part):
    """One metric in one scope, by the label of the run."""

    values: dict[str, Interval]
    differences: dict[str, Interval]  # to the first run, paired by intent


class ComparedRun(Part):
    label: str
    name: str
    uri: str
    intents: int


class Verdict(Part):
    """Whether one bound of a threshold holds for one run."""

    metric: str
    task: str
    run: str
    bound: str
    limit: float
    certain: bool
    base: Interval
    candidate: Interval
    difference: Interval
    holds: bool


class Comparison(Part):
    """``compare.json``. ``scopes`` holds each metric by task, and for all shared tasks together under :data:`ALL`."""

    policy: str
    runs: list[ComparedRun]
    intents: int
    bootstrap: int
    seed: int
    warnings: list[str]
    left_out: dict[str, str]  # metric -> reason
    metrics: dict[str, Metric]
    scopes: dict[str, dict[str, MetricComparison]]
    thresholds: list[Verdict] = Field(default_factory=list)

    @property
    def base(self) -> str:
        return self.runs[0].label

    @property
    def candidates(self) -> list[str]:
        return [run.label for run in self.runs[1:]]


SPEEDS = {
    "tokens_per_second": Metric(form=",.0f"),
    "latency_p50": Metric(better="lower"),
    "latency_p95": Metric(better="lower"),
}
METRICS = {
    "rejected": Metric(better="lower"),
    "length.mae": Metric(better="lower"),
    "length.exact": Metric(),
    "length.within_2": Metric(),
    "reward.spearman": Metric(),
    "reward.difference": Metric(),
    "diversity.distinct_2": Metric(),
    "diversity.vendi": Metric(form=".2f"),
    "diversity.self_bleu": Metric(better="lower"),
    **SPEEDS,
}
Figures = dict[str, dict[str, Number]]  # label -> metric without an interval -> value


def compare(runs: Sequence[EvaluatedRun], policy: str = STUDENT) -> Comparison:
    """Compare the outputs of ``policy`` in all runs.

    Raises:
        UserError: ``policy`` has no outputs in one of the runs, or the runs share no task or intent.
    """
    parts = find_comparable_parts(runs, policy)
    metrics = {"relevance": Metric(), **{f"judge.{name}": Metric() for name in parts.judges}, **METRICS}
    metrics = {name: metric for name, metric in metrics.items() if name not in parts.left_out}
    bootstrap = Bootstrap(runs[0].document.bootstrap, runs[0].document.seed)
    first = parts.outputs[runs[0].label]
    tasks = sorted(set(first["task"]))
    by_task = {task: {run: select(rows, rows["task"] == task) for run, rows in parts.outputs.items()} for task in tasks}
    figures = {task: _figures(outputs, bootstrap.seed) for task, outputs in by_task.items()}
    speeds = {run.label: _speeds(run, policy) for run in runs}
    # Texts of different tasks, and ranks of their bins, are not pooled: over all tasks their figures are the mean of the tasks.
    over_all = {run: {**_mean([figures[task][run] for task in tasks]), **speeds[run]} for run in parts.outputs}
    scopes = {ALL: _measure(parts.outputs, over_all, list(metrics), bootstrap)}
    scopes |= {task: _measure(by_task[task], figures[task], list(metrics), bootstrap) for task in tasks}
    return Comparison(
        policy=policy,
        runs=[ComparedRun(label=r.label, name=r.document.name, uri=r.uri, intents=len(r.intents)) for r in runs],
        intents=len(np.unique(first["intent_id"])),
        bootstrap=bootstrap.resamples,
        seed=bootstrap.seed,
        warnings=parts.warnings,
        left_out=parts.left_out,
        metrics=metrics,
        scopes=scopes,
    )


def _measure(
    outputs: dict[str, Columns], figures: Figures, metrics: Sequence[str], bootstrap: Bootstrap
) -> dict[str, MetricComparison]:
    """Compare all metrics in one scope; the first of ``outputs`` is the base."""
    base, *candidates = outputs
    samples = {run: _samples(rows) for run, rows in outputs.items()}
    comparisons = {}
    for name in metrics:
        if name in samples[base]:
            values = {run: bootstrap.mean(samples[run][name]) for run in outputs}
            differences = {run: bootstrap.difference(samples[run][name], samples[base][name]) for run in candidates}
        else:
            values = {run: Interval(value=figures[run][name]) for run in outputs}
            differences = {run: Interval(value=_subtract(values[run].value, values[base].value)) for run in candidates}
        comparisons[name] = MetricComparison(values=values, differences=differences)
    return comparisons


def _subtract(value: Number, base: Number) -> Number:
    return None if value is None or base is None else value - base


def _samples(rows: Columns) -> dict[str, Sample]:
    """Return the metrics that are means over rows, and so have intervals."""
    default = select(rows, rows["probe"] == "default")
    swept = select(rows, (rows["probe"] == "length") & (rows["command_words"] >= 1))
    error = np.abs(swept["n_words"] - swept["command_words"]).astype(float)
    hit = ~swept["rejected"]  # a rejected output misses
    judges = {f"judge.{name.removeprefix(JUDGE)}": default[name] for name in rows if name.startswith(JUDGE)}
    of_default = {"relevance": default["relevance"], **judges, "rejected": default["rejected"]}
    of_swept = {
        "length.mae": np.where(hit, error, np.nan),
        "length.exact": hit & (error == 0),
        "length.within_2": hit & (error <= 2),
    }
    return {
        **{name: Sample(values, default["intent_id"]) for name, values in of_default.items()},
        **{name: Sample(values, swept["intent_id"]) for name, values in of_swept.items()},
        "reward.difference": _reward_gains(select(rows, rows["probe"] == "reward")),
    }


def _reward_gains(rows: Columns) -> Sample:
    """Return the mean relevance of the top bin minus that of the bottom one, by task and intent, of accepted prompts.

    Intents without both are left out.
    """
    gains, intents = [], []
    for task in sorted(set(rows["task"])):
        bins = rows["command_reward"][(rows["task"] == task) & (rows["command_reward"] >= 0)]
        if not len(bins) or bins.min() == bins.max():
            continue
        accepted = select(rows, (rows["task"] == task) & ~rows["rejected"])
        for intent in np.unique(accepted["intent_id"]):
            own = select(accepted, accepted["intent_id"] == intent)
            top, bottom = (own["relevance"][own["command_reward"] == end] for end in (bins.max(), bins.min()))
            if len(top) and len(bottom):
                gains.append(top.mean() - bottom.mean())
                intents.append(intent)
    return Sample(np.array(gains, dtype=float), np.array(intents, dtype=np.int64))


def _figures(outputs: dict[str, Columns], seed: int) -> Figures:
    """Return one task's metrics without an interval, of each run; speeds are measured over all tasks only.

    All runs are cut to one length and number of prompts, as policies are in an evaluation. The Vendi score is over word pairs,
    so that no model is loaded.
    """
    default = {run: select(rows, rows["probe"] == "default") for run, rows in outputs.items()}
    names = ("rejected", "prompt", "intent_id", "variation")
    pooled = {name: np.concatenate([rows[name] for rows in default.values()]) for name in names}
    pooled["policy"] = np.repeat(np.array(list(default), dtype=object), [len(rows["prompt"]) for rows in default.values()])
    diversities = diversity.measure_task(pooled, list(outputs), seed=seed).diversity.policies
    figures: Figures = {}
    for run, rows in outputs.items():
        swept = select(rows, (rows["probe"] == "reward") & (rows["command_reward"] >= 0) & ~rows["rejected"])
        figures[run] = {f"diversity.{name}": value for name, value in diversities[run]}
        figures[run]["reward.spearman"] = spearman(swept["command_reward"], swept["relevance"])
        figures[run] |= dict.fromkeys(SPEEDS)
    return figures


def _mean(by_task: Sequence[dict[str, Number]]) -> dict[str, Number]:
    return {name: float(np.mean(np.array([task[name] for task in by_task], dtype=float))) for name in by_task[0]}


def _speeds(run: EvaluatedRun, policy: str) -> dict[str, Number]:
    profile = run.document.policies.get(policy)
    return {name: getattr(profile, name) if profile else None for name in SPEEDS}


WIDTH = 120  # columns of the plain text
NAME = 22  # columns of a metric's name
AT_ONCE = 2  # candidates in one plain table
SIGNED = "+z"  # before a format: with its sign, and without a minus if it rounds to 0
MARKS = {"better": "*", "worse": "!", "": ""}
SIDES = {"better": "better", "worse": "**worse**", "": ""}


def plain_text(comparison: Comparison) -> str:
    """Return tables of at most :data:`WIDTH` columns: every metric by task, in each run and as its difference to the base."""
    legend = "brackets: 95%, paired by intent; * better, ! worse: the whole bracket is on that side"
    lines = [_run_line(run) for run in comparison.runs]
    lines += ["", f"policy {comparison.policy}; {comparison.intents:,} shared intents; {legend}"]
    for start in range(0, len(comparison.candidates), AT_ONCE):
        candidates = comparison.candidates[start : start + AT_ONCE]
        # There is room for one candidate's intervals; with two, only differences have them.
        rows: list[list[str]] = []
        for title, scope in _titled_scopes(comparison):
            cells = _rows(comparison, scope, candidates, MARKS, intervals=len(candidates) == 1)
            rows += [[], [_shorten(title)], *([_shorten(name), *row] for name, row in cells)]
        header = ["", *_header(comparison, candidates)]
        rows = [row + [""] * (len(header) - len(row)) for row in rows[1:]]
        lines += ["", text_table(header, rows, left_columns=len(header))]
    return "\n".join(lines)


def markdown(comparison: Comparison, verdict_lines: Sequence[str] = ()) -> str:
    """Return the same as Markdown, with all intervals and the lines of the thresholds."""
    runs = [[run.label, escape_markdown(run.name), f"`{run.uri}`", f"{run.intents:,}"] for run in comparison.runs]
    parts = [
        f"# Comparison of {' and '.join(escape_markdown(run.name) for run in comparison.runs)}",
        markdown_table(["", "run", "evaluation", "intents"], runs, left_columns=3),
        f"Policy {comparison.policy}; {comparison.intents:,} shared intents. Brackets hold 95% intervals, paired by intent. A "
        "difference is marked better or worse if all of its bracket is on that side.",
    ]
    if comparison.warnings:
        parts.append("\n".join(f"- {escape_markdown(warning)}" for warning in comparison.warnings))
    if verdict_lines:
        parts += ["## Thresholds", "\n".join(f"- {line}" for line in verdict_lines)]
    for title, scope in _titled_scopes(comparison):
        cells = _rows(comparison, scope, comparison.candidates, SIDES, intervals=True)
        header = ["metric", *_header(comparison, comparison.candidates)]
        parts += [
            f"## {escape_markdown(title)}",
            markdown_table(header, [[f"`{name}`", *row] for name, row in cells], left_columns=1),
        ]
    return "\n\n".join(parts) + "\n"


def verdict_line(comparison: Comparison, verdict: Verdict) -> str:
    """Return one line: metric, base, candidate, difference, bound."""
    form = comparison.metrics[verdict.metric].form
    return (
        f"{'holds' if verdict.holds else 'FAILS'}: {verdict.metric} ({verdict.task}), run {verdict.run}: "
        f"base {_value(verdict.base, form)}, candidate {_interval(verdict.candidate, form)}, "
        f"difference {_interval(verdict.difference, SIGNED + form)}; "
        f"{verdict.bound} {verdict.limit:g}{' (certain)' if verdict.certain else ''}"
    )


def _titled_scopes(comparison: Comparison) -> list[tuple[str, dict[str, MetricComparison]]]:
    """Return all tasks together, then each; a single task is shown once."""
    tasks = [(name, scope) for name, scope in comparison.scopes.items() if name != ALL]
    if len(tasks) == 1:
        return [(tasks[0][0], comparison.scopes[ALL])]
    return [("all tasks", comparison.scopes[ALL]), *tasks]


def _header(comparison: Comparison, candidates: Sequence[str]) -> list[str]:
    base = comparison.base
    return [base, *(head for label in candidates for head in (label, f"{label} - {base}"))]


def _rows(
    comparison: Comparison,
    scope: dict[str, MetricComparison],
    candidates: Sequence[str],
    marks: dict[str, str],
    intervals: bool,
) -> list[tuple[str, list[str]]]:
    """Return the cells of each metric that at least one run has."""
    rows = []
    for name, metric in scope.items():
        if all(value.value is None for value in metric.values.values()):
            continue
        form = comparison.metrics[name].form
        show = _interval if intervals else _value
        cells = [show(metric.values[comparison.base], form)]
        for label in candidates:
            difference = metric.differences[label]
            mark = marks[_side(difference, comparison.metrics[name].better)]
            cells += [show(metric.values[label], form), f"{_interval(difference, SIGNED + form)} {mark}".rstrip()]
        rows.append((name, cells))
    return rows


def _side(difference: Interval, better: str) -> str:
    """Return ``better`` or ``worse`` if the whole interval is on that side, else an empty string."""
    if difference.low is None or difference.high is None or difference.low <= 0 <= difference.high:
        return ""
    return "better" if (difference.low > 0) == (better == "higher") else "worse"


def _value(interval: Interval, form: str) -> str:
    return number(interval.value, form)


def _interval(interval: Interval, form: str) -> str:
    """Return the value with its bounds, also if they are equal: certain is not the same as unknown."""
    value, low, high = (number(bound, form) for bound in (interval.value, interval.low, interval.high))
    return value if interval.low is None else f"{value} [{low}, {high}]"


def _shorten(name: str) -> str:
    return name if len(name) <= NAME else f"{name[: NAME - 1]}~"


def _run_line(run: ComparedRun) -> str:
    """Return a run's line, with the end of a long URI, which tells runs apart."""
    before, after = f"{run.label}  {run.name}  ", f"  ({run.intents:,} intents)"
    room = max(10, WIDTH - len(before) - len(after))
    uri = run.uri if len(run.uri) <= room else f"~{run.uri[1 - room :]}"
    return f"{before}{uri}{after}"[:WIDTH]
