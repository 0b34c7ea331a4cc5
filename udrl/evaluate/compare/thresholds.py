"""Rules on a comparison, for CI: how far a run may be from the base, and what it must reach.

Words are literal: ``max_drop`` bounds how much smaller a number is than the base's, ``max_rise`` how much larger, whichever
way is better. A rule that can't be checked is an error, never a pass.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import yaml
from pydantic import Field, ValidationError, model_validator

from udrl import storage
from udrl.errors import UserError
from udrl.evaluate.compare.paired import ALL
from udrl.recipe import Section, problem_line

DROPS, RISES = ("max_drop", "max_drop_percent"), ("max_rise", "max_rise_percent")
BOUNDS = (*DROPS, *RISES, "min", "max")
ROUNDING = 1e-6  # scores are stored as float32, where 0.40 - 0.38 is 0.0200000107, and still a drop of 0.02


class Rule(Section):
    """Bounds on one metric of one scope."""

    metric: str = Field(description="a name from the comparison's table")
    task: str = ALL
    max_drop: float | None = Field(None, ge=0)
    max_drop_percent: float | None = Field(None, ge=0, description="of the base's size")
    max_rise: float | None = Field(None, ge=0)
    max_rise_percent: float | None = Field(None, ge=0, description="of the base's size")
    min: float | None = None
    max: float | None = None
    certain: bool = Field(False, description="fails only when the whole 95% interval lies beyond the bound")

    @model_validator(mode="after")
    def _bounded(self) -> "Rule":
        if not self.bounds():
            raise ValueError(f"no bound is given; give at least one of {', '.join(BOUNDS)}")
        return self

    def bounds(self) -> dict[str, float]:
        """The bounds that are given, by name."""
        return {name: value for name in BOUNDS if (value := getattr(self, name)) is not None}


class Verdict(NamedTuple):
    """What one bound says of one run; the three measurements are intervals of the comparison."""

    metric: str
    task: str
    run: str
    bound: str
    limit: float
    certain: bool
    base: dict[str, float | None]
    candidate: dict[str, float | None]
    difference: dict[str, float | None]
    holds: bool


def load(uri: str) -> list[Rule]:
    """Read a YAML list of rules.

    Raises:
        UserError: file absent, not YAML, or a rule that is not allowed, a line each.
    """
    try:
        values = yaml.safe_load(storage.read_bytes(uri))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"thresholds {uri}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, list) or not values:
        raise UserError(f"thresholds {uri}: expected a list of rules, such as - {{metric: relevance, max_drop: 0.02}}")
    rules, problems = [], []
    for i, value in enumerate(values, start=1):
        try:
            rules.append(Rule.model_validate(value))
        except ValidationError as error:
            problems += [_problem(f"thresholds {uri}: rule {i}", problem) for problem in error.errors()]
    if problems:
        raise UserError("\n".join(problems))
    return rules


def _problem(origin: str, problem: Any) -> str:
    if problem["type"] == "extra_forbidden":  # problem_line would name the recipe's keys
        return f"{origin}: {problem['loc'][-1]}: unknown key; allowed here: {', '.join(Rule.model_fields)}"
    if problem["type"] == "model_type":
        return f"{origin}: expected keys and values, such as {{metric: relevance, max_drop: 0.02}}; got {problem['input']!r}"
    return problem_line(origin, problem)


def check(rules: Sequence[Rule], document: dict[str, Any]) -> list[Verdict]:
    """Hold every run but the first against the rules.

    Args:
        document: of :func:`udrl.evaluate.compare.comparison.compare`.

    Raises:
        UserError: a rule names what is unknown or was not measured, a line each.
    """
    verdicts, problems = [], []
    for i, rule in enumerate(rules, start=1):
        for run in document["runs"][1:]:
            try:
                verdicts += _check(rule, document, run["label"])
            except UserError as error:
                problems.append(f"rule {i}: {error}")
    if problems:
        raise UserError("\n".join(dict.fromkeys(problems)))
    return verdicts


def _check(rule: Rule, document: dict[str, Any], run: str) -> list[Verdict]:
    if rule.metric not in document["metrics"]:
        reason = document["left_out"].get(rule.metric)
        known = ", ".join(document["metrics"])
        raise UserError(
            f"{rule.metric}: not compared, {reason}" if reason else f"{rule.metric}: unknown metric; known: {known}"
        )
    if rule.task not in document["scopes"]:
        raise UserError(f"task {rule.task}: not in all runs; known: {', '.join(document['scopes'])}")
    found = document["scopes"][rule.task][rule.metric]
    first = document["runs"][0]["label"]
    base, candidate, difference = found["values"][first], found["values"][run], found["differences"][run]
    verdicts = []
    for bound, limit in rule.bounds().items():
        judged = candidate if bound in ("min", "max") else difference
        if judged["value"] is None:
            absent = [label for label in (first, run) if found["values"][label]["value"] is None]
            raise UserError(f"{rule.metric} ({rule.task}): not measured in {', '.join(absent)}")
        if rule.certain and judged["low"] is None:
            raise UserError(f"{rule.metric} ({rule.task}): has no interval, so nothing is certain; leave certain out")
        if bound.endswith("_percent") and not base["value"]:
            absolute = bound.removesuffix("_percent")
            raise UserError(f"{rule.metric} ({rule.task}): the base is 0, of which there are no per cent; use {absolute}")
        most = limit * abs(base["value"]) / 100 if bound.endswith("_percent") else limit
        holds = _beyond(bound, most, judged, rule.certain) <= ROUNDING
        told = (rule.metric, rule.task, run, bound, limit, rule.certain, base, candidate, difference)
        verdicts.append(Verdict(*told, holds))
    return verdicts


def _beyond(bound: str, most: float, judged: dict[str, Any], certain: bool) -> float:
    """How far the measurement lies beyond the bound; where that must be certain, its end that is nearest to the bound."""
    if bound in RISES or bound == "max":
        return (judged["low"] if certain else judged["value"]) - most
    nearest = judged["high"] if certain else judged["value"]
    return most - nearest if bound == "min" else -nearest - most


def doubts(rules: Sequence[Rule], document: dict[str, Any]) -> list[str]:
    """Rules that bound an improvement, which is hardly ever meant."""
    found = []
    for i, rule in enumerate(rules, start=1):
        better = document["metrics"].get(rule.metric, {}).get("better")
        wrong = {"lower": (*DROPS, "min"), "higher": (*RISES, "max")}.get(better, ())
        found += [f"rule {i}: {b} bounds an improvement: {rule.metric} is better {better}" for b in rule.bounds() if b in wrong]
    return found
