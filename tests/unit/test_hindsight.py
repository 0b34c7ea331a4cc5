"""Reward bins, ranks and labels."""

from typing import Any

import numpy as np
import pytest
from fakes.fake_vocabulary import fake_vocabulary, fit_to
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from udrl.commands import ANY, CommandVocabulary
from udrl.hashing import fingerprint
from udrl.train import hindsight

TASKS = ["paint", "find"]
VALUES = arrays(np.float64, st.integers(5, 200), elements=st.floats(0, 1, width=32))


def episodes(n: int = 200) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "task": np.where(np.arange(n) % 2 == 0, "paint", "find"),
        "intent_id": np.arange(n) // 4,
        "n_words": rng.integers(3, 30, n),
        "reward": rng.random(n),
        "relevance": rng.random(n),
    }


def fit(columns: dict[str, Any] | None = None, **options: Any) -> CommandVocabulary:
    return fit_to(TASKS, episodes() if columns is None else columns, **{"max_words": 24, **options})


def labels_of(vocabulary: CommandVocabulary, columns: dict[str, np.ndarray]) -> np.ndarray:
    values = hindsight.rank_values(columns, vocabulary.rank_within)
    return hindsight.find_reward_bins(vocabulary, columns["task"], values)


def edges_of(rewards: np.ndarray, bins: int) -> np.ndarray:
    n = len(rewards)
    columns = {"task": np.full(n, "paint"), "intent_id": np.arange(n), "n_words": np.full(n, 5), "reward": rewards}
    return np.array(fit_to(["paint"], {**columns, "relevance": rewards}, reward_bins=bins).tasks["paint"].edges)


# ---- bins


@settings(deadline=None)
@given(VALUES, st.integers(2, 8))
def test_a_higher_reward_never_lies_in_a_lower_bin(rewards: np.ndarray, bins: int) -> None:
    placed = hindsight.find_bins(rewards, edges_of(rewards, bins))
    assert placed.min() >= 0
    assert placed.max() <= bins - 1
    order = np.argsort(rewards, kind="stable")
    assert (np.diff(placed[order]) >= 0).all()


def test_bins_of_distinct_rewards_are_equally_full() -> None:
    rewards = np.random.default_rng(1).permutation(np.arange(1000.0))
    assert np.bincount(hindsight.find_bins(rewards, edges_of(rewards, 5))).tolist() == [200] * 5


@pytest.mark.parametrize("shape", ["even", "peaked", "skewed"])
def test_bins_of_continuous_rewards_are_as_full_as_those_of_exact_quantiles(shape: str) -> None:
    rng = np.random.default_rng(2)
    rewards = {"even": rng.random(20_000), "peaked": rng.normal(0.8, 0.03, 20_000), "skewed": rng.beta(5, 1, 20_000)}[shape]
    exact = np.quantile(rewards, np.arange(1, 5) / 5)
    edges = edges_of(rewards, 5)
    assert np.allclose(edges, exact, atol=5e-4)
    counts = np.bincount(hindsight.find_bins(rewards, edges))
    assert np.allclose(counts, np.bincount(hindsight.find_bins(rewards, exact)), rtol=0.01)


@settings(deadline=None)
@given(VALUES, st.integers(2, 8))
def test_equal_rewards_share_a_bin_and_the_top_bin_is_never_empty(rewards: np.ndarray, bins: int) -> None:
    placed = hindsight.find_bins(rewards, edges_of(rewards, bins))
    assert placed.max() == bins - 1
    for reward in np.unique(rewards):
        assert len(np.unique(placed[rewards == reward])) == 1


def test_many_ties_at_the_bottom_stay_out_of_the_top_bin() -> None:
    rewards = np.r_[np.zeros(900), np.linspace(0.5, 1, 100)]
    assert (hindsight.find_bins(rewards, edges_of(rewards, 5)) == 4).sum() == 100


def test_rewards_below_zero_keep_their_order() -> None:
    rewards = np.linspace(-2, 2, 1000)
    assert np.bincount(hindsight.find_bins(rewards, edges_of(rewards, 4))).tolist() == [250] * 4


# ---- counts


@pytest.mark.parametrize("rank_within", ["task", "intent"])
def test_counts_of_single_files_add_up_to_the_counts_of_all_episodes(rank_within: str) -> None:
    columns = episodes()
    files = [{name: column[i : i + 40] for name, column in columns.items()} for i in range(0, 200, 40)]  # 10 intents each
    parts = [hindsight.count_episodes(file, rank_within) for file in files]
    options: dict[str, Any] = {"max_words": 24, "reward_bins": 5, "rank_within": rank_within}
    vocabulary = fit(rank_within=rank_within)
    merged = hindsight.merge_counts(parts)
    reordered = hindsight.merge_counts([hindsight.merge_counts(parts[3:]), *parts[:3]])
    assert hindsight.fit_vocabulary(merged, TASKS, **options) == vocabulary
    assert hindsight.fit_vocabulary(reordered, TASKS, **options) == vocabulary
    empty = hindsight.count_episodes({name: column[:0] for name, column in columns.items()}, rank_within)
    assert hindsight.merge_counts([empty, *parts]).num_rows == merged.num_rows


