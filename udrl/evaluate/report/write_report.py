"""Write the report of an evaluation: ``report.html`` and ``report.md``, which say the same, and the data behind them."""

import re
import textwrap

import pyarrow as pa

from udrl import storage
from udrl.evaluate.document import EvaluationDocument
from udrl.evaluate.report import plots, render, tables
from udrl.evaluate.report.selection import validated_judges
from udrl.run import EvaluationPaths
from udrl.text import text_table

WIDTH = 120  # columns of the job's last lines
# Titles of the report's columns by task in a terminal, after the task and the judges.
SHORT_TITLES = ("scorer", "subject", "clean", "within2", "rejected")
VERDICTS = {True: "met", False: "MISSED", None: "open"}
# Files of earlier versions, which would be taken for this report's.
OBSOLETE = ("pairwise.parquet", "relevance.png", "quality_cost.png", "training_loss.png")


def write_report(paths: EvaluationPaths, outputs: pa.Table, document: EvaluationDocument) -> dict[str, str]:
    """Write all files of the report and return their URIs by name.

    ``report.md`` is written last: if it is there, the report is complete. ``outputs`` is a table of
    :data:`udrl.evaluate.outputs.OUTPUTS` with the judges' columns.
    """
    drawings = plots.draw(document, validated_judges(document))
    markdown = render.render_markdown(document, outputs, list(drawings))
    for name in OBSOLETE:
        storage.remove(storage.join(paths.folder, name))
    storage.write_table(paths.outputs, outputs)
    document.save(paths.metrics)
    for name in plots.CAPTIONS:
        if name in drawings:
            storage.write_bytes(paths.plot(name), drawings[name])
        else:
            storage.remove(paths.plot(name))  # of an earlier report
    storage.write_bytes(paths.report_html, render.render_page(markdown, drawings).encode())
    storage.write_bytes(paths.report_markdown, markdown.encode())
    plot_files = {f"{name}.png": paths.plot(name) for name in drawings}
    data = {"outputs.parquet": paths.outputs, "metrics.json": paths.metrics}
    return {**data, **plot_files, "report.html": paths.report_html, "report.md": paths.report_markdown}


def verdict_lines(document: EvaluationDocument) -> str:
    """Return the claim, the table by task and the targets as plain text; running text has at most :data:`WIDTH` columns."""
    claim = f"claim: {VERDICTS[document.claim.met]}. {document.claim.text}"
    targets = [f"{VERDICTS[target.met]:<10} {target.name}: {target.measured}" for target in document.targets]
    return "\n".join([_wrap(claim), task_lines(document), *map(_wrap, targets)])


def task_lines(document: EvaluationDocument) -> str:
    """Return the report's table by task for a terminal: ratios and pairs are student / teacher."""
    columns = tables.task_columns(document)
    n_judges = len(columns) - len(SHORT_TITLES) - 1
    header = ["task", *(column.title.split(":")[0] for column in columns[1 : n_judges + 1]), *SHORT_TITLES]
    rows = [[re.sub(r"[`*\\]", "", column.cell(row)) for column in columns] for row in tables.task_rows(document)]
    return text_table(header, rows)


def _wrap(line: str) -> str:
    return "\n".join(textwrap.wrap(line, WIDTH, subsequent_indent=" " * 11))
