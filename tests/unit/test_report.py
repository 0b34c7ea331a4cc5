"""The report says one thing in two renderings, holds any text, and leaves a dash where nothing was measured."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fakes import fake_evaluation as made_up
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jinja2 import UndefinedError

from udrl.evaluate import formatting
from udrl.evaluate.document import EvaluationDocument, Interval
from udrl.evaluate.formatting import code, escape_markdown
from udrl.evaluate.judges.validation import MIN_AUC
from udrl.evaluate.metrics.intervals import GROUPS
from udrl.evaluate.outputs import OUTPUTS
from udrl.evaluate.report import plots, render, tables
from udrl.evaluate.report import write_report as report
from udrl.evaluate.report.examples import example_tables
from udrl.evaluate.report.selection import order_policies, ordered_judges, reference_policy, validated_judges
from udrl.evaluate.speed import REPEATS
from udrl.run import EvaluationPaths

TEMPLATE = (Path(render.__file__).parent / "page.html.j2").read_text()
VOID = {"meta", "link", "br", "img"}
HOSTILE = "<script>alert(1)</script> | `code` *bold* [a](http://x) & \"quoted\" 'x' $y_z$ \\ ![i](u) --> ]]>"


class Page(HTMLParser):
    """What a page holds: texts of its cells, its elements with attributes; complains of what is not closed in its order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.cells: list[str] = []
        self.text = ""
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag in ("td", "th"):
            self.cells.append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if "td" in self.open or "th" in self.open:
            self.cells[-1] += data


def as_json(document: EvaluationDocument) -> dict[str, Any]:
    return document.model_dump(mode="json")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("report") / "evaluation"
    files = report.write_report(EvaluationPaths(str(folder)), made_up.outputs(), made_up.document())
    return folder, {**as_json(made_up.document()), "files": files}


def test_all_files_are_written_and_named(written: tuple[Path, dict[str, Any]]) -> None:
    folder, document = written
    pictures = {f"{name}.png" for name in ("length_control", "reward_control")}
    assert set(document["files"]) == {"report.md", "report.html", "metrics.json", "outputs.parquet", *pictures}
    assert list(document["files"])[-1] == "report.md"  # where it is, all is
    for name, uri in document["files"].items():
        assert uri == str(folder / name)
        assert (folder / name).stat().st_size
    assert pq.read_schema(folder / "outputs.parquet").names == [*OUTPUTS.names, "judge_gated"]


def test_a_second_report_leaves_nothing_of_the_first(tmp_path: Path) -> None:
    for name in ("pairwise.parquet", "training_loss.png", "reward_control.png"):
        (tmp_path / name).write_text("of the first")
    report.write_report(EvaluationPaths(str(tmp_path)), made_up.table(made_up.row()), made_up.bare())
    assert {file.name for file in tmp_path.iterdir()} == {"report.md", "report.html", "metrics.json", "outputs.parquet"}


def test_metrics_json_is_strict_and_holds_the_document_with_none_for_what_is_unknown(
    written: tuple[Path, dict[str, Any]],
) -> None:
    folder, document = written
    stored = json.loads((folder / "metrics.json").read_text(), parse_constant=pytest.fail)  # no bare NaN
    assert stored == {name: part for name, part in document.items() if name != "files"}
    assert stored["overall"]["comparisons"]["teacher"]["judges"]["rubric"]["value"] is None
    assert stored["claim"]["parts"][0]["interval"]["low"] == pytest.approx(0.92)


def markdown_of(document: EvaluationDocument, outputs: pa.Table | None = None) -> str:
    return render.render_markdown(document, made_up.outputs() if outputs is None else outputs, [])


