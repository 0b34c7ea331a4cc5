"""Finished evaluations side by side, paired on the intents that all of them have; the first one is the base.

What rows tell is measured again from each ``outputs.parquet`` on the shared intents alone, so that values and differences
belong together; what an evaluation timed, and which judges it asked, stands in its ``metrics.json``. A thing that would
compare unlike with unlike (a judge with another model, another scorer of relevance) is left out, with the reason.
"""

import json
import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import yaml

from udrl import storage
from udrl.errors import UserError
from udrl.evaluate.compare.paired import JUDGED, MEASURED, SPEEDS, Metric, scopes
from udrl.evaluate.outputs import JUDGE, OUTPUTS, STUDENT, Columns, columns, select

FOLDER = "evaluation"  # where a run's evaluation lies by default
SHOWN = 3  # examples in a warning
BY_RELEVANCE = ("relevance", "reward.spearman", "reward.difference")


@dataclass(frozen=True)
class Run:
    """A finished evaluation: ``rows`` of :func:`udrl.evaluate.outputs.columns`, ``intents`` by id."""

    label: str  # A, B, ...
    uri: str
    document: dict[str, Any]
    rows: Columns
    intents: dict[int, str]


def load(uris: Sequence[str]) -> list[Run]:
    """Read evaluations, each by the storage of its run or by its own folder, and name them A, B, ...

    Raises:
        UserError: no finished evaluation there, or one that can't be read.
    """
    if len(uris) > len(string.ascii_uppercase):
        raise UserError(f"{len(uris)} runs: at most {len(string.ascii_uppercase)} can be compared at once")
    return [_load(uri, label) for uri, label in zip(uris, string.ascii_uppercase, strict=False)]


def _load(uri: str, label: str) -> Run:
    places = (uri, storage.join(uri, FOLDER))
    folder = next((place for place in places if storage.exists(storage.join(place, "metrics.json"))), None)
    if folder is None:
        raise UserError(f"{uri}: no finished evaluation (metrics.json); run jobs.evaluate, or name its evaluate.folder")
    tables = storage.join(folder, "outputs.parquet")
    if not storage.exists(tables):
        raise UserError(f"{folder}: no outputs.parquet beside metrics.json; run jobs.evaluate again")
    try:
        document, table = storage.read_json(storage.join(folder, "metrics.json")), storage.read_table(tables)
    except (ValueError, pa.ArrowException) as error:
        raise UserError(f"{folder}: can't be read ({' '.join(str(error).split())[:100]}); run jobs.evaluate again") from error
    absent = [name for name in OUTPUTS.names if name not in table.column_names]
    if absent or not isinstance(document, dict) or not isinstance(document.get("policies"), dict):
        missing = f"outputs.parquet has no {', '.join(absent)}" if absent else "metrics.json has no policies"
        raise UserError(f"{folder}: made by another version ({missing}); run jobs.evaluate again")
    if document.get("rows") not in (None, table.num_rows):
        raise UserError(f"{folder}: metrics.json and outputs.parquet are of different evaluations; run jobs.evaluate again")
    intents = dict(zip(table["intent_id"].to_pylist(), table["intent"].to_pylist(), strict=True))
    return Run(label, folder, document, columns(table), intents)


def compare(runs: Sequence[Run], policy: str = STUDENT) -> dict[str, Any]:
    """Measure what ``policy`` wrote in each run, and how far each is from the first.

    Returns:
        ``policy``, ``runs``, ``intents`` (shared), ``warnings``, ``left_out`` (metric -> reason), ``metrics`` (name -> better,
        form) and ``scopes``: by task, and ``all`` for all together, a metric's ``values`` (by label) and ``differences`` to the
        first run (by label), each ``value``, ``low`` and ``high`` (95%, paired by intent), None where unknown.

    Raises:
        UserError: ``policy`` wrote nothing in one of them, or they share no intent or task.
    """
    for run in runs:
        if policy not in run.rows["policy"]:
            names = ", ".join(sorted(set(run.rows["policy"]))) or "nobody"
            raise UserError(f"{run.uri}: policy {policy!r} wrote nothing there; who did: {names}")
    sides = {run.label: select(run.rows, run.rows["policy"] == policy) for run in runs}
    warnings: list[str] = []
    tasks = _shared("task", "tasks", sides, {}, warnings)
    sides = {label: select(rows, np.isin(rows["task"], tasks)) for label, rows in sides.items()}
    texts = {key: text for run in runs for key, text in run.intents.items()}
    shared = _shared("intent_id", "intents", sides, texts, warnings)
    sides = {label: select(rows, np.isin(rows["intent_id"], shared)) for label, rows in sides.items()}
    judges, left_out = _judges(runs, warnings)
    left_out |= _scorers(runs, warnings)
    _sweeps(sides, warnings)
    _machines(runs, warnings)
    metrics = {"relevance": Metric(), **{f"judge.{name}": JUDGED for name in judges}, **MEASURED}
    metrics = {name: metric for name, metric in metrics.items() if name not in left_out}
    first = runs[0].document
    options = {"resamples": first.get("bootstrap") or 1000, "seed": first.get("seed") or 0}
    return {
        "policy": policy,
        "runs": [_told(run) for run in runs],
        "intents": len(shared),
        "bootstrap": options["resamples"],
        "seed": options["seed"],
        "warnings": warnings,
        "left_out": left_out,
        "metrics": {name: metric._asdict() for name, metric in metrics.items()},
        "scopes": scopes(sides, tasks, metrics, {run.label: _speeds(run, policy) for run in runs}, options),
    }