def test_the_size_of_counts_is_bounded_by_cells_and_lengths_and_not_by_episodes() -> None:
    columns = episodes(300_000)
    columns |= {"reward": 0.5 + columns["reward"] / 2, "n_words": columns["n_words"] % 4}
    assert hindsight.count_episodes(columns, "task").num_rows <= 2 * 4 * 4096  # tasks, lengths, cells from 1/2 to 1


def test_the_threshold_of_the_top_share_is_reached_by_that_share_of_the_episodes() -> None:
    columns = episodes(20_000)
    thresholds = hindsight.top_share_thresholds(hindsight.count_episodes(columns, "task"), TASKS, 0.3)
    for task in TASKS:
        assert (columns["reward"][columns["task"] == task] >= thresholds[task]).mean() == pytest.approx(0.3, abs=0.003)


def test_a_task_without_episodes_is_named() -> None:
    with pytest.raises(ValueError, match="sing"):
        fit_to(["sing"], episodes())


# ---- ranks


@settings(deadline=None)
@given(VALUES, st.integers(1, 9))
def test_ranks_within_a_group_do_not_depend_on_the_group_s_difficulty(values: np.ndarray, size: int) -> None:
    groups = np.arange(len(values)) // size
    ranks = hindsight.rank_within_groups(values, groups)
    for group in np.unique(groups):
        of_group = ranks[groups == group]
        # Each group has the same mid-quantiles, however good its members are.
        assert np.allclose(np.sort(of_group), (np.arange(len(of_group)) + 0.5) / len(of_group))
        assert (np.diff(values[groups == group][np.argsort(of_group)]) >= 0).all()


def test_ranking_within_the_intent_labels_easy_and_hard_intents_alike() -> None:
    columns = episodes()
    columns["reward"] = columns["reward"] * 0.1 + (columns["intent_id"] % 10)  # the intent decides nearly everything
    by_task, by_intent = (labels_of(fit(columns, reward_bins=2, rank_within=w), columns) for w in ("task", "intent"))
    is_hard = columns["intent_id"] % 10 == 0
    assert by_task[is_hard].mean() == 0
    assert 0.4 <= by_intent[is_hard].mean() <= 0.6


# ---- labels


def test_reward_bins_rise_with_the_reward_within_each_task() -> None:
    columns, vocabulary = episodes(), fit()
    labels = labels_of(vocabulary, columns)
    for task in TASKS:
        of_task = columns["task"] == task
        means = [columns["reward"][of_task & (labels == b)].mean() for b in range(5)]
        assert means == sorted(means)
        assert np.allclose(means, vocabulary.tasks[task].achieved_reward)


def test_command_dropout_drops_both_parts_together_and_each_on_its_own() -> None:
    words, rewards = hindsight.label_episodes(
        fake_vocabulary(), np.full(5000, 9), np.full(5000, 3), 0.1, np.random.default_rng(0)
    )
    assert set(words) == {ANY, 9}
    assert set(rewards) == {ANY, 3}
    assert 0.09 < ((words == ANY) & (rewards == ANY)).mean() < 0.13
    assert 0.17 < (words == ANY).mean() < 0.21


def test_a_length_that_has_no_token_is_commanded_as_any() -> None:
    words, rewards = hindsight.label_episodes(
        fake_vocabulary(), np.array([0, 1, 16, 17]), np.arange(4), 0.0, np.random.default_rng(0)
    )
    assert words.tolist() == [ANY, 1, 16, ANY]
    assert rewards.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("objective", ["sft", "sft_top"])
def test_plain_fine_tuning_commands_only_the_task(objective: str) -> None:
    vocabulary = fake_vocabulary(objective=objective)
    words, rewards = hindsight.label_episodes(vocabulary, np.arange(1, 9), np.arange(8) % 5, 0.5, np.random.default_rng(0))
    assert set(words) == set(rewards) == {ANY}


@pytest.mark.parametrize(
    ("rank_within", "vocabulary_hash", "labels_hash", "thresholds"),
    [
        ("task", "dcd3c281b4f26c74", "acb051fbd4370f84", {"paint": 0.8018798828125, "find": 0.7440185546875}),
        ("intent", "5f8fb38d8548d441", "2697c9622c8320c5", {"paint": 0.75, "find": 0.75}),
    ],
)
def test_labels_are_those_of_earlier_versions(
    rank_within: str, vocabulary_hash: str, labels_hash: str, thresholds: dict[str, float]
) -> None:
    """Labels are part of existing students' training data; these values were computed with the version of 2026-11-24."""
    columns = episodes()
    seed = [4, 0, 1]
    counts = hindsight.count_episodes(columns, rank_within, seed)
    vocabulary = hindsight.fit_vocabulary(counts, TASKS, max_words=24, reward_bins=5, rank_within=rank_within)
    assert fingerprint(vocabulary.model_dump()) == vocabulary_hash
    bins = hindsight.find_reward_bins(vocabulary, columns["task"], hindsight.rank_values(columns, rank_within, seed))
    words, rewards = hindsight.label_episodes(vocabulary, columns["n_words"], bins, 0.1, np.random.default_rng([*seed, 0]))
    assert fingerprint([words.tolist(), rewards.tolist()]) == labels_hash
    assert hindsight.top_share_thresholds(counts, TASKS, 0.3) == thresholds
