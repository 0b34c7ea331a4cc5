"""Render the report: a Jinja2 template makes the Markdown, markdown-it-py makes the page from it.

The page is one file without server, script or font, readable on a phone, in dark mode and in print. It may load nothing and run
nothing, even if a prompt in it held markup; the texts of a run are escaped in the Markdown already.
"""

import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import pyarrow as pa

from udrl.evaluate.document import EvaluationDocument
from udrl.evaluate.judges.validation import MIN_AUC
from udrl.evaluate.metrics.claim import MIN_INTENTS, deciding_judges, rivals
from udrl.evaluate.metrics.intervals import GROUPS
from udrl.evaluate.outputs import STUDENT, TEACHER
from udrl.evaluate.report import plots, tables
from udrl.evaluate.report.formatting import DASH, code, count, escape_markdown, parameters, percent, seconds
from udrl.evaluate.report.selection import best_judge, pairwise_judges, reference_policy
from udrl.evaluate.speed import REPEATS

# The page may load nothing; style attributes are those of the plots.
CONTENT_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
VERDICT_CLASSES = {
    **dict.fromkeys(("met", "validated", "Yes."), "good"),
    **dict.fromkeys(("missed", "not validated", "rejected", "No."), "bad"),
    **dict.fromkeys(("open", "Open."), "open"),
}
LONG = 40  # characters of a cell that may wrap; shorter ones stay on one line
APPENDIX = "Appendix"  # the parts of this section are folded
# HTML must not hold these control characters.
_FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufdd0-\ufdef\ufffe\uffff]")


def render_markdown(document: EvaluationDocument, outputs: pa.Table, plot_names: Sequence[str]) -> str:
    """Return the report as one Markdown file; plots are PNG files next to it."""
    names = [name for name in rivals(list(document.overall.policies)) if name in document.overall.comparisons]
    labels = ["its teacher" if name == TEACHER else name for name in names] or ["its teacher"]
    environment = document.environment
    packages = ", ".join(f"{name} {version}" for name, version in environment.packages.items())
    best = best_judge(document)
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
            pairwise=pairwise_judges(document),
            swept=any(task.length.levels or task.reach.levels or task.reward.levels for task in document.tasks.values()),
            examples=tables.example_tables(document, outputs, best),
            min_intents=MIN_INTENTS,
            min_auc=MIN_AUC,
            groups=GROUPS,
            repeats=REPEATS,
            environment=[
                ("python", environment.python or DASH),
                ("cores", str(environment.cores)),
                ("machine", environment.machine),
                ("packages", packages or DASH),
            ],
            phases=[(f"time: {phase}", seconds(value)) for phase, value in document.seconds.items()],
            fence="`" * max(3, 1 + fences),
        )
    )
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def render_page(markdown: str, drawings: Mapping[str, str]) -> str:
    """Return the Markdown of :func:`render_markdown` as a whole page; ``drawings`` maps each plot to its SVG element."""
    parser = _parser(drawings)
    state: dict[str, Any] = {}
    html = parser.render(_FORBIDDEN.sub("\ufffd", markdown), state)
    if state.get("open"):
        html += "</details>\n"
    headings = re.findall(r'<h2 id="([^"]+)">(.*?)</h2>', html)
    head, *rest = html.partition("<h2")
    page = template_environment(autoescape=True).get_template("page.html.j2")
    title = re.sub(r"<[^>]+>", "", re.findall(r"<h1[^>]*>(.*?)</h1>", html)[0])
    return page.render(policy=CONTENT_POLICY, title=title, head=head, contents=headings, body="".join(rest)) + "\n"


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


def _parser(drawings: Mapping[str, str]) -> Any:
    """Return a Markdown parser with the page's renderings of headings, tables, verdicts and plots."""
    from markdown_it import MarkdownIt
    from markdown_it.common.utils import escapeHtml

    parser: Any = MarkdownIt("commonmark", {"html": False}).enable("table")
    rules = parser.renderer.rules
    plain = parser.renderer.renderToken

    def heading_open(tokens: Any, i: int, options: Any, env: Any) -> str:
        level, text = tokens[i].tag, tokens[i + 1].content
        closing = "</details>\n" if env.pop("open", False) and level in ("h2", "h3") else ""
        if level == "h2":
            env["folds"] = text == APPENDIX
        anchor = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
        number = env.setdefault("anchors", {}).setdefault(anchor, 0)
        env["anchors"][anchor] = number + 1
        identity = f"{anchor}-{number}" if number else anchor
        if level == "h3" and env.get("folds"):
            env["open"] = True
            return f'{closing}<details><summary id="{identity}">'
        return f'{closing}<{level} id="{identity}">'

    def heading_close(tokens: Any, i: int, options: Any, env: Any) -> str:
        return "</summary>\n" if tokens[i].tag == "h3" and env.get("folds") else f"</{tokens[i].tag}>\n"

    def table_open(tokens: Any, i: int, options: Any, env: Any) -> str:
        # A box that scrolls must be reachable by keyboard, and then it needs a name.
        label = next(token.content for token in tokens[i:] if token.type == "inline")
        return f'<div class="scroll" role="region" aria-label="{escapeHtml(label)}" tabindex="0"><table>\n'

    def cell_open(tokens: Any, i: int, options: Any, env: Any) -> str:
        token = tokens[i]
        numeric = "right" in str(token.attrGet("style"))
        names = [*([] if numeric else ["word"]), *(["long"] if len(tokens[i + 1].content) > LONG else [])]
        scope = ' scope="col"' if token.tag == "th" else ""
        return f"<{token.tag}{scope}" + (f' class="{" ".join(names)}">' if names else ">")

    def strong_open(tokens: Any, i: int, options: Any, env: Any) -> str:
        name = VERDICT_CLASSES.get(tokens[i + 1].content)
        return f'<strong class="{name}">' if name else "<strong>"

    def image(tokens: Any, i: int, options: Any, env: Any) -> str:
        svg = drawings.get(str(tokens[i].attrGet("src")).removesuffix(".png"), "")
        label = escapeHtml(tokens[i].content)
        return svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)

    def paragraph_open(tokens: Any, i: int, options: Any, env: Any) -> str:
        env["figure"] = [child.type for child in tokens[i + 1].children or []] == ["image"]
        return "<figure>\n<div>" if env["figure"] else plain(tokens, i, options, env)

    def paragraph_close(tokens: Any, i: int, options: Any, env: Any) -> str:
        return "</div></figure>\n" if env.get("figure") else plain(tokens, i, options, env)

    rules.update(
        heading_open=heading_open,
        heading_close=heading_close,
        table_open=table_open,
        table_close=lambda *_: "</table></div>\n",
        th_open=cell_open,
        td_open=cell_open,
        strong_open=strong_open,
        image=image,
        paragraph_open=paragraph_open,
        paragraph_close=paragraph_close,
    )
    return parser
