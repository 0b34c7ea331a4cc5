"""The blocks of a report: a flat list, written once and rendered as Markdown and as HTML.

Texts are plain and renderers escape them, so that an intent or a prompt may hold any character and is never read as markup.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

Style = Literal["code", "strong", "soft", "good", "bad", "open"]


@dataclass(frozen=True)
class Span:
    """A piece of text with a style: code, strong, soft (a remark), or a verdict: good, bad, open."""

    text: str
    style: Style


Text = str | Span | Sequence[str | Span]  # pieces are joined without spaces


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
    """``lines`` have as many cells as ``heads``; the first ``left`` columns are words, with ``prose`` all are."""

    heads: Sequence[str]
    lines: Sequence[Sequence[Text]]
    caption: str = ""
    left: int = 1
    prose: bool = False


@dataclass(frozen=True)
class Plot:
    """``name`` is the image file's name without its ending; ``read`` says how to read it, ``alt`` describes it."""

    name: str
    read: str
    alt: str


@dataclass(frozen=True)
class Code:
    text: str
    language: str = ""


@dataclass(frozen=True)
class Details:
    """Blocks that few readers need; HTML folds them."""

    summary: str
    blocks: "Sequence[Block]" = field(default_factory=tuple)


Block = Heading | Paragraph | Bullets | Table | Plot | Code | Details


def pieces(text: Text) -> Sequence[str | Span]:
    """Return the pieces of a text."""
    return [text] if isinstance(text, str | Span) else text


def plain(text: Text) -> str:
    """Return the text without styles."""
    return "".join(piece if isinstance(piece, str) else piece.text for piece in pieces(text))
