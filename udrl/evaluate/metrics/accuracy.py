"""Does a prompt serve its task: is it recognised as the task's by a classifier, and does it keep the task's format rules?

The classifier learns from the teacher's prompts. It says whether the student kept the tasks apart as the teacher did, not
whether a prompt is good. A rejected output is neither recognised nor well-formed.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from udrl.evaluate.metrics.control import average
from udrl.evaluate.outputs import TEACHER, Columns, where
from udrl.tasks import Task

SAMPLE = 4000  # training prompts a task
FOLDS = 5
RECOGNISED, WELL_FORMED = "recognised", "well_formed"  # float columns (rows,), NaN where not known
Texts = dict[str, list[str]]  # task -> prompts


def listen(training: Iterable[pa.Table], into: Texts, *, limit: int = SAMPLE, seed: int = 0) -> Iterator[pa.Table]:
    """Pass tables (task, prompt, policy) on, and put at most ``limit`` of the teacher's prompts a task in ``into``.

    Every prompt draws a number, and the smallest numbers stay: a uniform sample of a stream whose length is not known. It is
    whole once the stream has ended.
    """
    rng = np.random.default_rng(seed)
    numbers: dict[str, np.ndarray] = {}
    for part in training:
        yield part
        written = part.filter(pc.equal(part["policy"], TEACHER))
        for task in pc.unique(written["task"]).to_pylist():
            prompts = written.filter(pc.equal(written["task"], task))["prompt"]
            drawn = rng.random(len(prompts))
            before = numbers.get(task, np.zeros(0))
            if len(before) == limit:
                keep = np.flatnonzero(drawn < before.max())
                drawn, prompts = drawn[keep], prompts.take(pa.array(keep))
            merged, texts = np.concatenate([before, drawn]), [*into.get(task, []), *prompts.to_pylist()]
            chosen = np.argsort(merged)[:limit]
            numbers[task], into[task] = merged[chosen], [texts[i] for i in chosen]


def mark(rows: Columns, tasks: Sequence[Task], training: Texts, *, seed: int = 0) -> tuple[Columns, int]:
    """The rows with the columns :data:`RECOGNISED` and :data:`WELL_FORMED`, and how many prompts taught the classifier.

    Args:
        rows: of the default probe.
        training: prompts of the teacher from training. Where they don't cover two tasks and all that are here, the teacher's
            outputs teach instead, in folds: nobody's prompt is judged by a classifier that saw a prompt for its intent.
    """
    by_name = {task.name: task for task in tasks}
    formed = np.full(len(rows["prompt"]), np.nan)
    for i, (task, prompt) in enumerate(zip(rows["task"], rows["prompt"], strict=True)):
        if task in by_name:
            formed[i] = by_name[task].malformed(prompt) is None
    formed = np.where(rows["rejected"] & ~np.isnan(formed), 0.0, formed)
    recognised, taught = _recognised(rows, training, seed)
    return {**rows, RECOGNISED: recognised, WELL_FORMED: formed}, taught


def table(rows: Columns, taught: int) -> dict[str, Any]:
    """The shares of some of the rows of :func:`mark`.

    Returns:
        ``classifier``: ``n``, ``teacher_holdout`` (right among the teacher's accepted prompts for intents that taught
        nothing), ``policies`` (share of a policy's outputs recognised as their task); ``format``: ``policies`` (share of its
        outputs that keep the task's rules).
    """
    policies = sorted(set(rows["policy"]))
    of = {policy: where(rows, rows["policy"] == policy) for policy in policies}
    holdout = rows[RECOGNISED][(rows["policy"] == TEACHER) & ~rows["rejected"]]
    return {
        "classifier": {
            "n": taught,
            "teacher_holdout": average(holdout),
            "policies": {policy: average(mine[RECOGNISED]) for policy, mine in of.items()},
        },
        "format": {"policies": {policy: average(mine[WELL_FORMED]) for policy, mine in of.items()}},
    }


def _recognised(rows: Columns, training: Texts, seed: int) -> tuple[np.ndarray, int]:
    """Whether each output is recognised as its task (rows,), NaN without a classifier, and the prompts that taught one."""
    here, accepted = set(rows["task"]), ~rows["rejected"]
    found = np.full(len(accepted), np.nan)
    texts, labels = rows["prompt"], rows["task"]
    if len(here) < 2:
        return found, 0
    found[~accepted] = 0.0
    if all(training.get(task) for task in here):
        lines = [prompt for task in sorted(here) for prompt in training[task]]
        model = _fit(lines, [task for task in sorted(here) for _ in training[task]])
        if accepted.any():
            found[accepted] = model.predict(texts[accepted]) == labels[accepted]
        return found, len(lines)
    written = accepted & (rows["policy"] == TEACHER)
    fold = _folds(rows, written, seed)
    for k in range(FOLDS):
        taught, asked = written & (fold != k), accepted & (fold == k)
        if len(set(labels[taught])) < len(here):
            return np.full(len(accepted), np.nan), 0  # too few of the teacher's prompts to hold any out
        if asked.any():
            found[asked] = _fit(texts[taught], labels[taught]).predict(texts[asked]) == labels[asked]
    return found, int(written.sum())


def _folds(rows: Columns, written: np.ndarray, seed: int) -> np.ndarray:
    """Fold of each row (rows,): its intent's; that of the teacher's intent where it repeats a prompt of the teacher."""
    intents = np.unique(rows["intent_id"])
    of_intent = np.random.default_rng(seed).permutation(len(intents)) % FOLDS
    fold = of_intent[np.searchsorted(intents, rows["intent_id"])]
    first = dict(zip(rows["prompt"][written], fold[written], strict=True))
    return np.array([first.get(prompt, mine) for prompt, mine in zip(rows["prompt"], fold, strict=True)], dtype=int)


def _fit(texts: Sequence[str], tasks: Sequence[str]) -> Any:
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    weights = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"\S+")
    # saga: under a second for 16,000 prompts, where lbfgs took many times that for the same held-out accuracy.
    model = LogisticRegression(C=10, solver="saga", tol=0.01, max_iter=300, random_state=0)
    return make_pipeline(weights, model).fit(texts, tasks)
