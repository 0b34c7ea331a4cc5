"""Loads finished evaluations, and finds the parts of them that can be compared.

Runs are compared on the tasks and intents that all of them have. A metric that would compare unlike with unlike (a judge with
another model, another scorer of relevance) is left out with the reason; other differences become warnings.
"""

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import yaml

from udrl import storage
from udrl.errors import UserError
from udrl.evaluate.document import EvaluationDocument, JudgeProfile
from udrl.evaluate.outputs import JUDGE, OUTPUTS, Columns, columns, select
from udrl.run import EvaluationPaths, Run

FOLDER = "evaluation"  # the default of evaluate.folder
MAX_EXAMPLES = 3  # in a warning
BY_RELEVANCE = ("relevance", "reward.spearman", "reward.difference")  # metrics that depend on the scorer of relevance


@dataclass(frozen=True)
class EvaluatedRun:
    """A finished evaluation. ``intents`` maps ids to texts."""

    label: str  # A, B, ...
    uri: str
    document: EvaluationDocument
    outputs: Columns
    intents: dict[int, str]


@dataclass
class Comparability:
    """The parts of some runs that can be compared."""

    outputs: dict[str, Columns]  # by label: rows of one policy, of shared tasks and intents
    judges: list[str]  # pointwise judges that all runs asked in the same way
    left_out: dict[str, str]  # metric -> reason
    warnings: list[str] = field(default_factory=list)


def load_runs(uris: Sequence[str]) -> list[EvaluatedRun]:
    """Load evaluations by the storage of their run or by their own folder, and label them A, B, ...

    Raises:
        UserError: a finished evaluation is missing or can't be read.
    """
    if len(uris) > len(string.ascii_uppercase):
        raise UserError(f"{len(uris)} runs: at most {len(string.ascii_uppercase)} can be compared at once")
    return [_load(uri, label) for uri, label in zip(uris, string.ascii_uppercase, strict=False)]


def _load(uri: str, label: str) -> EvaluatedRun:
    paths = next(
        (paths for paths in (EvaluationPaths(uri), Run(uri).evaluation(FOLDER)) if storage.exists(paths.metrics)), None
    )
    if paths is None:
        raise UserError(f"{uri}: no finished evaluation (metrics.json); run jobs.evaluate, or name its evaluate.folder")
    if not storage.exists(paths.outputs):
        raise UserError(f"{paths.folder}: no outputs.parquet next to metrics.json; run jobs.evaluate again")
    document = EvaluationDocument.load(paths.metrics)
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
    """Find the outputs, judges and metrics that can be compared.

    Raises:
        UserError: ``policy`` has no outputs in one of the runs, or the runs share no task or intent.
    """
    for run in runs:
        if policy not in run.outputs["policy"]:
            names = ", ".join(sorted(set(run.outputs["policy"]))) or "none"
            raise UserError(f"{run.uri}: no outputs of policy {policy!r}; policies with outputs: {names}")
    outputs = {run.label: select(run.outputs, run.outputs["policy"] == policy) for run in runs}
    texts = {intent_id: text for run in runs for intent_id, text in run.intents.items()}
    outputs, task_warnings = _keep_shared(outputs, "task", "tasks", {}, "tasks")
    remedy = "evaluate.source, or the same episodes_from and seed"
    outputs, intent_warnings = _keep_shared(outputs, "intent_id", "intents", texts, remedy)
    parts = Comparability(outputs, [], {}, [*task_warnings, *intent_warnings])
    _compare_judges(runs, parts)
    _compare_scorers(runs, parts)
    _compare_commands(parts)
    if len({(run.document.environment.machine, run.document.environment.cores) for run in runs}) > 1:
        parts.warnings.append("tokens_per_second, latency_p50, latency_p95: not measured on the same machine")
    return parts


