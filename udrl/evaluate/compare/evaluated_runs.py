"""Loads finished evaluations, and finds the parts of them that can be compared.

Runs are compared on the tasks, intents and commands that all of them have. A metric that would compare unlike with unlike (a
judge with another model, another scorer of relevance) is left out with the reason.
"""

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import yaml
from pydantic import AliasChoices, Field

from udrl import storage
from udrl.errors import UserError
from udrl.evaluate.outputs import JUDGE, OUTPUTS, Columns, columns, select
from udrl.run import Document, EvaluationPaths, Run

FOLDER = "evaluation"  # the default of evaluate.folder
MAX_EXAMPLES = 3  # in a warning
BY_RELEVANCE = ("relevance", "reward.difference")  # metrics that depend on the scorer of relevance


class StoredJudge(Document):
    kind: str
    model: str
    validated: bool = Field(validation_alias=AliasChoices("validated", "believable"))  # the latter until 2026-11-25


class StoredEvaluation(Document):
    """The part of a ``metrics.json``, of any version, that a comparison needs."""

    name: str
    rows: int
    bootstrap: int
    seed: int
    judges: dict[str, StoredJudge]
    recipe: str


@dataclass(frozen=True)
class EvaluatedRun:
    """A finished evaluation. ``intents`` maps ids to texts."""

    label: str  # A, B, ...
    uri: str
    document: StoredEvaluation
    outputs: Columns
    intents: dict[int, str]


@dataclass
class Comparability:
    """The parts of some runs that can be compared."""

    outputs: dict[str, Columns]  # by label: rows of one policy, of shared tasks, intents and commands
    left_out: dict[str, str]  # metric -> reason
    warnings: list[str]


def load_runs(uris: Sequence[str]) -> list[EvaluatedRun]:
    """Load evaluations by the storage of their run or by their own folder, and label them A, B, ...

    Raises:
        UserError: a finished evaluation is missing or can't be read.
    """
    if len(uris) > len(string.ascii_uppercase):
        raise UserError(f"{len(uris)} runs: at most {len(string.ascii_uppercase)} can be compared at once")
    return [_load(uri, label) for uri, label in zip(uris, string.ascii_uppercase, strict=False)]


def _load(uri: str, label: str) -> EvaluatedRun:
    folders = (EvaluationPaths(uri), Run(uri).evaluation(FOLDER))
    paths = next((paths for paths in folders if storage.exists(paths.metrics)), None)
    if paths is None:
        raise UserError(f"{uri}: no finished evaluation (metrics.json); run jobs.evaluate, or name its evaluate.folder")
    document = StoredEvaluation.load(paths.metrics)
    try:
        table = storage.read_table(paths.outputs)
    except (ValueError, pa.ArrowException) as error:
        message = " ".join(str(error).split())[:100]
        raise UserError(f"{paths.outputs}: can't be read ({message}); run jobs.evaluate again") from error
    missing = [name for name in OUTPUTS.names if name not in table.column_names]
    if missing:
        raise UserError(f"{paths.outputs}: made by another version (no column {', '.join(missing)}); run jobs.evaluate again")
    if document.rows != table.num_rows:
        raise UserError(
            f"{paths.folder}: metrics.json and outputs.parquet are of different evaluations; run jobs.evaluate again"
        )
    intents = dict(zip(table["intent_id"].to_pylist(), table["intent"].to_pylist(), strict=True))
    return EvaluatedRun(label, paths.folder, document, columns(table), intents)


