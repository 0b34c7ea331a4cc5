"""Render blocks as Markdown."""

import re
from collections.abc import Sequence

from udrl.evaluate.report.blocks import Block, Bullets, Code, Details, Heading, Paragraph, Plot, Span, Table, Text, pieces
from udrl.text import markdown_table

NOTHING = "Nothing was measured."


def escape_markdown(text: object) -> str:
    """Return a text on one line in which Markdown reads no markup; numbers in brackets, which can't be a link, stay."""
    escaped = re.sub(r"([\\`*_\[\]<>|#~$&])", r"\\\1", " ".join(str(text).split()))
    return re.sub(r"(?<!\\)\\\[([-+.,%\d ]+)\\\](?!\()", r"[\1]", escaped)


def code(name: str) -> str:
    """Return a name in code style; a bar would end the table cell even there."""
    return f"`{name}`" if name and not re.search(r"[`|\s]", name) else escape_markdown(name)


def render_markdown(blocks: Sequence[Block]) -> str:
    """Return the blocks as one Markdown file; plots are PNG files next to it."""
    return "\n\n".join(_block(block) for block in blocks) + "\n"


def _block(block: Block) -> str:
    match block:
        case Heading(level, text):
            return f"{'#' * level} {inline_markdown(text)}"
        case Paragraph(text):
            return inline_markdown(text)
        case Bullets(items):
            return "\n".join(f"- {inline_markdown(item)}" for item in items)
        case Table(heads, lines, caption, left, prose):
            cells = [[inline_markdown(cell) for cell in line] for line in lines]
            if not cells:
                body = f"*{NOTHING}*"
            else:
                body = markdown_table(
                    [escape_markdown(head) for head in heads], cells, len(heads) if prose else left, escaped=True
                )
            return f"{escape_markdown(caption)}\n\n{body}" if caption else body
        case Plot(name, read, alt):
            return f"![{escape_markdown(alt)}]({name}.png)\n\n*{escape_markdown(read)}*"
        case Code(text, language):
            fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
            return f"{fence}{language}\n{text.strip()}\n{fence}"
        case Details(summary, inner):
            return "\n\n".join([f"### {escape_markdown(summary)}", *(_block(one) for one in inner)])


def inline_markdown(text: Text) -> str:
    """Return a text on one line, escaped, with its spans marked."""
    return "".join(_piece(piece) for piece in pieces(text))


def _piece(piece: str | Span) -> str:
    if isinstance(piece, str):
        return _escape_between_spans(piece)
    marks = {"code": "", "soft": "*", "strong": "**", "bad": "**", "good": "", "open": ""}
    mark, text = marks[piece.style], code(piece.text) if piece.style == "code" else escape_markdown(piece.text)
    return f"{mark}{text}{mark}" if text else ""


def _escape_between_spans(text: str) -> str:
    """Escape a text but keep one space at either end if it has one there: a span may follow."""
    inner = escape_markdown(text)
    if not inner:
        return " " if text else ""
    return (" " if text[0].isspace() else "") + inner + (" " if text[-1].isspace() else "")
