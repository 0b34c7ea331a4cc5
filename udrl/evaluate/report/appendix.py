"""The end of the report: what the student can be told, how everyone was asked, the recipe, the machine."""

from collections.abc import Sequence
from typing import Any

from udrl.commands import ANY
from udrl.evaluate.report.blocks import Block, Code, Details, Heading, Span, Table, Text
from udrl.evaluate.report.markdown import number
from udrl.evaluate.report.reading import at, in_order, seconds


def appendix(document: dict[str, Any]) -> list[Block]:
    """Folded blocks under one heading; only those that there is something for."""
    found: list[Block] = []
    if commands := at(document, "commands"):
        found.append(Details("The student's commands", [_commands(commands)]))
    if facts := at(document, "policies"):
        found.append(Details("How each policy was asked", [_asked(facts)]))
    if took := at(document, "seconds"):
        lines = [[phase, seconds(value)] for phase, value in took.items()]
        found.append(Details("What took the time", [Table(["phase", "seconds"], lines)]))
    if environment := at(document, "environment"):
        lines = [[str(key), _value(value)] for key, value in environment.items()]
        found.append(Details("Environment", [Table(["what", "found"], lines, left=2)]))
    if recipe := at(document, "recipe"):
        found.append(Details("Recipe", [Code(recipe, "yaml")]))
    return [Heading(2, "Settings"), *found] if found else []


def _commands(commands: dict[str, Any]) -> Table:
    lines: list[Sequence[Text]] = [
        [
            Span(name, "code"),
            _or_any(task.get("default_words")),
            _or_any(task.get("default_reward")),
            " / ".join(str(words) for words in task.get("words") or ()) or "-",
            " ".join(number(value) for value in task.get("achieved_relevance") or ()) or "-",
        ]
        for name, task in (commands.get("tasks") or {}).items()
    ]
    heads = ["task", "default words", "default bin", "words in training: p5 / median / p95", "training relevance by bin"]
    caption = f"{commands.get('reward_bins', '-')} reward bins, ranked within the {commands.get('rank_within', '-')}; "
    return Table(heads, lines, f"{caption}up to {commands.get('max_words', '-')} words.")


def _asked(facts: dict[str, Any]) -> Table:
    lines = [
        [
            name,
            str(at(facts, name, "kind") or "-"),
            str(at(facts, name, "model") or "-"),
            str(at(facts, name, "revision") or "-"),
            _value(at(facts, name, "sampling") or {}),
            "-" if at(facts, name, "seed") is None else str(facts[name]["seed"]),
        ]
        for name in in_order(set(facts), facts)
    ]
    return Table(["policy", "kind", "model", "revision", "sampling", "seed"], lines, left=6)


def _or_any(value: int | None) -> str:
    return "-" if value is None else "any" if value == ANY else str(value)


def _value(value: Any) -> str:
    """Anything of JSON on one line."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_value(inner)}" for key, inner in value.items() if inner is not None) or "-"
    if isinstance(value, list):
        return ", ".join(_value(inner) for inner in value) or "-"
    return "-" if value is None else str(value)
