"""A comparison as plain text for a terminal, and as Markdown."""

from collections.abc import Sequence
from typing import Any

from udrl.evaluate.compare.paired import ALL
from udrl.evaluate.compare.thresholds import Verdict
from udrl.evaluate.report.blocks import Block, Bullets, Heading, Paragraph, Span, Table, Text
from udrl.evaluate.report.markdown import number, render

WIDTH = 120  # of the plain table, in columns
NAME = 22  # of a metric
AT_ONCE = 2  # runs beside the base in one plain table
READING = "Brackets hold 95% intervals, paired by intent; better and worse are said where all of the bracket is on that side."
SIGNED = "+z"  # before a format: with its sign, and no minus before what rounds to 0
MARKS = {"better": "*", "worse": "!", "": " "}


def text(document: dict[str, Any]) -> str:
    """Plain tables of at most :data:`WIDTH` columns: every task and metric, each run, its difference to the first."""
    lines = [_run(run) for run in document["runs"]]
    first, *others = (run["label"] for run in document["runs"])
    how = "brackets: 95%, paired by intent; * better, ! worse: the whole bracket is on that side"
    lines += ["", f"policy {document['policy']}; {document['intents']:,} shared intents; {how}"]
    for at in range(0, len(others), AT_ONCE):
        some = others[at : at + AT_ONCE]
        tables = [(title, _rows(document, scope, first, some)) for title, scope in _scopes(document)]
        widths = [max(len(row[i]) for _, rows in tables for row in rows) for i in range(2 + 2 * len(some))]
        for title, rows in tables:
            lines.append("")
            for row in [[_short(title), *rows[0][1:]], *rows[1:]]:
                cells = [cell.ljust(width) for cell, width in zip(row, [NAME, *widths[1:]], strict=True)]
                lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _rows(document: dict[str, Any], scope: dict[str, Any], first: str, others: Sequence[str]) -> list[list[str]]:
    """Cells under a head. Where two runs stand beside the base, there is room for the intervals of differences alone."""
    rows = [["", first, *(head for label in others for head in (label, f"{label} - {first}"))]]
    for name, found in _known(scope):
        form = document["metrics"][name]["form"]
        shown = {label: value if len(others) == 1 else {**value, "low": None} for label, value in found["values"].items()}
        row = [_short(name), _value(shown[first], form)]
        for label in others:
            mark = MARKS[_side(document, name, found["differences"][label])]
            row += [_value(shown[label], form), f"{_value(found['differences'][label], SIGNED + form)} {mark}".rstrip()]
        rows.append(row)
    return rows


def markdown(document: dict[str, Any], verdicts: Sequence[str] = ()) -> str:
    """The same for a file, with all intervals, and the lines of the thresholds."""
    first, *others = (run["label"] for run in document["runs"])
    runs = [[run["label"], run["name"] or "-", Span(run["uri"], "code"), f"{run['intents']:,}"] for run in document["runs"]]
    blocks: list[Block] = [
        Heading(1, f"Comparison of {' and '.join(str(run['name'] or run['label']) for run in document['runs'])}"),
        Table(["", "run", "evaluation", "intents"], runs, left=3),
        Paragraph(f"Policy {document['policy']}; {document['intents']:,} shared intents. {READING}"),
        Bullets(document["warnings"]),
    ]
    if verdicts:
        blocks += [Heading(2, "Thresholds"), Bullets(verdicts)]
    heads = ["metric", first, *(head for label in others for head in (label, f"{label} - {first}"))]
    for title, scope in _scopes(document):
        lines: list[Sequence[Text]] = []
        for name, found in _known(scope):
            form = document["metrics"][name]["form"]
            line: list[Text] = [Span(name, "code"), _value(found["values"][first], form)]
            for label in others:
                side = _side(document, name, found["differences"][label])
                look: list[str | Span] = [" ", Span(side, "bad" if side == "worse" else "good")] if side else []
                line += [_value(found["values"][label], form), [_value(found["differences"][label], SIGNED + form), *look]]
            lines.append(line)
        blocks += [Heading(2, title), Table(heads, lines)]
    return render([block for block in blocks if not isinstance(block, Bullets) or block.items])


def verdict(document: dict[str, Any], found: Verdict) -> str:
    """One line of what a rule says: what, base, candidate, difference, the bound."""
    form = document["metrics"][found.metric]["form"]
    return (
        f"{'holds' if found.holds else 'FAILS'}: {found.metric} ({found.task}), run {found.run}: "
        f"base {number(found.base['value'], form)}, candidate {_value(found.candidate, form)}, "
        f"difference {_value(found.difference, SIGNED + form)}; "
        f"{found.bound} {found.limit:g}{' (certain)' if found.certain else ''}"
    )


def _scopes(document: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """All tasks together, then each; where there is one task, it is all."""
    named = {name: scope for name, scope in document["scopes"].items() if name != ALL}
    if len(named) == 1:
        return [(next(iter(named)), document["scopes"][ALL])]
    return [("all tasks", document["scopes"][ALL]), *named.items()]


def _known(scope: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The metrics that at least one run has."""
    return [(name, found) for name, found in scope.items() if any(v["value"] is not None for v in found["values"].values())]


def _value(interval: dict[str, Any], form: str) -> str:
    """With its interval where there is one, even without width: no doubt found is not the same as none looked for."""
    value, low, high = (number(interval[key], form) for key in ("value", "low", "high"))
    return value if interval["low"] is None else f"{value} [{low}, {high}]"


def _side(document: dict[str, Any], name: str, difference: dict[str, Any]) -> str:
    """``better`` or ``worse`` where the whole interval says so, else nothing."""
    if difference["low"] is None or difference["low"] <= 0 <= difference["high"]:
        return ""
    higher = difference["low"] > 0
    return "better" if higher == (document["metrics"][name]["better"] == "higher") else "worse"


def _short(name: str) -> str:
    return name if len(name) <= NAME else f"{name[: NAME - 1]}~"


def _run(told: dict[str, Any]) -> str:
    """A run's line; of a long URI the end, which tells runs apart."""
    before, after = f"{told['label']}  {told['name'] or '-'}  ", f"  ({told['intents']:,} intents)"
    room = max(10, WIDTH - len(before) - len(after))
    uri = told["uri"]
    return f"{before}{uri if len(uri) <= room else f'~{uri[1 - room :]}'}{after}"[:WIDTH]
