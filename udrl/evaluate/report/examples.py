"""Choose the report's examples: of each task the student's best, median and worst prompt, and a random one."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from udrl.evaluate.document import EvaluationDocument
from udrl.evaluate.formatting import DASH, escape_markdown
from udrl.evaluate.outputs import JUDGE, STUDENT, Columns, columns
from udrl.evaluate.report.selection import writers
from udrl.text import markdown_table


def example_tables(document: EvaluationDocument, outputs: pa.Table, judge: str | None) -> dict[str, str]:
    """Return a Markdown table of each task, with the other policies' prompts for the same intents.

    ``judge`` ranks the student's accepted prompts; relevance does if it is None or has no scores.
    """
    rows = columns(outputs)
    intents = outputs["intent"].to_pylist()
    scores = rows.get(f"{JUDGE}{judge}", np.full(outputs.num_rows, np.nan))
    of_student = (rows["policy"] == STUDENT) & (rows["probe"] == "default")
    ranking = rows["relevance"] if np.isnan(scores[of_student]).all() else scores
    policies = writers(document)
    tables = {}
    for task in sorted(set(rows["task"])):
        first_rows = _first_rows(rows, task)
        chosen = _choose(sorted(first_rows.get(STUDENT, {}).values()), rows["rejected"], ranking, document.seed)
        lines = []
        for label, row in chosen.items():
            places = [first_rows.get(policy, {}).get(int(rows["intent_id"][row])) for policy in policies]
            cells = [_example(rows, scores, place) for place in places]
            lines.append([f"**{label}**", escape_markdown(intents[row] or ""), *cells])
        if lines:
            header = ["student's", "intent", *map(escape_markdown, policies)]
            tables[task] = markdown_table(header, lines, len(header), escaped=True)
    return tables


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


def _example(rows: Columns, scores: np.ndarray, row: int | None) -> str:
    if row is None:
        return DASH
    if rows["rejected"][row]:
        return f"**rejected**: {escape_markdown(rows['reason'][row] or 'empty')}"
    remarks = [f"{rows['n_words'][row]} words", f"relevance {rows['relevance'][row]:.2f}"]
    if not np.isnan(scores[row]):
        remarks.append(f"judge {scores[row]:.2f}")
    return f"{escape_markdown(rows['prompt'][row])} *({', '.join(remarks)})*"
