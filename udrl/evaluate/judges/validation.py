"""Validates judges: true pairs of intent and prompt against controls, which are worse by construction.

The share of (true pair, control) in which the judge prefers the true one is the area under the ROC curve: 0.5 is chance, 1
is perfect, and below 0.5 the judge prefers the control. A likelihood or a cosine prefers an echo by its nature; the controls
show by how much.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np
import pyarrow as pa

from udrl.evaluate.document import ControlKind
from udrl.scoring.rewards import words

CONTROL_KINDS: tuple[ControlKind, ...] = get_args(ControlKind)
MIN_AUC = 0.8  # against shuffled pairs, of a validated judge
MIN_PAIRS = 20  # true pairs, and as many shuffled ones: fewer reach that area by luck
CONTROLS = pa.schema(
    [
        ("pair", pa.int64()),  # index of the true pair that it is compared with: same intent and task
        ("kind", pa.string()),
        ("intent", pa.string()),
        ("task", pa.string()),
        ("prompt", pa.string()),
    ]
)
QUALITY_WORDS = ("masterpiece", "best quality", "highly detailed", "8k", "award-winning", "professional")
_FUNCTION_WORDS = frozenset(
    (  # noqa: SIM905
        "a about an and are as at be by for from i in is it its me my of on or our please some that the this to want with you"
    ).split()
)


@dataclass(frozen=True)
class Validation:
    """How well a judge tells true pairs from controls; see :class:`~udrl.evaluate.document.JudgeProfile`."""

    auc: dict[ControlKind, float]
    tasks: dict[str, dict[ControlKind, float]]
    pairs: int
    validated: bool
    unrelated_score: float = float("nan")
    ratio_scale: bool = False


# ---- controls


def make_controls(intents: Sequence[str], prompts: Sequence[str], tasks: Sequence[str], seed: int) -> pa.Table:
    """Return four worse prompts for each true pair, as :data:`CONTROLS`; deterministic for a ``seed``.

    ``shuffled`` is a prompt for another intent of the task (none if the task has one intent), ``echo`` the intent itself,
    ``stuffed`` a list of the intent's content words and words of praise, ``truncated`` the prompt's first third.
    """
    prompts_of: dict[tuple[str, str], list[str]] = {}
    positions = []
    for intent, prompt, task in zip(intents, prompts, tasks, strict=True):
        own = prompts_of.setdefault((task, intent), [])
        positions.append(len(own))
        own.append(prompt)
    rows = []
    others = shuffle_intents(intents, tasks, seed)
    for i, (intent, prompt, task) in enumerate(zip(intents, prompts, tasks, strict=True)):
        controls = {"echo": intent, "stuffed": stuff_keywords(intent), "truncated": truncate(prompt)}
        if others[i]:
            unrelated = prompts_of[task, others[i]]
            controls["shuffled"] = unrelated[positions[i] % len(unrelated)]
        rows += [
            {"pair": i, "kind": kind, "intent": intent, "task": task, "prompt": controls[kind]}
            for kind in CONTROL_KINDS
            if kind in controls
        ]
    return pa.Table.from_pylist(rows, schema=CONTROLS)


def shuffle_intents(intents: Sequence[str], tasks: Sequence[str], seed: int = 0) -> list[str]:
    """Return for each row another intent of its task; empty if the task has no other.

    Each intent of a task replaces exactly one other, so that true and shuffled pairs have equally hard intents.
    """
    rng = np.random.default_rng(seed)
    successor: dict[tuple[str, str], str] = {}
    for task in sorted(set(tasks)):
        ring = sorted({intent for intent, t in zip(intents, tasks, strict=True) if t == task})
        rng.shuffle(ring)
        for intent, other in zip(ring, [*ring[1:], ring[0]], strict=True):
            successor[task, intent] = other if other != intent else ""
    return [successor[task, intent] for intent, task in zip(intents, tasks, strict=True)]


def stuff_keywords(intent: str) -> str:
    """Return the intent's content words twice, with words of praise between and after them, as a list."""
    all_words = list(dict.fromkeys(words(intent))) or intent.split()
    content = [word for word in all_words if word not in _FUNCTION_WORDS] or all_words
    return ", ".join([*content, *QUALITY_WORDS[:3], *content, *QUALITY_WORDS[3:]])


