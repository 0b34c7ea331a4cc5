"""Write the report of an evaluation: ``report.html`` and ``report.md``, which say the same, and the data behind them."""

import textwrap

import pyarrow as pa

from udrl import storage
from udrl.evaluate.document import EvaluationDocument
from udrl.evaluate.report import plots, render
from udrl.evaluate.report.selection import validated_judges
from udrl.run import EvaluationPaths

WIDTH = 110  # columns of the job's last lines
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
    """Return the claim and the targets as plain text of at most :data:`WIDTH` columns."""
    lines = [f"claim: {VERDICTS[document.claim.met]}. {document.claim.text}"]
    lines += [f"{VERDICTS[target.met]:<10} {target.name}: {target.measured}" for target in document.targets]
    return "\n".join(piece for line in lines for piece in textwrap.wrap(line, WIDTH, subsequent_indent=" " * 11))
