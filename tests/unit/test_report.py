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

from udrl.evaluate.document import EvaluationDocument, Interval
from udrl.evaluate.judges.validation import MIN_AUC, MIN_PAIRS
from udrl.evaluate.metrics.intervals import GROUPS
from udrl.evaluate.outputs import OUTPUTS, PAIRWISE
from udrl.evaluate.report import examples, formatting, html, markdown, sections
from udrl.evaluate.report import write_report as report
from udrl.evaluate.report.blocks import Bullets, Code, Details, Heading, Paragraph, Plot, Span, Table, plain
from udrl.evaluate.report.selection import best_judge, order_policies, pointwise_judges, reference_policy
from udrl.run import EvaluationPaths

VOID = {"meta", "link", "br", "path", "use", "rect"}
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
    pair = {"judge": "duel", "policy": "student", "other": "teacher", "first": 0.5, "second": 0.5, "parsed": True}
    pairwise = pa.Table.from_pylist([pair], schema=PAIRWISE)
    files = report.write_report(EvaluationPaths(str(folder)), made_up.outputs(), made_up.document(), pairwise)
    return folder, {**as_json(made_up.document()), "files": files}


def test_all_files_are_written_and_named(written: tuple[Path, dict[str, Any]]) -> None:
    folder, document = written
    pictures = {f"{name}.png" for name in ("relevance", "length_control", "reward_control", "quality_cost", "training_loss")}
    tables = {"outputs.parquet", "pairwise.parquet"}
    assert set(document["files"]) == {"report.md", "report.html", "metrics.json", *tables, *pictures}
    assert list(document["files"])[-1] == "report.md"  # where it is, all is
    for name, uri in document["files"].items():
        assert uri == str(folder / name)
        assert (folder / name).stat().st_size
    assert pq.read_schema(folder / "outputs.parquet").names == [*OUTPUTS.names, "judge_likelihood"]


def test_a_second_report_leaves_nothing_of_the_first(tmp_path: Path) -> None:
    for name in ("pairwise.parquet", "training_loss.png"):
        (tmp_path / name).write_text("of the first")
    report.write_report(EvaluationPaths(str(tmp_path)), made_up.outputs(), made_up.document(losses=[]), PAIRWISE.empty_table())
    assert not (tmp_path / "pairwise.parquet").exists()
    assert not (tmp_path / "training_loss.png").exists()


def test_metrics_json_is_strict_and_holds_the_document_with_none_for_what_is_unknown(
    written: tuple[Path, dict[str, Any]],
) -> None:
    folder, document = written
    stored = json.loads((folder / "metrics.json").read_text(), parse_constant=pytest.fail)  # no bare NaN
    assert stored == {name: part for name, part in document.items() if name != "files"}
    assert stored["overall"]["comparisons"]["teacher"]["judges"]["rubric"]["ratio"]["value"] is None
    assert stored["claim"]["parts"][0]["interval"]["low"] == pytest.approx(0.92)


