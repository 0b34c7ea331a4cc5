"""Reward components: what they punish, and how they mix."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from udrl.episodes import COMPONENTS
from udrl.recipe import RewardWeights
from udrl.rewards import components
from udrl.rewards.relevance import Embedder

VOCABULARY = "red fox snow light owl jazz poster bold soft night".split()  # noqa: SIM905
WORDS = st.lists(st.sampled_from(VOCABULARY), min_size=1, max_size=20)


def test_an_echo_has_no_novelty_and_a_fresh_text_has_all() -> None:
    assert components.novelty("a red fox", "Red fox, a fox!") == 0
    assert components.novelty("a red fox", "owl night") == 1
    assert components.novelty("red fox", "red fox snow light") == 0.5
    assert components.novelty("red fox", "") == 0


def test_saying_it_twice_is_repetition() -> None:
    assert components.repetition("soft light over snow") == 1
    assert components.repetition("wide shot, wide shot, wide shot") == 2 / 5
    assert components.repetition("fox") == 1


@given(WORDS, WORDS)
def test_components_stay_between_0_and_1(intent: list[str], prompt: list[str]) -> None:
    assert 0 <= components.novelty(" ".join(intent), " ".join(prompt)) <= 1
    assert 0 <= components.repetition(" ".join(prompt)) <= 1


@given(st.integers(1, 60), st.integers(1, 60))
def test_length_is_best_on_the_command(achieved: int, commanded: int) -> None:
    assert components.length(achieved, commanded) <= components.length(commanded, commanded) == 1
    assert components.length(achieved, -1) == 1


def test_the_mix_is_a_weighted_mean_of_the_components() -> None:
    values = {c: np.array([i / 10, 1.0]) for i, c in enumerate(COMPONENTS)}
    weights = RewardWeights(relevance=2, novelty=1, repetition=0, format=0, length=1)
    mixed = components.mix(values, weights)
    assert mixed == pytest.approx([(2 * 0.0 + 1 * 0.1 + 1 * 0.4) / 4, 1.0])


def test_embeddings_find_the_prompt_that_is_about_the_intent() -> None:
    embedder = Embedder("bundled:minilm", 8)
    intents = ["a fox in the snow", "a fox in the snow", "jazz night flyer"]
    prompts = ["red fox walking over a snowy field", "saxophone player under amber light", "red fox walking over a snowy field"]
    right, wrong, crossed = embedder.relevance(intents, prompts)
    assert right > max(wrong, crossed) + 0.3
    assert embedder.relevance(["same"], ["same"])[0] == pytest.approx(1, abs=0.01)
    assert embedder.relevance([], []).shape == (0,)
