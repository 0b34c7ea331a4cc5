"""Examples for the report, chosen by rule: best, median, worst and one at random."""

import numpy as np
import pyarrow as pa

from udrl.evaluation.control import Columns
from udrl.evaluation.markdown import code, escape, table
from udrl.evaluation.metrics import STUDENT, TEACHER, columns


def side_by_side(outputs: pa.Table, seed: int = 0) -> str:
    """Per task the intents with the student's best, median and worst prompt, and one at random, beside the teacher's."""
    rows = columns(outputs)
    by = "relevance" if np.isnan(rows["judge"]).all() else "judge"
    parts = [
        "Chosen by rule, not by eye: of each policy its first prompt to the intent; the student's accepted ones ranked by "
        f"{'the independent judge' if by == 'judge' else 'relevance'}; one more intent drawn from all (seed {seed})."
    ]
    texts = {name: outputs[name].to_pylist() for name in ("intent", "prompt", "reason")}
    for task in sorted(set(rows["task"])):
        first = _first_rows(rows, task)
        mine = sorted(first[STUDENT].values())
        if not mine:
            continue
        ranked = [i for i in mine if not rows["rejected"][i] and not np.isnan(rows[by][i])]
        ranked.sort(key=lambda i: (-rows[by][i], i))
        middle = {"best": ranked[0], "median": ranked[len(ranked) // 2], "worst": ranked[-1]} if ranked else {}
        chosen = {**middle, "random": mine[int(np.random.default_rng(seed).integers(len(mine)))]}
        lines = []
        for label, i in chosen.items():
            other = first[TEACHER].get(int(rows["intent_id"][i]))
            lines.append(
                [label, escape(texts["intent"][i]), _cell(rows, texts, i), "-" if other is None else _cell(rows, texts, other)]
            )
        parts += [f"### {code(task)}", table(["", "intent", "student", "teacher"], lines)]
    return "\n\n".join(parts)


def _first_rows(rows: Columns, task: str) -> dict[str, dict[int, int]]:
    """Per policy the row of each intent's lowest variation in the default probe."""
    first: dict[str, dict[int, int]] = {STUDENT: {}, TEACHER: {}}
    here = (rows["task"] == task) & (rows["probe"] == "default")
    for i in np.lexsort((rows["variation"], rows["intent_id"])):
        if here[i] and rows["policy"][i] in first:
            first[rows["policy"][i]].setdefault(int(rows["intent_id"][i]), int(i))
    return first


def _cell(rows: Columns, texts: dict[str, list[str]], i: int) -> str:
    if rows["rejected"][i]:
        return f"*rejected: {escape(texts['reason'][i] or 'empty')}*"
    judge = "" if np.isnan(rows["judge"][i]) else f", judge {rows['judge'][i]:+.2f}"
    return f"{escape(texts['prompt'][i])} *({rows['n_words'][i]} words, relevance {rows['relevance'][i]:.2f}{judge})*"
