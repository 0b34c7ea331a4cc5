"""Render the report: a Jinja2 template makes the Markdown, markdown-it-py makes the page from it.

The page is one file without server, script or font, readable on a phone, in dark mode and in print. It may load nothing and run
nothing, even if a prompt in it held markup; the texts of a run are escaped in the Markdown already.
"""

import re
from base64 import b64encode
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import pyarrow as pa

from udrl.evaluate.document import EvaluationDocument
from udrl.evaluate.formatting import code, count, escape_markdown, parameters, percent
from udrl.evaluate.judges.validation import MIN_AUC
from udrl.evaluate.metrics.claim import MIN_INTENTS, deciding_judges, rivals
from udrl.evaluate.metrics.intervals import GROUPS
from udrl.evaluate.outputs import STUDENT, TEACHER
from udrl.evaluate.report import plots, tables
from udrl.evaluate.report.examples import example_tables
from udrl.evaluate.report.selection import reference_policy, validated_judges
from udrl.evaluate.speed import REPEATS

# The page may load nothing; style attributes are those of the tables' cells.
CONTENT_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
VERDICT_CLASSES = {
    **dict.fromkeys(("met", "validated", "Yes."), "good"),
    **dict.fromkeys(("missed", "not validated", "rejected", "No."), "bad"),
    **dict.fromkeys(("open", "Open."), "open"),
}
# HTML must not hold these control characters.
_FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufdd0-\ufdef\ufffe\uffff]")


def render_markdown(document: EvaluationDocument, outputs: pa.Table, plot_names: Sequence[str]) -> str:
    """Return the report as one Markdown file; plots are PNG files next to it."""
    names = [name for name in rivals(list(document.overall.policies)) if name in document.overall.comparisons]
    labels = ["its teacher" if name == TEACHER else name for name in names] or ["its teacher"]
    best = next(iter(validated_judges(document)), None)
    fences = max((len(run) for run in re.findall("`+", document.recipe)), default=0)
    text = (
        template_environment()
        .get_template("report.md.j2")
        .render(
            document=document,
            t=tables,
            plots=plot_names,
            captions=plots.CAPTIONS,
            alts=plots.ALTS,
            student=document.policies.get(STUDENT),
            rivals=" and ".join(labels),
            deciding=deciding_judges(document.judges)[:2],
            reference=reference_policy(document),
            best=best,
            swept=any(task.length.levels or task.reach.levels or task.reward.bins for task in document.tasks.values()),
            examples=example_tables(document, outputs, best),
            min_intents=MIN_INTENTS,
            min_auc=MIN_AUC,
            groups=GROUPS,
            repeats=REPEATS,
            fence="`" * max(3, 1 + fences),
        )
    )
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def render_page(markdown: str, plots: Mapping[str, bytes]) -> str:
    """Return the Markdown of :func:`render_markdown` as a whole page; ``plots`` maps each plot to its PNG file."""
    from markdown_it import MarkdownIt

    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    html = parser.render(_FORBIDDEN.sub("\ufffd", markdown))
    # All tags are the parser's: it escapes those that a text holds.
    html = _fold_appendix(html)
    html = re.sub(r"<table>\n<thead>\n<tr>\n<th[^>]*>(.*?)</th>", _scroll, html).replace("</table>", "</table></div>")
    html = html.replace("<th>", '<th scope="col">').replace("<th style", '<th scope="col" style')
    html = re.sub(r"<strong>(.*?)</strong>", _color_verdict, html)
    for name, png in plots.items():
        html = html.replace(f'<img src="{name}.png"', f'<img src="data:image/png;base64,{b64encode(png).decode()}"')
    title = re.sub(r"<[^>]+>", "", re.findall(r"<h1>(.*?)</h1>", html)[0])
    page = template_environment(autoescape=True).get_template("page.html.j2")
    return page.render(policy=CONTENT_POLICY, title=title, body=html) + "\n"


def _fold_appendix(html: str) -> str:
    """Make each part of the appendix one that the reader unfolds."""
    front, heading, appendix = html.partition(">Appendix</h2>")
    lead, *parts = re.split(r"<h3>(.*?)</h3>", appendix)
    folded = [
        f"<details><summary>{title}</summary>{body}</details>\n" for title, body in zip(parts[::2], parts[1::2], strict=True)
    ]
    return "".join([front, heading, lead, *folded])


def _scroll(table: re.Match[str]) -> str:
    """Put a table into a box that scrolls; it must be reachable by keyboard, and then it needs a name."""
    label = re.sub(r"<[^>]+>", "", table[1])
    return f'<div class="scroll" role="region" aria-label="{label}" tabindex="0">{table[0]}'


def _color_verdict(strong: re.Match[str]) -> str:
    name = VERDICT_CLASSES.get(strong[1])
    return f'<strong class="{name}">{strong[1]}</strong>' if name else strong[0]


@cache
def template_environment(autoescape: bool = False) -> Any:
    """A misspelled name in a template is an error, not an empty text."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("udrl.evaluate", "report")
    environment = Environment(
        loader=loader, autoescape=autoescape, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"md": escape_markdown, "code": code, "count": count}
    environment.globals |= {"percent": percent, "parameters": parameters}
    return environment