def truncate(prompt: str) -> str:
    """Return the first third of the words, at least one."""
    all_words = prompt.split()
    return " ".join(all_words[: max(1, len(all_words) // 3)])


def sample_per_task(tasks: Sequence[str], limit: int, seed: int) -> list[int]:
    """Return indices of at most ``limit`` random rows of each task."""
    sampled: dict[str, list[int]] = {}
    for i in np.random.default_rng(seed).permutation(len(tasks)):
        own = sampled.setdefault(tasks[i], [])
        if len(own) < limit:
            own.append(int(i))
    return [i for task in sorted(sampled) for i in sampled[task]]


# ---- verdicts


def validate(true_scores: np.ndarray, control_scores: np.ndarray, controls: pa.Table, tasks: Sequence[str]) -> Validation:
    """Validate a pointwise judge.

    Args:
        true_scores: of the true pairs, shape (pairs,), NaN if the judge failed.
        control_scores: of the controls, shape (rows of ``controls``,), NaN likewise.
        controls: as :data:`CONTROLS`.
        tasks: of the true pairs.
    """
    pair_tasks, control_tasks = np.asarray(tasks, dtype=object), np.asarray(controls["task"].to_pylist(), dtype=object)

    def area(of_kind: np.ndarray, task: str | None) -> float:
        is_true = np.ones(len(true_scores), dtype=bool) if task is None else pair_tasks == task
        is_control = of_kind if task is None else of_kind & (control_tasks == task)
        return auc(true_scores[is_true & ~np.isnan(true_scores)], control_scores[is_control & ~np.isnan(control_scores)])

    aucs, by_task = _areas(area, controls)
    pairs = int((~np.isnan(true_scores)).sum())
    validated = _is_validated(aucs, controls, ~np.isnan(control_scores), pairs)
    unrelated = nan_mean(control_scores[_kinds(controls) == "shuffled"])
    return Validation(aucs, by_task, pairs, validated, unrelated, validated and nan_mean(true_scores) > unrelated)


def validate_pairwise(preferences: np.ndarray, controls: pa.Table) -> Validation:
    """Validate a pairwise judge by its preferences for the true prompt over each control.

    ``preferences`` has shape (rows of ``controls``,), NaN if there is no verdict; a tie counts half. The judge has no scale.
    """
    control_tasks = np.asarray(controls["task"].to_pylist(), dtype=object)
    wins = (1 + np.sign(np.round(preferences - 0.5, 6))) / 2  # rounding: an even pair is 0.5 only up to float errors

    def share(of_kind: np.ndarray, task: str | None) -> float:
        return nan_mean(wins[of_kind & (True if task is None else control_tasks == task)])

    aucs, by_task = _areas(share, controls)
    is_judged = ~np.isnan(preferences)
    pairs = len(np.unique(controls["pair"].to_numpy()[is_judged]))
    return Validation(aucs, by_task, pairs, _is_validated(aucs, controls, is_judged, pairs))


Areas = dict[ControlKind, float]


def _areas(measure: Callable[[np.ndarray, str | None], float], controls: pa.Table) -> tuple[Areas, dict[str, Areas]]:
    """``measure`` of each kind of control, over all tasks and by task."""
    kinds, tasks = _kinds(controls), sorted(set(controls["task"].to_pylist()))
    overall = {kind: measure(kinds == kind, None) for kind in CONTROL_KINDS}
    return overall, {task: {kind: measure(kinds == kind, task) for kind in CONTROL_KINDS} for task in tasks}


def _is_validated(aucs: Areas, controls: pa.Table, is_scored: np.ndarray, pairs: int) -> bool:
    shuffled = int((is_scored & (_kinds(controls) == "shuffled")).sum())
    return min(pairs, shuffled) >= MIN_PAIRS and aucs["shuffled"] >= MIN_AUC


def _kinds(controls: pa.Table) -> np.ndarray:
    return np.asarray(controls["kind"].to_pylist(), dtype=object)


def nan_mean(values: np.ndarray) -> float:
    """Return the mean without NaNs; NaN if nothing remains."""
    finite = values[~np.isnan(values)]
    return float(finite.mean()) if len(finite) else float("nan")


def auc(positive: np.ndarray, negative: np.ndarray) -> float:
    """Return the probability that a positive scores above a negative, ties counting half (Mann-Whitney U / pairs)."""
    from scipy import stats

    if not len(positive) or not len(negative):
        return float("nan")
    return float(stats.mannwhitneyu(positive, negative).statistic / (len(positive) * len(negative)))
