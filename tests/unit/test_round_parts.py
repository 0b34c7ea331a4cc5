"""Rounds: what is commanded, whom it is asked of, what is kept in the mix, and when a round is not learnt from."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fakes.vocabularies import fit_to
from hypothesis import given, settings
from hypothesis import strategies as st

from udrl import storage
from udrl.commands import ANY, CommandVocabulary
from udrl.episodes import EPISODES
from udrl.errors import UserError
from udrl.hashing import stable_id
from udrl.policies.policy import Policy
from udrl.policies.requests import read_intents
from udrl.policies.teacher import teacher_policy
from udrl.recipe import Recipe, Teacher
from udrl.tasks import Example, Task
from udrl.train import achieved
from udrl.train import diversity_guard as guard
from udrl.train import round_record as record
from udrl.train import stage as run
from udrl.train.explore import Draw, drawn_places, draws, requests
from udrl.train.export import TRAINING
from udrl.train.hindsight import count_episodes

BLANK = {"string": "", "int64": 0, "int32": 0, "float": 0.5}


def write_episodes(folder: str, rows: list[dict[str, Any]], files: int = 1) -> str:
    blank = {f.name: BLANK[str(f.type)] for f in EPISODES}
    made = [{**blank, "episode_id": i, "task": "paint", **row} for i, row in enumerate(rows)]
    for part in range(files):
        table = pa.Table.from_pylist(made[part::files], schema=EPISODES)
        storage.write_table(storage.join(folder, f"part-{part:08d}.parquet"), table)
    return folder


def learnt(rewards: np.ndarray, words: np.ndarray, **more: Any) -> tuple[pa.Table, CommandVocabulary]:
    columns = {
        "task": np.full(len(rewards), "paint"),
        "intent_id": np.arange(len(rewards)) // 4,
        "n_words": words,
        "reward": rewards,
        "relevance": rewards,
    }
    return count_episodes(columns, "task"), fit_to(["paint"], columns, **{"max_words": 20, **more})


# --- what is commanded ---


@settings(deadline=None)
@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=60), st.floats(0.05, 1))
def test_the_best_episodes_are_the_best(values: list[float], share: float) -> None:
    rewards = np.array(values, dtype=np.float32)
    found = achieved.best(learnt(rewards, np.ones(len(rewards), dtype=int))[0], "paint", share)
    n = share * len(rewards)
    weights = np.clip(n - np.arange(len(rewards)), 0, 1)  # the last of them counts in part
    mean = float(np.average(np.sort(rewards)[::-1], weights=weights))
    assert found.mean == pytest.approx(mean, abs=1e-3)
    spread = np.average((np.sort(rewards)[::-1] - mean) ** 2, weights=weights) ** 0.5
    assert found.sd == pytest.approx(spread, abs=1e-3)
    assert found.lengths.sum() == pytest.approx(n)


def test_counts_do_not_depend_on_the_files(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = [{"reward": float(rng.random()), "n_words": int(rng.integers(1, 9))} for _ in range(200)]
    one = achieved.counted([write_episodes(str(tmp_path / "one"), rows)])
    halves = [write_episodes(str(tmp_path / name), part, 3) for name, part in (("a", rows[:90]), ("b", rows[90:]))]
    many = achieved.counted(halves)
    for a, b in zip(achieved.best(one, "paint", 0.3), achieved.best(many, "paint", 0.3), strict=True):
        assert np.allclose(a, b)
    assert achieved.rewards_of(str(tmp_path / "one"))["paint"] == {
        "episodes": 200,
        "mean": pytest.approx(np.mean([r["reward"] for r in rows]), abs=1e-3),
        "sd": pytest.approx(np.std([r["reward"] for r in rows]), abs=1e-3),
    }


def test_commands_ask_for_just_above_the_best_at_lengths_that_the_best_had() -> None:
    rng = np.random.default_rng(1)
    rewards = rng.random(4000)
    words = np.where(rewards > 0.5, rng.choice([7, 9], 4000), 3)  # short prompts are never among the best
    buffer, vocabulary = learnt(rewards, words)
    draw = draws(buffer, vocabulary, 0.8)["paint"]
    assert draw.mean == pytest.approx(0.6, abs=0.02)
    drawn = [draw.command("paint", 0, 1, i) for i in range(3000)]
    bins = Counter(c.reward for c in drawn)
    # U[0.6, 0.83] over bins of a fifth: most of it below 0.8, none above what was reached or below the mean.
    assert set(bins) == {2, 3, 4} or set(bins) == {3, 4}
    assert bins[3] / 3000 == pytest.approx((0.8 - draw.mean) / draw.sd, abs=0.05)
    lengths = Counter(c.words for c in drawn)
    assert set(lengths) == {3, 7, 9}
    assert lengths[3] / 3000 == pytest.approx((0.8 - 0.5) / 0.8, abs=0.04)


def test_a_request_always_gets_the_same_command_and_others_get_others() -> None:
    buffer, vocabulary = learnt(np.linspace(0, 1, 500), np.arange(500) % 18 + 1)
    draw = draws(buffer, vocabulary, 0.5)["paint"]
    assert draw.command("paint", 0, 1, 7, 0) == draw.command("paint", 0, 1, 7, 0)
    assert len({draw.command("paint", 0, 1, i, 0).words for i in range(50)}) > 5
    assert [draw.command("paint", 0, 2, i, 0) for i in range(20)] != [draw.command("paint", 0, 1, i, 0) for i in range(20)]


def test_bins_ranked_within_the_intent_are_asked_for_at_the_top() -> None:
    buffer, vocabulary = learnt(np.linspace(0, 1, 500), np.full(500, 5), rank_within="intent")
    draw = draws(buffer, vocabulary, 0.9)["paint"]
    assert {draw.command("paint", i).reward for i in range(50)} == {4}


def test_lengths_that_can_t_be_commanded_are_left_open() -> None:
    draw = Draw(mean=0.5, sd=0.1, edges=[0.5], bins=2, lengths=[0.0] * 20)
    assert draw.command("paint", 1).words == ANY


# --- whom it is asked of ---


@settings(deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 40))
def test_drawn_intents_are_distinct_and_cut_anywhere(among: int, wanted: int, piece: int) -> None:
    wanted = min(wanted, among)
    whole = drawn_places(0, wanted, wanted, among, 0, 1)
    assert len(np.unique(whole)) == wanted
    assert whole.min() >= 0
    assert whole.max() < among
    assert (np.diff(whole) > 0).all()
    cut = [drawn_places(a, min(a + piece, wanted), wanted, among, 0, 1) for a in range(0, wanted, piece)]
    assert np.array_equal(np.concatenate(cut), whole)


@pytest.fixture
def policy(tmp_path: Path) -> Policy:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    examples = [Example(intent=f"thing {i}", prompt=f"a thing number {i} in light") for i in range(3)]
    task = Task(name="paint", title="Paint", instruction="Write a prompt.", examples=examples)
    return teacher_policy(Teacher(model=str(tmp_path / "model")), [task])


def test_each_drawn_intent_is_asked_once_a_task_and_sample_under_its_own_command(tmp_path: Path, policy: Policy) -> None:
    uri = str(tmp_path / "train.parquet")
    table = pa.table({"intent_id": range(1000), "intent": [f"intent {i}" for i in range(1000)], "subject": ["s"] * 1000})
    pq.write_table(table, uri, row_group_size=64)
    assert list(read_intents(uri, np.array([3, 64, 999]))) == [(i, f"intent {i}") for i in (3, 64, 999)]
    draw = Draw(mean=0.5, sd=0.4, edges=[0.6, 0.7], bins=3, lengths=[1.0] * 20)
    asked = requests(policy, uri, 150, 2, {"paint": draw, "find": draw}, round_=3, seed=0)
    assert asked.shards > 1
    shards = [list(asked.rows(shard)) for shard in range(asked.shards)]
    assert [len(rows) for rows in shards] == [asked.shard_size(shard) for shard in range(asked.shards)]
    rows = [row for shard in shards for row in shard]
    assert len({row["episode_id"] for row in rows}) == len(rows) == asked.total == 150 * 2 * 2
    assert Counter(Counter(row["intent_id"] for row in rows).values()) == {4: 150}
    assert {row["round"] for row in rows} == {3}
    assert len({row["command_words"] for row in rows}) == 20
    assert {row["command_reward"] for row in rows} == {0, 1, 2}
    assert shards == [list(asked.rows(shard)) for shard in range(asked.shards)]
    others = requests(policy, uri, 150, 2, {"paint": draw}, round_=4, seed=0)
    assert {r["intent_id"] for r in others.rows(0)} != {r["intent_id"] for r in shards[0]}


# --- the guard ---


@settings(deadline=None)
@given(st.integers(1, 10_000), st.integers(1, 10_000), st.floats(0, 0.99))
def test_earlier_episodes_keep_their_share_of_the_mix(earlier: int, new: int, replay: float) -> None:
    kept = guard.keep(earlier, new, replay)
    assert 0 <= kept <= 1
    assert earlier / (earlier + kept * new) >= replay - 1e-9
    if kept < 1:  # and no more than needed is thrown away
        assert earlier / (earlier + (kept + 1e-4) * new) <= replay + 1e-6


def test_the_share_that_is_kept_by_hand() -> None:
    assert guard.keep(1000, 500, 0.5) == 1.0
    assert guard.keep(1000, 4000, 0.5) == 0.25
    assert guard.keep(1000, 4000, 0.0) == 1.0


def text(intent: int, salt: str, words: int = 8) -> str:
    return " ".join(f"w{stable_id(salt, intent, i) % 400}" for i in range(words))


def test_a_round_that_says_one_thing_is_not_trained_on(tmp_path: Path) -> None:
    first = [{"intent_id": i // 2, "prompt": text(i, "first")} for i in range(400)]
    varied = [{"intent_id": i, "prompt": text(i, "new")} for i in range(200)]
    dull = [{"intent_id": i, "prompt": f"w{i % 5} same words again and again for ever"} for i in range(200)]
    a, b, c = (write_episodes(str(tmp_path / n), rows, 3) for n, rows in (("a", first), ("b", varied), ("c", dull)))
    good, bad = guard.diversity(a, b, 200), guard.diversity(a, c, 200)
    assert good["paint"]["n"] == bad["paint"]["n"] == 200
    assert good["paint"]["ratio"] == pytest.approx(1, abs=0.05)
    assert bad["paint"]["ratio"] < 0.1
    assert bad["paint"]["compression"][1] > 3 * bad["paint"]["compression"][0]
    assert guard.verdict(200, good, 0.7) == ""
    assert "paint 0.0" in guard.verdict(200, bad, 0.7)
    assert guard.verdict(200, bad, 0.0) == ""
    assert "no prompt" in guard.verdict(0, {}, 0.7)


def test_diversity_compares_one_prompt_of_the_same_intents_at_one_length(tmp_path: Path) -> None:
    # The round asked about half of the intents, four times each, and wrote at length: none of that is a lack of diversity.
    first = [{"intent_id": i, "prompt": text(i, "first", 6)} for i in range(200)]
    new = [{"intent_id": i // 4, "prompt": text(i // 4, "new", 30)} for i in range(400)]
    found = guard.diversity(*(write_episodes(str(tmp_path / n), rows) for n, rows in (("a", first), ("b", new))), intents=100)
    assert (found["paint"]["n"], found["paint"]["words"]) == (100, 6)
    assert found["paint"]["ratio"] == pytest.approx(1, abs=0.05)


def test_what_can_t_be_compared_is_not_held_against_a_round(tmp_path: Path) -> None:
    a = write_episodes(str(tmp_path / "a"), [{"intent_id": 1, "prompt": "one two three"}])
    b = write_episodes(str(tmp_path / "b"), [{"intent_id": 2, "prompt": "one two three"}])
    found = guard.diversity(a, b, 1)
    assert found["paint"]["ratio"] is None
    assert guard.verdict(1, found, 0.9) == ""


# --- what is told ---


def test_a_round_s_commands_and_their_errors(tmp_path: Path) -> None:
    def row(commanded: int, reward: int, words: int) -> dict[str, Any]:
        return {"command_words": commanded, "command_reward": reward, "n_words": words}

    episodes = write_episodes(str(tmp_path / "episodes"), [row(8, 4, 8), row(10, 4, 13), row(ANY, 3, 5)], 2)
    rejects = write_episodes(str(tmp_path / "rejects"), [row(12, 4, 0)])
    assert record.asked(episodes, rejects)["paint"].plain() == {
        "requests": 4,
        "mean_words": 10.0,
        "reward_bins": {"3": 1, "4": 3},
        "words_off": 1.5,
        "within_2": 0.5,
    }


def test_the_table_has_a_line_a_round() -> None:
    zero = {"round": 0, "accepted": 900, "requested": 1000, "achieved": {"a": {"mean": 0.5}}, "refused": ""}
    one = {
        **{"round": 1, "accepted": 700, "requested": 1000, "keep": 1.0, "refused": "too dull"},
        "achieved": {"a": {"mean": 0.6}, "b": {"mean": 0.7}},
        "before": {"a": {"mean": 0.5}, "b": {"mean": 0.5}},
        "commands": {"a": {"words_off": 1.0}, "b": {"words_off": None}},
        "diversity": {"a": {"ratio": 0.8}, "b": {"ratio": None}},
    }
    head, _, first, second = record.table([zero, one])
    assert head.split()[:3] == ["round", "episodes", "accepted"]
    assert first.split() == ["0", "900", "90%", "0.500", "-", "-", "-", "trained"]
    assert second.split() == [
        "1",
        "700",
        "70%",
        "0.650",
        "(0.500)",
        "1.0",
        "80%",
        "100%",
        "not",
        "trained",
        "on:",
        "too",
        "dull",
    ]


def test_a_copied_student_is_whole(tmp_path: Path) -> None:
    source, target = str(tmp_path / "a"), str(tmp_path / "b")
    for name in ("model.safetensors", TRAINING, "zebra.json"):
        storage.write_bytes(storage.join(source, name), name.encode())
    storage.write_bytes(storage.join(target, "stale.json"), b"")
    run.copy_student(source, target)
    assert storage.list_files(target) == storage.list_files(source)
    assert storage.read_bytes(storage.join(target, TRAINING)) == TRAINING.encode()


def test_rounds_need_a_student_that_takes_commands(tmp_path: Path) -> None:
    values = {"name": "x", "storage": str(tmp_path), "tasks": ["image_search"], "intents": {"limit": 5}, "rounds": 1}
    with pytest.raises(UserError, match=r"train\.objective=udrl"):
        run.run(Recipe.model_validate({**values, "train": {"objective": "sft"}}))
