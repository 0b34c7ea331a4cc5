"""How well the student follows its commands: length and reward, commanded against achieved.

A rejected output misses every length; means and errors in words are of accepted ones. Reward counts accepted prompts, and shows
the rejected share next to them: with refusals as 0, a bottom bin full of them would draw a slope that is not control. ``rises``
must hold both ways, so that a top bin can't gain by refusing. A slope counts only if its whole interval is above 0: without
control a point estimate rises from one bin to another in half of all runs.
"""

from collections.abc import Iterable
from itertools import pairwise

import numpy as np
from scipy import stats

from udrl.evaluate.document import UNKNOWN, Interval, LengthControl, LengthLevel, RewardControl, RewardCurve
from udrl.evaluate.metrics.intervals import Bootstrap, Sample
from udrl.evaluate.outputs import Columns, judge_columns, select


def length_control(rows: Columns, bootstrap: Bootstrap) -> LengthControl:
    """Compare commanded with achieved words; ``rows`` are one task's of the probe ``length`` or ``reach``."""
    rows = select(rows, rows["command_words"] >= 1)
    commanded, accepted = rows["command_words"], ~rows["rejected"]
    error = np.abs(rows["n_words"] - commanded)
    within_2 = (error <= 2) & accepted
    lengths = np.unique(commanded).tolist()
    by_length = [select(rows, (commanded == words) & accepted) for words in lengths]
    achieved = [Sample(level["n_words"], level["intent_id"]) for level in by_length]
    return LengthControl(
        n=len(error),
        rejected=average(rows["rejected"]),
        mean=average(rows["n_words"][accepted]),
        mae=average(error[accepted]),
        exact=average((error == 0) & accepted),
        within_2=bootstrap.mean(Sample(within_2, rows["intent_id"])),
        within_2_accepted=average(within_2[accepted]),
        spearman=spearman(commanded[accepted], rows["n_words"][accepted]),
        rises=all_met(_is_positive(bootstrap.difference(upper, lower)) for lower, upper in pairwise(achieved)),
        levels=[_length_level(words, level["n_words"]) for words, level in zip(lengths, by_length, strict=True)],
    )


def length_control_over_tasks(rows: Columns, by_task: Iterable[LengthControl], bootstrap: Bootstrap) -> LengthControl:
    """Compare words over all tasks. The mean rises if it does on every task, because commanded lengths differ by task."""
    overall = length_control(rows, bootstrap)
    return overall.model_copy(update={"rises": all_met(task.rises for task in by_task), "levels": []})


def _length_level(words: int, achieved: np.ndarray) -> LengthLevel:
    p10, p90 = np.quantile(achieved, [0.1, 0.9]).tolist() if len(achieved) else (None, None)
    return LengthLevel(words=words, mean=average(achieved), p10=p10, p90=p90)


def _is_positive(estimate: Interval) -> bool | None:
    if estimate.low is None or estimate.high is None:
        return None
    return True if estimate.low > 0 else False if estimate.high <= 0 else None


def reward_control(rows: Columns, bootstrap: Bootstrap) -> RewardControl:
    """Compare commanded bins with relevance and judges; ``rows`` are one task's of the probe ``reward``."""
    rows = select(rows, rows["command_reward"] >= 0)
    commanded, intents, accepted = rows["command_reward"], rows["intent_id"], ~rows["rejected"]
    bins = np.unique(commanded).tolist()

    def of_bin(values: np.ndarray, level: int) -> Sample:
        return Sample(values[commanded == level], intents[commanded == level])

    def gain(values: np.ndarray) -> Interval:
        return bootstrap.difference(of_bin(values, bins[-1]), of_bin(values, bins[0])) if len(bins) > 1 else UNKNOWN

    def curve(column: str) -> RewardCurve:
        values = np.where(accepted, rows[column], np.nan)
        known = ~np.isnan(values)
        return RewardCurve(
            spearman=spearman(commanded[known], values[known]),
            difference=gain(values),
            means=[bootstrap.mean(of_bin(values, level)) for level in bins],
        )

    relevance = curve("relevance")
    return RewardControl(
        bins=bins,
        rejected=[average(rows["rejected"][commanded == level]) for level in bins],
        rises=all_met([_is_positive(relevance.difference), _is_positive(gain(rows["relevance"]))]),
        relevance=relevance,
        judges={judge: curve(column) for judge, column in judge_columns(rows).items()},
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
