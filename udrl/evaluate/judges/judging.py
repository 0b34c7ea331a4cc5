"""Asks the judges of a recipe about the outputs, and validates each judge on true pairs and controls in the same pass."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from udrl import models
from udrl.context import StageContext
from udrl.errors import UserError
from udrl.evaluate.document import JudgeProfile, Relation
from udrl.evaluate.judges.answers import answer_questions, question
from udrl.evaluate.judges.controls import Pair, gold_pairs, make_controls, sample_per_task
from udrl.evaluate.judges.validation import areas_by_task, is_validated, nan_mean
from udrl.evaluate.outputs import JUDGE, STUDENT, TEACHER
from udrl.hashing import stable_id
from udrl.policies.policy import Row
from udrl.recipe import Judge, Recipe
from udrl.run import EvaluationPaths
from udrl.scoring import rubric
from udrl.tasks import Task, shipped_tasks

JUDGED_PROBES = ("default", "reward")
MAX_TRUE_PAIRS = 25  # true pairs of the run, a task, that a judge is validated on
MAX_GOLD_PAIRS = 25  # hand-written pairs, a task, that a judge with a language model is validated on; others see all


@dataclass(frozen=True)
class JudgedOutputs:
    """``outputs`` has a float32 column ``judge_<name>`` for each judge, NaN in other probes or if it failed."""

    outputs: pa.Table
    judges: dict[str, JudgeProfile]


@dataclass(frozen=True)
class _PairSet:
    """True pairs and their controls, as rows to score."""

    pairs: list[Pair]
    controls: pa.Table

    @classmethod
    def of(cls, pairs: Sequence[Pair], seed: int, donors: Sequence[Pair] = ()) -> "_PairSet":
        return cls(list(pairs), make_controls(pairs, seed, donors))

    def true_rows(self) -> list[Row]:
        return [{**pair._asdict(), "intent_id": stable_id(pair.intent)} for pair in self.pairs]

    def control_rows(self) -> list[Row]:
        return [{**row, "intent_id": stable_id(row["intent"])} for row in self.controls.to_pylist()]


def ask_judges(recipe: Recipe, tasks: Sequence[Task], outputs: pa.Table, evaluation: EvaluationPaths) -> JudgedOutputs:
    """Ask every judge of the recipe about the outputs, and validate it.

    Judges score the accepted rows of :data:`JUDGED_PROBES`; a rejected row gets their mean score for prompts of other intents.
    ``outputs`` has the columns of :data:`~udrl.evaluate.outputs.OUTPUTS`.

    Raises:
        UserError: a judge's model is missing or can't be placed.
        StalledError: a judge did not answer for ``recipe.watchdog_minutes``.
    """
    rows = outputs.to_pylist()
    own = _PairSet.of(_true_pairs(rows, recipe.seed), recipe.seed)
    donors = [pair for name in shipped_tasks() for pair in gold_pairs(name)]
    profiles: dict[str, JudgeProfile] = {}
    for judge in recipe.evaluate.judges:
        limit = MAX_GOLD_PAIRS if judge.kind == "rubric" else None
        gold = _PairSet.of([pair for task in tasks for pair in gold_pairs(task.name)[:limit]], seed=0, donors=donors)
        column, profiles[judge.display_name] = _ask_judge(judge, rows, own, gold, recipe, tasks, evaluation)
        outputs = outputs.append_column(JUDGE + judge.display_name, pa.array(column, pa.float32()))
    return JudgedOutputs(outputs, profiles)


def _true_pairs(rows: Sequence[Row], seed: int) -> list[Pair]:
    """At most :data:`MAX_TRUE_PAIRS` accepted prompts a task: the teacher's, or the student's if the teacher has none."""
    accepted = [row for row in rows if row["probe"] == "default" and _is_accepted(row)]
    by_policy = {name: [row for row in accepted if row["policy"] == name] for name in (TEACHER, STUDENT)}
    candidates = by_policy[TEACHER] or by_policy[STUDENT]
    sampled = [candidates[i] for i in sample_per_task([row["task"] for row in candidates], MAX_TRUE_PAIRS, seed)]
    return [Pair(row["intent"], row["task"], row["prompt"]) for row in sampled]


def _is_accepted(row: Row) -> bool:
    return bool(row["prompt"]) and not row["reason"]


def _ask_judge(
    judge: Judge,
    rows: Sequence[Row],
    own: _PairSet,
    gold: _PairSet,
    recipe: Recipe,
    tasks: Sequence[Task],
    evaluation: EvaluationPaths,
) -> tuple[np.ndarray, JudgeProfile]:
    """Return the judge's column of shape (rows,), and its profile."""
    judged = [i for i, row in enumerate(rows) if row["probe"] in JUDGED_PROBES]
    accepted = [i for i in judged if _is_accepted(rows[i])]
    rejected = [i for i in judged if not _is_accepted(rows[i])]
    parts = [[rows[i] for i in accepted], own.true_rows(), own.control_rows(), gold.true_rows(), gold.control_rows()]
    scores, parse_failures = score_pairs(judge, [row for part in parts for row in part], recipe, tasks, evaluation)
    scored, own_true, own_controls, gold_true, gold_controls = np.split(scores, np.cumsum([len(part) for part in parts])[:-1])
    own_areas = areas_by_task(own_true, own_controls, own.controls, [pair.task for pair in own.pairs])
    gold_areas = areas_by_task(gold_true, gold_controls, gold.controls, [pair.task for pair in gold.pairs])
    unrelated = nan_mean(own_controls[np.asarray(own.controls["kind"].to_pylist(), dtype=object) == "shuffled"])
    column = np.full(len(rows), np.nan)
    column[accepted] = scored
    column[rejected] = np.nan_to_num(unrelated)  # refusing is as good as a prompt for another intent
    # The gold set decides whether the judge is validated; without gold, the run's own pairs do.
    validated = is_validated(gold_areas[None] or own_areas[None])
    profile = JudgeProfile(
        kind=judge.kind,
        model=judge.model if judge.kind != "coverage" else "-",
        relation=relate(judge, recipe),
        validated=validated,
        ratio_scale=validated and nan_mean(own_true) > unrelated,
        unrelated_score=unrelated,
        gold=gold_areas.pop(None),
        gold_tasks=gold_areas,
        gold_pairs=int((~np.isnan(gold_true)).sum()),
        auc=own_areas.pop(None),
        tasks=own_areas,
        pairs=int((~np.isnan(own_true)).sum()),
        parse_failures=parse_failures,
    )
    return column, profile


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


def score_pairs(
    judge: Judge, pairs: Sequence[Row], recipe: Recipe, tasks: Sequence[Task], evaluation: EvaluationPaths
) -> tuple[np.ndarray, float | None]:
    """Score pairs of intent and prompt (rows with intent_id, intent, task and prompt).

    Returns:
        The scores, float64 of shape (pairs,), NaN if a text is empty or the judge failed; and the share of a rubric's judgments
        with little probability on scores, None for other kinds.
    """
    questions = [question(row) if row["prompt"].strip() and row["intent"].strip() else None for row in pairs]
    by_id = answer_questions(judge, [q for q in questions if q], evaluation, tasks, StageContext.of(recipe))
    answers = [by_id[q["episode_id"]] if q else (math.nan, math.nan) for q in questions]
    scores, masses = (np.array([answer[i] for answer in answers], dtype=np.float64) for i in (0, 1))
    if judge.kind != "rubric":
        return scores, None
    scores[masses == 0] = np.nan  # the scoring pass writes 0, so that training does not learn it as good; here it is unknown
    return scores, nan_mean(np.where(np.isnan(masses), np.nan, masses < rubric.MIN_MASS))
