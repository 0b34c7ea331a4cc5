"""Examples for the report, chosen by rule: best, median, worst and a random one."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from udrl.evaluate.outputs import JUDGE, STUDENT, Columns, columns
from udrl.evaluate.report.blocks import Block, Heading, Paragraph, Span, Table, Text


def side_by_side(outputs: pa.Table, policies: Sequence[str], judge: str | None, seed: int = 0) -> list[Block]:
    """Return per task the intents of the student's best, median and worst prompt and a random one, with every policy's prompt.

    ``judge`` names the judge that ranks; relevance ranks if it is None or has no scores.
    """
    rows = columns(outputs)
    scores = rows.get(f"{JUDGE}{judge}", np.full(outputs.num_rows, np.nan))
    of_student = (rows["policy"] == STUDENT) & (rows["probe"] == "default")
    is_judged = bool((~np.isnan(scores[of_student])).any())
    ranking = scores if is_judged else rows["relevance"]
    others = [policy for policy in policies if policy != STUDENT]
    texts = {name: outputs[name].to_pylist() for name in ("intent", "prompt", "reason")}
    blocks: list[Block] = [
        Paragraph(
            "Chosen by rule, not by eye: each policy's first prompt for the intent; the student's accepted prompts ranked by"
            f" {f'the judge {judge}' if is_judged else 'relevance'}; one more intent is drawn from all (seed {seed})."
        )
    ]
    for task in sorted(set(rows["task"])):
        first_rows = _first_rows(rows, task)
        student_rows = sorted(first_rows.get(STUDENT, {}).values())
        lines: list[Sequence[Text]] = []
        for label, row in _choose(student_rows, rows["rejected"], ranking, seed).items():
            intent = int(rows["intent_id"][row])
            other_rows = [first_rows.get(policy, {}).get(intent) for policy in others]
            cells = [_cell(rows, texts, scores, place) for place in (row, *other_rows)]
            lines.append([Span(label, "strong"), texts["intent"][row] or "", *cells])
        if lines:
            blocks += [Heading(3, Span(task, "code")), Table(["student's", "intent", STUDENT, *others], lines, prose=True)]
    return blocks


def _choose(rows: Sequence[int], rejected: np.ndarray, ranking: np.ndarray, seed: int) -> dict[str, int]:
    """Return the rows to show by the reason why they are shown."""
    if not rows:
        return {}
    ranked = [row for row in rows if not rejected[row] and not np.isnan(ranking[row])]
    ranked.sort(key=lambda row: (-ranking[row], row))
    by_rank = {"best": ranked[0], "median": ranked[len(ranked) // 2], "worst": ranked[-1]} if ranked else {}
    return {**by_rank, "random": rows[int(np.random.default_rng(seed).integers(len(rows)))]}


def _first_rows(rows: Columns, task: str) -> dict[str, dict[int, int]]:
    """Return policy -> intent -> row of its lowest variation in the default probe."""
    first: dict[str, dict[int, int]] = {}
    in_task = (rows["task"] == task) & (rows["probe"] == "default")
    for row in np.lexsort((rows["variation"], rows["intent_id"])):
        if in_task[row]:
            first.setdefault(rows["policy"][row], {}).setdefault(int(rows["intent_id"][row]), int(row))
    return first


def _cell(rows: Columns, texts: dict[str, list[str]], scores: np.ndarray, row: int | None) -> Text:
    if row is None:
        return "-"
    if rows["rejected"][row]:
        return Span(f"rejected: {texts['reason'][row] or 'empty'}", "bad")
    remarks = [f"{rows['n_words'][row]} words", f"relevance {rows['relevance'][row]:.2f}"]
    if not np.isnan(scores[row]):
        remarks.append(f"judge {scores[row]:+.2f}")
    return [texts["prompt"][row], " ", Span(f"({', '.join(remarks)})", "soft")]
