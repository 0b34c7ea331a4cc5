"""How well the student follows its commands: commanded against achieved length and reward.

Length counts every output (a rejected one has the words of its text, or none). Reward counts accepted prompts, and shows the
rejected share next to them: with refusals as 0, a bottom bin full of them would draw a slope that is not control. ``rises``
must hold both ways, so that a top bin can't gain by refusing.
"""

from collections.abc import Iterable, Sequence

import numpy as np
from scipy import stats

from udrl.evaluate.document import (
    UNKNOWN,
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
from udrl.evaluate.outputs import JUDGE, Columns, select


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
