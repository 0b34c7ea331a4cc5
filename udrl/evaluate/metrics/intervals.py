"""Intervals over *intents*: the outputs of one intent succeed or fail together, so rows are not the unit.

95%, seeded. Most are percentiles of a bootstrap. Their statistic is a ratio of sums (a mean is values over counts), so one
resampling is a matrix product of how often each intent was drawn with the per-intent sums; no loop over resamples. A figure
of diversity can't be resampled so, as an intent that is drawn twice is a copy; it has a jackknife.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np

LEVEL = 0.95
GROUPS = 20  # of intents, each left out once by a jackknife
_CHUNK = 4_000_000  # cells of one block of draws: bounds memory at 32 MB however many intents there are


class Interval(NamedTuple):
    """An estimate with its bounds; NaN where there was nothing to estimate from."""

    value: float
    low: float
    high: float

    def plain(self) -> dict[str, float]:
        """For JSON."""
        return self._asdict()


UNKNOWN = Interval(np.nan, np.nan, np.nan)


def mean(values: np.ndarray, clusters: np.ndarray, *, resamples: int = 1000, seed: int = 0) -> Interval:
    """Mean of ``values`` (rows,), NaN rows left out, with the intents in ``clusters`` (rows,) resampled."""
    (sums,) = _sums([(values, clusters)])
    if not sums[:, 1].sum():
        return UNKNOWN
    drawn = _resampled(sums, resamples, seed)
    return _interval(_divide(*sums.sum(axis=0)), _divide(drawn[:, 0], drawn[:, 1]))


def difference(
    values: np.ndarray,
    clusters: np.ndarray,
    others: np.ndarray,
    other_clusters: np.ndarray,
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> Interval:
    """Mean of ``values`` minus mean of ``others``, paired: both sides see the same drawn intents."""
    here, there = _both(values, clusters, others, other_clusters, resamples, seed)
    return UNKNOWN if np.isnan(here[0] - there[0]) else _interval(here[0] - there[0], here[1:] - there[1:])


def ratio(
    values: np.ndarray,
    clusters: np.ndarray,
    others: np.ndarray,
    other_clusters: np.ndarray,
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> Interval:
    """Mean of ``values`` over mean of ``others``, paired; unknown where the mean below the line is not positive."""
    here, there = _both(values, clusters, others, other_clusters, resamples, seed)
    quotients = _divide(here, np.where(there > 0, there, 0.0))
    return UNKNOWN if np.isnan(quotients[0]) else _interval(quotients[0], quotients[1:])


def groups(intents: int, seed: int = 0) -> np.ndarray:
    """Which intents stay when each of :data:`GROUPS` groups, or each intent where there are fewer, is left out: bool (groups,
    intents)."""
    number = min(GROUPS, intents)
    member = np.random.default_rng(seed).permutation(np.arange(intents) % max(1, number))
    return member != np.arange(number)[:, None]


def jackknife(estimate: float, without: np.ndarray) -> Interval:
    """A positive figure with the interval of its values without each of :func:`groups`, (groups,); NaN ones don't count.

    Delete-a-group jackknife (Kott 2001, Journal of Official Statistics 17) of the logarithm, with Student's t. What is left is
    nearly the whole sample: a figure that grows with its number, as a Vendi score does, spreads less on half of it, and half
    samples would give too narrow an interval. With fewer than two values the bounds are the estimate.
    """
    from scipy import stats

    if np.isnan(estimate):
        return UNKNOWN
    logs = np.log(without[without > 0])
    if len(logs) < 2:
        return Interval(estimate, estimate, estimate)
    free = len(logs) - 1
    spread = np.sqrt(free * np.var(logs))  # the sum of squares, times (n - 1) / n
    reach = float(np.exp(stats.t.ppf((1 + LEVEL) / 2, free) * spread))
    return Interval(estimate, estimate / reach, estimate * reach)


def _both(
    values: np.ndarray, clusters: np.ndarray, others: np.ndarray, other_clusters: np.ndarray, resamples: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """The two means, shape (1 + resamples,) each; the estimate stands first."""
    here, there = _sums([(values, clusters), (others, other_clusters)])
    sums = np.hstack([here, there])
    drawn = np.vstack([sums.sum(axis=0), _resampled(sums, resamples, seed)])
    return _divide(drawn[:, 0], drawn[:, 1]), _divide(drawn[:, 2], drawn[:, 3])


def _sums(sides: list[tuple[np.ndarray, np.ndarray]]) -> list[np.ndarray]:
    """Per-intent (sum, count) of each side over the union of their intents, shape (intents, 2) each."""
    known = [(np.asarray(v, dtype=float), np.asarray(c)) for v, c in sides]
    known = [(v[~np.isnan(v)], c[~np.isnan(v)]) for v, c in known]
    intents, index = np.unique(np.concatenate([c for _, c in known]), return_inverse=True)
    parts = np.split(index, np.cumsum([len(v) for v, _ in known])[:-1])
    n = len(intents)
    return [np.stack([np.bincount(i, v, n), np.bincount(i, minlength=n)], 1) for (v, _), i in zip(known, parts, strict=True)]


def _resampled(sums: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Column sums of ``resamples`` bootstrap draws of the rows of ``sums``, shape (resamples, columns)."""
    intents = len(sums)
    if not intents:
        return np.zeros((resamples, sums.shape[1]))
    if resamples * intents <= _CHUNK:
        return _drawn(intents, resamples, seed) @ sums
    rng = np.random.default_rng(seed)
    step = max(1, _CHUNK // intents)
    blocks = [_draw(rng, intents, min(step, resamples - at)) @ sums for at in range(0, resamples, step)]
    return np.vstack(blocks)


@lru_cache(maxsize=4)
def _drawn(intents: int, resamples: int, seed: int) -> np.ndarray:
    """One block of draws, kept: a report asks for hundreds of intervals over the same number of intents."""
    return _draw(np.random.default_rng(seed), intents, resamples).astype(float)


def _draw(rng: np.random.Generator, intents: int, resamples: int) -> np.ndarray:
    """How often each intent is drawn, shape (resamples, intents)."""
    return rng.multinomial(intents, np.full(intents, 1 / intents), size=resamples)


def _divide(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    above, below = np.asarray(above, dtype=float), np.asarray(below, dtype=float)
    return np.divide(above, below, out=np.full(below.shape, np.nan), where=below != 0)


def _interval(estimate: float | np.ndarray, drawn: np.ndarray) -> Interval:
    """Percentiles of the draws that have the statistic; widened to hold the estimate, which rounding alone can put outside."""
    drawn, value = drawn[~np.isnan(drawn)], float(estimate)
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]) if len(drawn) else (value, value)
    return Interval(value, min(float(low), value), max(float(high), value))
