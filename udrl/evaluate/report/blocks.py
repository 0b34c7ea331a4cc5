"""What a report is made of: a flat list of blocks, written once and rendered as Markdown and as HTML.

Texts here are plain: a renderer escapes them. So an intent or a prompt can hold any character, and neither rendering reads
it as markup.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

Style = Literal["code", "strong", "soft", "good", "bad", "open"]


@dataclass(frozen=True)
class Span:
    """A piece of text with a look: code, strong, soft (said aside), or a verdict: good, bad, open."""

    text: str
    style: Style


Text = str | Span | Sequence[str | Span]  # pieces stand beside each other as they are, without spaces between


@dataclass(frozen=True)
class Heading:
    """``level`` 1 is the title, 2 a section (listed in the table of contents), 3 a part of one."""

    level: int
    text: Text


@dataclass(frozen=True)
class Paragraph:
    text: Text


@dataclass(frozen=True)
class Bullets:
    items: Sequence[Text]


@dataclass(frozen=True)
class Table:
    """``lines`` have as many cells as ``heads``; the first ``left`` columns are words, the rest figures. ``prose``: all are."""

    heads: Sequence[str]
    lines: Sequence[Sequence[Text]]
    caption: str = ""
    left: int = 1
    prose: bool = False


@dataclass(frozen=True)
class Plot:
    """``name`` is that of the picture's file without its ending; ``read`` says what to read from it, ``alt`` what it shows."""

    name: str
    read: str
    alt: str


@dataclass(frozen=True)
class Code:
    text: str
    language: str = ""


@dataclass(frozen=True)
class Details:
    """Blocks that few need: folded away where the rendering can."""

    summary: str
    blocks: "Sequence[Block]" = field(default_factory=tuple)


Block = Heading | Paragraph | Bullets | Table | Plot | Code | Details


def pieces(text: Text) -> Sequence[str | Span]:
    """The pieces of a text, one by one."""
    return [text] if isinstance(text, str | Span) else text


def plain(text: Text) -> str:
    """The text without its looks."""
    return "".join(piece if isinstance(piece, str) else piece.text for piece in pieces(text))
