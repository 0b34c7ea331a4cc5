"""All numbers of an evaluation, as pure functions of its tables.

One rule holds everywhere: a rejected or empty output counts as relevance 0, and for a judge as a prompt for another intent, for
every policy, so that refusing never pays (see :mod:`udrl.evaluate.outputs`).
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pyarrow as pa

from udrl.evaluate.document import (
    UNKNOWN,
    JudgeComparison,
    JudgeProfile,
    Measurements,
    PairedComparison,
    PairwiseComparison,
    PolicyComparison,
    PolicyScores,
    Quality,
    RelevanceComparison,
    Repetition,
    Scope,
    TaskScope,
)
from udrl.evaluate.metrics import claim, control, diversity, novelty, wording
from udrl.evaluate.metrics.control import average
from udrl.evaluate.metrics.diversity import Embed
from udrl.evaluate.metrics.intervals import Bootstrap, Sample
from udrl.evaluate.outputs import JUDGE, STUDENT, Columns, columns, select
from udrl.tasks import Task


def compute(
    outputs: pa.Table,
    *,
    tasks: Sequence[Task],
    judges: Mapping[str, JudgeProfile],
    pairwise: pa.Table | None,
    training: Iterable[pa.Table] | None,
    embed: Embed | None,
    subject_words: Mapping[int, Sequence[str]],
    bootstrap: int = 1000,
    seed: int = 0,
) -> Measurements:
    """Measure everything that the report shows.

    Args:
        outputs: a table of :data:`~udrl.evaluate.outputs.OUTPUTS`, with a column for each pointwise judge.
        tasks: give the format rules.
        pairwise: a table of :data:`~udrl.evaluate.outputs.PAIRWISE`.
        training: tables of task, prompt and policy that the student was trained on, streamed once; None: unknown.
        embed: texts -> unit vectors (texts, dimensions), for the Vendi scores.
        subject_words: words that a prompt must keep, by the id of its intent.
        bootstrap: resamples of an interval.
    """
    rows = columns(outputs)
    resampling = Bootstrap(bootstrap, seed)
    default = select(rows, rows["probe"] == "default")
    sample: control.Texts = {}
    stream = None if training is None else control.sample_teacher_prompts(training, sample, seed=seed)
    copied, default = novelty.copied_shares(default, stream)  # reads the stream to its end, which completes the sample
    default = control.add_accuracy_columns(default, tasks, sample, seed=seed)
    default = wording.add_wording_columns(default, subject_words)
    pairs = _pairs(pairwise, default)
    groups = diversity.IntentGroups.of(default["intent_id"], seed)
    writers = [policy for policy in sorted(set(default["policy"])) if not claim.is_trivial_baseline(policy)]
    by_task: dict[str, TaskScope] = {}
    diversities = []
    for task in sorted(set(rows["task"])):
        task_rows, task_default = select(rows, rows["task"] == task), select(default, default["task"] == task)
        diversities.append(diversity.measure_task(task_default, writers, embed=embed, seed=seed, groups=groups))
        by_task[task] = TaskScope(
            policies=_score_policies(task_default, resampling),
            comparisons=_compare_with_student(task_default, select(pairs, pairs["task"] == task), judges, resampling),
            accuracy=control.accuracy_by_policy(task_default),
            diversity=diversity.with_ratios(diversities[-1]),
            length=control.length_control(_student(task_rows, "length"), resampling),
            reach=control.length_control(_student(task_rows, "reach"), resampling),
            reward=control.reward_control(_student(task_rows, "reward"), resampling),
        )
    overall = Scope(
        policies=_score_policies(default, resampling),
        comparisons=_compare_with_student(default, pairs, judges, resampling),
        accuracy=control.accuracy_by_policy(default),
        diversity=diversity.average_over_tasks(diversities),
        length=control.length_control_over_tasks(
            _student(rows, "length"), [task.length for task in by_task.values()], resampling
        ),
        reach=control.length_control_over_tasks(_student(rows, "reach"), [task.reach for task in by_task.values()], resampling),
    )
    return Measurements(
        intents=(intents := len(np.unique(rows["intent_id"]))),
        rows=outputs.num_rows,
        bootstrap=bootstrap,
        seed=seed,
        overall=overall,
        tasks=by_task,
        novelty=copied,
        claim=claim.decide_claim(overall, judges, intents),
        targets=claim.check_targets(overall, by_task, intents),
    )


def _student(rows: Columns, probe: str) -> Columns:
    return select(rows, (rows["probe"] == probe) & (rows["policy"] == STUDENT))


def _score_policies(rows: Columns, bootstrap: Bootstrap) -> dict[str, PolicyScores]:
    return {policy: _scores(outputs, bootstrap) for policy, outputs in _by_policy(rows).items()}


def _compare_with_student(
    rows: Columns, pairs: Columns, judges: Mapping[str, JudgeProfile], bootstrap: Bootstrap
) -> dict[str, PolicyComparison]:
    """Compare the student with each of the other policies."""
    by_policy = _by_policy(rows)
    if STUDENT not in by_policy:
        return {}
    student = by_policy.pop(STUDENT)
    return {
        policy: PolicyComparison(
            relevance=_compare_relevance(student, outputs, bootstrap),
            coverage=_compare(student, outputs, wording.COVERAGE, bootstrap),
            clean=_compare(student, outputs, wording.CLEAN, bootstrap),
            copied_8=_compare(student, outputs, novelty.COPIED_8, bootstrap) if novelty.COPIED_8 in student else None,
            judges={
                judge: _compare_by_judge(column, judges.get(judge), student, outputs, bootstrap)
                for judge, column in _judge_columns(rows).items()
            },
            pairwise=_compare_pairwise(select(pairs, pairs["other"] == policy), bootstrap),
        )
        for policy, outputs in by_policy.items()
    }


def _by_policy(rows: Columns) -> dict[str, Columns]:
    return {policy: select(rows, rows["policy"] == policy) for policy in sorted(set(rows["policy"]))}


def _scores(outputs: Columns, bootstrap: Bootstrap) -> PolicyScores:
    """Score the outputs of one policy."""
    accepted = select(outputs, ~outputs["rejected"])
    qualities: dict[Quality, str] = {"relevance": "relevance", "coverage": wording.COVERAGE, "clean": wording.CLEAN}
    prompts = list(accepted["prompt"])
    return PolicyScores(
        n=len(outputs["intent_id"]),
        rejected=average(outputs["rejected"]),
        words=average(accepted["n_words"]),
        **{name: bootstrap.mean(_sample(outputs, column)) for name, column in qualities.items()},
        accepted={name: bootstrap.mean(_sample(accepted, column)) for name, column in qualities.items()},
        repetition=Repetition(
            doubled_word=average(np.array([wording.doubles_word(prompt) for prompt in prompts])),
            repeated_pair=average(np.array([wording.repeats_ngram(prompt, 2) for prompt in prompts])),
            repeated_trigram=average(np.array([wording.repeats_ngram(prompt, 3) for prompt in prompts])),
        ),
        copied_8=bootstrap.mean(_sample(outputs, novelty.COPIED_8)) if novelty.COPIED_8 in outputs else UNKNOWN,
        judges={judge: bootstrap.mean(_sample(outputs, column)) for judge, column in _judge_columns(outputs).items()},
    )


def _judge_columns(rows: Columns) -> dict[str, str]:
    """Map each pointwise judge to its column."""
    return {name.removeprefix(JUDGE): name for name in rows if name.startswith(JUDGE)}


def _sample(rows: Columns, column: str) -> Sample:
    return Sample(rows[column], rows["intent_id"])


def _compare(student: Columns, other: Columns, column: str, bootstrap: Bootstrap) -> PairedComparison:
    sides = _sample(student, column), _sample(other, column)
    return PairedComparison(difference=bootstrap.difference(*sides), ratio=bootstrap.ratio(*sides))


def _compare_relevance(student: Columns, other: Columns, bootstrap: Bootstrap) -> RelevanceComparison:
    """Compare with and without rejected prompts; without is the harder reading for a student that is rejected less often."""
    sides = _sample(student, "relevance"), _sample(other, "relevance")
    accepted = [_sample(select(rows, ~rows["rejected"]), "relevance") for rows in (student, other)]
    return RelevanceComparison(
        difference=bootstrap.difference(*sides),
        ratio=bootstrap.ratio(*sides),
        ratio_accepted=bootstrap.ratio(*accepted),
    )


def _compare_by_judge(
    column: str, judge: JudgeProfile | None, student: Columns, other: Columns, bootstrap: Bootstrap
) -> JudgeComparison:
    """Compare by a pointwise judge; its ratio is of the scores above those of unrelated prompts, which are taken as known."""
    sides = _sample(student, column), _sample(other, column)
    ratio = UNKNOWN
    if judge is not None and judge.ratio_scale and judge.unrelated_score is not None:
        above, other_above = (side._replace(values=side.values - judge.unrelated_score) for side in sides)
        if (bootstrap.mean(other_above).low or 0) > 0:
            ratio = bootstrap.ratio(above, other_above)
    return JudgeComparison(difference=bootstrap.difference(*sides), ratio=ratio)


def _compare_pairwise(pairs: Columns, bootstrap: Bootstrap) -> dict[str, PairwiseComparison]:
    """Count how often each pairwise judge prefers the student's prompt."""
    comparisons = {}
    for judge in sorted(set(pairs["judge"])):
        judged = select(pairs, pairs["judge"] == judge)
        first, second = judged["first"], judged["second"]
        decided = ~np.isnan(first + second)
        shown = judged["shown"] & decided
        preferred = bootstrap.mean(Sample((first + second) / 2, judged["intent_id"])) if shown.any() else UNKNOWN
        comparisons[judge] = PairwiseComparison(
            preferred=preferred,
            n=int(decided.sum()),
            settled=int((decided & ~shown).sum()),
            consistent=average(np.sign(first[shown] - 0.5) == np.sign(second[shown] - 0.5)),
        )
    return comparisons


