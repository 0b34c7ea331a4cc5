"""Does the student do as it is told: what was commanded against what was achieved, by task.

Length tables count every row as it stands (a refusal has the words of the text it has, or none). Reward tables describe
accepted prompts, with the share of rejected ones beside them: a bottom bin full of refusals counted as zero would draw a
slope that is not control. That ``rises`` must hold both ways keeps a top bin from gaining by refusing.
"""

from typing import Any

import numpy as np
from scipy import stats

from udrl.evaluation import intervals

Columns = dict[str, np.ndarray]  # the arrays of `metrics.columns`, all of shape (rows,)


def length_table(rows: Columns) -> dict[str, Any]:
    """Words commanded against words achieved for one task's rows of the length probe.

    Returns:
        ``levels`` (one dict a commanded length: words, n, mean, p10, p90, mae, exact, within_1, within_2), the same
        figures over all rows, ``spearman``, and ``rises``: the mean achieved grows at every step (None with fewer than
        two lengths).
    """
    commanded, achieved = rows["command_words"], rows["n_words"]
    keep = commanded >= 1
    commanded, achieved = commanded[keep], achieved[keep]
    levels = [
        {
            "words": int(level),
            **_length_errors(commanded[commanded == level], achieved[commanded == level]),
            "p10": float(np.quantile(achieved[commanded == level], 0.1)),
            "p90": float(np.quantile(achieved[commanded == level], 0.9)),
        }
        for level in np.unique(commanded)
    ]
    return {
        **_length_errors(commanded, achieved),
        "spearman": spearman(commanded, achieved),
        "rises": steadily([level["mean"] for level in levels]),
        "levels": levels,
    }


def _length_errors(commanded: np.ndarray, achieved: np.ndarray) -> dict[str, float]:
    error = np.abs(achieved - commanded)
    shares = {name: average(error <= most) for name, most in (("exact", 0), ("within_1", 1), ("within_2", 2))}
    return {"n": len(error), "mean": average(achieved), "mae": average(error), **shares}


def reward_table(rows: Columns, *, resamples: int = 1000, seed: int = 0) -> dict[str, Any]:
    """Reward bin commanded against what was achieved for one task's rows of the reward probe.

    Returns:
        ``levels`` (one dict a bin: bin, n, rejected, relevance and reward with intervals), ``spearman`` of bin and
        relevance, ``difference`` (top bin's mean relevance minus bottom's, paired by intent), ``rises`` (top above
        bottom, among accepted prompts and with rejected ones as 0), ``monotone`` (every step up).
    """
    rows = {name: column[rows["command_reward"] >= 0] for name, column in rows.items()}
    bins, intents, accepted = rows["command_reward"], rows["intent_id"], ~rows["rejected"]
    relevance = np.where(accepted, rows["relevance"], np.nan)
    reward = np.where(accepted, rows["reward"], np.nan)
    levels: list[dict[str, Any]] = []
    for level in np.unique(bins):
        here = bins == level
        levels.append(
            {
                "bin": int(level),
                "n": int(here.sum()),
                "rejected": average(~accepted[here]),
                "relevance": intervals.mean(relevance[here], intents[here], resamples=resamples, seed=seed).plain(),
                "reward": intervals.mean(reward[here], intents[here], resamples=resamples, seed=seed).plain(),
            }
        )
    known = ~np.isnan(relevance)
    top, bottom = (bins == bins.max(), bins == bins.min()) if len(bins) else (bins > 0, bins > 0)
    gain = intervals.difference(
        relevance[top], intents[top], relevance[bottom], intents[bottom], resamples=resamples, seed=seed
    )
    gain_of_all = average(rows["relevance"][top]) - average(rows["relevance"][bottom])
    unknown = len(levels) < 2 or np.isnan(gain.value)
    return {
        "n": len(bins),
        "spearman": spearman(bins[known], relevance[known]),
        "difference": (intervals.UNKNOWN if unknown else gain).plain(),
        "rises": None if unknown else bool(gain.value > 0 and gain_of_all > 0),
        "monotone": steadily([level["relevance"]["value"] for level in levels]),
        "levels": levels,
    }


def spearman(commanded: np.ndarray, achieved: np.ndarray) -> float:
    """Rank correlation over rows; NaN where either side does not vary."""
    if len(commanded) < 2 or np.ptp(commanded) == 0 or np.ptp(achieved) == 0:
        return float("nan")
    return float(stats.spearmanr(commanded, achieved).statistic)


def steadily(means: list[float]) -> bool | None:
    """Does every step go up? None with fewer than two known levels."""
    known = [m for m in means if not np.isnan(m)]
    return None if len(known) < 2 else bool(np.all(np.diff(known) > 0))


def average(values: np.ndarray) -> float:
    """Mean, NaN of nothing."""
    return float(np.mean(values)) if len(values) else float("nan")
