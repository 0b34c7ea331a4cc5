"""How well the student follows its commands: length and reward, commanded against achieved, and the task.

A rejected output misses every length; means and errors in words are of accepted ones. Reward counts accepted prompts, and shows
the rejected share next to them: with refusals as 0, a bottom bin full of them would draw a slope that is not control. ``rises``
must hold both ways, so that a top bin can't gain by refusing. A slope counts only if its whole interval is above 0: without
control a point estimate rises from one bin to another in half of all runs.

A prompt serves its task if a classifier, trained on the teacher's prompts, recognizes it as the task's, and if it keeps the
task's format rules. This says whether the student keeps the tasks apart as the teacher does, not whether a prompt is good. A
rejected output is neither recognized nor well-formed.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from scipy import stats

from udrl.evaluate.document import (
    UNKNOWN,
    Interval,
    LengthControl,
    LengthErrors,
    LengthLevel,
    LengthShares,
    RewardControl,
    RewardCurve,
    RewardLevel,
    TaskAccuracy,
)
from udrl.evaluate.metrics.intervals import Bootstrap, Sample
from udrl.evaluate.outputs import JUDGE, TEACHER, Columns, select
from udrl.tasks import Task


def length_control(rows: Columns, bootstrap: Bootstrap) -> LengthControl:
    """Compare commanded with achieved words; ``rows`` are one task's of the probe ``length`` or ``reach``."""
    rows = select(rows, rows["command_words"] >= 1)
    commanded = rows["command_words"]
    levels = [_length_level(int(words), select(rows, commanded == words)) for words in np.unique(commanded)]
    steps = _steps(np.where(rows["rejected"], np.nan, rows["n_words"]), commanded, rows["intent_id"], bootstrap)
    accepted = select(rows, ~rows["rejected"])
    within_2 = (np.abs(rows["n_words"] - commanded) <= 2) & ~rows["rejected"]
    return LengthControl(
        **_length_errors(rows).model_dump(),
        within_2_interval=bootstrap.mean(Sample(within_2.astype(float), rows["intent_id"])),
        spearman=spearman(accepted["command_words"], accepted["n_words"]),
        rises=_all_up(steps),
        levels=levels,
    )


def length_control_over_tasks(rows: Columns, by_task: Iterable[LengthControl], bootstrap: Bootstrap) -> LengthControl:
    """Compare words over all tasks. The mean rises if it does on every task, because commanded lengths differ by task."""
    overall = length_control(rows, bootstrap)
    return overall.model_copy(update={"rises": all_met(task.rises for task in by_task), "levels": None})


def _length_level(words: int, rows: Columns) -> LengthLevel:
    achieved = rows["n_words"][~rows["rejected"]]
    p10, p90 = (float(np.quantile(achieved, q)) if len(achieved) else None for q in (0.1, 0.9))
    return LengthLevel(**_length_errors(rows).model_dump(), words=words, p10=p10, p90=p90)


def _length_errors(rows: Columns) -> LengthErrors:
    accepted = select(rows, ~rows["rejected"])
    difference = accepted["n_words"] - accepted["command_words"]
    shares = _length_shares(accepted)
    accepted_share = 1 - average(rows["rejected"])  # NaN without outputs
    with_misses = {name: (share or 0.0) * accepted_share for name, share in shares.model_dump().items()}
    return LengthErrors(
        n=len(rows["rejected"]),
        rejected=average(rows["rejected"]),
        accepted=shares,
        mean=average(accepted["n_words"]),
        mae=average(np.abs(difference)),
        bias=average(difference),
        **with_misses,
    )


def _length_shares(rows: Columns) -> LengthShares:
    commanded, error = rows["command_words"], np.abs(rows["n_words"] - rows["command_words"])
    return LengthShares(
        exact=average(error <= 0),
        within_1=average(error <= 1),
        within_2=average(error <= 2),
        within_10pct=average(10 * error <= commanded),  # in integers, so that 2 of 20 words is within
    )


def _steps(values: np.ndarray, commands: np.ndarray, intents: np.ndarray, bootstrap: Bootstrap) -> list[Interval]:
    """Return the rise of the mean from each commanded value to the next, paired by intent."""
    levels = [Sample(values[commands == command], intents[commands == command]) for command in np.unique(commands)]
    return [bootstrap.difference(upper, lower) for lower, upper in pairwise(levels)]


def _all_up(steps: Sequence[Interval]) -> bool | None:
    """Whether every step is surely up; False if one is surely not; None if that is open, or there is no step."""
    return all_met(_is_positive(step) for step in steps)


def _is_positive(estimate: Interval) -> bool | None:
    if estimate.low is None or estimate.high is None:
        return None
    return True if estimate.low > 0 else False if estimate.high <= 0 else None


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

    def gain(values: np.ndarray) -> Interval:
        if len(levels) < 2:
            return UNKNOWN
        return bootstrap.difference(Sample(values[top], intents[top]), Sample(values[bottom], intents[bottom]))

    def curve(values: np.ndarray) -> RewardCurve:
        known = ~np.isnan(values)
        return RewardCurve(
            spearman=spearman(bins[known], values[known]),
            difference=gain(values),
            monotone=_all_up(_steps(values, bins, intents, bootstrap)),
        )

    relevance = curve(scores["relevance"])
    return RewardControl(
        **dict(relevance),
        rises=all_met([_is_positive(relevance.difference), _is_positive(gain(rows["relevance"]))]),
        levels=levels,
        judges={judge: curve(scores[name]) for judge, name in judges.items()},
    )


def spearman(commanded: np.ndarray, achieved: np.ndarray) -> float:
    """Return the rank correlation over rows, NaN if either side is constant."""
    if len(commanded) < 2 or np.ptp(commanded) == 0 or np.ptp(achieved) == 0:
        return float("nan")
    return float(stats.spearmanr(commanded, achieved).statistic)


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


def accuracy_by_policy(rows: Columns) -> dict[str, TaskAccuracy]:
    """Return the shares of some of the rows of :func:`add_accuracy_columns`."""
    accuracy = {}
    for policy in sorted(set(rows["policy"])):
        here = rows["policy"] == policy
        accepted = here & ~rows["rejected"]
        accuracy[policy] = TaskAccuracy(
            recognized=average(rows[RECOGNIZED][here]),
            well_formed=average(rows[WELL_FORMED][here]),
            recognized_accepted=average(rows[RECOGNIZED][accepted]),
            well_formed_accepted=average(rows[WELL_FORMED][accepted]),
        )
    return accuracy


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
