"""Confidence intervals: their bounds, the unit of resampling, and how often they cover the truth."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from udrl.evaluate.document import UNKNOWN, Interval
from udrl.evaluate.metrics import intervals
from udrl.evaluate.metrics.intervals import Bootstrap, Sample


def bounds(interval: Interval) -> tuple[float | None, float | None, float | None]:
    return interval.value, interval.low, interval.high


numbers = st.lists(st.tuples(st.floats(-100, 100), st.integers(0, 8)), min_size=1, max_size=40)


@settings(deadline=None, max_examples=40)
@given(numbers)
def test_an_interval_contains_its_mean(pairs: list[tuple[float, int]]) -> None:
    sample = Sample(*map(np.array, zip(*pairs, strict=True)))
    mean = Bootstrap(100).mean(sample)
    assert mean.value == pytest.approx(sample.values.mean(), abs=1e-9)
    assert mean.low <= mean.value <= mean.high
    assert sample.values.min() - 1e-9 <= mean.low
    assert mean.high <= sample.values.max() + 1e-9


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.floats(0.01, 1), st.integers(0, 8)), min_size=1, max_size=40))
def test_the_ratio_of_a_policy_to_itself_is_one_without_doubt(pairs: list[tuple[float, int]]) -> None:
    sample = Sample(*map(np.array, zip(*pairs, strict=True)))
    assert bounds(Bootstrap(100).ratio(sample, sample)) == pytest.approx((1, 1, 1))
    assert bounds(Bootstrap(100).difference(sample, sample)) == pytest.approx((0, 0, 0), abs=1e-12)


def test_the_unit_of_resampling_is_the_intent_not_the_row() -> None:
    rng = np.random.default_rng(0)
    per_intent = rng.normal(size=50)
    mean = Bootstrap(2000).mean(Sample(np.repeat(per_intent, 40), np.repeat(np.arange(50), 40)))
    half = (mean.high - mean.low) / 2
    assert half == pytest.approx(1.96 * per_intent.std() / math.sqrt(50), rel=0.1)  # 40 copies of a row add no information


def test_intervals_cover_the_true_mean_about_95_times_in_100() -> None:
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(200):
        values = rng.normal(0.4, 0.2, size=(60, 1)) + rng.normal(0, 0.1, size=(60, 2))
        mean = Bootstrap(300).mean(Sample(values.ravel(), np.repeat(np.arange(60), 2)))
        covered += mean.low <= 0.4 <= mean.high
    assert 180 <= covered <= 198


def test_pairing_by_intent_removes_the_difficulty_of_intents() -> None:
    rng = np.random.default_rng(2)
    difficulty, intents = rng.normal(0, 5, 100), np.arange(100)
    teacher, student = difficulty + 1, difficulty + 1.5 + rng.normal(0, 0.1, 100)
    paired = Bootstrap().difference(Sample(student, intents), Sample(teacher, intents))
    unpaired = Bootstrap().difference(Sample(student, intents), Sample(teacher, intents + 1000))
    assert paired.low > 0.4
    assert unpaired.low < 0 < unpaired.high


def test_intervals_are_the_same_for_the_same_seed_and_nan_rows_are_left_out() -> None:
    sample = Sample(np.array([1.0, np.nan, 3.0, 5.0]), np.array([1, 1, 2, 3]))
    assert Bootstrap(seed=3).mean(sample) == Bootstrap(seed=3).mean(sample)
    assert Bootstrap().mean(sample).value == 3
    assert Bootstrap().mean(Sample(np.array([]), np.array([]))) == UNKNOWN
    assert Bootstrap().ratio(sample, Sample(np.zeros(4), sample.intents)) == UNKNOWN


def test_an_interval_is_of_the_resampled_intents() -> None:
    values = np.random.default_rng(0).random(60)
    counts = np.random.default_rng(5).multinomial(60, np.full(60, 1 / 60), size=100)
    mean = Bootstrap(100, seed=5).mean(Sample(values, np.arange(60)))
    assert (mean.low, mean.high) == pytest.approx(tuple(np.quantile(counts @ values / 60, [0.025, 0.975])))


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 90), st.integers(0, 3))
def test_each_intent_is_left_out_with_one_group_and_groups_are_even(intents: int, seed: int) -> None:
    remaining = intervals.leave_out_groups(intents, seed)
    assert remaining.shape == (min(intents, intervals.GROUPS), intents)
    assert ((~remaining).sum(axis=0) == 1).all()
    left_out = (~remaining).sum(axis=1)
    assert not intents or left_out.max() - left_out.min() <= 1
    assert (remaining == intervals.leave_out_groups(intents, seed)).all()


def test_a_jackknife_against_values_worked_out_by_hand() -> None:
    error = math.sqrt(1 / 2 * (0.1**2 + 0.1**2))
    factor = math.exp(12.7062047 * error)  # Student's t, one degree of freedom
    interval = intervals.jackknife(2.0, np.exp([0.1, -0.1, np.nan]))
    assert bounds(interval) == pytest.approx((2.0, 2.0 / factor, 2.0 * factor))
    assert bounds(intervals.jackknife(2.0, np.array([2.0, 2.0]))) == pytest.approx((2, 2, 2))
    assert bounds(intervals.jackknife(2.0, np.array([1.0]))) == (2, 2, 2)
    assert intervals.jackknife(math.nan, np.ones(5)) == UNKNOWN


def test_a_jackknife_covers_the_true_ratio_about_95_times_in_100() -> None:
    rng = np.random.default_rng(4)
    covered = 0
    for i in range(200):
        shared = rng.gamma(4, 1, 60)
        one, two = 0.9 * shared * rng.gamma(9, 1 / 9, 60), shared * rng.gamma(9, 1 / 9, 60)
        remaining = intervals.leave_out_groups(60, i)
        interval = intervals.jackknife(one.mean() / two.mean(), (remaining @ one) / (remaining @ two))
        covered += interval.low <= 0.9 <= interval.high
    assert 180 <= covered <= 198