def find_comparable_parts(runs: Sequence[EvaluatedRun], policy: str) -> Comparability:
    """Find the outputs and metrics that can be compared.

    Raises:
        UserError: ``policy`` has no outputs in one of the runs, or the runs share no task or intent.
    """
    for run in runs:
        if policy not in run.outputs["policy"]:
            names = ", ".join(sorted(set(run.outputs["policy"]))) or "none"
            raise UserError(f"{run.uri}: no outputs of policy {policy!r}; policies with outputs: {names}")
    outputs = {run.label: _with_commands(select(run.outputs, run.outputs["policy"] == policy)) for run in runs}
    parts = Comparability(outputs, {}, [])
    texts = {intent_id: text for run in runs for intent_id, text in run.intents.items()}
    _keep_shared(parts, "task", "tasks", {}, "tasks")
    _keep_shared(parts, "intent_id", "intents", texts, "evaluate.source, or the same episodes_from and seed")
    _keep_shared(parts, "command", "commands", {}, "evaluate.lengths and commands.reward_bins")
    _leave_out_judges(runs, parts)
    scorers = {run.label: scorer for run in runs if (scorer := _scorer(yaml.safe_load(run.document.recipe)))}
    if len(set(scorers.values())) > 1:
        reason = f"not the same scorer: {', '.join(f'{label} {scorer}' for label, scorer in scorers.items())}"
        parts.warnings.append(f"{', '.join(BY_RELEVANCE)}: left out, {reason}")
        parts.left_out |= dict.fromkeys(BY_RELEVANCE, reason)
    return parts


def _with_commands(rows: Columns) -> Columns:
    """Return the rows with the column ``command``: of a sweep what was commanded, since errors at other lengths differ."""
    sweeps = {"length": "command_words", "reach": "command_words", "reward": "command_reward"}
    commands = [
        f"{probe} {rows[sweeps[probe]][i]} of {rows['task'][i]}" if probe in sweeps else probe
        for i, probe in enumerate(rows["probe"])
    ]
    return {**rows, "command": np.array(commands, dtype=object)}


def _keep_shared(parts: Comparability, column: str, label: str, texts: Mapping[int, str], remedy: str) -> None:
    """Keep the rows whose value of ``column`` all runs have, and warn of each run that has more."""
    values = {run: set(rows[column].tolist()) for run, rows in parts.outputs.items()}
    shared = set.intersection(*values.values())
    if not shared:
        counts = ", ".join(f"{run} has {len(own)}" for run, own in values.items())
        raise UserError(f"no common {label} ({counts}); evaluate the runs with the same {remedy}")
    for run, own in values.items():
        if extra := sorted(own - shared):
            examples = [repr(texts.get(value, value)) for value in extra[:MAX_EXAMPLES]]
            examples += ["..."] if len(extra) > MAX_EXAMPLES else []
            parts.warnings.append(f"{label}: {len(extra)} of {run} left out, not in all runs: {', '.join(examples)}")
    parts.outputs = {run: select(rows, np.isin(rows[column], sorted(shared))) for run, rows in parts.outputs.items()}


def _leave_out_judges(runs: Sequence[EvaluatedRun], parts: Comparability) -> None:
    """Leave out the judges that are not the same in all runs, and warn of those that are not validated."""
    for name in dict.fromkeys(name for run in runs for name in run.document.judges):
        profiles = {run.label: run.document.judges[name] for run in runs if name in run.document.judges}
        models = {label: f"{profile.kind} by {profile.model}" for label, profile in profiles.items()}
        missing = [run.label for run in runs if run.label not in profiles or JUDGE + name not in run.outputs]
        doubted = [label for label, profile in profiles.items() if not profile.validated]
        if missing:
            parts.left_out[f"judge.{name}"] = f"no scores of it in {', '.join(missing)}"
        elif len(set(models.values())) > 1:
            pairs = ", ".join(f"{label} {model}" for label, model in models.items())
            parts.left_out[f"judge.{name}"] = f"not the same judge: {pairs}"
        elif doubted:
            parts.warnings.append(f"judge.{name}: not validated on the controls in {', '.join(doubted)}; do not rely on it")
    parts.warnings += [f"{metric}: left out, {reason}" for metric, reason in parts.left_out.items()]


def _scorer(recipe: Any) -> str | None:
    """Return the scorer of relevance in a recipe of any version, None if it is unknown."""
    rewards = recipe.get("rewards") if isinstance(recipe, dict) else None
    if not isinstance(rewards, dict):
        return None
    if rewards.get("relevance") != "judge":
        return rewards.get("embedder")
    return f"judge {(rewards.get('judge') or {}).get('model')}"
