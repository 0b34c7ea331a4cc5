"""Asks the judges of a recipe about the outputs, and validates each judge on true pairs and controls in the same pass."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import pyarrow as pa

from udrl.context import StageContext
from udrl.evaluate.document import JudgeProfile
from udrl.evaluate.judges import pairwise
from udrl.evaluate.judges.answers import answer_questions, question
from udrl.evaluate.judges.validation import make_controls, nan_mean, sample_per_task, validate, validate_pairwise
from udrl.evaluate.outputs import JUDGE, PAIRWISE, STUDENT, TEACHER
from udrl.policies.policy import Row
from udrl.recipe import Judge, Recipe
from udrl.run import EvaluationPaths
from udrl.scoring import rubric
from udrl.tasks import Task

JUDGED_PROBES = ("default", "reward")  # probes that pointwise judges see
MAX_TRUE_PAIRS = 50  # true pairs a task that a judge is validated on
UNITS = {
    "likelihood": "nats per intent token",
    "embedding": "cosine",
    "rubric": "score, 0 to 1",
    "pairwise": "share preferred",
}


@dataclass(frozen=True)
class JudgedOutputs:
    """``outputs`` has a float32 column ``judge_<name>`` for each pointwise judge, NaN in other probes or if it failed."""

    outputs: pa.Table
    comparisons: pa.Table  # of udrl.evaluate.outputs.PAIRWISE
    judges: dict[str, JudgeProfile]


@dataclass(frozen=True)
class _Panel:
    """What all judges of one evaluation share."""

    recipe: Recipe
    tasks: Sequence[Task]
    evaluation: EvaluationPaths
    rows: list[Row]  # the outputs
    true_pairs: list[Row]
    controls: pa.Table


def ask_judges(recipe: Recipe, tasks: Sequence[Task], outputs: pa.Table, evaluation: EvaluationPaths) -> JudgedOutputs:
    """Ask every judge of the recipe about the outputs, and validate it.

    Pointwise judges score the accepted rows of :data:`JUDGED_PROBES`; a rejected row gets their mean score for prompts of
    other intents. Pairwise judges compare the student with every other policy; a pair with a rejected output is settled
    without them. ``outputs`` has the columns of :data:`~udrl.evaluate.outputs.OUTPUTS`.

    Raises:
        UserError: a judge's model is missing or can't be placed.
        StalledError: a judge did not answer for ``recipe.watchdog_minutes``.
    """
    rows = outputs.to_pylist()
    pairs = _true_pairs(rows, recipe.seed)
    intents, prompts, pair_tasks = ([row[name] for row in pairs] for name in ("intent", "prompt", "task"))
    controls = make_controls(intents, prompts, pair_tasks, recipe.seed)
    panel = _Panel(recipe, tasks, evaluation, rows, pairs, controls)
    comparisons = [PAIRWISE.empty_table()]
    profiles: dict[str, JudgeProfile] = {}
    for judge in recipe.evaluate.judges:
        if judge.kind == "pairwise":
            table, profiles[judge.display_name] = _ask_pairwise(judge, panel, outputs)
            comparisons.append(table)
        else:
            column, profiles[judge.display_name] = _ask_pointwise(judge, panel)
            outputs = outputs.append_column(JUDGE + judge.display_name, pa.array(column, pa.float32()))
    return JudgedOutputs(outputs, pa.concat_tables(comparisons), profiles)


def _true_pairs(rows: Sequence[Row], seed: int) -> list[Row]:
    """At most :data:`MAX_TRUE_PAIRS` accepted prompts a task: the teacher's, or the student's if the teacher has none."""
    accepted = [row for row in rows if row["probe"] == "default" and _is_accepted(row)]
    by_policy = {name: [row for row in accepted if row["policy"] == name] for name in (TEACHER, STUDENT)}
    candidates = by_policy[TEACHER] or by_policy[STUDENT]
    return [candidates[i] for i in sample_per_task([row["task"] for row in candidates], MAX_TRUE_PAIRS, seed)]


def _is_accepted(row: Row) -> bool:
    return bool(row["prompt"]) and not row["reason"]


def _ask_pointwise(judge: Judge, panel: _Panel) -> tuple[np.ndarray, JudgeProfile]:
    """The judge's column of shape (outputs,), and its profile."""
    judged = [i for i, row in enumerate(panel.rows) if row["probe"] in JUDGED_PROBES]
    accepted = [i for i in judged if _is_accepted(panel.rows[i])]
    rejected = [i for i in judged if not _is_accepted(panel.rows[i])]
    controls = [{**row, "intent_id": panel.true_pairs[row["pair"]]["intent_id"]} for row in panel.controls.to_pylist()]
    pairs = [*(panel.rows[i] for i in accepted), *panel.true_pairs, *controls]
    scores, parse_failures = score_pairs(judge, pairs, panel.recipe, panel.tasks, panel.evaluation)
    own, true, control = np.split(scores, [len(accepted), len(accepted) + len(panel.true_pairs)])
    validation = validate(true, control, panel.controls, [row["task"] for row in panel.true_pairs])
    column = np.full(len(panel.rows), np.nan)
    column[accepted] = own
    column[rejected] = np.nan_to_num(validation.unrelated_score)  # refusing is as good as a prompt for another intent
    return column, _profile(judge, panel, parse_failures=parse_failures, **asdict(validation))


