"""All numbers of an evaluation, as pure functions of its table of outputs.

One rule holds everywhere: a rejected or empty output counts as relevance 0, and for a judge as a prompt for another intent, for
every policy, so that refusing never pays (see :mod:`udrl.evaluate.outputs`).
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pyarrow as pa

from udrl.evaluate.document import (
    UNKNOWN,
    JudgeProfile,
    Measurements,
    PairedComparison,
    PolicyComparison,
    PolicyScores,
    Quality,
    Scope,
    TaskScope,
)
from udrl.evaluate.metrics import claim, control, diversity, novelty, wording
from udrl.evaluate.metrics.control import average
from udrl.evaluate.metrics.diversity import Embed
from udrl.evaluate.metrics.intervals import Bootstrap, Sample
from udrl.evaluate.outputs import STUDENT, Columns, columns, judge_columns, select

QUALITIES: dict[Quality, str] = {"relevance": "relevance", "coverage": wording.COVERAGE, "clean": wording.CLEAN}


def compute(
    outputs: pa.Table,
    *,
    judges: Mapping[str, JudgeProfile],
    training: Iterable[pa.Table] | None,
    embed: Embed | None,
    subject_words: Mapping[int, Sequence[str]],
    bootstrap: int = 1000,
    seed: int = 0,
) -> Measurements:
    """Measure everything that the report shows.

    Args:
        outputs: a table of :data:`~udrl.evaluate.outputs.OUTPUTS`, with a column for each judge.
        training: tables of the prompts that the student was trained on, streamed once; None: unknown.
        embed: texts -> unit vectors (texts, dimensions), for the Vendi scores.
        subject_words: words that a prompt must keep, by the id of its intent.
        bootstrap: resamples of an interval.
    """
    rows = columns(outputs)
    resampling = Bootstrap(bootstrap, seed)
    default = wording.add_wording_columns(select(rows, rows["probe"] == "default"), subject_words)
    training_prompts, default = novelty.add_copied_column(default, training)
    groups = diversity.IntentGroups.of(default["intent_id"], seed)
    writers = [policy for policy in sorted(set(default["policy"])) if not claim.is_trivial_baseline(policy)]
    by_task: dict[str, TaskScope] = {}
    diversities = []
    for task in sorted(set(rows["task"])):
        task_rows, task_default = select(rows, rows["task"] == task), select(default, default["task"] == task)
        diversities.append(diversity.measure_task(task_default, writers, embed=embed, seed=seed, groups=groups))
        by_task[task] = TaskScope(
            policies=_score_policies(task_default, resampling),
            comparisons=_compare_with_student(task_default, judges, resampling),
            diversity=diversity.with_ratios(diversities[-1]),
            length=control.length_control(_student(task_rows, "length"), resampling),
            reach=control.length_control(_student(task_rows, "reach"), resampling),
            reward=control.reward_control(_student(task_rows, "reward"), resampling),
        )
    lengths, reaches = ([getattr(task, probe) for task in by_task.values()] for probe in ("length", "reach"))
    overall = Scope(
        policies=_score_policies(default, resampling),
        comparisons=_compare_with_student(default, judges, resampling),
        diversity=diversity.average_over_tasks(diversities),
        length=control.length_control_over_tasks(_student(rows, "length"), lengths, resampling),
        reach=control.length_control_over_tasks(_student(rows, "reach"), reaches, resampling),
    )
    return Measurements(
        intents=(intents := len(np.unique(rows["intent_id"]))),
        rows=outputs.num_rows,
        bootstrap=bootstrap,
        seed=seed,
        training_prompts=training_prompts,
        overall=overall,
        tasks=by_task,
        claim=claim.decide_claim(overall, judges, intents),
        targets=claim.check_targets(overall, by_task, intents),
    )


def _student(rows: Columns, probe: str) -> Columns:
    return select(rows, (rows["probe"] == probe) & (rows["policy"] == STUDENT))


def _by_policy(rows: Columns) -> dict[str, Columns]:
    return {policy: select(rows, rows["policy"] == policy) for policy in sorted(set(rows["policy"]))}


def _sample(rows: Columns, column: str) -> Sample:
    return Sample(rows[column], rows["intent_id"])


def _score_policies(rows: Columns, bootstrap: Bootstrap) -> dict[str, PolicyScores]:
    return {policy: _scores(outputs, bootstrap) for policy, outputs in _by_policy(rows).items()}


def _scores(outputs: Columns, bootstrap: Bootstrap) -> PolicyScores:
    """Score the outputs of one policy."""
    accepted = select(outputs, ~outputs["rejected"])
    return PolicyScores(
        n=len(outputs["intent_id"]),
        rejected=average(outputs["rejected"]),
        reasons=Counter(reason or "empty" for reason in outputs["reason"][outputs["rejected"]]),
        words=average(accepted["n_words"]),
        **{name: bootstrap.mean(_sample(outputs, column)) for name, column in QUALITIES.items()},
        accepted={name: bootstrap.mean(_sample(accepted, column)) for name, column in QUALITIES.items()},
        copied_8=bootstrap.mean(_sample(outputs, novelty.COPIED_8)) if novelty.COPIED_8 in outputs else UNKNOWN,
        judges={judge: bootstrap.mean(_sample(outputs, column)) for judge, column in judge_columns(outputs).items()},
    )


def _compare_with_student(
    rows: Columns, judges: Mapping[str, JudgeProfile], bootstrap: Bootstrap
) -> dict[str, PolicyComparison]:
    """Compare the student with each of the other policies."""
    by_policy = _by_policy(rows)
    student = by_policy.pop(STUDENT, None)
    if student is None:
        return {}
    return {policy: _compare_policies(student, other, judges, bootstrap) for policy, other in by_policy.items()}


def _compare_policies(
    student: Columns, other: Columns, judges: Mapping[str, JudgeProfile], bootstrap: Bootstrap
) -> PolicyComparison:
    accepted, other_accepted = (select(rows, ~rows["rejected"]) for rows in (student, other))
    return PolicyComparison(
        **{name: _compare(student, other, column, bootstrap) for name, column in QUALITIES.items()},
        # The harder reading for a student that is rejected less often.
        relevance_accepted=_compare(accepted, other_accepted, "relevance", bootstrap),
        copied_8=_compare(student, other, novelty.COPIED_8, bootstrap) if novelty.COPIED_8 in student else None,
        judges={
            judge: _compare_by_judge(column, judges.get(judge), student, other, bootstrap)
            for judge, column in judge_columns(student).items()
        },
    )


def _compare(student: Columns, other: Columns, column: str, bootstrap: Bootstrap) -> PairedComparison:
    sides = _sample(student, column), _sample(other, column)
    return PairedComparison(difference=bootstrap.difference(*sides), ratio=bootstrap.ratio(*sides))


def _compare_by_judge(
    column: str, judge: JudgeProfile | None, student: Columns, other: Columns, bootstrap: Bootstrap
) -> PairedComparison:
    """Compare by a judge; its ratio is of the scores above those of unrelated prompts, which are taken as known."""
    sides = _sample(student, column), _sample(other, column)
    ratio = UNKNOWN
    if judge is not None and judge.ratio_scale and judge.unrelated_score is not None:
        above, other_above = (side._replace(values=side.values - judge.unrelated_score) for side in sides)
        if (bootstrap.mean(other_above).low or 0) > 0:
            ratio = bootstrap.ratio(above, other_above)
    return PairedComparison(difference=bootstrap.difference(*sides), ratio=ratio)
