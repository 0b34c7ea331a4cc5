"""How well the student follows its commands: length and reward, commanded against achieved, and the task.

Length counts every output (a rejected one has the words of its text, or none). Reward counts accepted prompts, and shows the
rejected share next to them: with refusals as 0, a bottom bin full of them would draw a slope that is not control. ``rises``
must hold both ways, so that a top bin can't gain by refusing.

A prompt serves its task if a classifier, trained on the teacher's prompts, recognizes it as the task's, and if it keeps the
task's format rules. This says whether the student keeps the tasks apart as the teacher does, not whether a prompt is good. A
rejected output is neither recognized nor well-formed.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from scipy import stats

from udrl.evaluate.document import (
    UNKNOWN,
    Accuracy,
    ClassifierAccuracy,
    FormatAccuracy,
    Interval,
    LengthControl,
    LengthErrors,
    LengthLevel,
    Number,
    RewardControl,
    RewardCurve,
    RewardLevel,
)
from udrl.evaluate.metrics.intervals import Bootstrap, Sample
from udrl.evaluate.outputs import JUDGE, TEACHER, Columns, select
from udrl.tasks import Task


def length_control(rows: Columns) -> LengthControl:
    """Compare commanded with achieved words; ``rows`` are one task's of the probe ``length`` or ``reach``."""
    rows = select(rows, rows["command_words"] >= 1)
    commanded, achieved = rows["command_words"], rows["n_words"]
    levels = [_length_level(int(words), achieved[commanded == words]) for words in np.unique(commanded)]
    return LengthControl(
        **_length_errors(commanded, achieved).model_dump(),
        spearman=spearman(commanded, achieved),
        rises=rises_steadily([level.mean for level in levels]),
        levels=levels,
    )


def length_control_over_tasks(rows: Columns, by_task: Iterable[LengthControl]) -> LengthControl:
    """Compare words over all tasks. The mean rises if it does on every task, because commanded lengths differ by task."""
    return length_control(rows).model_copy(update={"rises": all_met(task.rises for task in by_task), "levels": None})


def _length_level(words: int, achieved: np.ndarray) -> LengthLevel:
    errors = _length_errors(np.full(len(achieved), words), achieved)
    p10, p90 = (float(np.quantile(achieved, q)) for q in (0.1, 0.9))
    return LengthLevel(**errors.model_dump(), words=words, p10=p10, p90=p90)


def _length_errors(commanded: np.ndarray, achieved: np.ndarray) -> LengthErrors:
    error = np.abs(achieved - commanded)
    return LengthErrors(
        n=len(error),
        mean=average(achieved),
        mae=average(error),
        bias=average(achieved - commanded),
        exact=average(error <= 0),
        within_1=average(error <= 1),
        within_2=average(error <= 2),
        within_10pct=average(10 * error <= commanded),  # in integers, so that 2 of 20 words is within
    )


def reward_control(rows: Columns, bootstrap: Bootstrap) -> RewardControl:
    """Compare commanded bins with relevance, reward and judges; ``rows`` are one task's of the probe ``reward``."""
    rows = select(rows, rows["command_reward"] >= 0)
    bins, intents, accepted = rows["command_reward"], rows["intent_id"], ~rows["rejected"]
    judges = {name.removeprefix(JUDGE): name for name in rows if name.startswith(JUDGE)}
    scores = {name: np.where(accepted, rows[name], np.nan) for name in ("relevance", "reward", *judges.values())}
    levels = []
    for level in np.unique(bins):
        here = bins == level
        means = {name: bootstrap.mean(Sample(values[here], intents[here])) for name, values in scores.items()}
        levels.append(
            RewardLevel(
                bin=int(level),
                n=int(here.sum()),
                rejected=average(~accepted[here]),
                relevance=means["relevance"],
                reward=means["reward"],
                judges={judge: means[name] for judge, name in judges.items()},
            )
        )
    top, bottom = (bins == levels[-1].bin, bins == levels[0].bin) if levels else (bins > 0, bins > 0)

    def curve(values: np.ndarray, means: Sequence[Interval]) -> RewardCurve:
        known = ~np.isnan(values)
        gain = bootstrap.difference(Sample(values[top], intents[top]), Sample(values[bottom], intents[bottom]))
        return RewardCurve(
            spearman=spearman(bins[known], values[known]),
            difference=gain if len(levels) > 1 else UNKNOWN,
            monotone=rises_steadily([mean.value for mean in means]),
        )

    relevance = curve(scores["relevance"], [level.relevance for level in levels])
    gain = relevance.difference.value
    gain_with_rejected = average(rows["relevance"][top]) - average(rows["relevance"][bottom])
    return RewardControl(
        **dict(relevance),
        rises=None if gain is None else bool(gain > 0 and gain_with_rejected > 0),
        levels=levels,
        judges={judge: curve(scores[name], [level.judges[judge] for level in levels]) for judge, name in judges.items()},
    )


def spearman(commanded: np.ndarray, achieved: np.ndarray) -> float:
    """Return the rank correlation over rows, NaN if either side is constant."""
    if len(commanded) < 2 or np.ptp(commanded) == 0 or np.ptp(achieved) == 0:
        return float("nan")
    return float(stats.spearmanr(commanded, achieved).statistic)


def rises_steadily(means: Iterable[Number]) -> bool | None:
    """Whether every step goes up; None with fewer than two known means."""
    known = [mean for mean in means if mean is not None]
    return None if len(known) < 2 else bool(np.all(np.diff(known) > 0))


def all_met(verdicts: Iterable[bool | None]) -> bool | None:
    """Return False if one is, else None if one is unknown or there is none, else True."""
    verdicts = list(verdicts)
    if False in verdicts:
        return False
    return None if None in verdicts or not verdicts else True