def _told(run: Run) -> dict[str, Any]:
    known = run.document
    return {"label": run.label, "name": known.get("name"), "uri": run.uri, "intents": len(run.intents)}


def _shared(column: str, what: str, sides: dict[str, Columns], texts: dict[int, str], warnings: list[str]) -> list[Any]:
    """The values of ``column`` that all sides have; those that not all have are named."""
    found = {label: set(rows[column].tolist()) for label, rows in sides.items()}
    shared = set.intersection(*found.values())
    if not shared:
        counts = ", ".join(f"{label} has {len(values)}" for label, values in found.items())
        remedy = "tasks" if column == "task" else "evaluate.source, or the same episodes_from and seed"
        raise UserError(f"no common {what} ({counts}); evaluate the runs with the same {remedy}")
    for label, values in found.items():
        extra = sorted(values - shared)
        if extra:
            named = [repr(texts.get(value, value)) for value in extra[:SHOWN]] + (["..."] if len(extra) > SHOWN else [])
            warnings.append(f"{what}: {len(extra)} of {label} left out, not in all runs: {', '.join(named)}")
    return sorted(shared)


def _judges(runs: Sequence[Run], warnings: list[str]) -> tuple[list[str], dict[str, str]]:
    """The pointwise judges that all runs asked in the same way; the reason for each of the others, by metric."""
    asked = {run.label: run.document.get("judges") or {} for run in runs}
    names, left_out = [], {}
    for name in dict.fromkeys(name for judges in asked.values() for name in judges):
        told = {label: judges[name] for label, judges in asked.items() if name in judges}
        absent = [run.label for run in runs if run.label not in told or JUDGE + name not in run.rows]
        models = {label: f"{facts.get('kind')} by {facts.get('model')}" for label, facts in told.items()}
        if all(facts.get("kind") == "pairwise" for facts in told.values()):
            left_out[f"judge.{name}"] = "it compares the policies of one evaluation"
            continue
        if absent:
            left_out[f"judge.{name}"] = f"no scores of it in {', '.join(absent)}"
        elif len(set(models.values())) > 1:
            left_out[f"judge.{name}"] = (
                f"not the same judge: {', '.join(f'{label} {model}' for label, model in models.items())}"
            )
        else:
            names.append(name)
            doubted = [label for label, facts in told.items() if facts.get("validated", facts.get("believable")) is False]
            if doubted:
                warnings.append(f"judge.{name}: did not prove itself on the controls in {', '.join(doubted)}: don't lean on it")
            continue
        warnings.append(f"judge.{name}: left out, {left_out[f'judge.{name}']}")
    return names, left_out


def _scorers(runs: Sequence[Run], warnings: list[str]) -> dict[str, str]:
    """Relevance, and what rests on it, is left out where different scorers made it."""
    found = {run.label: _scorer(run.document) for run in runs}
    if len({scorer for scorer in found.values() if scorer}) < 2:
        return {}
    reason = f"not the same scorer: {', '.join(f'{label} {scorer}' for label, scorer in found.items() if scorer)}"
    warnings.append(f"{', '.join(BY_RELEVANCE)}: left out, {reason}")
    return dict.fromkeys(BY_RELEVANCE, reason)


def _scorer(document: dict[str, Any]) -> str | None:
    recipe = yaml.safe_load(document.get("recipe") or "")
    rewards = recipe.get("rewards") if isinstance(recipe, dict) else None
    if not isinstance(rewards, dict):
        return None
    if rewards.get("relevance") != "judge":
        return rewards.get("embedder")
    judge = rewards.get("judge") or {}
    return f"judge {judge.get('model')}"


def _sweeps(sides: dict[str, Columns], warnings: list[str]) -> None:
    """Errors of other commands are not the same question; so where commands differ, that is said."""
    for probe, column, remedy in (
        ("length", "command_words", "set evaluate.lengths in both"),
        ("reward", "command_reward", "train both with the same commands.reward_bins"),
    ):
        asked: dict[str, set[tuple[str, int]]] = {}
        for label, rows in sides.items():
            here = select(rows, (rows["probe"] == probe) & (rows[column] >= 0))
            asked[label] = set(zip(here["task"].tolist(), here[column].tolist(), strict=True))
        known = [commands for commands in asked.values() if commands]
        tasks = sorted({task for commands in known for task, _ in commands ^ known[0]})
        if tasks:
            warnings.append(f"{probe}.*: the runs were not asked for the same {probe}s in {', '.join(tasks)}; {remedy}")


def _machines(runs: Sequence[Run], warnings: list[str]) -> None:
    found = [run.document.get("environment") or {} for run in runs]
    if len({(known.get("machine"), known.get("cores")) for known in found if known}) > 1:
        warnings.append(f"{', '.join(SPEEDS)}: not measured on the same machine")


def _speeds(run: Run, policy: str) -> dict[str, float]:
    facts = run.document["policies"].get(policy) or {}
    return {name: np.nan if facts.get(name) is None else float(facts[name]) for name in SPEEDS}


def one_line(document: dict[str, Any]) -> str:
    """The document as one line of strict JSON."""
    return json.dumps(document, ensure_ascii=False, allow_nan=False)
