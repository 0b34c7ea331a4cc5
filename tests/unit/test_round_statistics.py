"""Statistics of a round: the best episodes, rewards, commands, and the table of rounds."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes.fake_episodes import write_episodes
from hypothesis import given, settings
from hypothesis import strategies as st

from udrl.commands import ANY
from udrl.run import CommandStatistics, DiversityStatistics, RewardStatistics, RoundRecord
from udrl.train.hindsight import count_episodes
from udrl.train.round_statistics import (
    best_episodes,
    command_statistics,
    count_folders,
    reward_statistics,
    rounds_table,
)


@settings(deadline=None)
@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=60), st.floats(0.05, 1))
def test_the_best_episodes_are_those_with_the_highest_rewards(values: list[float], share: float) -> None:
    n = len(values)
    rewards = np.array(values, dtype=np.float32)
    columns = {"task": np.full(n, "paint"), "intent_id": np.arange(n), "n_words": np.ones(n, dtype=int)}
    counts = count_episodes({**columns, "reward": rewards, "relevance": rewards}, "task")
    best = best_episodes(counts, "paint", share)
    weights = np.clip(share * n - np.arange(n), 0, 1)  # the last of the best counts in part
    descending = np.sort(rewards)[::-1]
    mean = float(np.average(descending, weights=weights))
    assert best.mean == pytest.approx(mean, abs=1e-3)
    assert best.sd == pytest.approx(np.average((descending - mean) ** 2, weights=weights) ** 0.5, abs=1e-3)
    assert best.lengths.sum() == pytest.approx(share * n)


def test_counts_do_not_depend_on_how_episodes_are_divided_into_files(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = [{"reward": float(rng.random()), "n_words": int(rng.integers(1, 9))} for _ in range(200)]
    one_file = count_folders([write_episodes(str(tmp_path / "one"), rows)])
    parts = {"a": rows[:90], "b": rows[90:]}
    many_files = count_folders([write_episodes(str(tmp_path / name), part, 20) for name, part in parts.items()])
    for a, b in zip(best_episodes(one_file, "paint", 0.3), best_episodes(many_files, "paint", 0.3), strict=True):
        assert np.allclose(a, b)


def test_reward_statistics_are_those_of_the_rewards(tmp_path: Path) -> None:
    rewards = np.random.default_rng(0).random(200)
    folder = write_episodes(str(tmp_path), [{"reward": float(reward)} for reward in rewards], files=3)
    statistics = reward_statistics(folder)["paint"]
    assert statistics.episodes == 200
    assert statistics.mean == pytest.approx(rewards.mean(), abs=1e-3)
    assert statistics.sd == pytest.approx(rewards.std(), abs=1e-3)


def test_command_statistics_cover_accepted_and_rejected_prompts(tmp_path: Path) -> None:
    def row(command_words: int, reward: int, words: int) -> dict[str, Any]:
        return {"command_words": command_words, "command_reward": reward, "n_words": words}

    episodes = write_episodes(str(tmp_path / "episodes"), [row(8, 4, 8), row(10, 4, 13), row(ANY, 3, 5)], files=2)
    rejects = write_episodes(str(tmp_path / "rejects"), [row(12, 4, 0)])
    assert command_statistics(episodes, rejects)["paint"] == CommandStatistics(
        requests=4, mean_words=10.0, reward_bins={"3": 1, "4": 3}, words_off=1.5, within_2=0.5
    )


def test_the_table_has_a_line_for_each_round() -> None:
    def rewards(mean: float) -> RewardStatistics:
        return RewardStatistics(episodes=9, mean=mean, sd=0.1)

    def commands(words_off: float | None) -> CommandStatistics:
        return CommandStatistics(requests=9, mean_words=None, reward_bins={}, words_off=words_off, within_2=None)

    def diversity(ratio: float | None) -> DiversityStatistics:
        return DiversityStatistics(n=9, words=6, distinct_2=None, compression=None, ratio=ratio)

    zero = RoundRecord(round=0, origin="x", accepted=900, requested=1000, achieved={"a": rewards(0.5)})
    one = RoundRecord(
        round=1,
        origin="y",
        accepted=700,
        requested=1000,
        achieved={"a": rewards(0.6), "b": rewards(0.7)},
        before={"a": rewards(0.5), "b": rewards(0.5)},
        commands={"a": commands(1.0), "b": commands(None)},
        diversity={"a": diversity(0.8), "b": diversity(None)},
        keep=1.0,
        refused="too dull",
    )
    header, _, first, second = rounds_table([zero, one]).splitlines()
    assert header.split()[:3] == ["round", "episodes", "accepted"]
    assert first.split() == ["0", "900", "90%", "0.500", "-", "-", "-", "trained"]
    assert " ".join(second.split()) == "1 700 70% 0.650 (0.500) 1.0 80% 100% not trained on: too dull"


def test_statistics_are_those_of_earlier_versions(tmp_path: Path) -> None:
    """Round records of existing runs are compared with new ones; computed with the version of 2026-11-24."""
    rng = np.random.default_rng(0)
    rng.integers(3, 12, 40), rng.random(40), rng.random(40)
    rows = [
        {"intent_id": i // 2, "task": ["text_to_image", "image_search"][i % 2], "reward": float(x), "n_words": int(n)}
        for i, (x, n) in enumerate(zip(rng.random(400), rng.integers(2, 15, 400), strict=True))
    ]
    assert reward_statistics(write_episodes(str(tmp_path), rows, 3)) == {
        "image_search": RewardStatistics(episodes=200, mean=0.5092, sd=0.2825),
        "text_to_image": RewardStatistics(episodes=200, mean=0.5436, sd=0.2848),
    }