def test_the_claim_comes_first_then_control_then_examples_then_the_rest(written: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = written
    heads = re.findall(r"^## (.*)$", (folder / "report.md").read_text(), flags=re.M)
    assert heads == ["Is the claim met?", "Control", "Examples", "Appendix"]
    page = (folder / "report.html").read_text()
    assert re.findall(r"<h2[^>]*>(.*?)</h2>", page) == heads
    appendix = page[page.index(">Appendix</h2>") :]
    parts = ["Metrics by task and policy", "Models, decoding", "Judges", "Diversity", "Limits", "Settings"]
    places = [appendix.index(f"<summary>{part}") for part in parts]
    assert places == sorted(places)
    assert appendix.count("<details>") == appendix.count("</details>") == len(parts)


def test_the_first_screen_states_the_claim_the_judges_and_the_intervals() -> None:
    head = markdown_of(made_up.document()).split("## Control")[0]
    assert "a student of 104.0M parameters writes prompts as well as llama3-8b and qwen3-8b and its teacher" in head
    assert "Relevance is the cosine of intent and prompt by the scorer that made the training reward" in head
    assert "judges that are independent of it decide: gated" in head
    assert "| part of the claim | verdict | student / other |" in head
    assert "**open** | 95.0% [92.0%, 98.0%] |" in head
    assert "| task | gated: student / teacher |" in head


def test_both_files_hold_the_same_numbers_in_the_same_cells(written: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = written
    text = (folder / "report.md").read_text().split("```yaml")[0]
    rows = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith("| ---")]
    cells = [cell.strip() for row in rows for cell in re.split(r"(?<!\\)\|", row)[1:-1]]
    assert len(cells) > 400
    shown = Page((folder / "report.html").read_text()).cells
    assert [re.sub(r"[\\*`]", "", cell) for cell in cells] == [re.sub(r"[\\*`]", "", cell) for cell in shown]


def test_the_page_loads_nothing_and_runs_nothing(written: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = written
    page = Page((folder / "report.html").read_text())
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "iframe", "object", "embed", "form", "base"}
    for tag, attributes in page.elements:
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("src", "href", "xlink:href", "action"):
                assert (value or "").startswith(("#", "data:image/png;base64,")) or value == "data:,", (tag, name)
    policy = next(a["content"] for t, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert (policy or "").startswith("default-src 'none'")
    style = (folder / "report.html").read_text().split("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style


def test_the_page_is_marked_up_for_readers_of_all_kinds(written: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = written
    text = (folder / "report.html").read_text()
    page = Page(text)
    assert ("html", {"lang": "en"}) in page.elements
    assert ("meta", {"charset": "utf-8"}) in page.elements
    assert [tag for tag, _ in page.elements].count("h1") == 1
    assert [a["alt"] for t, a in page.elements if t == "img"] == list(plots.ALTS.values())
    assert text.count("<p><em>Read: ") == 2
    assert all(a.get("scope") == "col" for t, a in page.elements if t == "th")
    boxes = [a for _, a in page.elements if a.get("class") == "scroll"]
    assert len(boxes) == text.count("<table>") > 10
    assert all(box["aria-label"] and box["tabindex"] == "0" for box in boxes)
    assert "prefers-color-scheme: dark" in text


def test_text_keeps_its_contrast_in_light_and_dark() -> None:
    """At least 4.5 to 1 (WCAG 2.2, 1.4.3) for every colour of text on every ground."""

    def luminance(colour: str) -> float:
        digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
        parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    schemes = [dict(re.findall(r"--(\w+): (#\w+)", block)) for block in re.findall(r":root \{(.*?)\}", TEMPLATE, flags=re.S)]
    assert len(schemes) == 2
    for scheme in schemes:
        for text in ("ink", "soft", "link", "good", "bad", "open"):
            for ground in ("bg", "card", "head"):
                high, low = sorted((luminance(scheme[text]), luminance(scheme[ground])), reverse=True)
                assert (high + 0.05) / (low + 0.05) >= 4.5, (text, ground)


def test_what_is_said_of_judges_and_intervals_is_how_they_are_made() -> None:
    text = markdown_of(made_up.document())
    for words in (
        "has a judge's score of a prompt for another intent",
        f"its lower bound is above {MIN_AUC} on hand-written (gold) pairs",
        f"1,000 bootstrap resamples of intents; those of ratios of diversity are from a jackknife of up to {GROUPS} groups",
        "one per intent and policy, for the intents that all models",
        "the scorer that made the training reward can only say missed",
        f"of {REPEATS} repetitions",
    ):
        assert words in text
    assert "Too few intents" not in text
    assert "Too few intents:** with fewer than 20" in markdown_of(made_up.document(intents=6))


def table_of(text: str, head: str) -> dict[str, dict[str, str]]:
    """Return the table whose header starts with ``head``: first cell of a row -> column -> cell, without marks."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {head} |"))
    split = [[re.sub(r"[\\*`]", "", cell).strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines[start:]]
    end = next((i for i, cells in enumerate(split) if not cells), len(split))
    header, _, *rows = split[:end]
    return {row[0]: dict(zip(header, row, strict=True)) for row in rows}


def test_the_judges_table_says_who_decides_and_why() -> None:
    text = markdown_of(made_up.document())
    judges = table_of(text, "judge | kind")
    assert [judges[name]["verdict"] for name in judges] == ["validated", "not validated"]
    assert [judges[name]["role"] for name in judges] == ["decides", "shown"]
    assert judges["gated"]["weakest control"] == "echo 0.85 [0.82, 0.88]"
    assert judges["rubric"]["relation"] == "teacher"
    assert [judges[name]["score of shuffled"] for name in judges] == ["0.16", "0.40"]
    areas = table_of(text, "judge: pairs")
    assert areas["rubric: own"]["echo"] == "0.50 [0.47, 0.53]"
    assert "spliced (held out)" in areas["gated: gold"]


def test_rejected_outputs_are_misses_and_the_share_among_accepted_ones_stands_next_to_them() -> None:
    text = markdown_of(made_up.document())
    scores = table_of(text, "task | policy | relevance")
    assert scores["image_search"]["subject's words kept"] == "60% [58%, 62%] (63%)"
    assert "| 5% (echo 4%, repetitive 1%) |" in text
    lengths = table_of(text, "task | lengths")
    assert lengths["all tasks"]["within 2"] == "31% [29%, 33%] (33%)"  # the last row: outside


def test_decoding_settings_stand_next_to_each_policy() -> None:
    policies = table_of(markdown_of(made_up.document()), "policy | model")
    assert policies["student"]["decoding"] == "temperature 0.7, seed 7"
    assert policies["student"]["prompts/s [least, most]"] == "210.0 [190.0, 230.0]"
    assert "echo" not in policies
    document = made_up.document()
    assert "Decoding (student / teacher) is the same." in markdown_of(document)
    document.policies["teacher"].sampling["frequency_penalty"] = 0.3
    text = markdown_of(document).replace("\\", "")
    assert "Decoding (student / teacher) differs: frequency_penalty - / 0.3." in text


def test_a_misspelled_name_in_a_template_is_an_error() -> None:
    for autoescape in (False, True):
        with pytest.raises(UndefinedError, match="documnet"):
            render.template_environment(autoescape).from_string("{{ documnet.claim }}").render()


def test_trivial_baselines_are_marked_and_the_student_comes_first() -> None:
    names = list(made_up.POLICIES)
    assert order_policies(set(names), made_up.document().policies) == names
    text = markdown_of(made_up.document())
    assert [*table_of(text, "policy | model")][:2] == ["student", "teacher"]
    assert "| **all tasks** | *echo* |" in text


def test_the_judge_to_read_is_the_deciding_one() -> None:
    document = made_up.document()
    assert validated_judges(document) == ["gated"]
    assert list(ordered_judges(document)) == ["gated", "rubric"]
    rubric = document.judges["rubric"]
    document.judges["rubric"] = rubric.model_copy(
        update={"validated": True, "ratio_scale": True, "gold": document.judges["gated"].gold | {}}
    )
    assert validated_judges(document) == ["gated", "rubric"]  # the rubric's model is the teacher's
    for judge in document.judges.values():
        judge.validated = False
    assert validated_judges(document) == []


def test_without_a_teacher_the_student_is_compared_with_the_first_baseline() -> None:
    policies = {"student": "student", "qwen3-8b": "baseline", "llama3-8b": "baseline", "echo": "trivial baseline"}
    document = made_up.document(made_up.TASKS, policies)
    assert reference_policy(document) == "llama3-8b"
    text = markdown_of(document, made_up.outputs(policies=policies))
    assert "gated: student / llama3-8b" in text
    assert "The teacher did not write" in text
    assert reference_policy(made_up.bare()) is None


@pytest.mark.parametrize(
    ("document", "outputs"),
    [
        (made_up.bare(), made_up.table(made_up.row(), made_up.row(variation=1))),
        (made_up.bare(), made_up.table(made_up.row(prompt="", reason="engine_error", relevance=None))),
        (made_up.document(("one",), {"student": "student"}), made_up.outputs(("one",), {"student": "student"}, judges=())),
    ],
    ids=["bare", "all rejected", "student alone"],
)
def test_missing_parts_leave_dashes_and_no_error(document: EvaluationDocument, outputs: Any, tmp_path: Path) -> None:
    report.write_report(EvaluationPaths(str(tmp_path)), outputs, document)
    for name in ("report.md", "report.html"):
        text = (tmp_path / name).read_text()
        assert not re.search(r"\b(nan|None)\b", Page(text).text if name.endswith("html") else text)
    assert report.verdict_lines(document).startswith("claim: open")


def test_a_prompt_is_shown_as_it_is_and_never_read_as_markup(tmp_path: Path) -> None:
    rows = [
        made_up.row(task="a|b", intent=i, policy=p, prompt=HOSTILE, intent_text="")
        for i in range(2)
        for p in ("student", "teacher")
    ]
    outputs = made_up.table(*({k: v for k, v in r.items() if k != "intent_text"} | {"intent": HOSTILE} for r in rows))
    document = made_up.document(("a|b",), recipe=f"name: '{HOSTILE}'\n```\n# not a heading", name=HOSTILE)
    report.write_report(EvaluationPaths(str(tmp_path)), outputs, document)
    page = Page((tmp_path / "report.html").read_text())
    assert "script" not in {tag for tag, _ in page.elements}
    assert HOSTILE in page.cells
    text = (tmp_path / "report.md").read_text()
    assert "\\<script\\>alert(1)\\</script\\> \\| \\`code\\` \\*bold\\*" in text
    assert "\n````yaml\n" in text  # a longer fence than the text holds


texts = st.text(max_size=40)


@settings(deadline=None, max_examples=60)
@given(texts, texts)
@example(HOSTILE, "[1] [2](x) \\[3] `|`")
@example("\x00\x1b\ufffe", "\u202e|\u2028#")
def test_any_text_stays_one_cell(first: str, second: str) -> None:
    columns = [
        tables.Column("a", lambda row: escape_markdown(row[0]) or "-", True),
        tables.Column("b", lambda row: f"{code(row[1])} *{escape_markdown(row[0]) or '-'}*", True),
    ]
    table = tables.table(columns, [(first, second)])
    row = table.splitlines()
    assert len(row) == 3
    assert len(re.findall(r"(?<!\\)(?:\\\\)*\|", row[2])) == 3  # bars that end a cell
    page = Page(render.render_page(f"# Title\n\n## Head\n\n{table}\n", {}))
    assert page.cells[:2] == ["a", "b"]
    assert len(page.cells) == 4
    assert " ".join(page.cells[2].split()) == (_held(" ".join(first.split())) or "-")


def _held(text: str) -> str:
    """As a page gives it back: characters that no HTML may hold are replaced."""
    return re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufdd0-\ufdef\ufffe\uffff]", "\ufffd", text)


def test_figures_in_brackets_stay_readable_and_links_do_not_come_to_life() -> None:
    assert escape_markdown("0.41 [0.38, 0.44]") == "0.41 [0.38, 0.44]"
    assert escape_markdown("95% [-1%, +2%]") == "95% [-1%, +2%]"
    assert escape_markdown("[1](http://x)") == "\\[1\\](http://x)"
    assert escape_markdown("\\[1]") == "\\\\\\[1\\]"


def test_an_unknown_number_is_a_dash() -> None:
    assert formatting.interval(Interval(value=0.5, low=0.4, high=0.6)) == "0.50 [0.40, 0.60]"
    assert formatting.interval(Interval(value=0.5, low=0.5, high=0.5)) == formatting.interval(Interval(value=0.5)) == "0.50"
    assert formatting.interval(Interval(value=float("nan"), low=0.0, high=0.0)) == formatting.interval(None) == "-"
    assert [formatting.signed(value) for value in (0.123, -0.001, None)] == ["+0.12", "+0.00", "-"]
    assert [formatting.seconds(value) for value in (0.34, 2.06, None)] == ["340 ms", "2.1 s", "-"]
    assert [formatting.parameters(value) for value in (8_900_000, 8.03e9, None)] == ["8.9M", "8.0B", "-"]


def test_markdown_becomes_a_page_with_headings_folds_plots_and_verdicts() -> None:
    text = "# Title\n\nAll.\n\n## One \\& two\n\n**met** and **bold**\n\n![A line](p.png)\n\n## Appendix\n\n### More\n\n"
    text += "```yaml\nk: <v>\n```\n\n### Again\n\nEnd.\n"
    page = render.render_page(text, {"p": b"bytes"})
    assert "<title>Title</title>" in page
    assert "<h2>One &amp; two</h2>" in page
    assert '<strong class="good">met</strong> and <strong>bold</strong>' in page
    assert '<img src="data:image/png;base64,Ynl0ZXM=" alt="A line"' in page
    assert "<details><summary>More</summary>" in page
    assert "k: &lt;v&gt;" in page
    assert page.count("<details>") == page.count("</details>") == 2


def _examples(*scores: float | None, judge: str | None = "gated") -> list[str]:
    rows = [
        made_up.row(intent=i, relevance=-score if score is not None else 0.0, judge_gated=score, prompt=f"prompt {i}")
        if score is not None
        else made_up.row(intent=i, prompt="", reason="echo", relevance=None)
        for i, score in enumerate(scores)
    ]
    document = made_up.document(("text_to_image",), {"student": "student"})
    text = example_tables(document, made_up.table(*rows, judges=("gated",)), judge)["text_to_image"]
    return [f"{label} {row['student'].split(' (')[0]}" for label, row in table_of(text, "student's").items()]


def test_examples_are_chosen_by_the_judges_rank_and_rejected_ones_by_chance_alone() -> None:
    assert _examples(0.1, 0.9, 0.5)[:3] == ["best prompt 1", "median prompt 2", "worst prompt 0"]
    assert _examples(0.1, 0.9, 0.5, judge=None)[:3] == ["best prompt 0", "median prompt 2", "worst prompt 1"]  # relevance falls
    assert _examples(None) == ["random rejected: echo"]
    assert _examples(0.1, 0.9, 0.5) == _examples(0.1, 0.9, 0.5)


def test_examples_show_every_writer_to_the_same_intent_and_its_first_prompt() -> None:
    rows = [
        made_up.row(intent=1, policy=policy, variation=variation, prompt=f"{policy} {variation}")
        for variation in (1, 0)
        for policy in ("student", "teacher", "llama3-8b", "echo")
    ]
    policies = {
        "student": "student",
        "teacher": "teacher",
        "llama3-8b": "baseline",
        "silent": "baseline",
        "echo": "trivial baseline",
    }
    text = example_tables(made_up.document(("text_to_image",), policies), made_up.table(*rows), None)["text_to_image"]
    row = table_of(text, "student's")["best"]
    shown = {policy: row[policy].split(" (")[0] for policy in ("student", "teacher", "llama3-8b", "silent")}
    assert shown == {"student": "student 0", "teacher": "teacher 0", "llama3-8b": "llama3-8b 0", "silent": "-"}
    assert "echo" not in row


def test_the_last_lines_of_the_job_fit_a_terminal_and_start_with_the_claim() -> None:
    lines = report.verdict_lines(made_up.document()).splitlines()
    assert max(map(len, lines)) <= report.WIDTH
    assert lines[0].startswith("claim: open. Relevance is within 6%")
    assert "MISSED     80% of prompts land within two words: 71.0%" in lines
    (header,) = (line for line in lines if line.startswith("task "))
    assert header.split()[-5:] == ["scorer", "subject", "clean", "within2", "rejected"]
    assert any(line.startswith("all tasks ") for line in lines)
