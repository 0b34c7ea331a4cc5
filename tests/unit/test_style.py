"""The tree stays readable: plain English, nouns as variable names, no two files of one name."""

import re
from pathlib import Path

import pytest

from scripts import readability

ROOT = Path(__file__).parents[2]
# Idiom -> what to write instead.
BANNED = {
    r"\bbeside\b": "next to, in addition to",
    r"\bbut for\b": "except",
    r"\balone\b": "only",
    r"\banew\b": "again",
    r"\bfor want of\b": "without",
    r"\bwh(?:o|at|ich)ever\b": "name the thing, or: any",
    r"\b(?:is|are|was|were) told\b": "is reported, knows",
    r"(?<![Tt]here )\b(?:is|are) no\b (?!longer|more|less|fewer)": "is not a",
    r"\byardsticks?\b": "trivial baseline",
    r"\bcontenders?\b": "policy",
    r"\bbeliev(?:ed|able)\b": "validated",
    r"\bsift(?:s|ed)?\b(?![\"`/])": "filter",
}


@pytest.mark.parametrize("idiom", BANNED)
def test_prose_and_comments_are_free_of_an_idiom(idiom: str) -> None:
    pattern = re.compile(idiom)
    uses = [
        f"{file}: ...{text[max(0, match.start() - 40) : match.end() + 30]!r}"
        for file, text in readability.all_prose(ROOT)
        if not file.startswith("scripts/")
        for match in pattern.finditer(text)
    ]
    assert uses == [], f"write instead: {BANNED[idiom]}"


def test_what_clauses_and_where_are_rare() -> None:
    figures = readability.measure(ROOT)
    assert figures.what_clauses_per_10000_words < 6
    assert figures.where_per_10000_words < 8


def test_variables_are_named_by_nouns() -> None:
    assert readability.measure(ROOT).participles_per_1000_lines < 3  # some, such as `judged`, are the field's words


def test_no_two_files_of_the_product_have_one_base_name() -> None:
    assert readability.repeated_base_names(ROOT) == {}
