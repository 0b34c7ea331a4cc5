"""Does the student do as it is told: what was commanded against what was achieved, by task.

Length tables count every row as it stands (a refusal has the words of the text it has, or none). Reward tables describe
accepted prompts, with the share of rejected ones beside them: a bottom bin full of refusals counted as zero would draw a
slope that is not control. That ``rises`` must hold both ways keeps a top bin from gaining by refusing.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
from scipy import stats

from udrl.evaluate.metrics import intervals
from udrl.evaluate.outputs import JUDGE, Columns


def length_table(rows: Columns) -> dict[str, Any]:
    """Words commanded against words achieved for one task's rows of the probe ``length`` or ``reach``.

    Returns:
        ``levels`` (one dict a commanded length: words, n, mean, p10, p90, mae, bias, exact, within_1, within_2, within_10pct),
        the same figures over all rows, ``spearman``, and ``rises``: the mean achieved grows at every step (None with fewer
        than two lengths). ``bias`` is the mean of achieved minus commanded; ``within_10pct`` is of the commanded words.
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


def over_tasks(rows: Columns, of_tasks: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The length table of all tasks together, without levels. It rises if every task's does: their levels differ."""
    found = {name: value for name, value in length_table(rows).items() if name != "levels"}
    return {**found, "rises": every(task["rises"] for task in of_tasks)}


def _length_errors(commanded: np.ndarray, achieved: np.ndarray) -> dict[str, float]:
    error = np.abs(achieved - commanded)
    shares = {name: average(error <= most) for name, most in (("exact", 0), ("within_1", 1), ("within_2", 2))}
    shares["within_10pct"] = average(10 * error <= commanded)  # in whole numbers: 2 of 20 words is within
    return {
        "n": len(error),
        "mean": average(achieved),
        "mae": average(error),
        "bias": average(achieved - commanded),
        **shares,
    }


def reward_table(rows: Columns, *, resamples: int = 1000, seed: int = 0) -> dict[str, Any]:
    """Reward bin commanded against what was achieved for one task's rows of the probe ``reward``.

    Returns:
        ``levels`` (one dict a bin: bin, n, rejected, relevance, reward and ``judges`` with intervals), ``spearman`` of bin
        and relevance, ``difference`` (top bin's mean relevance minus bottom's, paired by intent), ``rises`` (top above
        bottom, among accepted prompts and with rejected ones as 0), ``monotone`` (every step up), and under ``judges`` the
        spearman, difference and monotone of each judge: it did not make the reward.
    """
    rows = {name: column[rows["command_reward"] >= 0] for name, column in rows.items()}
    bins, intents, accepted = rows["command_reward"], rows["intent_id"], ~rows["rejected"]
    options: dict[str, Any] = {"resamples": resamples, "seed": seed}
    judges = {name.removeprefix(JUDGE): name for name in rows if name.startswith(JUDGE)}
    kept = {name: np.where(accepted, rows[name], np.nan) for name in ("relevance", "reward", *judges.values())}
    levels: list[dict[str, Any]] = []
    for level in np.unique(bins):
        here = bins == level
        means = {name: intervals.mean(kept[name][here], intents[here], **options).plain() for name in kept}
        levels.append(
            {
                "bin": int(level),
                "n": int(here.sum()),
                "rejected": average(~accepted[here]),
                "relevance": means["relevance"],
                "reward": means["reward"],
                "judges": {judge: means[name] for judge, name in judges.items()},
            }
        )
    top, bottom = (bins == bins.max(), bins == bins.min()) if len(bins) else (bins > 0, bins > 0)

    def seen_by(name: str, means: list[float]) -> dict[str, Any]:
        values = kept[name]
        known = ~np.isnan(values)
        gain = intervals.difference(values[top], intents[top], values[bottom], intents[bottom], **options)
        return {
            "spearman": spearman(bins[known], values[known]),
            "difference": (intervals.UNKNOWN if len(levels) < 2 else gain).plain(),
            "monotone": steadily(means),
        }

    found = seen_by("relevance", [level["relevance"]["value"] for level in levels])
    gain, gain_of_all = found["difference"]["value"], average(rows["relevance"][top]) - average(rows["relevance"][bottom])
    return {
        "n": len(bins),
        **found,
        "rises": None if np.isnan(gain) else bool(gain > 0 and gain_of_all > 0),
        "levels": levels,
        "judges": {
            judge: seen_by(name, [level["judges"][judge]["value"] for level in levels]) for judge, name in judges.items()
        },
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


def every(met: Iterable[bool | None]) -> bool | None:
    """False if one is, else None if one is not known or there is none, else True."""
    known = list(met)
    return False if False in known else None if None in known or not known else True


def average(values: np.ndarray) -> float:
    """Mean, NaN of nothing."""
    return float(np.mean(values)) if len(values) else float("nan")