def test_the_claim_comes_first_then_results_then_the_rest_in_both_renderings(written: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = written
    order = ["Is the claim met?", "Results by task", "Policies side by side", "Targets", "Judges", "Control", "Diversity"]
    order += ["Novelty", "Quality against cost", "Examples", "Training", "Limits", "Settings"]
    heads = re.findall(r"^## (.*)$", (folder / "report.md").read_text(), flags=re.M)
    assert [head.split(",")[0].split(" and ")[0] for head in heads] == order
    assert re.findall(r"<h2[^>]*>(.*?)</h2>", (folder / "report.html").read_text()) == heads


def test_both_renderings_hold_the_same_numbers_in_the_same_cells() -> None:
    blocks = sections.build_report(made_up.document(), made_up.outputs(), [])
    tables = [b for block in blocks for b in (block.blocks if isinstance(block, Details) else [block]) if isinstance(b, Table)]
    cells = [plain(cell) for table in tables for line in (table.heads, *table.lines) for cell in line]
    assert len(cells) > 500
    assert Page(html.render_html(blocks, {})).cells == cells
    text = re.sub(r"[\\*`]", "", markdown.render_markdown(blocks))
    for cell in cells:
        assert re.sub(r"[\\*`]", "", cell) in text


def test_the_page_loads_nothing_and_runs_nothing(written: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = written
    page = Page((folder / "report.html").read_text())
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "iframe", "img", "object", "embed", "form", "base"}
    for tag, attributes in page.elements:
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("src", "href", "xlink:href", "action"):
                assert (value or "").startswith("#") or value == "data:,", (tag, name)
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
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    links = [(a.get("href") or a.get("xlink:href") or "") for t, a in page.elements if t in ("a", "use")]
    assert links
    assert all(link[1:] in ids for link in links)
    figures = [a for t, a in page.elements if t == "svg"]
    assert len(figures) == 5
    assert all(a["role"] == "img" and a["aria-label"] for a in figures)
    assert text.count("<figcaption>Read: ") == 5
    assert "prefers-color-scheme: dark" in text


def test_text_keeps_its_contrast_in_light_and_dark() -> None:
    """At least 4.5 to 1 (WCAG 2.2, 1.4.3) for every colour of text on every ground."""

    def luminance(colour: str) -> float:
        digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
        parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    schemes = [dict(re.findall(r"--(\w+): (#\w+)", block)) for block in re.findall(r":root \{(.*?)\}", html.STYLE, flags=re.S)]
    assert len(schemes) == 2
    for scheme in schemes:
        for text in ("ink", "soft", "link", "good", "bad", "open"):
            for ground in ("bg", "card", "head"):
                high, low = sorted((luminance(scheme[text]), luminance(scheme[ground])), reverse=True)
                assert (high + 0.05) / (low + 0.05) >= 4.5, (text, ground)


def test_what_is_said_of_judges_and_intervals_is_how_they_are_made() -> None:
    text = markdown.render_markdown(sections.build_report(made_up.document(), made_up.outputs(), [])).replace("\\", "")
    for said in (
        "for a judge as a prompt for another intent",
        f"at least {MIN_AUC} on shuffled, from at least {MIN_PAIRS} scored pairs",
        f"1,000 bootstrap resamples of intents; those of ratios of diversity are from a jackknife of up to {GROUPS} groups",
        "one per intent and policy, for the intents that all models",
        "or only the scorer that made the training reward, towards which the student was trained, could say met",
    ):
        assert said in text
    assert "floor" not in text


def test_the_zero_of_a_judge_s_scale_and_the_pairs_it_never_saw_are_shown() -> None:
    blocks = sections.build_report(made_up.document(), made_up.outputs(), [])
    tables = {tuple(map(plain, block.heads)): block for block in blocks if isinstance(block, Table)}
    judges = next(table for heads, table in tables.items() if "score of shuffled" in heads)
    heads = list(map(plain, judges.heads))
    assert [plain(line[heads.index("score of shuffled")]) for line in judges.lines] == ["0.16", "0.40", "-"]
    beside = next(table for heads, table in tables.items() if heads[0] == "student against")
    heads = list(map(plain, beside.heads))
    at = [heads.index(f"pairwise: {column}") for column in ("pairs", "decided by a rejection", "same winner in both orders")]
    assert [plain(beside.lines[0][i]) for i in at] == ["50", "4", "64%"]


def test_trivial_baselines_are_marked_and_the_student_comes_first() -> None:
    names = list(made_up.POLICIES)
    assert order_policies(set(names), made_up.document().policies) == names
    blocks = sections.build_report(made_up.document(), made_up.outputs(), [])
    side_by_side = next(b for b in blocks if isinstance(b, Table) and b.heads[:2] == ["policy", "kind"])
    shown = {plain(line[0]): line[1] for line in side_by_side.lines}
    assert shown["echo *"] == shown["best-of-2 *"] == "trivial baseline"
    assert [plain(line[0]) for line in side_by_side.lines][:2] == ["student", "teacher"]


def test_the_judge_to_read_is_the_best_validated_one_that_is_not_the_teacher() -> None:
    document = made_up.document()
    assert best_judge(document) == "likelihood"
    assert list(pointwise_judges(document)) == ["likelihood", "rubric"]
    rubric = document.judges["rubric"]
    rubric.validated, rubric.auc = True, {"shuffled": 0.99}
    assert best_judge(document) == "likelihood"  # the rubric's model is the teacher's
    rubric.is_teacher = False
    assert best_judge(document) == "rubric"
    for judge in document.judges.values():
        judge.validated = False
    assert best_judge(document) is None


def test_without_a_teacher_the_student_is_compared_with_the_first_baseline() -> None:
    policies = {"student": "student", "qwen3-8b": "baseline", "llama3-8b": "baseline", "echo": "trivial baseline"}
    document = made_up.document(made_up.TASKS, policies)
    assert reference_policy(document) == "llama3-8b"
    text = markdown.render_markdown(sections.build_report(document, made_up.outputs(policies=policies), []))
    assert "student / llama3-8b" in text
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
    assert report.short_table(document).startswith("claim: open")


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
    table = Table(["a", "b"], [[first, [Span(second, "code"), " ", Span(first, "soft")]]])
    page = Page(html.render_html([table], {}))
    assert page.cells == ["a", "b", _held(first), _held(f"{second} {first}")]
    row = markdown.render_markdown([table]).splitlines()
    assert len(row) == 3
    assert len(re.findall(r"(?<!\\)(?:\\\\)*\|", row[2])) == 3  # bars that end a cell


def _held(text: str) -> str:
    """As a page gives it back: what no HTML may hold is replaced, and a parser makes one line end of all kinds."""
    return re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufdd0-\ufdef\ufffe\uffff]", "\ufffd", text)


