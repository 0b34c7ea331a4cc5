"""Text: its number of words, the one definition of a prompt's length, and tables as Markdown or for a terminal."""

import re
from collections.abc import Sequence

_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")


def count_words(text: str) -> int:
    """Return the number of whitespace-separated words, the unit of every length in the project."""
    return len(text.split())


def words(text: str) -> list[str]:
    """Return case-folded words without punctuation, to compare texts; lengths are :func:`count_words`."""
    return _WORD.findall(text.casefold())


def markdown_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], left_columns: int | None = None, escaped: bool = False
) -> str:
    """Return a Markdown table; pipes and line breaks in cells are escaped, unless the cells are ``escaped`` already.

    ``left_columns`` aligns that many columns left and the rest right; None leaves the alignment to the renderer.
    """
    cells = [list(row) if escaped else [_escape_cell(cell) for cell in row] for row in rows]
    if left_columns is None:
        rule = ["---"] * len(header)
    else:
        rule = ["---" if i < left_columns else "---:" for i in range(len(header))]
    return "\n".join(f"| {' | '.join(row)} |" for row in [list(header), rule, *cells])


def _escape_cell(cell: str) -> str:
    return cell.replace("|", "\\|").replace("\n", " ")


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]], left_columns: int = 1, ragged_last: bool = False) -> str:
    """Return a table for a terminal: aligned columns, a rule under the header.

    The first ``left_columns`` are aligned left, the others right. With ``ragged_last`` the last column is not padded, for a
    column of free text.
    """
    lines = [list(header), *map(list, rows)]
    columns = len(header)
    padded = columns - 1 if ragged_last else columns
    widths = [max(len(line[i]) for line in lines) for i in range(padded)]

    def render(line: Sequence[str]) -> str:
        cells = [line[i].ljust(widths[i]) if i < left_columns else line[i].rjust(widths[i]) for i in range(padded)]
        return "  ".join([*cells, *line[padded:]]).rstrip()

    text = [render(line) for line in lines]
    return "\n".join([text[0], "-" * len(text[0]), *text[1:]])


def name_value_table(title: str, rows: Sequence[tuple[str, str]]) -> list[str]:
    """Return the lines of a titled two-column list, indented by two spaces."""
    width = max(len(name) for name, _ in rows)
    return [f"{title}:", *(f"  {name:<{width}}  {value}" for name, value in rows)]
