"""Examples for the report, chosen by rule: best, median, worst and one at random."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from udrl.evaluate.outputs import JUDGE, STUDENT, Columns, columns
from udrl.evaluate.report.blocks import Block, Heading, Paragraph, Span, Table, Text


def side_by_side(outputs: pa.Table, policies: Sequence[str], judge: str | None, seed: int = 0) -> list[Block]:
    """Per task the intents with the student's best, median and worst prompt, and one at random, each policy beside it.

    ``judge`` names the judge that ranks; relevance does where there is none or where it was not asked.
    """
    rows = columns(outputs)
    scores = rows.get(f"{JUDGE}{judge}", np.full(outputs.num_rows, np.nan))
    mine = (rows["policy"] == STUDENT) & (rows["probe"] == "default")
    judged = bool((~np.isnan(scores[mine])).any())
    ranking = scores if judged else rows["relevance"]
    others = [policy for policy in policies if policy != STUDENT]
    texts = {name: outputs[name].to_pylist() for name in ("intent", "prompt", "reason")}
    found: list[Block] = [
        Paragraph(
            "Chosen by rule, not by eye: of each policy its first prompt to the intent; the student's accepted ones ranked by "
            f"{f'the judge {judge}' if judged else 'relevance'}; one more intent drawn from all (seed {seed})."
        )
    ]
    for task in sorted(set(rows["task"])):
        first = _first_rows(rows, task)
        chosen = _chosen(first.get(STUDENT, {}), rows["rejected"], ranking, seed)
        lines: list[Sequence[Text]] = []
        for label, i in chosen.items():
            beside = [first.get(policy, {}).get(int(rows["intent_id"][i])) for policy in others]
            cells = [_cell(rows, texts, scores, k) for k in (i, *beside)]
            lines.append([Span(label, "strong"), texts["intent"][i] or "", *cells])
        if lines:
            found += [Heading(3, Span(task, "code")), Table(["student's", "intent", STUDENT, *others], lines, prose=True)]
    return found


def _chosen(mine: dict[int, int], rejected: np.ndarray, ranking: np.ndarray, seed: int) -> dict[str, int]:
    """Rows of the student's outputs (intent -> row) by what they are shown for."""
    rows = sorted(mine.values())
    if not rows:
        return {}
    ranked = [i for i in rows if not rejected[i] and not np.isnan(ranking[i])]
    ranked.sort(key=lambda i: (-ranking[i], i))
    middle = {"best": ranked[0], "median": ranked[len(ranked) // 2], "worst": ranked[-1]} if ranked else {}
    return {**middle, "random": rows[int(np.random.default_rng(seed).integers(len(rows)))]}


def _first_rows(rows: Columns, task: str) -> dict[str, dict[int, int]]:
    """Per policy the row of each intent's lowest variation in the default probe."""
    first: dict[str, dict[int, int]] = {}
    here = (rows["task"] == task) & (rows["probe"] == "default")
    for i in np.lexsort((rows["variation"], rows["intent_id"])):
        if here[i]:
            first.setdefault(rows["policy"][i], {}).setdefault(int(rows["intent_id"][i]), int(i))
    return first


def _cell(rows: Columns, texts: dict[str, list[str]], scores: np.ndarray, i: int | None) -> Text:
    if i is None:
        return "-"
    if rows["rejected"][i]:
        return Span(f"rejected: {texts['reason'][i] or 'empty'}", "bad")
    facts = [f"{rows['n_words'][i]} words", f"relevance {rows['relevance'][i]:.2f}"]
    facts += [] if np.isnan(scores[i]) else [f"judge {scores[i]:+.2f}"]
    return [texts["prompt"][i], " ", Span(f"({', '.join(facts)})", "soft")]
