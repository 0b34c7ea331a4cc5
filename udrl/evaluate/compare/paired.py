"""What several evaluations measured on the same intents, each with its difference to the first.

Means over rows have intervals that resample intents, paired; the other figures stand alone.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from udrl.evaluate.document import UNKNOWN, Interval
from udrl.evaluate.metrics import control, diversity
from udrl.evaluate.metrics.intervals import Bootstrap, Sample
from udrl.evaluate.outputs import JUDGE, Columns, select

ALL = "all"  # the scope of all shared tasks together
Rows = Sample


class Metric(NamedTuple):
    """Which way is better, and how a value is written."""

    better: Literal["higher", "lower"] = "higher"
    form: str = ".3f"


JUDGED = Metric()  # of every judge.NAME
SPEEDS = {
    "tokens_per_second": Metric(form=",.0f"),
    "latency_p50": Metric("lower"),
    "latency_p95": Metric("lower"),
}
# Beside relevance and the judges. What follows diversity. is a name of udrl.evaluate.metrics.diversity.
MEASURED = {
    "rejected": Metric("lower"),
    "length.mae": Metric("lower"),
    "length.exact": Metric(),
    "length.within_2": Metric(),
    "reward.spearman": Metric(),
    "reward.difference": Metric(),
    "diversity.distinct_2": Metric(),
    "diversity.vendi": Metric(form=".2f"),
    "diversity.self_bleu": Metric("lower"),
    **SPEEDS,
}


def scopes(
    sides: dict[str, Columns],
    tasks: Sequence[str],
    metrics: dict[str, Metric],
    speeds: dict[str, dict[str, float]],
    options: dict[str, Any],
) -> dict[str, Any]:
    """Each of ``metrics`` for all tasks together and for each, as :func:`.comparison.compare` returns them.

    Args:
        sides: by label the rows of one run, of shared tasks and intents alone; the first is the base.
        speeds: by label what was timed, NaN where it was not.
        options: ``resamples`` and ``seed`` of the intervals.
    """
    by_task = {task: {label: select(rows, rows["task"] == task) for label, rows in sides.items()} for task in tasks}
    points = {task: _points(mine, options["seed"]) for task, mine in by_task.items()}
    found = {task: _scope(mine, points[task], metrics, options) for task, mine in by_task.items()}
    # Texts of different tasks, and ranks of their bins, are not pooled: over all tasks these are the mean of the tasks.
    over_all = {
        label: {
            name: _point(float(np.mean(np.array([points[task][label][name].value for task in tasks], dtype=float))))
            for name in points[tasks[0]][label]
        }
        | {name: _point(value) for name, value in speeds[label].items()}
        for label in sides
    }
    return {ALL: _scope(sides, over_all, metrics, options), **found}


def _scope(
    sides: dict[str, Columns], points: dict[str, dict[str, Interval]], metrics: dict[str, Metric], options: dict[str, Any]
) -> dict[str, Any]:
    first, *others = sides
    means = {label: _means(rows) for label, rows in sides.items()}
    found = {}
    for name in metrics:
        if name in means[first]:
            mine = {label: means[label][name] for label in sides}
            values = {label: Bootstrap(**options).mean(mine[label]) for label in sides}
            differences = {label: Bootstrap(**options).difference(mine[label], mine[first]) for label in others}
        else:
            values = {label: points[label].get(name, UNKNOWN) for label in sides}
            differences = {label: _point(_gap(values[label], values[first])) for label in others}
        found[name] = {
            "values": {label: _plain(value) for label, value in values.items()},
            "differences": {label: _plain(value) for label, value in differences.items()},
        }
    return found


def _means(rows: Columns) -> dict[str, Rows]:
    """The metrics that are means over rows, and so have intervals."""
    default = select(rows, rows["probe"] == "default")
    swept = select(rows, (rows["probe"] == "length") & (rows["command_words"] >= 1))
    error = np.abs(swept["n_words"] - swept["command_words"])
    judged = {f"judge.{name.removeprefix(JUDGE)}": default[name] for name in rows if name.startswith(JUDGE)}
    of_default = {"relevance": default["relevance"], **judged, "rejected": default["rejected"].astype(float)}
    of_swept = {"length.mae": error, "length.exact": error == 0, "length.within_2": error <= 2}
    return {
        **{name: Sample(values, default["intent_id"]) for name, values in of_default.items()},
        **{name: Sample(values.astype(float), swept["intent_id"]) for name, values in of_swept.items()},
        "reward.difference": _gains(select(rows, rows["probe"] == "reward")),
    }


def _gains(rows: Columns) -> Rows:
    """By task and intent, mean relevance of the top bin minus that of the bottom one, accepted prompts alone; an intent
    without both is left out."""
    gains, owners = [], []
    for task in sorted(set(rows["task"])):
        bins = rows["command_reward"][(rows["task"] == task) & (rows["command_reward"] >= 0)]
        if not len(bins) or bins.min() == bins.max():
            continue
        mine = select(rows, (rows["task"] == task) & ~rows["rejected"])
        for intent in np.unique(mine["intent_id"]):
            ours = mine["intent_id"] == intent
            top, bottom = (mine["relevance"][ours & (mine["command_reward"] == end)] for end in (bins.max(), bins.min()))
            if len(top) and len(bottom):
                gains.append(top.mean() - bottom.mean())
                owners.append(intent)
    return Sample(np.array(gains, dtype=float), np.array(owners, dtype=np.int64))


def _points(sides: dict[str, Columns], seed: int) -> dict[str, dict[str, Interval]]:
    """One task's metrics that have no interval. All runs are cut to one length and number of prompts, as policies are in an
    evaluation; the Vendi score is over word pairs, so that no model is loaded."""
    default = {label: select(rows, rows["probe"] == "default") for label, rows in sides.items()}
    named = [{**rows, "policy": np.full(len(rows["policy"]), label, dtype=object)} for label, rows in default.items()]
    columns = ("policy", "rejected", "prompt", "intent_id", "variation")
    together = {name: np.concatenate([rows[name] for rows in named]) for name in columns}
    varied = diversity.measure_task(together, list(sides), seed=seed).diversity.policies
    found = {}
    for label, rows in sides.items():
        swept = select(rows, (rows["probe"] == "reward") & (rows["command_reward"] >= 0) & ~rows["rejected"])
        found[label] = {f"diversity.{figure}": _point(value) for figure, value in varied[label]}
        found[label]["reward.spearman"] = _point(control.spearman(swept["command_reward"], swept["relevance"]))
    return found


def _gap(one: Interval, base: Interval) -> float | None:
    return None if one.value is None or base.value is None else one.value - base.value


def _point(value: float | None) -> Interval:
    return Interval(value=value)


def _plain(interval: Interval) -> dict[str, float | None]:
    return dict(interval)
