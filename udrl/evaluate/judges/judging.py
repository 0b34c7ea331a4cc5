"""Asks the judges of a recipe about the outputs, and validates each judge on true pairs and controls in the same pass."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from udrl import models
from udrl.context import StageContext
from udrl.errors import UserError
from udrl.evaluate.document import JudgeProfile, Relation
from udrl.evaluate.judges import pairwise
from udrl.evaluate.judges.answers import MODEL_FREE, answer_questions, question
from udrl.evaluate.judges.controls import Pair, gold_pairs, make_controls, sample_per_task
from udrl.evaluate.judges.validation import Areas, areas_by_task, is_validated, nan_mean, preferences_by_task
from udrl.evaluate.outputs import JUDGE, PAIRWISE, STUDENT, TEACHER
from udrl.hashing import stable_id
from udrl.policies.policy import Row
from udrl.recipe import Judge, Recipe
from udrl.run import EvaluationPaths
from udrl.scoring import rubric
from udrl.tasks import Task, shipped_tasks

JUDGED_PROBES = ("default", "reward")  # probes that pointwise judges see
MAX_TRUE_PAIRS = 25  # true pairs of the run, a task, that a judge is validated on
MAX_GOLD_PAIRS = 25  # hand-written pairs, a task, that a judge with a model is validated on; one without sees all
UNITS = {
    "gated": "0 to 1",
    "coverage": "0 to 1",
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
class _PairSet:
    """True pairs and their controls, as questions to a judge."""

    pairs: list[Pair]
    controls: pa.Table

    @classmethod
    def of(cls, pairs: Sequence[Pair], seed: int, donors: Sequence[Pair] = ()) -> "_PairSet":
        return cls(list(pairs), make_controls(pairs, seed, donors))

    def true_rows(self) -> list[Row]:
        return [{**pair._asdict(), "intent_id": stable_id(pair.intent)} for pair in self.pairs]

    def control_rows(self) -> list[Row]:
        return [{**row, "intent_id": stable_id(row["intent"])} for row in self.controls.to_pylist()]

    def comparisons(self) -> list[Row]:
        """Return the true prompt of each control, with the control as the other prompt."""
        true = self.true_rows()
        return [{**true[row["pair"]], "other_prompt": row["prompt"]} for row in self.controls.to_pylist()]


@dataclass(frozen=True)
class _Panel:
    """What all judges of one evaluation share."""

    recipe: Recipe
    tasks: Sequence[Task]
    evaluation: EvaluationPaths
    rows: list[Row]  # the outputs
    own: _PairSet

    def gold(self, judge: Judge) -> _PairSet:
        donors = [pair for name in shipped_tasks() for pair in gold_pairs(name)]
        return _PairSet.of(gold_pairs_for(judge, self.tasks), seed=0, donors=donors)


def gold_pairs_for(judge: Judge, tasks: Sequence[Task]) -> list[Pair]:
    """Return the hand-written pairs that validate a judge: all, or a sample for one that takes long."""
    limit = None if judge.kind in MODEL_FREE else MAX_GOLD_PAIRS
    return [pair for task in tasks for pair in gold_pairs(task.name)[:limit]]


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
    panel = _Panel(recipe, tasks, evaluation, rows, _PairSet.of(_true_pairs(rows, recipe.seed), recipe.seed))
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


def _true_pairs(rows: Sequence[Row], seed: int) -> list[Pair]:
    """At most :data:`MAX_TRUE_PAIRS` accepted prompts a task: the teacher's, or the student's if the teacher has none."""
    accepted = [row for row in rows if row["probe"] == "default" and _is_accepted(row)]
    by_policy = {name: [row for row in accepted if row["policy"] == name] for name in (TEACHER, STUDENT)}
    candidates = by_policy[TEACHER] or by_policy[STUDENT]
    sampled = [candidates[i] for i in sample_per_task([row["task"] for row in candidates], MAX_TRUE_PAIRS, seed)]
    return [Pair(row["intent"], row["task"], row["prompt"]) for row in sampled]


def _is_accepted(row: Row) -> bool:
    return bool(row["prompt"]) and not row["reason"]


def _ask_pointwise(judge: Judge, panel: _Panel) -> tuple[np.ndarray, JudgeProfile]:
    """The judge's column of shape (outputs,), and its profile."""
    judged = [i for i, row in enumerate(panel.rows) if row["probe"] in JUDGED_PROBES]
    accepted = [i for i in judged if _is_accepted(panel.rows[i])]
    rejected = [i for i in judged if not _is_accepted(panel.rows[i])]
    own, gold = panel.own, panel.gold(judge)
    parts = [[panel.rows[i] for i in accepted], own.true_rows(), own.control_rows(), gold.true_rows(), gold.control_rows()]
    scores, parse_failures = score_pairs(
        judge, [row for part in parts for row in part], panel.recipe, panel.tasks, panel.evaluation
    )
    scored, own_true, own_controls, gold_true, gold_controls = np.split(scores, np.cumsum([len(part) for part in parts])[:-1])
    own_areas = areas_by_task(own_true, own_controls, own.controls, [pair.task for pair in own.pairs])
    gold_areas = areas_by_task(gold_true, gold_controls, gold.controls, [pair.task for pair in gold.pairs])
    unrelated = nan_mean(own_controls[np.asarray(own.controls["kind"].to_pylist(), dtype=object) == "shuffled"])
    column = np.full(len(panel.rows), np.nan)
    column[accepted] = scored
    column[rejected] = np.nan_to_num(unrelated)  # refusing is as good as a prompt for another intent
    profile = _profile(
        judge,
        panel,
        own_areas,
        gold_areas,
        pairs=int((~np.isnan(own_true)).sum()),
        gold_pairs=int((~np.isnan(gold_true)).sum()),
        unrelated_score=unrelated,
        parse_failures=parse_failures,
    )
    return column, profile.model_copy(update={"ratio_scale": profile.validated and nan_mean(own_true) > unrelated})


