"""Validates judges: true pairs of intent and prompt against controls (:mod:`~udrl.evaluate.judges.controls`).

The share of (true pair, control) in which the judge prefers the true one is the area under the ROC curve (AUC): 0.5 is chance,
1 is perfect, and below 0.5 the judge prefers the control. A judge is validated on the gold set if the 95% interval of every
foreseen kind of control lies above :data:`MIN_AUC`: a judge that an echo wins says nothing about a student that echoes.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa

from udrl.evaluate.document import UNKNOWN, Areas, ControlKind, Interval
from udrl.evaluate.judges.controls import CONTROL_KINDS, HELD_OUT_KINDS

MIN_AUC = 0.75  # lower bound of the interval
FORESEEN_KINDS = tuple(kind for kind in CONTROL_KINDS if kind not in HELD_OUT_KINDS)
Z = 1.959964  # of a two-sided 95% interval


def areas_by_task(
    true_scores: np.ndarray, control_scores: np.ndarray, controls: pa.Table, tasks: Sequence[str]
) -> dict[str | None, Areas]:
    """Return a judge's AUC against each kind of control, by task and, under None, over all tasks.

    Args:
        true_scores: of the true pairs, shape (pairs,), NaN if the judge failed.
        control_scores: of the controls, shape (rows of ``controls``,), NaN likewise.
        controls: as :data:`~udrl.evaluate.judges.controls.CONTROLS`.
        tasks: of the true pairs.
    """
    kinds, control_tasks = (np.asarray(controls[name].to_pylist(), dtype=object) for name in ("kind", "task"))
    pair_tasks = np.asarray(tasks, dtype=object)
    true_known, control_known = ~np.isnan(true_scores), ~np.isnan(control_scores)
    areas: dict[str | None, Areas] = {}
    for task in (None, *sorted(set(control_tasks))):
        true = true_scores[true_known & (True if task is None else pair_tasks == task)]
        of_task = control_known & (True if task is None else control_tasks == task)
        areas[task] = {kind: auc(true, control_scores[of_task & (kinds == kind)]) for kind in CONTROL_KINDS if kind in kinds}
    return areas


def weakest(areas: Mapping[ControlKind, Interval]) -> tuple[ControlKind | None, Interval]:
    """Return the foreseen kind of control that the judge tells worst, by the interval's lower bound; unknown if one is."""
    known = {kind: areas[kind] for kind in FORESEEN_KINDS if kind in areas}
    if not known or any(area.low is None for area in known.values()):
        return None, UNKNOWN
    kind = min(known, key=lambda kind: known[kind].low or 0.0)
    return kind, known[kind]


def is_validated(areas: Mapping[ControlKind, Interval]) -> bool:
    """Whether the interval of every foreseen kind of control lies above :data:`MIN_AUC`.

    A kind for which there is no material (the prompts of another task, in a run of one) is not required, except for the
    prompts of other intents and the echo.
    """
    _, area = weakest(areas)
    return {"shuffled", "echo"} <= areas.keys() and area.low is not None and area.low > MIN_AUC


def auc(positive: np.ndarray, negative: np.ndarray) -> Interval:
    """Return the probability that a positive scores above a negative, ties counting half, with its 95% interval.

    The interval is Wilson's for as many independent pairs as would give DeLong's variance (DeLong et al. 1988), so that it
    stays within 0 and 1 and has a width even if no pair is wrong.
    """
    m, n = len(positive), len(negative)
    if not m or not n:
        return UNKNOWN
    # Placement values: the share of the other side that each score is on the right side of.
    of_positive, of_negative = _share_below(positive, negative), 1 - _share_below(negative, positive)
    area = float(of_positive.mean())
    variance = (of_positive.var(ddof=1) / m if m > 1 else 0.0) + (of_negative.var(ddof=1) / n if n > 1 else 0.0)
    pairs = area * (1 - area) / variance if variance > 0 else min(m, n)
    return wilson(area, float(np.clip(pairs, min(m, n), m * n)))


def _share_below(values: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return the share of ``others`` below each value, ties counting half, (values,)."""
    ordered = np.sort(others)
    return (np.searchsorted(ordered, values, "left") + np.searchsorted(ordered, values, "right")) / (2 * len(others))


def wilson(share: float, n: float) -> Interval:
    """Return a share of ``n`` independent trials with its 95% interval (Wilson 1927)."""
    center = (share + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z * np.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2)) / (1 + Z**2 / n)
    return Interval(value=share, low=max(0.0, float(center - half)), high=min(1.0, float(center + half)))


def nan_mean(values: np.ndarray) -> float:
    """Return the mean without NaNs; NaN if nothing remains."""
    finite = values[~np.isnan(values)]
    return float(finite.mean()) if len(finite) else float("nan")
