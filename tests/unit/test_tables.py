"""Tables keep their columns for any text in their cells."""

import re

from hypothesis import given
from hypothesis import strategies as st

from udrl.text import markdown_table, name_value_table, text_table

CELL = st.text(st.characters(codec="ascii", exclude_categories=["Cc"]) | st.sampled_from("|\n狐"), max_size=8)
LINE = st.text(st.characters(codec="ascii", exclude_categories=["Cc"]), max_size=8)


@st.composite
def tables(draw: st.DrawFn, cell: st.SearchStrategy[str]) -> tuple[list[str], list[list[str]]]:
    columns = draw(st.integers(1, 4))
    row = st.lists(cell, min_size=columns, max_size=columns)
    return [f"h{i}" for i in range(columns)], draw(st.lists(row, max_size=5))


def read_markdown(line: str) -> list[str]:
    """Split a Markdown row at the pipes that are not escaped."""
    cells = re.split(r"(?<!\\)\|", line)
    assert (cells[0], cells[-1]) == ("", "")
    return [cell[1:-1].replace("\\|", "|") for cell in cells[1:-1]]


@given(tables(CELL.filter(lambda cell: "\\" not in cell)))
def test_a_markdown_table_has_one_line_per_row_and_reads_back(table: tuple[list[str], list[list[str]]]) -> None:
    header, rows = table
    lines = markdown_table(header, rows).split("\n")
    assert len(lines) == 2 + len(rows)
    assert read_markdown(lines[0]) == header
    assert [read_markdown(line) for line in lines[2:]] == [[cell.replace("\n", " ") for cell in row] for row in rows]


def test_a_markdown_table_aligns_columns_on_request() -> None:
    header, rows = ["task", "n"], [["a|b", "1"]]
    assert markdown_table(header, rows) == "| task | n |\n| --- | --- |\n| a\\|b | 1 |"
    assert markdown_table(header, rows, left_columns=1) == "| task | n |\n| --- | ---: |\n| a\\|b | 1 |"


@given(tables(LINE), st.integers(0, 4))
def test_all_columns_of_a_text_table_start_and_end_at_the_same_place(
    table: tuple[list[str], list[list[str]]], left_columns: int
) -> None:
    header, rows = table
    lines = text_table(header, rows, left_columns).split("\n")
    assert len(lines) == 2 + len(rows)
    assert lines[1] == "-" * len(lines[0])
    start = 0
    for i in range(len(header)):
        width = max(len(row[i]) for row in [header, *rows])
        for line, row in zip([lines[0], *lines[2:]], [header, *rows], strict=True):
            cell = row[i].ljust(width) if i < left_columns else row[i].rjust(width)
            assert line.ljust(1000)[start : start + width] == cell
        start += width + 2


def test_the_last_column_of_free_text_is_not_padded() -> None:
    text = text_table(["n", "note"], [["1", "x"], ["20", "a long sentence"]], left_columns=0, ragged_last=True)
    assert text.split("\n") == [" n  note", "--------", " 1  x", "20  a long sentence"]


def test_a_list_of_names_and_values_is_aligned_under_its_title() -> None:
    assert name_value_table("cost", [("tokens", "1"), ("GPU-hours", "2")]) == ["cost:", "  tokens     1", "  GPU-hours  2"]
