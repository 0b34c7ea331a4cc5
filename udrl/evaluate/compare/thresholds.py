"""Rules on a comparison, for CI: how far a run may be from the base, and the values that it must reach.

Bounds are literal: ``max_drop`` bounds how much smaller a number is than the base's, ``max_rise`` how much larger, in
which direction the metric improves. A rule that can't be checked is an error, never a pass.
"""

from collections.abc import Sequence
from typing import Any

import yaml
from pydantic import Field, ValidationError, model_validator

from udrl import storage
from udrl.errors import UserError
from udrl.evaluate.compare.comparison import ALL, Comparison, Verdict, show_difference, show_value
from udrl.evaluate.document import Interval
from udrl.recipe import Section, problem_line

BOUNDS = ("max_drop", "max_rise", "min", "max")
ROUNDING = 1e-6  # scores are stored as float32, in which 0.40 - 0.38 is 0.0200000107, which still is a drop of 0.02


class Rule(Section):
    """Bounds on one metric of one scope."""

    metric: str = Field(description="a name from the comparison's table")
    task: str = ALL
    max_drop: float | None = Field(None, ge=0)
    max_rise: float | None = Field(None, ge=0)
    min: float | None = None
    max: float | None = None
    certain: bool = Field(False, description="fails only when the whole 95% interval lies beyond the bound")

    @model_validator(mode="after")
    def _require_a_bound(self) -> "Rule":
        if not self.bounds():
            raise ValueError(f"no bound; set at least one of {', '.join(BOUNDS)}")
        return self

    def bounds(self) -> dict[str, float]:
        return {name: value for name in BOUNDS if (value := getattr(self, name)) is not None}


def load_rules(uri: str) -> list[Rule]:
    """Read a YAML list of rules.

    Raises:
        UserError: the file is absent or not YAML, or a rule is not allowed; one line per problem.
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


def check(rules: Sequence[Rule], comparison: Comparison) -> list[Verdict]:
    """Check every run except the first against the rules.

    Raises:
        UserError: a rule names an unknown metric or task, or one that was not measured; one line per problem.
    """
    verdicts, problems = [], []
    for i, rule in enumerate(rules, start=1):
        for run in comparison.candidates:
            try:
                verdicts += _check(rule, comparison, run)
            except UserError as error:
                problems.append(f"rule {i}: {error}")
    if problems:
        raise UserError("\n".join(dict.fromkeys(problems)))
    return verdicts


def _check(rule: Rule, comparison: Comparison, run: str) -> list[Verdict]:
    if rule.metric in comparison.left_out:
        raise UserError(f"{rule.metric}: not compared, {comparison.left_out[rule.metric]}")
    if rule.metric not in comparison.scopes[ALL]:
        raise UserError(f"{rule.metric}: unknown metric; known: {', '.join(comparison.scopes[ALL])}")
    if rule.task not in comparison.scopes:
        raise UserError(f"task {rule.task}: not in all runs; known: {', '.join(comparison.scopes)}")
    measured = comparison.scopes[rule.task][rule.metric]
    base, candidate, difference = measured.values[comparison.base], measured.values[run], measured.differences[run]
    verdicts = []
    for bound, limit in rule.bounds().items():
        interval = candidate if bound in ("min", "max") else difference
        if interval.value is None:
            missing = [label for label in (comparison.base, run) if measured.values[label].value is None]
            raise UserError(f"{rule.metric} ({rule.task}): not measured in {', '.join(missing)}")
        holds = excess_over(bound, limit, interval, rule.certain) <= ROUNDING
        line = (
            f"{'holds' if holds else 'FAILS'}: {rule.metric} ({rule.task}), run {run}: base {show_value(base)}, "
            f"candidate {show_value(candidate)}, difference {show_difference(difference)}; "
            f"{bound} {limit:g}{' (certain)' if rule.certain else ''}"
        )
        verdicts.append(Verdict(line=line, holds=holds))
    return verdicts


def excess_over(bound: str, limit: float, interval: Interval, certain: bool) -> float:
    """Return how far a measurement lies beyond a bound; if that must be certain, its end that is nearest to the bound."""
    value, low, high = interval.value, interval.low, interval.high
    assert value is not None
    if bound in ("max_rise", "max"):
        return (low if certain and low is not None else value) - limit
    nearest = high if certain and high is not None else value
    return limit - nearest if bound == "min" else -nearest - limit
