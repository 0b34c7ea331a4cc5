"""Can a judge be believed? True pairs of intent and prompt against controls that are worse by construction.

The share of (true pair, control) in which the judge prefers the true one is the area under the ROC curve: 0.5 is chance, 1
is perfect, below 0.5 the judge prefers the control. A likelihood or cosine prefers an echo by its nature; the controls show
how much so.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from udrl.rewards.components import words

KINDS = ("shuffled", "echo", "stuffed", "truncated")
BELIEVED_FROM = 0.8  # area under the curve against shuffled pairs
CONTROLS = pa.schema(
    [
        ("pair", pa.int64()),  # position of the true pair that it stands against: same intent and task
        ("kind", pa.string()),
        ("intent", pa.string()),
        ("task", pa.string()),
        ("prompt", pa.string()),
    ]
)
QUALITY = ("masterpiece", "best quality", "highly detailed", "8k", "award-winning", "professional")
_FUNCTION_WORDS = frozenset(
    (  # noqa: SIM905
        "a about an and are as at be by for from i in is it its me my of on or our please some that the this to want with you"
    ).split()
)


def controls(intents: Sequence[str], prompts: Sequence[str], tasks: Sequence[str], seed: int) -> pa.Table:
    """Four worse prompts for each true pair, as :data:`CONTROLS`; the same for the same ``seed``.

    ``shuffled`` is a prompt written for another intent of the task (none where the task has one intent), ``echo`` the intent
    itself, ``stuffed`` a list of the intent's content words and words of praise, ``truncated`` the prompt's first third.
    """
    written: dict[tuple[str, str], list[str]] = {}
    place = []
    for intent, prompt, task in zip(intents, prompts, tasks, strict=True):
        mine = written.setdefault((task, intent), [])
        place.append(len(mine))
        mine.append(prompt)
    rows = []
    others = shuffled(intents, tasks, seed)
    for i, (intent, prompt, task) in enumerate(zip(intents, prompts, tasks, strict=True)):
        made = {"echo": intent, "stuffed": stuffed(intent), "truncated": truncated(prompt)}
        if others[i]:
            wrong = written[task, others[i]]
            made["shuffled"] = wrong[place[i] % len(wrong)]
        rows += [
            {"pair": i, "kind": kind, "intent": intent, "task": task, "prompt": made[kind]} for kind in KINDS if kind in made
        ]
    return pa.Table.from_pylist(rows, schema=CONTROLS)


def stuffed(intent: str) -> str:
    """Keyword stuffing: the intent's content words twice, with words of praise between, as a list."""
    said = list(dict.fromkeys(words(intent))) or intent.split()
    content = [word for word in said if word not in _FUNCTION_WORDS] or said
    return ", ".join([*content, *QUALITY[:3], *content, *QUALITY[3:]])


def truncated(prompt: str) -> str:
    """The first third of the words, at least one."""
    said = prompt.split()
    return " ".join(said[: max(1, len(said) // 3)])


def validate(true: np.ndarray, scores: np.ndarray, made: pa.Table, tasks: Sequence[str]) -> dict[str, Any]:
    """A pointwise judge's areas under the curve, from the scores of the true pairs and those of their controls.

    Args:
        true: (pairs,), NaN where the judge failed.
        scores: (rows of ``made``,), the same.
        made: the :data:`CONTROLS`.
        tasks: of each true pair.

    Returns:
        ``auc`` by control, ``tasks`` the same by task, ``pairs`` that were scored, ``believable``.
    """
    task_of_pair, task_of_control = np.asarray(tasks, dtype=object), np.asarray(made["task"].to_pylist(), dtype=object)

    def area(kind: np.ndarray, task: str | None) -> float:
        mine = np.ones(len(true), dtype=bool) if task is None else task_of_pair == task
        theirs = kind if task is None else kind & (task_of_control == task)
        return auc(true[mine & ~np.isnan(true)], scores[theirs & ~np.isnan(scores)])

    return _summary(area, made, int((~np.isnan(true)).sum()))


def validate_pairwise(preferred: np.ndarray, made: pa.Table) -> dict[str, Any]:
    """The same of a pairwise judge: its mean preference for the true prompt over each control, (rows of ``made``,)."""
    task_of_control = np.asarray(made["task"].to_pylist(), dtype=object)

    def mean(kind: np.ndarray, task: str | None) -> float:
        mine = kind & ~np.isnan(preferred) & (True if task is None else task_of_control == task)
        return float(preferred[mine].mean()) if mine.any() else float("nan")

    judged = made["pair"].to_numpy()[~np.isnan(preferred)]
    return _summary(mean, made, len(np.unique(judged)))


def _summary(measure: Callable[[np.ndarray, str | None], float], made: pa.Table, pairs: int) -> dict[str, Any]:
    kinds = np.asarray(made["kind"].to_pylist(), dtype=object)
    by_kind = {kind: measure(kinds == kind, None) for kind in KINDS}
    by_task = {task: {kind: measure(kinds == kind, task) for kind in KINDS} for task in sorted(set(made["task"].to_pylist()))}
    # NaN, where there was nothing to shuffle, is not believed either.
    return {"auc": by_kind, "tasks": by_task, "pairs": pairs, "believable": by_kind["shuffled"] >= BELIEVED_FROM}


def zero_means_unrelated(true: np.ndarray, scores: np.ndarray, made: pa.Table) -> bool:
    """Whether a ratio of mean scores says something: prompts for another intent score at most half of what true ones do.

    Cosines of a language model's states, or the scores of a weak judge, lie high whatever they are of; their ratio is near 1
    for any two policies.
    """
    wrong = scores[np.asarray(made["kind"].to_pylist(), dtype=object) == "shuffled"]
    right, wrong = true[~np.isnan(true)], wrong[~np.isnan(wrong)]
    return bool(len(right) and len(wrong) and wrong.mean() <= right.mean() / 2)


def draw(tasks: Sequence[str], limit: int, seed: int) -> list[int]:
    """Positions of at most ``limit`` rows of each task, drawn by ``seed``."""
    taken: dict[str, list[int]] = {}
    for i in np.random.default_rng(seed).permutation(len(tasks)):
        mine = taken.setdefault(tasks[i], [])
        if len(mine) < limit:
            mine.append(int(i))
    return [i for task in sorted(taken) for i in taken[task]]


def shuffled(intents: Sequence[str], tasks: Sequence[str], seed: int = 0) -> list[str]:
    """For each row another intent of its task, never its own; empty where the task has no other. Each intent of a task
    stands in for exactly one other, so that the right and the wrong side hold equally hard intents."""
    rng = np.random.default_rng(seed)
    successor: dict[tuple[str, str], str] = {}
    for task in sorted(set(tasks)):
        ring = sorted({intent for intent, t in zip(intents, tasks, strict=True) if t == task})
        rng.shuffle(ring)
        for here, there in zip(ring, [*ring[1:], ring[0]], strict=True):
            successor[task, here] = there if there != here else ""
    return [successor[task, intent] for intent, task in zip(intents, tasks, strict=True)]


def auc(positive: np.ndarray, negative: np.ndarray) -> float:
    """Probability that a true pair scores above a false one, ties counting half (Mann-Whitney U over the pairs)."""
    from scipy import stats

    if not len(positive) or not len(negative):
        return float("nan")
    return float(stats.mannwhitneyu(positive, negative).statistic / (len(positive) * len(negative)))
