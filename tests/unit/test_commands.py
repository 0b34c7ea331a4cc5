"""Commands: bins, ranks, the control tokens, and what travels with the model."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pydantic import ValidationError

from udrl import commands
from udrl.commands import ANY, Command, CommandVocabulary

VALUES = arrays(np.float64, st.integers(5, 200), elements=st.floats(0, 1, width=32))


def episodes(n: int = 200, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "task": np.where(np.arange(n) % 2 == 0, "paint", "find"),
        "intent_id": np.arange(n) // 4,
        "n_words": rng.integers(3, 30, n),
        "reward": rng.random(n),
        "relevance": rng.random(n),
    }


def learnt(**more: object) -> tuple[CommandVocabulary, np.ndarray]:
    options = {"max_words": 24, "reward_bins": 5, "rank_within": "task"} | more
    return commands.learn(["paint", "find"], episodes(), **options)


@settings(deadline=None)
@given(VALUES, st.integers(2, 8))
def test_a_higher_value_never_lies_in_a_lower_bin(values: np.ndarray, bins: int) -> None:
    placed = commands.to_bin(values, commands.bin_edges(values, bins))
    assert placed.min() >= 0
    assert placed.max() <= bins - 1
    order = np.argsort(values, kind="stable")
    assert (np.diff(placed[order]) >= 0).all()


def test_bins_of_distinct_values_are_equally_full() -> None:
    values = np.random.default_rng(1).permutation(np.arange(1000.0))
    counts = np.bincount(commands.to_bin(values, commands.bin_edges(values, 5)))
    assert counts.tolist() == [200] * 5


@pytest.mark.parametrize("shape", ["even", "peaked", "skewed"])
def test_bins_of_continuous_rewards_are_as_full_as_exact_quantiles_make_them(shape: str) -> None:
    rng = np.random.default_rng(2)
    values = {"even": rng.random(20_000), "peaked": rng.normal(0.8, 0.03, 20_000), "skewed": rng.beta(5, 1, 20_000)}[shape]
    exact = np.quantile(values, np.arange(1, 5) / 5)
    ours = commands.bin_edges(values, 5)
    assert np.allclose(ours, exact, atol=5e-4)
    counts = np.bincount(commands.to_bin(values, ours))
    assert np.allclose(counts, np.bincount(commands.to_bin(values, exact)), rtol=0.01)


@settings(deadline=None)
@given(VALUES, st.integers(2, 8))
def test_equal_values_share_a_bin_and_the_top_bin_is_never_empty(values: np.ndarray, bins: int) -> None:
    placed = commands.to_bin(values, commands.bin_edges(values, bins))
    assert placed.max() == bins - 1
    for value in np.unique(values):
        assert len(np.unique(placed[values == value])) == 1


def test_many_ties_at_the_bottom_stay_out_of_the_top_bin() -> None:
    values = np.r_[np.zeros(900), np.linspace(0.5, 1, 100)]
    placed = commands.to_bin(values, commands.bin_edges(values, 5))
    assert (placed == 4).sum() == 100


def test_rewards_below_zero_keep_their_order() -> None:
    values = np.linspace(-2, 2, 1000)
    assert np.bincount(commands.to_bin(values, commands.bin_edges(values, 4))).tolist() == [250] * 4


@pytest.mark.parametrize("rank_within", ["task", "intent"])
def test_counting_file_by_file_learns_what_counting_at_once_does(rank_within: str) -> None:
    whole = episodes()
    files = [{name: column[i : i + 40] for name, column in whole.items()} for i in range(0, 200, 40)]  # 10 intents each
    parts = [commands.tally(file, rank_within) for file in files]
    options = {"max_words": 24, "reward_bins": 5, "rank_within": rank_within}
    at_once = commands.fit_vocabulary(commands.tally(whole, rank_within), ["paint", "find"], **options)
    assert commands.fit_vocabulary(commands.merge(parts), ["paint", "find"], **options) == at_once
    assert (
        commands.fit_vocabulary(commands.merge([commands.merge(parts[3:]), *parts[:3]]), ["paint", "find"], **options)
        == at_once
    )
    empty = {name: column[:0] for name, column in whole.items()}
    assert commands.merge([commands.tally(empty, rank_within), *parts]).num_rows == commands.merge(parts).num_rows


def test_a_tally_is_bounded_by_cells_and_lengths_and_not_by_episodes() -> None:
    columns = episodes(300_000)
    columns |= {"reward": 0.5 + columns["reward"] / 2, "n_words": columns["n_words"] % 4}
    assert commands.tally(columns, "task").num_rows <= 2 * 4 * 4096  # tasks, lengths, cells from 1/2 to 1


def test_the_top_share_is_cut_by_the_ranking_of_the_bins() -> None:
    columns = episodes(20_000)
    cut = commands.top_edges(commands.tally(columns, "task"), ["paint", "find"], 0.3)
    for task in ("paint", "find"):
        assert (columns["reward"][columns["task"] == task] >= cut[task]).mean() == pytest.approx(0.3, abs=0.003)


@pytest.mark.parametrize("objective", ["sft", "sft_top"])
def test_without_hindsight_the_default_command_is_the_task_alone(objective: str) -> None:
    vocabulary, _ = learnt(objective=objective)
    assert vocabulary.default("paint") == Command(task="paint", words=ANY, reward=ANY)
    assert vocabulary.control_tokens() == learnt()[0].control_tokens()  # the same tokenizer serves every objective


@settings(deadline=None)
@given(VALUES, st.integers(1, 9))
def test_ranks_within_a_group_take_the_group_s_difficulty_out(values: np.ndarray, size: int) -> None:
    groups = np.arange(len(values)) // size
    ranks = commands.rank_within_groups(values, groups)
    for group in np.unique(groups):
        mine = ranks[groups == group]
        # Each group holds the same mid-quantiles, however good its members are.
        assert np.allclose(np.sort(mine), (np.arange(len(mine)) + 0.5) / len(mine))
        order = np.argsort(mine)
        assert (np.diff(values[groups == group][order]) >= 0).all()


def test_hindsight_bins_rise_with_the_reward_within_each_task() -> None:
    vocabulary, labels = learnt()
    columns = episodes()
    for task in ("paint", "find"):
        mine = columns["task"] == task
        means = [columns["reward"][mine & (labels == b)].mean() for b in range(5)]
        assert means == sorted(means)
        assert np.allclose(means, vocabulary.tasks[task].achieved_reward)


def test_ranking_within_the_intent_labels_easy_and_hard_intents_alike() -> None:
    columns = episodes()
    columns["reward"] = columns["reward"] * 0.1 + (columns["intent_id"] % 10)  # the intent decides nearly everything
    options = {"max_words": 24, "reward_bins": 2}
    _, by_task = commands.learn(["paint", "find"], columns, rank_within="task", **options)
    _, by_intent = commands.learn(["paint", "find"], columns, rank_within="intent", **options)
    hard = columns["intent_id"] % 10 == 0
    assert by_task[hard].mean() == 0
    assert 0.4 <= by_intent[hard].mean() <= 0.6


def test_the_default_command_is_in_distribution() -> None:
    vocabulary, _ = learnt()
    default = vocabulary.default("paint")
    assert default.reward == 4
    assert 3 <= default.words <= 24


def test_control_tokens_are_distinct_and_cover_every_command() -> None:
    vocabulary, _ = learnt()
    tokens = vocabulary.control_tokens()
    assert len(tokens) == len(set(tokens))
    for words in (ANY, 1, 24):
        for reward in (ANY, 0, 4):
            assert set(vocabulary.tokens(Command(task="find", words=words, reward=reward))) <= set(tokens)


@pytest.mark.parametrize(
    ("command", "named"),
    [
        (Command(task="sing"), "sing"),
        (Command(task="find", words=25), "25"),
        (Command(task="find", words=0), "0"),
        (Command(task="find", reward=5), "5"),
    ],
)
def test_a_command_outside_the_vocabulary_is_refused_by_name(command: Command, named: str) -> None:
    vocabulary, _ = learnt()
    with pytest.raises(ValueError, match=named):
        vocabulary.tokens(command)


def test_below_any_is_no_command() -> None:
    with pytest.raises(ValidationError):
        Command(task="find", words=-2)


def test_the_vocabulary_survives_its_file(tmp_path: object) -> None:
    vocabulary, _ = learnt()
    vocabulary.save(str(tmp_path))
    assert CommandVocabulary.load(str(tmp_path)) == vocabulary


def test_a_task_without_episodes_is_named() -> None:
    with pytest.raises(ValueError, match="sing"):
        commands.learn(["sing"], episodes(), max_words=24, reward_bins=5, rank_within="task")
