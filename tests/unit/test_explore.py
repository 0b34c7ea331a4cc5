"""Exploration: the drawn commands, the drawn intents, and the fingerprints that name existing completions."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fakes.fake_vocabulary import fake_vocabulary, fit_to
from hypothesis import given, settings
from hypothesis import strategies as st

from udrl import storage, tokenizer
from udrl.commands import ANY
from udrl.policies.policy import Policy
from udrl.policies.requests import read_intents
from udrl.policies.teacher import teacher_policy
from udrl.recipe import Recipe, Teacher
from udrl.run import GenerateSummary, Run, TrainingSummary
from udrl.tasks import Example, Task
from udrl.train.explore import (
    CommandDistribution,
    CommandDistributions,
    draw_positions,
    exploration_requests,
    fit_command_distributions,
    plan_exploration,
)
from udrl.train.hindsight import count_episodes
from udrl.train.stage import round_fingerprint

DISTRIBUTION = CommandDistribution(mean=0.5, sd=0.4, edges=[0.6, 0.7], bins=3, lengths=[1.0] * 20)
TASK = Task(
    name="paint",
    title="Paint",
    instruction="Write a prompt.",
    examples=[Example(intent=f"thing {i}", prompt=f"a thing number {i} in light") for i in range(3)],
)


def fit(rewards: np.ndarray, words: np.ndarray, top_share: float, **options: Any) -> CommandDistribution:
    """Fit the distribution of one task to a buffer of these episodes."""
    n = len(rewards)
    columns = {"task": np.full(n, "paint"), "intent_id": np.arange(n) // 4, "n_words": words}
    columns |= {"reward": rewards, "relevance": rewards}
    vocabulary = fit_to(["paint"], columns, **{"max_words": 20, **options})
    return fit_command_distributions(count_episodes(columns, "task"), vocabulary, top_share)["paint"]


def write_intents(uri: str) -> None:
    table = pa.table({"intent_id": range(1000), "intent": [f"intent {i}" for i in range(1000)], "subject": ["s"] * 1000})
    Path(uri).parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, uri, row_group_size=64)


# ---- commands


def test_commands_ask_for_just_above_the_best_rewards_at_lengths_of_the_best_episodes() -> None:
    rng = np.random.default_rng(1)
    rewards = rng.random(4000)
    words = np.where(rewards > 0.5, rng.choice([7, 9], 4000), 3)  # most short prompts are not among the best
    distribution = fit(rewards, words, 0.8)
    assert distribution.mean == pytest.approx(0.6, abs=0.02)
    commands = [distribution.draw("paint", 0, 1, i) for i in range(3000)]
    bins = Counter(command.reward for command in commands)
    # U[0.6, 0.83] over bins of a fifth: most of it below 0.8, nothing above the best rewards or below their mean.
    assert set(bins) == {2, 3, 4} or set(bins) == {3, 4}
    assert bins[3] / 3000 == pytest.approx((0.8 - distribution.mean) / distribution.sd, abs=0.05)
    lengths = Counter(command.words for command in commands)
    assert set(lengths) == {3, 7, 9}
    assert lengths[3] / 3000 == pytest.approx((0.8 - 0.5) / 0.8, abs=0.04)


def test_a_request_always_has_the_same_command() -> None:
    distribution = fit(np.linspace(0, 1, 500), np.arange(500) % 18 + 1, 0.5)
    assert distribution.draw("paint", 0, 1, 7, 0) == distribution.draw("paint", 0, 1, 7, 0)
    assert len({distribution.draw("paint", 0, 1, i, 0).words for i in range(50)}) > 5
    rounds = [[distribution.draw("paint", 0, round_, i, 0) for i in range(20)] for round_ in (1, 2)]
    assert rounds[0] != rounds[1]


def test_bins_ranked_within_the_intent_are_commanded_at_the_top() -> None:
    distribution = fit(np.linspace(0, 1, 500), np.full(500, 5), 0.9, rank_within="intent")
    assert {distribution.draw("paint", i).reward for i in range(50)} == {4}


def test_lengths_that_can_not_be_commanded_are_left_open() -> None:
    distribution = CommandDistribution(mean=0.5, sd=0.1, edges=[0.5], bins=2, lengths=[0.0] * 20)
    assert distribution.draw("paint", 1).words == ANY


def test_distributions_of_earlier_versions_load(tmp_path: Path) -> None:
    storage.write_json(str(tmp_path / "old.json"), {"paint": DISTRIBUTION.model_dump()})
    saved = CommandDistributions(tasks={"paint": DISTRIBUTION})
    assert CommandDistributions.load(str(tmp_path / "old.json")) == saved
    saved.save(str(tmp_path / "new.json"))
    assert CommandDistributions.load(str(tmp_path / "new.json")) == saved


# ---- requests


@settings(deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 40))
def test_drawn_intents_are_distinct_and_can_be_cut_anywhere(n_intents: int, n_drawn: int, piece: int) -> None:
    n_drawn = min(n_drawn, n_intents)
    positions = draw_positions(0, n_drawn, n_drawn, n_intents, 0, 1)
    assert len(np.unique(positions)) == n_drawn
    assert positions.min() >= 0
    assert positions.max() < n_intents
    assert (np.diff(positions) > 0).all()
    starts = range(0, n_drawn, piece)
    pieces = [draw_positions(start, min(start + piece, n_drawn), n_drawn, n_intents, 0, 1) for start in starts]
    assert np.array_equal(np.concatenate(pieces), positions)


@pytest.fixture
def policy(tmp_path: Path) -> Policy:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    return teacher_policy(Teacher(model=str(tmp_path / "model")), [TASK])


def test_each_drawn_intent_has_one_request_per_task_and_sample_under_its_own_command(tmp_path: Path, policy: Policy) -> None:
    uri = str(tmp_path / "train.parquet")
    write_intents(uri)
    assert list(read_intents(uri, np.array([3, 64, 999]))) == [(i, f"intent {i}") for i in (3, 64, 999)]
    distributions = {"paint": DISTRIBUTION, "find": DISTRIBUTION}
    requests = exploration_requests(policy, uri, 150, 2, distributions, round_=3, seed=0)
    assert requests.shards > 1
    shards = [list(requests.rows(shard)) for shard in range(requests.shards)]
    assert [len(rows) for rows in shards] == [requests.shard_size(shard) for shard in range(requests.shards)]
    rows = [row for shard in shards for row in shard]
    assert len({row["episode_id"] for row in rows}) == len(rows) == requests.total == 150 * 2 * 2
    assert Counter(Counter(row["intent_id"] for row in rows).values()) == {4: 150}
    assert {row["round"] for row in rows} == {3}
    assert len({row["command_words"] for row in rows}) == 20
    assert {row["command_reward"] for row in rows} == {0, 1, 2}
    assert shards == [list(requests.rows(shard)) for shard in range(requests.shards)]
    next_round = exploration_requests(policy, uri, 150, 2, {"paint": DISTRIBUTION}, round_=4, seed=0)
    assert {row["intent_id"] for row in next_round.rows(0)} != {row["intent_id"] for row in shards[0]}


# ---- values that name existing completions and episodes; they were computed with the version of 2026-11-24


def test_draws_are_those_of_earlier_versions() -> None:
    commands = [DISTRIBUTION.draw("paint", 0, 1, i, 0) for i in range(6)]
    assert [(command.words, command.reward) for command in commands] == [
        *[(14, 2), (1, 0), (19, 2), (10, 1), (1, 0), (11, 0)],
    ]
    assert draw_positions(0, 5, 5, 40, 0, 1).tolist() == [3, 12, 19, 30, 36]


def test_the_fingerprints_of_a_round_are_those_of_earlier_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # the student's path is part of the fingerprint
    run, tasks = Run("run"), ["text_to_image", "image_search"]
    vocabulary = fake_vocabulary(tasks, max_words=12, reward_bins=3)
    student = run.round(0).student
    Path(student.folder).mkdir(parents=True)
    tokenizer.train_tokenizer([" a red fox in snow"] * 5, vocabulary, 400).save_pretrained(student.folder)
    vocabulary.save(student.folder)
    storage.write_json(student.config, {"n_positions": 64})
    TrainingSummary(fingerprint="f", weights="w").save(student.training)
    write_intents(run.intents("here").train)
    GenerateSummary(intents="here", ledger="l", scoring="s", accepted=5).save(run.generate_summary)
    values = {"name": "x", "storage": "run", "tasks": tasks, "intents": {"limit": 10}, "rounds": 1}
    recipe = Recipe.model_validate({**values, "explore": {"intents": 70}})

    exploration = plan_exploration(recipe, 1)
    assert exploration.manifest.fingerprint == "f9c29a6395f63ed4"
    assert exploration.ledger == "run/rounds/1/completions/f9c29a6395f63ed4"
    assert round_fingerprint(exploration, recipe.rewards, [TASK]) == "78d532e77c1d8411"
