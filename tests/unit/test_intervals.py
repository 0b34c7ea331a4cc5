"""Bootstrap intervals: what they hold, what they resample, how often they cover."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from udrl.evaluate.metrics import intervals

numbers = st.lists(st.tuples(st.floats(-100, 100), st.integers(0, 8)), min_size=1, max_size=40)


@settings(deadline=None, max_examples=40)
@given(numbers)
def test_an_interval_contains_its_mean(pairs: list[tuple[float, int]]) -> None:
    values, clusters = map(np.array, zip(*pairs, strict=True))
    found = intervals.mean(values, clusters, resamples=100)
    assert found.value == pytest.approx(values.mean(), abs=1e-9)
    assert found.low <= found.value <= found.high
    assert values.min() - 1e-9 <= found.low
    assert found.high <= values.max() + 1e-9


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.floats(0.01, 1), st.integers(0, 8)), min_size=1, max_size=40))
def test_the_ratio_of_a_policy_to_itself_is_one_without_doubt(pairs: list[tuple[float, int]]) -> None:
    values, clusters = map(np.array, zip(*pairs, strict=True))
    assert intervals.ratio(values, clusters, values, clusters, resamples=100) == pytest.approx((1, 1, 1))
    assert intervals.difference(values, clusters, values, clusters, resamples=100) == pytest.approx((0, 0, 0), abs=1e-12)


def test_the_unit_of_resampling_is_the_intent_not_the_row() -> None:
    rng = np.random.default_rng(0)
    per_intent = rng.normal(size=50)
    values, clusters = np.repeat(per_intent, 40), np.repeat(np.arange(50), 40)
    found = intervals.mean(values, clusters, resamples=2000)
    half = (found.high - found.low) / 2
    assert half == pytest.approx(1.96 * per_intent.std() / math.sqrt(50), rel=0.1)  # 40 copies of a row tell nothing new


def test_intervals_cover_the_true_mean_about_95_times_in_100() -> None:
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(200):
        values = rng.normal(0.4, 0.2, size=(60, 1)) + rng.normal(0, 0.1, size=(60, 2))
        found = intervals.mean(values.ravel(), np.repeat(np.arange(60), 2), resamples=300)
        covered += found.low <= 0.4 <= found.high
    assert 180 <= covered <= 198


def test_pairing_by_intent_takes_the_difficulty_of_intents_out() -> None:
    rng = np.random.default_rng(2)
    difficulty, intents = rng.normal(0, 5, 100), np.arange(100)
    teacher, student = difficulty + 1, difficulty + 1.5 + rng.normal(0, 0.1, 100)
    paired = intervals.difference(student, intents, teacher, intents)
    apart = intervals.difference(student, intents, teacher, intents + 1000)
    assert paired.low > 0.4
    assert apart.low < 0 < apart.high


def test_intervals_are_the_same_for_the_same_seed_and_nan_rows_are_left_out() -> None:
    values, clusters = np.array([1.0, np.nan, 3.0, 5.0]), np.array([1, 1, 2, 3])
    assert intervals.mean(values, clusters, seed=3) == intervals.mean(values, clusters, seed=3)
    assert intervals.mean(values, clusters).value == 3
    assert all(math.isnan(x) for x in intervals.mean(np.array([]), np.array([])))
    assert all(math.isnan(x) for x in intervals.ratio(values, clusters, np.zeros(4), clusters))


def test_a_kept_draw_gives_what_drawing_in_blocks_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    values, clusters = np.arange(30.0), np.arange(30)
    kept = intervals.mean(values, clusters, resamples=100, seed=5)
    monkeypatch.setattr(intervals, "_CHUNK", 40 * 30)  # three blocks
    assert intervals.mean(values, clusters, resamples=100, seed=5) == pytest.approx(kept)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 90), st.integers(0, 3))
def test_each_intent_is_left_out_with_one_group_and_groups_are_even(intents: int, seed: int) -> None:
    kept = intervals.groups(intents, seed)
    assert kept.shape == (min(intents, intervals.GROUPS), intents)
    assert ((~kept).sum(axis=0) == 1).all()
    left_out = (~kept).sum(axis=1)
    assert not intents or left_out.max() - left_out.min() <= 1
    assert (kept == intervals.groups(intents, seed)).all()


def test_a_jackknife_against_values_worked_out_by_hand() -> None:
    found = intervals.jackknife(2.0, np.exp([0.1, -0.1, np.nan]))
    spread = math.sqrt(1 / 2 * (0.1**2 + 0.1**2))
    reach = math.exp(12.7062047 * spread)  # Student's t, one degree of freedom
    assert found == pytest.approx((2.0, 2.0 / reach, 2.0 * reach))
    assert intervals.jackknife(2.0, np.array([2.0, 2.0])) == pytest.approx((2, 2, 2))
    assert intervals.jackknife(2.0, np.array([1.0])) == (2, 2, 2)
    assert all(math.isnan(x) for x in intervals.jackknife(math.nan, np.ones(5)))


def test_a_jackknife_covers_the_true_ratio_about_95_times_in_100() -> None:
    rng = np.random.default_rng(4)
    covered = 0
    for i in range(200):
        shared = rng.gamma(4, 1, 60)
        one, two = 0.9 * shared * rng.gamma(9, 1 / 9, 60), shared * rng.gamma(9, 1 / 9, 60)
        kept = intervals.groups(60, i)
        found = intervals.jackknife(one.mean() / two.mean(), (kept @ one) / (kept @ two))
        covered += found.low <= 0.9 <= found.high
    assert 180 <= covered <= 198