def _ask_pairwise(judge: Judge, panel: _Panel, outputs: pa.Table) -> tuple[pa.Table, JudgeProfile]:
    """The judge's comparisons as :data:`~udrl.evaluate.outputs.PAIRWISE`, and its profile."""
    pairs = pairwise.pairs_to_compare(outputs, panel.recipe.evaluate.pairs, panel.recipe.seed)
    settled = [pairwise.settle_without_judge(_is_accepted(student), _is_accepted(other)) for student, other in pairs]
    unsettled = [{**student, "other_prompt": other["prompt"]}
                 for (student, other), verdict in zip(pairs, settled, strict=True) if verdict is None]  # fmt: skip
    controls = [{**panel.true_pairs[row["pair"]], "other_prompt": row["prompt"]} for row in panel.controls.to_pylist()]
    comparisons, parse_failures = compare_pairs(judge, [*unsettled, *controls], panel.recipe, panel.tasks, panel.evaluation)
    own, control = comparisons[: len(unsettled)], comparisons[len(unsettled) :]
    answers = iter(own)
    verdicts = [next(answers) if verdict is None else pairwise.Comparison(verdict, verdict, True) for verdict in settled]
    rows = [
        {"judge": judge.display_name, **{name: student[name] for name in ("task", "intent_id", "policy", "variation")}}
        | {"other": other["policy"], **verdict._asdict()}
        for (student, other), verdict in zip(pairs, verdicts, strict=True)
    ]
    preferences = [(one.first + one.second) / 2 if one.parsed else math.nan for one in control]
    validation = validate_pairwise(np.array(preferences, dtype=float), panel.controls)
    bias = nan_mean(np.array([one.first - one.second if one.parsed else math.nan for one in own], dtype=float))
    profile = _profile(judge, panel, parse_failures=parse_failures, position_bias=bias, **asdict(validation))
    return pa.Table.from_pylist(rows, schema=PAIRWISE), profile


def _profile(judge: Judge, panel: _Panel, **values: object) -> JudgeProfile:
    is_teacher = judge.model == panel.recipe.teacher.model
    settings = {"kind": judge.kind, "model": judge.model, "unit": UNITS[judge.kind], "is_teacher": is_teacher}
    return JudgeProfile.model_validate({**settings, **values})


# ---- one judge, any texts


def score_pairs(
    judge: Judge, pairs: Sequence[Row], recipe: Recipe, tasks: Sequence[Task], evaluation: EvaluationPaths
) -> tuple[np.ndarray, float | None]:
    """Score pairs of intent and prompt (rows with intent_id, intent, task and prompt) by a pointwise judge.

    Returns:
        The scores in the judge's unit, float64 of shape (pairs,), NaN if a text is empty or the judge failed; and the share
        of a rubric's judgments with little probability on scores, None for other kinds.
    """
    questions = [question(row, row["prompt"]) if row["prompt"].strip() and row["intent"].strip() else None for row in pairs]
    by_id = answer_questions(judge, [q for q in questions if q], evaluation, tasks, StageContext.of(recipe))
    answers = [by_id[q["episode_id"]] if q else (math.nan, math.nan) for q in questions]
    scores, masses = (np.array([answer[i] for answer in answers], dtype=np.float64) for i in (0, 1))
    if judge.kind != "rubric":
        return scores, None
    scores[masses == 0] = np.nan  # the scoring pass writes 0, so that training does not learn it as good; here it is unknown
    return scores, nan_mean(np.where(np.isnan(masses), np.nan, masses < rubric.MIN_MASS))


def compare_pairs(
    judge: Judge, pairs: Sequence[Row], recipe: Recipe, tasks: Sequence[Task], evaluation: EvaluationPaths
) -> tuple[list[pairwise.Comparison], float]:
    """Compare ``prompt`` with ``other_prompt`` of each row in both orders; no text may be empty.

    Returns:
        A comparison for each row, and the share of answers that were neither A nor B.
    """
    orders = [
        (question(row, row["prompt"], row["other_prompt"]), question(row, row["other_prompt"], row["prompt"])) for row in pairs
    ]
    by_id = answer_questions(judge, [q for both in orders for q in both], evaluation, tasks, StageContext.of(recipe))
    answers = [(by_id[one["episode_id"]], by_id[two["episode_id"]]) for one, two in orders]
    unparsed = [mass < rubric.MIN_MASS for both in answers for _, mass in both]
    return [pairwise.combine_orders(*both) for both in answers], nan_mean(np.array(unparsed, dtype=float))