def _keep_shared(
    outputs: dict[str, Columns], column: str, label: str, texts: Mapping[int, str], remedy: str
) -> tuple[dict[str, Columns], list[str]]:
    """Keep the rows whose value of ``column`` all runs have, and return a warning for each run that has more."""
    values = {run: set(rows[column].tolist()) for run, rows in outputs.items()}
    shared = set.intersection(*values.values())
    if not shared:
        counts = ", ".join(f"{run} has {len(own)}" for run, own in values.items())
        raise UserError(f"no common {label} ({counts}); evaluate the runs with the same {remedy}")
    warnings = []
    for run, own in values.items():
        if extra := sorted(own - shared):
            examples = [repr(texts.get(value, value)) for value in extra[:MAX_EXAMPLES]]
            examples += ["..."] if len(extra) > MAX_EXAMPLES else []
            warnings.append(f"{label}: {len(extra)} of {run} left out, not in all runs: {', '.join(examples)}")
    return {run: select(rows, np.isin(rows[column], sorted(shared))) for run, rows in outputs.items()}, warnings


def _compare_judges(runs: Sequence[EvaluatedRun], parts: Comparability) -> None:
    for name in dict.fromkeys(name for run in runs for name in run.document.judges):
        profiles = {run.label: run.document.judges[name] for run in runs if name in run.document.judges}
        if all(profile.kind == "pairwise" for profile in profiles.values()):
            parts.left_out[f"judge.{name}"] = "it compares the policies of one evaluation"
        elif reason := _mismatch(name, profiles, runs):
            parts.left_out[f"judge.{name}"] = reason
            parts.warnings.append(f"judge.{name}: left out, {reason}")
        else:
            parts.judges.append(name)
            doubted = [label for label, profile in profiles.items() if not profile.validated]
            if doubted:
                parts.warnings.append(f"judge.{name}: not validated on the controls in {', '.join(doubted)}; do not rely on it")


def _mismatch(name: str, profiles: Mapping[str, JudgeProfile], runs: Sequence[EvaluatedRun]) -> str:
    """Return the reason why a judge's scores can't be compared; empty if they can."""
    missing = [run.label for run in runs if run.label not in profiles or JUDGE + name not in run.outputs]
    if missing:
        return f"no scores of it in {', '.join(missing)}"
    models = {label: f"{profile.kind} by {profile.model}" for label, profile in profiles.items()}
    if len(set(models.values())) > 1:
        return f"not the same judge: {', '.join(f'{label} {model}' for label, model in models.items())}"
    return ""


def _compare_scorers(runs: Sequence[EvaluatedRun], parts: Comparability) -> None:
    """Leave relevance out, and the metrics that depend on it, if different scorers made it."""
    scorers = {run.label: scorer for run in runs if (scorer := _scorer(yaml.safe_load(run.document.recipe)))}
    if len(set(scorers.values())) > 1:
        reason = f"not the same scorer: {', '.join(f'{label} {scorer}' for label, scorer in scorers.items())}"
        parts.warnings.append(f"{', '.join(BY_RELEVANCE)}: left out, {reason}")
        parts.left_out |= dict.fromkeys(BY_RELEVANCE, reason)


def _scorer(recipe: Any) -> str | None:
    """Return the scorer of relevance in a recipe of any version, None if it is unknown."""
    rewards = recipe.get("rewards") if isinstance(recipe, dict) else None
    if not isinstance(rewards, dict):
        return None
    if rewards.get("relevance") != "judge":
        return rewards.get("embedder")
    return f"judge {(rewards.get('judge') or {}).get('model')}"


def _compare_commands(parts: Comparability) -> None:
    """Warn if the sweeps have different commands, as their errors answer different questions."""
    for probe, column, remedy in (
        ("length", "command_words", "set evaluate.lengths in both"),
        ("reward", "command_reward", "train both with the same commands.reward_bins"),
    ):
        commands = []
        for rows in parts.outputs.values():
            swept = select(rows, (rows["probe"] == probe) & (rows[column] >= 0))
            commands.append(set(zip(swept["task"].tolist(), swept[column].tolist(), strict=True)))
        measured = [own for own in commands if own]
        tasks = sorted({task for own in measured for task, _ in own ^ measured[0]})
        if tasks:
            parts.warnings.append(f"{probe}.*: the {probe}s that were commanded differ in {', '.join(tasks)}; {remedy}")
