"""95% confidence intervals over intents, seeded.

The outputs of one intent succeed or fail together, so intents are resampled, not rows. Most intervals are percentiles of a
bootstrap. Its statistic is a ratio of sums (a mean is a sum over a count), so all resamples are one product of a matrix, how
often each intent was drawn, with the sums of each intent. A diversity figure can't be resampled so, because an intent that is
drawn twice would be a copy; it has a jackknife.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from udrl.evaluate.document import UNKNOWN, Interval

LEVEL = 0.95
GROUPS = 20  # groups of intents, which a jackknife leaves out in turn


class Sample(NamedTuple):
    """Values and the intents they belong to, shape (rows,) each; NaN values are left out."""

    values: np.ndarray
    intents: np.ndarray


@dataclass(frozen=True)
class Bootstrap:
    """The settings of all bootstrap intervals of one evaluation."""

    resamples: int = 1000
    seed: int = 0

    def mean(self, sample: Sample) -> Interval:
        (sums,) = _sums_by_intent(sample)
        if not sums[:, 1].sum():
            return UNKNOWN
        resampled = self._resample(sums)
        return _percentiles(_divide(*sums.sum(axis=0)), _divide(resampled[:, 0], resampled[:, 1]))

    def difference(self, sample: Sample, base: Sample) -> Interval:
        """Return the mean of ``sample`` minus that of ``base``, paired: both sides see the same resampled intents."""
        means, base_means = self._paired_means(sample, base)
        return _percentiles(means[0] - base_means[0], means[1:] - base_means[1:])

    def ratio(self, sample: Sample, base: Sample) -> Interval:
        """Return the mean of ``sample`` over that of ``base``, paired; unknown if the mean of ``base`` is not positive."""
        means, base_means = self._paired_means(sample, base)
        ratios = _divide(means, np.where(base_means > 0, base_means, 0.0))
        return _percentiles(ratios[0], ratios[1:])

    def _paired_means(self, sample: Sample, base: Sample) -> tuple[np.ndarray, np.ndarray]:
        """Return the two means, shape (1 + resamples,) each; the estimate comes first."""
        sums = np.hstack(_sums_by_intent(sample, base))
        resampled = np.vstack([sums.sum(axis=0), self._resample(sums)])
        return _divide(resampled[:, 0], resampled[:, 1]), _divide(resampled[:, 2], resampled[:, 3])

    def _resample(self, sums: np.ndarray) -> np.ndarray:
        """Return the column sums of each resample of the rows of ``sums``, shape (resamples, columns)."""
        return _draws(len(sums), self.resamples, self.seed) @ sums if len(sums) else np.zeros((self.resamples, sums.shape[1]))


def leave_out_groups(intents: int, seed: int = 0) -> np.ndarray:
    """Return which intents stay when each group of them is left out, bool (groups, intents).

    There are :data:`GROUPS` groups, or one for each intent if there are fewer intents.
    """
    groups = min(GROUPS, intents)
    membership = np.random.default_rng(seed).permutation(np.arange(intents) % max(1, groups))
    return membership != np.arange(groups)[:, None]


def jackknife(estimate: float, without: np.ndarray) -> Interval:
    """Return a positive figure with its interval, from its values without each group of intents, (groups,).

    Delete-a-group jackknife (Kott 2001, Journal of Official Statistics 17) of the logarithm, with Student's t. Each value
    rests on nearly the whole sample: a figure that grows with the sample, as a Vendi score does, varies less on half of it, so
    half samples would give too narrow an interval. With fewer than two known values the bounds are the estimate.
    """
    from scipy import stats

    if np.isnan(estimate):
        return UNKNOWN
    logs = np.log(without[without > 0])
    if len(logs) < 2:
        return Interval(value=estimate, low=estimate, high=estimate)
    degrees = len(logs) - 1
    error = np.sqrt(degrees * np.var(logs))  # the sum of squares, times (n - 1) / n
    factor = float(np.exp(stats.t.ppf((1 + LEVEL) / 2, degrees) * error))
    return Interval(value=estimate, low=estimate / factor, high=estimate * factor)


def _sums_by_intent(*samples: Sample) -> list[np.ndarray]:
    """Return (sum, count) of each intent for each sample, shape (intents, 2), over the union of their intents."""
    finite = []
    for sample in samples:
        values = np.asarray(sample.values, dtype=float)
        finite.append(Sample(values[~np.isnan(values)], np.asarray(sample.intents)[~np.isnan(values)]))
    intents, positions = np.unique(np.concatenate([sample.intents for sample in finite]), return_inverse=True)
    by_sample = np.split(positions, np.cumsum([len(sample.values) for sample in finite])[:-1])
    return [
        np.stack([np.bincount(at, sample.values, len(intents)), np.bincount(at, minlength=len(intents))], 1)
        for sample, at in zip(finite, by_sample, strict=True)
    ]


@lru_cache(maxsize=4)
def _draws(intents: int, resamples: int, seed: int) -> np.ndarray:
    """Return how often each intent is drawn, shape (resamples, intents).

    A report needs hundreds of intervals over one number of intents.
    """
    rng = np.random.default_rng(seed)
    return rng.multinomial(intents, np.full(intents, 1 / intents), size=resamples).astype(float)


def _divide(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Return the quotients, NaN where the denominator is 0."""
    numerator, denominator = np.asarray(numerator, dtype=float), np.asarray(denominator, dtype=float)
    return np.divide(numerator, denominator, out=np.full(denominator.shape, np.nan), where=denominator != 0)


def _percentiles(estimate: float | np.ndarray, resampled: np.ndarray) -> Interval:
    """Return the percentiles of the known values, widened to hold the estimate, which rounding can put outside."""
    value = float(estimate)
    if np.isnan(value):
        return UNKNOWN
    known = resampled[~np.isnan(resampled)]
    low, high = np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]) if len(known) else (value, value)
    return Interval(value=value, low=min(float(low), value), high=max(float(high), value))
