"""Asking the judges of a recipe, each about all that it is to score in one pass.

A text is judged once: equal texts share a judgement, and what lies under ``<work>/judge-<name>-<mark>/`` is not asked again.
The mark covers all that a score depends on, so another model or template never takes over a score.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from udrl.context import StageContext
from udrl.evaluate.judges import judgments as store
from udrl.evaluate.judges import pairwise
from udrl.evaluate.judges.judge_passes import answers
from udrl.evaluate.judges.validation import controls, draw, mean, validate, validate_pairwise
from udrl.evaluate.outputs import JUDGE, PAIRWISE, STUDENT, TEACHER
from udrl.policies.policy import Row
from udrl.recipe import Judge, Recipe
from udrl.scoring import rubric
from udrl.tasks import Task

JUDGED = ("default", "reward")  # probes that pointwise judges see
CONTROLLED = 50  # true pairs a task that a judge is validated on
UNITS = {
    "likelihood": "nats per intent token",
    "embedding": "cosine",
    "rubric": "score, 0 to 1",
    "pairwise": "share preferred",
}
VERDICTS = pa.schema([("first", pa.float64()), ("second", pa.float64()), ("parsed", pa.bool_())])
Facts = dict[str, Any]


def ask(recipe: Recipe, tasks: Sequence[Task], outputs: pa.Table, work: str) -> tuple[pa.Table, pa.Table, dict[str, Facts]]:
    """Ask every judge of the recipe about the outputs, and find out which of them can be believed.

    Pointwise judges score the accepted rows of the probes :data:`JUDGED`; a rejected one gets their mean score for prompts of
    other intents. Pairwise judges compare the student with every other policy, and a pair in which one was rejected is
    settled without asking.

    Args:
        outputs: of :data:`~udrl.evaluate.outputs.OUTPUTS`.
        work: folder or URI of what is kept between runs.

    Returns:
        ``outputs`` with a float32 column ``judge_<name>`` for each pointwise judge, NaN in other probes or where it failed; the
        comparisons as :data:`~udrl.evaluate.outputs.PAIRWISE`; by judge what it is, and how it fared on true pairs and
        controls.

    Raises:
        UserError: a judge's model can't be found or placed.
        StalledError: a judge was silent for ``recipe.watchdog_minutes``.
    """
    rows = outputs.to_pylist()
    true = _true_pairs(rows, recipe.seed)
    made = controls([r["intent"] for r in true], [r["prompt"] for r in true], [r["task"] for r in true], recipe.seed)
    compared = [PAIRWISE.empty_table()]
    facts: dict[str, Facts] = {}
    for judge in recipe.evaluate.judges:
        what = {"kind": judge.kind, "model": judge.model, "unit": UNITS[judge.kind]}
        of_teacher = judge.model == recipe.teacher.model
        if judge.kind == "pairwise":
            table, found = _compare(judge, recipe, tasks, outputs, true, made, work)
            compared.append(table)
        else:
            column, found = _score(judge, recipe, tasks, rows, true, made, work)
            outputs = outputs.append_column(JUDGE + judge.display_name, pa.array(column, pa.float32()))
        facts[judge.display_name] = {**what, **found, "of_teacher": of_teacher}
    return outputs, pa.concat_tables(compared), facts


def _true_pairs(rows: Sequence[Row], seed: int) -> list[Row]:
    """The teacher's accepted prompts, or where it did not write the student's, at most :data:`CONTROLLED` a task."""
    default = [row for row in rows if row["probe"] == "default" and _accepted(row)]
    written = [r for r in default if r["policy"] == TEACHER] or [r for r in default if r["policy"] == STUDENT]
    return [written[i] for i in draw([row["task"] for row in written], CONTROLLED, seed)]


def _accepted(row: Row) -> bool:
    return bool(row["prompt"]) and not row["reason"]


def _score(
    judge: Judge, recipe: Recipe, tasks: Sequence[Task], rows: list[Row], true: list[Row], made: pa.Table, work: str
) -> tuple[np.ndarray, Facts]:
    """A pointwise judge's column, NaN in other probes or where it failed, and what is known of it."""
    chosen = [i for i, row in enumerate(rows) if row["probe"] in JUDGED and _accepted(row)]
    false = [{**row, "intent_id": true[row["pair"]]["intent_id"]} for row in made.to_pylist()]
    questions = [*(rows[i] for i in chosen), *true, *false]
    scores, facts = judge_pointwise(judge, _pairs(questions), work, tasks, recipe)
    mine, right, wrong = np.split(scores, [len(chosen), len(chosen) + len(true)])
    found = validate(right, wrong, made, [row["task"] for row in true])
    column = np.full(len(rows), np.nan)
    column[chosen] = mine
    refused = [i for i, row in enumerate(rows) if row["probe"] in JUDGED and not _accepted(row)]
    column[refused] = np.nan_to_num(found["unrelated"])  # as good as a prompt for something else, whatever the judge's unit
    return column, {**facts, **found}


