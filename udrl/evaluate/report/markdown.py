"""Blocks as Markdown; and numbers and flags as the report writes them, with a dash for what is not known."""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from udrl.evaluate.report.blocks import Block, Bullets, Code, Details, Heading, Paragraph, Plot, Span, Table, Text, pieces

NOTHING = "Nothing was measured."


def absent(value: float | None) -> bool:
    return value is None or math.isnan(value)


def number(value: float | None, form: str = ".2f") -> str:
    return "-" if value is None or math.isnan(value) else format(value, form)


def percent(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{100 * value:.0f}%"


def span(interval: dict[str, Any] | None, show: Callable[[float | None], str] = number) -> str:
    """``0.41 [0.38, 0.44]``; the value alone where the interval is missing or has no width."""
    if not interval or absent(interval["value"]):
        return "-"
    if absent(interval.get("low")) or absent(interval.get("high")) or interval["low"] == interval["high"]:
        return show(interval["value"])
    return f"{show(interval['value'])} [{show(interval['low'])}, {show(interval['high'])}]"


def yes(flag: bool | None) -> str:
    return "-" if flag is None else "yes" if flag else "no"


def count(parameters: float | None) -> str:
    if parameters is None or math.isnan(parameters):
        return "-"
    return f"{parameters / 1e9:.1f}B" if parameters >= 1e9 else f"{parameters / 1e6:.1f}M"


def table(heads: Sequence[str], lines: Sequence[Sequence[str]], left: int = 1) -> str:
    """A Markdown table, right-aligned behind its first ``left`` columns; cells must be escaped already."""
    if not lines:
        return f"*{NOTHING}*"
    rows = [heads, ["---" if i < left else "---:" for i in range(len(heads))], *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def escape(text: object) -> str:
    """Any text on one line, with nothing in it that Markdown would read. Figures in brackets, which can't be a link, stay."""
    escaped = re.sub(r"([\\`*_\[\]<>|#~$&])", r"\\\1", " ".join(str(text).split()))
    return re.sub(r"(?<!\\)\\\[([-+.,%\d ]+)\\\](?!\()", r"[\1]", escaped)


def code(name: str) -> str:
    """A name in code style; a bar would end the table cell even there."""
    return f"`{name}`" if name and not re.search(r"[`|\s]", name) else escape(name)


def render(blocks: Sequence[Block]) -> str:
    """The blocks as one Markdown file; plots are PNG files beside it."""
    return "\n\n".join(_block(block) for block in blocks) + "\n"


def _block(block: Block) -> str:
    match block:
        case Heading(level, text):
            return f"{'#' * level} {inline(text)}"
        case Paragraph(text):
            return inline(text)
        case Bullets(items):
            return "\n".join(f"- {inline(item)}" for item in items)
        case Table(heads, lines, caption, left, prose):
            cells = [[inline(cell) for cell in line] for line in lines]
            drawn = table([escape(head) for head in heads], cells, len(heads) if prose else left)
            return f"{escape(caption)}\n\n{drawn}" if caption else drawn
        case Plot(name, read, alt):
            return f"![{escape(alt)}]({name}.png)\n\n*{escape(read)}*"
        case Code(text, language):
            fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
            return f"{fence}{language}\n{text.strip()}\n{fence}"
        case Details(summary, inner):
            return "\n\n".join([f"### {escape(summary)}", *(_block(one) for one in inner)])


def inline(text: Text) -> str:
    """A text on one line, escaped, its spans marked."""
    return "".join(_piece(piece) for piece in pieces(text))


def _piece(piece: str | Span) -> str:
    if isinstance(piece, str):
        return _keeping_ends(piece)
    marks = {"code": "", "soft": "*", "strong": "**", "bad": "**", "good": "", "open": ""}
    mark, told = marks[piece.style], code(piece.text) if piece.style == "code" else escape(piece.text)
    return f"{mark}{told}{mark}" if told else ""


def _keeping_ends(text: str) -> str:
    """Escaped; one space stays at either end where there was one, for the span that follows."""
    inner = escape(text)
    if not inner:
        return " " if text else ""
    return (" " if text[0].isspace() else "") + inner + (" " if text[-1].isspace() else "")
