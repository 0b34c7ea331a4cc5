"""Write the report of an evaluation: ``report.html`` and ``report.md``, which say the same, and the data behind them."""

import textwrap
from collections.abc import Sequence

import pyarrow as pa

from udrl import storage
from udrl.evaluate.document import EvaluationDocument, Scope
from udrl.evaluate.judges.validation import weakest
from udrl.evaluate.outputs import STUDENT, TEACHER
from udrl.evaluate.report import plots, render
from udrl.evaluate.report.formatting import interval, number, parameters, percent, seconds
from udrl.evaluate.report.selection import order_policies, pointwise_judges, reference_policy, scopes, validated_judges
from udrl.run import EvaluationPaths
from udrl.text import text_table

WIDTH = 110  # columns of the short table
VERDICTS = {True: "met", False: "MISSED", None: "open"}


def write_report(
    paths: EvaluationPaths, outputs: pa.Table, document: EvaluationDocument, pairwise: pa.Table | None = None
) -> dict[str, str]:
    """Write all files of the report and return their URIs by name.

    ``report.md`` is written last: if it is there, the report is complete. ``outputs`` is a table of
    :data:`udrl.evaluate.outputs.OUTPUTS` with the judges' columns, ``pairwise`` one of ``PAIRWISE``.
    """
    drawings = plots.draw(document, validated_judges(document))
    markdown = render.render_markdown(document, outputs, list(drawings))
    files = {"outputs.parquet": paths.outputs}
    storage.write_table(paths.outputs, outputs)
    if pairwise is not None and pairwise.num_rows:
        files["pairwise.parquet"] = paths.pairwise
        storage.write_table(paths.pairwise, pairwise)
    else:
        storage.remove(paths.pairwise)  # of an earlier report
    files["metrics.json"] = paths.metrics
    document.save(paths.metrics)
    for name in plots.CAPTIONS:
        if name in drawings:
            files[f"{name}.png"] = paths.plot(name)
            storage.write_bytes(paths.plot(name), drawings[name].png)
        else:
            storage.remove(paths.plot(name))  # of an earlier report
    files |= {"report.html": paths.report_html, "report.md": paths.report_markdown}
    page = render.render_page(markdown, {name: drawing.svg for name, drawing in drawings.items()})
    storage.write_bytes(paths.report_html, page.encode())
    storage.write_bytes(paths.report_markdown, markdown.encode())
    return files


def short_table(document: EvaluationDocument) -> str:
    """Return the evaluation as plain text of at most :data:`WIDTH` columns: claim, tasks, policies, judges, targets."""
    verdict = VERDICTS[document.claim.met]
    lines = [f"claim: {verdict}. {document.claim.text}", *_task_table(document).splitlines(), *_policy_lines(document)]
    for name, judge in document.judges.items():
        kind, area = weakest(judge.gold or judge.auc)
        worst = f"weakest control {kind}, AUC {interval(area)}" if kind else "no control was measured"
        relation = "" if judge.relation == "independent" else f", not independent ({judge.relation})"
        lines.append(f"judge {name}: {'validated' if judge.validated else 'NOT VALIDATED'}{relation}; {worst}")
    lines += [f"{VERDICTS[target.met]:<10} {target.name}: {target.measured}" for target in document.targets]
    return "\n".join(piece for line in lines for piece in _wrap(line))


def _task_table(document: EvaluationDocument) -> str:
    """The student over the reference policy, by the scorer and by the best judges; then figures of the student."""
    reference, judges = reference_policy(document) or TEACHER, list(pointwise_judges(document))[:2]
    header = ["task", "relevance (scorer)", *(_shorten(judge, 16) for judge in judges)]
    header += ["subject", "clean", "within2", "rejected"]
    return text_table(header, [_task_row(name or "all tasks", scope, reference, judges) for name, scope in scopes(document)])


def _task_row(name: str, scope: Scope, reference: str, judges: Sequence[str]) -> list[str]:
    student = scope.policies.get(STUDENT)
    comparison = scope.comparisons.get(reference)
    ratios = [comparison.judges[judge].ratio if comparison and judge in comparison.judges else None for judge in judges]
    return [
        _shorten(name, 16),
        interval(comparison.relevance.ratio if comparison else None, percent),
        *(interval(ratio, percent) for ratio in ratios),
        percent(student.coverage.value if student else None),
        percent(student.clean.value if student else None),
        percent(scope.length.within_2),
        percent(student.rejected if student else None),
    ]


def _policy_lines(document: EvaluationDocument) -> list[str]:
    return [
        f"{name + ':':<10} {parameters(profile.parameters)} parameters, {number(profile.tokens_per_second, ',.0f')} tokens/s,"
        f" latency p50 {seconds(profile.latency_p50)}, {profile.model}"
        for name in order_policies(document.policies, document.policies)
        if (profile := document.policies[name]).kind != "trivial baseline"
    ]


def _wrap(line: str) -> list[str]:
    """Wrap a line that is too long; one that fits keeps its columns."""
    return [line] if len(line) <= WIDTH else textwrap.wrap(line, WIDTH, subsequent_indent=" " * 11)


def _shorten(name: str, length: int) -> str:
    return name if len(name) <= length else f"{name[: length - 1]}~"
