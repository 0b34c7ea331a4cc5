"""Can a judge be believed? True pairs of intent and prompt against controls that are worse by construction.

The share of (true pair, control) in which the judge prefers the true one is the area under the ROC curve: 0.5 is chance, 1
is perfect, below 0.5 the judge prefers the control. A likelihood or cosine prefers an echo by its nature; the controls show
how much so.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from udrl.scoring.rewards import words

KINDS = ("shuffled", "echo", "stuffed", "truncated")
BELIEVED_FROM = 0.8  # area under the curve against shuffled pairs
ENOUGH = 20  # true pairs, and as many shuffled ones: fewer reach that area by luck
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
        ``auc`` by control, ``tasks`` the same by task, ``pairs`` that were scored, ``believable``; ``unrelated``, the mean
        score of ``shuffled`` controls (NaN if there is none), which is the zero of the judge's scale; and ``ratio``, whether
        scores above that zero can be divided: the judge is believable and true pairs score above it on average.
    """
    task_of_pair, task_of_control = np.asarray(tasks, dtype=object), np.asarray(made["task"].to_pylist(), dtype=object)

    def area(kind: np.ndarray, task: str | None) -> float:
        mine = np.ones(len(true), dtype=bool) if task is None else task_of_pair == task
        theirs = kind if task is None else kind & (task_of_control == task)
        return auc(true[mine & ~np.isnan(true)], scores[theirs & ~np.isnan(scores)])

    found = _summary(area, made, ~np.isnan(scores), int((~np.isnan(true)).sum()))
    unrelated = mean(scores[_kinds(made) == "shuffled"])
    return {**found, "unrelated": unrelated, "ratio": found["believable"] and mean(true) > unrelated}


def validate_pairwise(preferred: np.ndarray, made: pa.Table) -> dict[str, Any]:
    """The same of a pairwise judge, from its preference for the true prompt over each control, (rows of ``made``,), NaN where
    it gave none: the share of controls that it likes less, ties counting half. It has no zero, and so no ratio."""
    task_of_control = np.asarray(made["task"].to_pylist(), dtype=object)
    wins = (1 + np.sign(np.round(preferred - 0.5, 6))) / 2  # 0.5 of either order may be off by a rounding

    def share(kind: np.ndarray, task: str | None) -> float:
        return mean(wins[kind & (True if task is None else task_of_control == task)])

    judged = ~np.isnan(preferred)
    return {**_summary(share, made, judged, len(np.unique(made["pair"].to_numpy()[judged]))), "ratio": False}


def _summary(
    measure: Callable[[np.ndarray, str | None], float], made: pa.Table, scored: np.ndarray, pairs: int
) -> dict[str, Any]:
    kinds = _kinds(made)
    by_kind = {kind: measure(kinds == kind, None) for kind in KINDS}
    by_task = {task: {kind: measure(kinds == kind, task) for kind in KINDS} for task in sorted(set(made["task"].to_pylist()))}
    enough = min(pairs, int((scored & (kinds == "shuffled")).sum())) >= ENOUGH
    # NaN, where there was nothing to shuffle, is not believed either.
    believable = enough and by_kind["shuffled"] >= BELIEVED_FROM
    return {"auc": by_kind, "tasks": by_task, "pairs": pairs, "believable": believable}


def _kinds(made: pa.Table) -> np.ndarray:
    return np.asarray(made["kind"].to_pylist(), dtype=object)


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


def mean(values: np.ndarray) -> float:
    """Mean of what is known, NaN of nothing."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


def auc(positive: np.ndarray, negative: np.ndarray) -> float:
    """Probability that a true pair scores above a false one, ties counting half (Mann-Whitney U over the pairs)."""
    from scipy import stats

    if not len(positive) or not len(negative):
        return float("nan")
    return float(stats.mannwhitneyu(positive, negative).statistic / (len(positive) * len(negative)))