def _pairs(pairwise: pa.Table | None, default: Columns) -> Columns:
    """Return the comparisons as arrays, shape (pairs,).

    ``first`` and ``second`` are NaN without a verdict; ``shown`` says whether the judge saw the pair, as neither prompt was
    rejected.
    """
    rows = pairwise.to_pylist() if pairwise is not None else []
    pairs = {name: np.array([row[name] for row in rows], dtype=object) for name in ("judge", "task", "other")}
    pairs["intent_id"] = np.array([row["intent_id"] for row in rows], dtype=np.int64)
    for name in ("first", "second"):
        verdicts = [row[name] if row["parsed"] and row[name] is not None else np.nan for row in rows]
        pairs[name] = np.array(verdicts, dtype=float)
    keys = zip(default["task"], default["intent_id"], default["policy"], default["variation"], strict=True)
    rejected = dict(zip(keys, default["rejected"], strict=True))

    def is_rejected(row: dict[str, object], policy: object) -> bool:
        """A policy without that variation is compared by its variation 0, as the judges do."""
        output = (row["task"], row["intent_id"], policy)
        return bool(rejected.get((*output, row["variation"]), rejected.get((*output, 0), False)))

    shown = [not (is_rejected(row, STUDENT) or is_rejected(row, row["other"])) for row in rows]
    pairs["shown"] = np.array(shown, dtype=bool)
    return pairs