def _ask_pairwise(judge: Judge, panel: _Panel, outputs: pa.Table) -> tuple[pa.Table, JudgeProfile]:
    """The judge's comparisons as :data:`~udrl.evaluate.outputs.PAIRWISE`, and its profile. The judge has no scale."""
    pairs = pairwise.pairs_to_compare(outputs, panel.recipe.evaluate.pairs, panel.recipe.seed)
    settled = [pairwise.settle_without_judge(_is_accepted(student), _is_accepted(other)) for student, other in pairs]
    unsettled = [{**student, "other_prompt": other["prompt"]}
                 for (student, other), verdict in zip(pairs, settled, strict=True) if verdict is None]  # fmt: skip
    own, gold = panel.own, panel.gold(judge)
    parts = [unsettled, own.comparisons(), gold.comparisons()]
    comparisons, parse_failures = compare_pairs(
        judge, [row for part in parts for row in part], panel.recipe, panel.tasks, panel.evaluation
    )
    answers = comparisons[: len(unsettled)]
    preferences = np.array([_preference(one) for one in comparisons[len(unsettled) :]], dtype=float)
    own_preferences, gold_preferences = np.split(preferences, [own.controls.num_rows])
    remaining = iter(answers)
    verdicts = [next(remaining) if verdict is None else pairwise.Comparison(verdict, verdict, True) for verdict in settled]
    rows = [
        {"judge": judge.display_name, **{name: student[name] for name in ("task", "intent_id", "policy", "variation")}}
        | {"other": other["policy"], **verdict._asdict()}
        for (student, other), verdict in zip(pairs, verdicts, strict=True)
    ]
    bias = nan_mean(np.array([one.first - one.second if one.parsed else math.nan for one in answers], dtype=float))
    profile = _profile(
        judge,
        panel,
        preferences_by_task(own_preferences, own.controls),
        preferences_by_task(gold_preferences, gold.controls),
        pairs=_count_judged(own.controls, own_preferences),
        gold_pairs=_count_judged(gold.controls, gold_preferences),
        parse_failures=parse_failures,
        position_bias=bias,
    )
    return pa.Table.from_pylist(rows, schema=PAIRWISE), profile


def _preference(comparison: pairwise.Comparison) -> float:
    return (comparison.first + comparison.second) / 2 if comparison.parsed else math.nan


def _count_judged(controls: pa.Table, preferences: np.ndarray) -> int:
    return len(np.unique(controls["pair"].to_numpy()[~np.isnan(preferences)]))


def _profile(
    judge: Judge, panel: _Panel, own: dict[str | None, Areas], gold: dict[str | None, Areas], **values: Any
) -> JudgeProfile:
    """Return the judge's profile. The gold set decides whether it is validated; without gold, the run's own pairs do."""
    return JudgeProfile(
        kind=judge.kind,
        model=judge.model if judge.kind != "coverage" else "-",
        unit=UNITS[judge.kind],
        relation=relate(judge, panel.recipe),
        validated=is_validated(gold.get(None) or own.get(None, {})),
        ratio_scale=False,
        gold=gold.get(None, {}),
        gold_tasks={task: areas for task, areas in gold.items() if task is not None},
        auc=own.get(None, {}),
        tasks={task: areas for task, areas in own.items() if task is not None},
        **values,
    )


def relate(judge: Judge, recipe: Recipe) -> Relation:
    """Return how a judge is related to the models of the run, by the hashes of weights and vocabularies.

    The name of a model says nothing: the teacher's folder and its id on a hub are the same model.
    """
    if judge.kind == "coverage":
        return "independent"
    rewards = recipe.rewards
    scorer = (rewards.embedder, None) if rewards.relevance == "embedding" else (rewards.judge.model, rewards.judge.revision)
    teacher = (recipe.teacher.model, recipe.teacher.revision)
    own = (judge.model, judge.revision)
    if _same_weights(own, scorer):
        return "scorer"
    if _same_weights(own, teacher):
        return "teacher"
    if any(_same_weights(own, (baseline.model, baseline.revision)) for baseline in recipe.evaluate.baselines):
        return "baseline"
    vocabularies = [models.vocabulary_hash(path) if path else None for path in map(_local_path, (judge.model, teacher[0]))]
    return "teacher's family" if vocabularies[0] is not None and vocabularies[0] == vocabularies[1] else "independent"


def _same_weights(one: tuple[str, str | None], other: tuple[str, str | None]) -> bool:
    if one == other:
        return True
    hashes = [models.weights_hash(path) if path else None for path in (_local_path(model) for model, _ in (one, other))]
    return hashes[0] is not None and hashes[0] == hashes[1]


def _local_path(model: str) -> str | None:
    """Return the model's folder or id; None if it is not there, as it may be once all its answers are."""
    try:
        return models.resolve(model)
    except UserError:
        return None


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
