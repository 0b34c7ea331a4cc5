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
    Interval,
    JudgeProfile,
    Measurements,
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
    embed: Embed,
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
    def sides(column: str) -> tuple[Sample, Sample]:
        return _sample(student, column), _sample(other, column)

    def ratio_above_unrelated(judge: JudgeProfile | None, column: str) -> Interval:
        if judge is None or not judge.ratio_scale or judge.unrelated_score is None:
            return UNKNOWN
        zero = judge.unrelated_score  # taken as known
        above, other_above = (side._replace(values=side.values - zero) for side in sides(column))
        return bootstrap.ratio(above, other_above) if (bootstrap.mean(other_above).low or 0) > 0 else UNKNOWN

    # The harder reading for a student that is rejected less often.
    accepted = [_sample(select(rows, ~rows["rejected"]), "relevance") for rows in (student, other)]
    return PolicyComparison(
        **{name: bootstrap.ratio(*sides(column)) for name, column in QUALITIES.items()},
        relevance_accepted=bootstrap.ratio(*accepted),
        copied_8=bootstrap.difference(*sides(novelty.COPIED_8)) if novelty.COPIED_8 in student else UNKNOWN,
        judges={judge: ratio_above_unrelated(judges.get(judge), column) for judge, column in judge_columns(student).items()},
    )
