"""Finished evaluations side by side, paired on the intents that all of them have; the first is the base.

Metrics are measured again from each ``outputs.parquet`` on the shared intents, so that values and differences are consistent.
Every metric has paired intervals: a difference without one says nothing.
"""

from collections.abc import Sequence
from itertools import product

import numpy as np
from pydantic import Field

from udrl.evaluate.compare.evaluated_runs import EvaluatedRun, find_comparable_parts
from udrl.evaluate.document import Interval, Part
from udrl.evaluate.formatting import number
from udrl.evaluate.metrics.intervals import Bootstrap, Sample
from udrl.evaluate.outputs import STUDENT, Columns, judge_columns, select
from udrl.text import text_table

ALL = "all"  # the scope of all shared tasks together
LOWER_IS_BETTER = ("rejected", "length.mae")


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
    """Whether one bound of a threshold holds for one run; the line names the rule and the numbers."""

    line: str
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
    scopes: dict[str, dict[str, MetricComparison]]
    thresholds: list[Verdict] = Field(default_factory=list)

    @property
    def base(self) -> str:
        return self.runs[0].label

    @property
    def candidates(self) -> list[str]:
        return [run.label for run in self.runs[1:]]


def compare(runs: Sequence[EvaluatedRun], policy: str = STUDENT) -> Comparison:
    """Compare the outputs of ``policy`` in all runs.

    Raises:
        UserError: ``policy`` has no outputs in one of the runs, or the runs share no task or intent.
    """
    parts = find_comparable_parts(runs, policy)
    bootstrap = Bootstrap(runs[0].document.bootstrap, runs[0].document.seed)
    first = parts.outputs[runs[0].label]
    scopes = {ALL: _measure(parts.outputs, parts.left_out, bootstrap)}
    for task in sorted(set(first["task"])):
        of_task = {run: select(rows, rows["task"] == task) for run, rows in parts.outputs.items()}
        scopes[task] = _measure(of_task, parts.left_out, bootstrap)
    return Comparison(
        policy=policy,
        runs=[ComparedRun(label=r.label, name=r.document.name, uri=r.uri, intents=len(r.intents)) for r in runs],
        intents=len(np.unique(first["intent_id"])),
        bootstrap=bootstrap.resamples,
        seed=bootstrap.seed,
        warnings=parts.warnings,
        left_out=parts.left_out,
        scopes=scopes,
    )


def _measure(outputs: dict[str, Columns], left_out: dict[str, str], bootstrap: Bootstrap) -> dict[str, MetricComparison]:
    """Compare all metrics in one scope; the first of ``outputs`` is the base."""
    base, *candidates = outputs
    samples = {run: _samples(rows) for run, rows in outputs.items()}
    return {
        name: MetricComparison(
            values={run: bootstrap.mean(samples[run][name]) for run in outputs},
            differences={run: bootstrap.difference(samples[run][name], samples[base][name]) for run in candidates},
        )
        for name in samples[base]
        if name not in left_out
    }


def _samples(rows: Columns) -> dict[str, Sample]:
    """Return each metric by its name, as a mean over rows."""
    default = select(rows, rows["probe"] == "default")
    swept = select(rows, (rows["probe"] == "length") & (rows["command_words"] >= 1))
    error = np.abs(swept["n_words"] - swept["command_words"]).astype(float)
    hit = ~swept["rejected"]  # a rejected output misses
    judges = {f"judge.{judge}": default[column] for judge, column in judge_columns(rows).items()}
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


# ---- as text

FORM = ".3f"


def plain_text(comparison: Comparison) -> str:
    """Return a table for each candidate and task: every metric in the base and in the candidate, and the difference."""
    legend = "brackets: 95%, paired by intent; * better, ! worse: the whole bracket is on that side"
    lines = [f"{run.label}  {run.name}  {run.uri}  ({run.intents:,} intents)" for run in comparison.runs]
    lines += ["", f"policy {comparison.policy}; {comparison.intents:,} shared intents; {legend}"]
    base = comparison.base
    for candidate, (task, scope) in product(comparison.candidates, comparison.scopes.items()):
        if task == ALL and len(comparison.scopes) == 2:
            continue  # a single task is shown once
        rows = []
        for name, metric in scope.items():
            value, own, difference = metric.values[base], metric.values[candidate], metric.differences[candidate]
            if value.value is not None or own.value is not None:
                rows.append(
                    [name, show_value(value), show_value(own), f"{show_difference(difference)} {_side(difference, name)}"]
                )
        header = ["all tasks" if task == ALL else task, base, candidate, f"{candidate} - {base}"]
        lines += ["", text_table(header, rows, left_columns=len(header))]
    if comparison.thresholds:
        failures = [verdict.line for verdict in comparison.thresholds if not verdict.holds]
        total = len(comparison.thresholds)
        lines += ["", *failures, f"thresholds: {total - len(failures)} of {total} hold"]
    return "\n".join(lines)


def show_value(interval: Interval, form: str = FORM) -> str:
    """Return the value with its bounds, also if they are equal: certain is not the same as unknown."""
    value, low, high = (number(bound, form) for bound in (interval.value, interval.low, interval.high))
    return value if interval.low is None else f"{value} [{low}, {high}]"


def show_difference(interval: Interval) -> str:
    return show_value(interval, "+z" + FORM)


def _side(difference: Interval, metric: str) -> str:
    """Return ``*`` or ``!`` if the whole interval is better or worse."""
    if difference.low is None or difference.high is None or difference.low <= 0 <= difference.high:
        return ""
    return "*" if (difference.low > 0) != (metric in LOWER_IS_BETTER) else "!"
