"""A comparison as plain text for a terminal, and as Markdown."""

from collections.abc import Sequence

from udrl.evaluate.compare.comparison import ALL, ComparedRun, Comparison, MetricComparison, Verdict
from udrl.evaluate.document import Interval
from udrl.evaluate.report.formatting import number
from udrl.evaluate.report.markdown import escape_markdown
from udrl.tables import markdown_table, text_table

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
