"""The report of an evaluation in one folder: ``report.html`` and ``report.md``, which say the same, and what they rest on."""

import textwrap
from typing import Any

import pyarrow as pa

from udrl import storage
from udrl.evaluate.document import EvaluationDocument
from udrl.evaluate.outputs import STUDENT, TEACHER
from udrl.evaluate.report import content, html, markdown, plots
from udrl.evaluate.report.markdown import count, number, percent, span, yes
from udrl.evaluate.report.reading import at, best_judge, in_order, kind, pointwise, reference, scopes, seconds, signed

WIDTH = 110  # of the short table, in columns
MARKS = {True: "met", False: "MISSED", None: "-"}


def write(
    folder_uri: str, outputs: pa.Table, evaluation: EvaluationDocument, pairwise: pa.Table | None = None
) -> dict[str, str]:
    """Write all files of the report under ``folder_uri``, and return their URIs by name.

    ``report.md`` is written last: if it is there, the report is complete. ``outputs`` is a table of
    :data:`udrl.evaluate.outputs.OUTPUTS` with the judges' columns, ``pairwise`` one of ``PAIRWISE``.
    """
    document = evaluation.model_dump(mode="json")
    drawn = plots.draw(document, [j for j in pointwise(document) if at(document, "judges", j, "validated")])
    blocks = content.blocks(document, outputs, list(drawn))
    tables = {"outputs.parquet": outputs} | ({"pairwise.parquet": pairwise} if pairwise and pairwise.num_rows else {})
    for name, table in tables.items():
        storage.write_table(storage.join(folder_uri, name), table)
    storage.write_json(storage.join(folder_uri, "metrics.json"), document)
    pages = {f"{name}.png": plot.png for name, plot in drawn.items()}
    pages["report.html"] = html.render(blocks, {name: plot.svg for name, plot in drawn.items()}).encode()
    pages["report.md"] = markdown.render(blocks).encode()
    for name, data in pages.items():
        storage.write_bytes(storage.join(folder_uri, name), data)
    names = [*tables, "metrics.json", *pages]
    for name in ("pairwise.parquet", *(f"{plot}.png" for plot in plots.CAPTIONS)):
        if name not in names:  # an earlier report's
            storage.remove(storage.join(folder_uri, name))
    return {name: storage.join(folder_uri, name) for name in names}


def short_table(evaluation: EvaluationDocument) -> str:
    """The evaluation in plain text of at most :data:`WIDTH` columns: the claim, then a line a task, policy, judge, target."""
    document = evaluation.model_dump(mode="json")
    claim = at(document, "claim") or {}
    word = {True: "met", False: "MISSED", None: "open"}[claim.get("met")]
    lines = [f"claim: {word}. {claim.get('text') or ''}", *_tasks(document), *_policies(document)]
    for name, told in (at(document, "judges") or {}).items():
        belief = {True: "believed", False: "NOT BELIEVED", None: "-"}[told.get("validated")]
        aucs = ", ".join(f"{against} {number(auc)}" for against, auc in (told.get("auc") or {}).items())
        lines.append(f"judge {name}: {belief}; AUC {aucs or '-'}")
    lines += [f"{MARKS[t['met']]:<10} {t['name']}: {t['measured']}" for t in at(document, "targets") or ()]
    return "\n".join(piece for line in lines for piece in _wrapped(line))


def _tasks(document: dict[str, Any]) -> list[str]:
    """A line a task under a head, in columns."""
    other, judge = reference(document) or TEACHER, best_judge(document)
    heads = ["task", _cut(other, 7), "student (95%)", "ratio", "within2", "len up", "rew up", "rejected", "judge"]
    rows = [heads]
    for name, scope in scopes(document):
        against = at(scope, "comparisons", other) or {}
        rows.append(
            [
                _cut(name.text, 16),
                number(at(scope, "policies", other, "relevance", "value")),
                span(at(scope, "policies", STUDENT, "relevance")),
                span(at(against, "relevance", "ratio"), percent),
                percent(at(scope, "length", "within_2")),
                yes(at(scope, "length", "rises")) if at(scope, "length", "levels") is not None else "",
                yes(at(scope, "reward", "rises")) if "reward" in scope else "",
                percent(at(scope, "policies", STUDENT, "rejected")),
                signed(at(against, "judges", judge or "", "difference", "value")),
            ]
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(heads))]
    text = [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]) for row in rows
    ]
    return [text[0], "-" * len(text[0]), *text[1:]]


def _policies(document: dict[str, Any]) -> list[str]:
    facts = at(document, "policies") or {}
    return [
        f"{name + ':':<10} {count(told.get('parameters'))} parameters, "
        f"{number(told.get('tokens_per_second'), ',.0f')} tokens/s, "
        f"latency p50 {seconds(told.get('latency_p50'))}, {told.get('model', '-')}"
        for name, told in ((name, facts[name]) for name in in_order(set(facts), facts))
        if kind(name, facts) != "trivial baseline"
    ]


def _wrapped(line: str) -> list[str]:
    """The line as it is where it fits: its columns stay."""
    return [line] if len(line) <= WIDTH else textwrap.wrap(line, WIDTH, subsequent_indent=" " * 11)


def _cut(name: str, most: int) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}~"