def average(values: np.ndarray) -> float:
    """Return the mean, NaN of an empty array."""
    return float(np.mean(values)) if len(values) else float("nan")


SAMPLE = 4000  # training prompts a task
FOLDS = 5
RECOGNIZED, WELL_FORMED = "recognized", "well_formed"  # float columns (rows,), NaN if unknown
Texts = dict[str, list[str]]  # task -> prompts


def sample_teacher_prompts(
    training: Iterable[pa.Table], sample: Texts, *, limit: int = SAMPLE, seed: int = 0
) -> Iterator[pa.Table]:
    """Pass tables (task, prompt, policy) on, and collect at most ``limit`` of the teacher's prompts a task in ``sample``.

    Every prompt gets a random key, and the smallest keys stay: a uniform sample of a stream of unknown length. It is complete
    when the stream has ended.
    """
    rng = np.random.default_rng(seed)
    keys: dict[str, np.ndarray] = {}
    for part in training:
        yield part
        by_teacher = part.filter(pc.equal(part["policy"], TEACHER))
        for task in pc.unique(by_teacher["task"]).to_pylist():
            prompts = by_teacher.filter(pc.equal(by_teacher["task"], task))["prompt"]
            new_keys = rng.random(len(prompts))
            old_keys = keys.get(task, np.zeros(0))
            if len(old_keys) == limit:
                smaller = np.flatnonzero(new_keys < old_keys.max())
                new_keys, prompts = new_keys[smaller], prompts.take(pa.array(smaller))
            all_keys, texts = np.concatenate([old_keys, new_keys]), [*sample.get(task, []), *prompts.to_pylist()]
            smallest = np.argsort(all_keys)[:limit]
            keys[task], sample[task] = all_keys[smallest], [texts[i] for i in smallest]


def add_accuracy_columns(rows: Columns, tasks: Sequence[Task], training: Texts, *, seed: int = 0) -> Columns:
    """Return the rows with the columns :data:`RECOGNIZED` and :data:`WELL_FORMED`.

    Args:
        rows: of the default probe.
        training: the teacher's prompts from training. If they cover fewer than two tasks, or not all tasks of ``rows``, the
            teacher's outputs are used instead, in folds: no prompt is judged by a classifier that saw one for its intent.
    """
    by_name = {task.name: task for task in tasks}
    well_formed = np.full(len(rows["prompt"]), np.nan)
    for i, (task, prompt) in enumerate(zip(rows["task"], rows["prompt"], strict=True)):
        if task in by_name:
            well_formed[i] = by_name[task].find_violation(prompt) is None
    well_formed = np.where(rows["rejected"] & ~np.isnan(well_formed), 0.0, well_formed)
    return {**rows, RECOGNIZED: _recognize(rows, training, seed), WELL_FORMED: well_formed}


def accuracy_by_policy(rows: Columns) -> Accuracy:
    """Return the shares of some of the rows of :func:`add_accuracy_columns`."""
    by_policy = {policy: rows["policy"] == policy for policy in sorted(set(rows["policy"]))}
    recognized, well_formed = rows[RECOGNIZED], rows[WELL_FORMED]
    return Accuracy(
        classifier=ClassifierAccuracy(
            teacher_holdout=average(recognized[(rows["policy"] == TEACHER) & ~rows["rejected"]]),
            policies={policy: average(recognized[here]) for policy, here in by_policy.items()},
        ),
        format=FormatAccuracy(policies={policy: average(well_formed[here]) for policy, here in by_policy.items()}),
    )


def _recognize(rows: Columns, training: Texts, seed: int) -> np.ndarray:
    """Return whether each output is recognized, (rows,), NaN without a classifier."""
    tasks, accepted = set(rows["task"]), ~rows["rejected"]
    unknown = np.full(len(accepted), np.nan)
    texts, labels = rows["prompt"], rows["task"]
    if len(tasks) < 2:
        return unknown
    recognized = np.where(accepted, np.nan, 0.0)
    if all(training.get(task) for task in tasks):
        prompts = [prompt for task in sorted(tasks) for prompt in training[task]]
        model = _fit(prompts, [task for task in sorted(tasks) for _ in training[task]])
        if accepted.any():
            recognized[accepted] = model.predict(texts[accepted]) == labels[accepted]
        return recognized
    by_teacher = accepted & (rows["policy"] == TEACHER)
    fold = _folds(rows, by_teacher, seed)
    for k in range(FOLDS):
        train, test = by_teacher & (fold != k), accepted & (fold == k)
        if len(set(labels[train])) < len(tasks):
            return unknown  # too few of the teacher's prompts to hold any out
        if test.any():
            recognized[test] = _fit(texts[train], labels[train]).predict(texts[test]) == labels[test]
    return recognized


def _folds(rows: Columns, by_teacher: np.ndarray, seed: int) -> np.ndarray:
    """Return the fold of each row, (rows,): its intent's, or the teacher's if it repeats a prompt of the teacher."""
    intents = np.unique(rows["intent_id"])
    fold_of_intent = np.random.default_rng(seed).permutation(len(intents)) % FOLDS
    folds = fold_of_intent[np.searchsorted(intents, rows["intent_id"])]
    teachers = dict(zip(rows["prompt"][by_teacher], folds[by_teacher], strict=True))
    return np.array([teachers.get(prompt, fold) for prompt, fold in zip(rows["prompt"], folds, strict=True)], dtype=int)


def _fit(texts: Sequence[str], tasks: Sequence[str]) -> Any:
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    weights = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"\S+")
    # saga fits 16,000 prompts in under a second; lbfgs took many times that for the same held-out accuracy.
    model = LogisticRegression(C=10, solver="saga", tol=0.01, max_iter=300, random_state=0)
    return make_pipeline(weights, model).fit(texts, tasks)