def test_figures_in_brackets_stay_readable_and_links_do_not_come_to_life() -> None:
    assert markdown.escape_markdown("0.41 [0.38, 0.44]") == "0.41 [0.38, 0.44]"
    assert markdown.escape_markdown("95% [-1%, +2%]") == "95% [-1%, +2%]"
    assert markdown.escape_markdown("[1](http://x)") == "\\[1\\](http://x)"
    assert markdown.escape_markdown("\\[1]") == "\\\\\\[1\\]"


def test_an_unknown_number_is_a_dash() -> None:
    assert formatting.interval(Interval(value=0.5, low=0.4, high=0.6)) == "0.50 [0.40, 0.60]"
    assert formatting.interval(Interval(value=0.5, low=0.5, high=0.5)) == formatting.interval(Interval(value=0.5)) == "0.50"
    assert formatting.interval(Interval(value=float("nan"), low=0.0, high=0.0)) == formatting.interval(None) == "-"
    assert [formatting.signed(value) for value in (0.123, -0.001, None)] == ["+0.12", "+0.00", "-"]
    assert [formatting.seconds(value) for value in (0.34, 2.06, None)] == ["340 ms", "2.1 s", "-"]
    assert [formatting.parameters(value) for value in (8_900_000, 8.03e9, None)] == ["8.9M", "8.0B", "-"]


def test_blocks_render_as_their_kind() -> None:
    blocks = [
        Heading(1, "Title"),
        Paragraph(["It is ", Span("so", "strong"), "."]),
        Heading(2, "One & two"),
        Bullets(["a", "b"]),
        Table(["x", "n"], [["y", "1"]], "What it is"),
        Plot("p", "Read: up.", "A line"),
        Details("More", [Code("k: <v>", "yaml")]),
        Heading(2, "One & two"),
    ]
    assert markdown.render_markdown(blocks) == (
        "# Title\n\nIt is **so**.\n\n## One \\& two\n\n- a\n- b\n\nWhat it is\n\n| x | n |\n| --- | ---: |\n| y | 1 |\n\n"
        "![A line](p.png)\n\n*Read: up.*\n\n### More\n\n```yaml\nk: <v>\n```\n\n## One \\& two\n"
    )
    page = html.render_html(blocks, {"p": "<svg viewBox='0 0 1 1'></svg>"})
    assert "<title>Title</title>" in page
    assert '<a href="#one-two">One &amp; two</a>' in page
    assert 'id="one-two-1"' in page
    assert "<figcaption>Read: up.</figcaption>" in page
    assert "<summary>More</summary>\n<pre><code>k: &lt;v&gt;</code></pre>" in page
    assert "<figure>" not in html.render_html(blocks, {})


def _examples(*scores: float | None, judge: str | None = "likelihood") -> list[str]:
    rows = [
        made_up.row(intent=i, relevance=-score if score is not None else 0.0, judge_likelihood=score, prompt=f"prompt {i}")
        if score is not None
        else made_up.row(intent=i, prompt="", reason="echo", relevance=None)
        for i, score in enumerate(scores)
    ]
    blocks = examples.side_by_side(made_up.table(*rows, judges=("likelihood",)), ["student"], judge)
    table = next(b for b in blocks if isinstance(b, Table))
    return [f"{plain(line[0])} {plain(line[2]).split(' (')[0]}" for line in table.lines]


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
    policies = ["student", "teacher", "llama3-8b", "never asked"]
    blocks = examples.side_by_side(made_up.table(*rows), policies, None)
    table = next(b for b in blocks if isinstance(b, Table))
    assert table.heads == ["student's", "intent", *policies]
    assert [plain(cell).split(" (")[0] for cell in table.lines[0][2:]] == ["student 0", "teacher 0", "llama3-8b 0", "-"]


def test_the_short_table_fits_a_terminal_starts_with_the_claim_and_names_what_missed() -> None:
    document = made_up.document(("text_to_template", "a task with a very long name indeed", "x"))
    document.policies["student"].model = "runs/" + "long/" * 30
    lines = report.short_table(document).splitlines()
    assert max(map(len, lines)) <= report.WIDTH
    assert lines[0].startswith("claim: open. Relevance is within 6%")
    text = "\n".join(lines)
    assert "MISSED     80% of prompts land within two words: 71.0%" in text
    assert "104.0M parameters, 4,100 tokens/s, latency p50 40 ms" in text
    assert "judge likelihood: validated; AUC shuffled 0.93, echo 0.35" in text
    assert "judge rubric: NOT VALIDATED; AUC shuffled 0.66" in text
    assert "echo:" not in text  # a trivial baseline has no model