def _pairs(rows: Sequence[Row]) -> pa.Table:
    columns = {name: [row[name] for row in rows] for name in ("intent_id", "intent", "task", "prompt")}
    return pa.table({"pair_id": pa.array(range(len(rows)), pa.int64()), **columns})


def _compare(
    judge: Judge, recipe: Recipe, tasks: Sequence[Task], outputs: pa.Table, true: list[Row], made: pa.Table, work: str
) -> tuple[pa.Table, Facts]:
    """A pairwise judge's comparisons and what is known of it."""
    pairs = pairwise.comparisons(outputs, recipe.evaluate.pairs, recipe.seed)
    settled = [pairwise.settled(_accepted(mine), _accepted(other)) for mine, other in pairs]
    first = np.array([math.nan if verdict is None else verdict for verdict in settled], dtype=np.float64)
    second, parsed = first.copy(), np.ones(len(pairs), dtype=bool)
    undecided = [i for i, verdict in enumerate(settled) if verdict is None]
    asked = [{**pairs[i][0], "other_prompt": pairs[i][1]["prompt"]} for i in undecided]
    asked += [{**true[row["pair"]], "other_prompt": row["prompt"]} for row in made.to_pylist()]
    table = _pairs(asked).append_column("other_prompt", pa.array([row["other_prompt"] for row in asked], pa.string()))
    answered, facts = judge_pairwise(judge, table, work, tasks, recipe)
    n = len(undecided)
    said = [column.to_numpy(zero_copy_only=False) for column in answered.columns]
    first[undecided], second[undecided], parsed[undecided] = (values[:n] for values in said)
    names = ("task", "intent_id", "policy", "variation")
    rows = [
        {"judge": judge.display_name, **{name: mine[name] for name in names}, "other": other["policy"]}
        | {"first": first[i], "second": second[i], "parsed": bool(parsed[i])}
        for i, (mine, other) in enumerate(pairs)
    ]
    bias = mean(np.where(parsed, first - second, np.nan)[undecided])
    controlled = np.where(said[2][n:], (said[0][n:] + said[1][n:]) / 2, np.nan)
    found = {**facts, **validate_pairwise(controlled, made), "position_bias": bias}
    return pa.Table.from_pylist(rows, schema=PAIRWISE), found


def judge_pointwise(
    judge: Judge, pairs: pa.Table, work: str, tasks: Sequence[Task], recipe: Recipe
) -> tuple[np.ndarray, Facts]:
    """Score pairs of intent and prompt.

    Args:
        pairs: columns pair_id int64, intent_id int64, intent, task, prompt.

    Returns:
        scores float64 of shape (pairs,), in the judge's unit, NaN where a text is empty or the judge failed; and
        ``parse_failures``, the share of a rubric's judgements with little probability on scores, None for other kinds.
    """
    questions = [
        store.question(row, row["prompt"]) if row["prompt"].strip() and row["intent"].strip() else None
        for row in pairs.to_pylist()
    ]
    said = answers(judge, [q for q in questions if q], work, tasks, StageContext.of(recipe))
    found = [said[q["episode_id"]] if q else (math.nan, math.nan) for q in questions]
    scores, mass = (np.array([answer[i] for answer in found], dtype=np.float64) for i in (0, 1))
    if judge.kind != "rubric":
        return scores, {"parse_failures": None}
    scores[mass == 0] = np.nan  # scoring makes it 0, so that it is not learnt as good; here it is not known
    return scores, {"parse_failures": mean(np.where(np.isnan(mass), np.nan, mass < rubric.MIN_MASS))}


def judge_pairwise(judge: Judge, table: pa.Table, work: str, tasks: Sequence[Task], recipe: Recipe) -> tuple[pa.Table, Facts]:
    """Compare ``prompt`` with ``other_prompt`` for their intent, in both orders.

    Args:
        table: columns pair_id int64, intent_id int64, intent, task, prompt, other_prompt; no text is empty.

    Returns:
        A row for each: ``first`` and ``second`` float64, the probability that ``prompt`` is preferred where it is shown first
        and where it is shown second, NaN where the judge failed; ``parsed``, whether it answered A or B in both orders. And
        ``parse_failures``, the share of answers that were neither.
    """
    rows = table.to_pylist()
    shown = [
        (store.question(row, row["prompt"], row["other_prompt"]), store.question(row, row["other_prompt"], row["prompt"]))
        for row in rows
    ]
    by_id = answers(judge, [question for both in shown for question in both], work, tasks, StageContext.of(recipe))
    said = [(by_id[one["episode_id"]], by_id[two["episode_id"]]) for one, two in shown]
    found = [pairwise.both_orders(one, two) for one, two in said]
    columns = [pa.array([row[i] for row in found], kind.type) for i, kind in enumerate(VERDICTS)]
    unparsed = mean(np.array([mass < rubric.MIN_MASS for both in said for _, mass in both], dtype=float))
    return pa.table(columns, schema=VERDICTS), {"parse_failures": unparsed}
