"""Reward components, and the reward as their weighted mean."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from udrl.episodes import COMPONENTS, EPISODES, REJECTS
from udrl.recipe import RewardWeights
from udrl.scoring import rewards as components
from udrl.scoring.embedder import Embedder
from udrl.scoring.filtering import FILTERED
from udrl.scoring.score import RELEVANCE, score_rows
from udrl.tasks import Example, Task

VOCABULARY = "red fox snow light owl jazz poster bold soft night".split()  # noqa: SIM905
WORDS = st.lists(st.sampled_from(VOCABULARY), min_size=1, max_size=20)


def test_novelty_is_the_share_of_new_words() -> None:
    assert components.novelty("a red fox", "Red fox, a fox!") == 0
    assert components.novelty("a red fox", "owl night") == 1
    assert components.novelty("red fox", "red fox snow light") == 0.5
    assert components.novelty("red fox", "") == 0


def test_repetition_is_the_share_of_distinct_word_pairs() -> None:
    assert components.repetition("soft light over snow") == 1
    assert components.repetition("wide shot, wide shot, wide shot") == 2 / 5
    assert components.repetition("fox") == 1


@given(WORDS, WORDS)
def test_components_are_between_0_and_1(intent: list[str], prompt: list[str]) -> None:
    assert 0 <= components.novelty(" ".join(intent), " ".join(prompt)) <= 1
    assert 0 <= components.repetition(" ".join(prompt)) <= 1


@given(st.integers(1, 60), st.integers(1, 60))
def test_length_is_best_at_the_command(achieved: int, commanded: int) -> None:
    assert components.length(achieved, commanded) <= components.length(commanded, commanded) == 1
    assert components.length(achieved, -1) == 1


def test_the_mix_is_a_weighted_mean_of_the_components() -> None:
    values = {c: np.array([i / 10, 1.0]) for i, c in enumerate(COMPONENTS)}
    weights = RewardWeights(relevance=2, novelty=1, repetition=0, format=0, length=1)
    mixed = components.mix(values, weights)
    assert mixed == pytest.approx([(2 * 0.0 + 1 * 0.1 + 1 * 0.4) / 4, 1.0])


def test_embeddings_score_the_matching_prompt_highest() -> None:
    embedder = Embedder("bundled:minilm", 8)
    intents = ["a fox in the snow", "a fox in the snow", "jazz night flyer"]
    prompts = ["red fox walking over a snowy field", "saxophone player under amber light", "red fox walking over a snowy field"]
    right, wrong, crossed = embedder.relevance(intents, prompts)
    assert right > max(wrong, crossed) + 0.3
    assert embedder.relevance(["same"], ["same"])[0] == pytest.approx(1, abs=0.01)
    assert embedder.relevance([], []).shape == (0,)


def test_only_the_beginning_of_a_megabyte_is_embedded() -> None:
    embedder = Embedder("bundled:minilm", 8)
    long = "a fox in the snow " * 60_000
    assert embedder.relevance([long], [long[: 2**13]])[0] == pytest.approx(1, abs=0.01)


def test_every_filtered_row_becomes_an_episode_or_a_reject() -> None:
    task = Task(name="paint", title="P", instruction="I", examples=[Example(intent="a", prompt="b")] * 3)
    blank = {"string": "", "int64": 0, "int32": 0}
    rows = [
        {f.name: blank[str(f.type)] for f in FILTERED}
        | {"episode_id": i, "task": "paint", "intent": "red fox", "prompt": prompt, "n_words": 2, "reason": reason}
        for i, (prompt, reason) in enumerate([("owl night", ""), ("", "empty"), ("jazz poster", ""), ("bold type", "")])
    ]
    relevance = {"episode_id": [0, 2], "relevance": [0.5, float("nan")]}  # a judge failed on two
    good, bad = score_rows(
        pa.Table.from_pylist(rows, schema=FILTERED),
        pa.table(relevance, schema=RELEVANCE),
        {"paint": task},
        RewardWeights(relevance=1, novelty=1, repetition=0, format=0),
        "some judge",
    )
    assert good.schema.equals(EPISODES)
    assert bad.schema.equals(REJECTS)
    assert good.select(["episode_id", "novelty", "reward"]).to_pylist() == [{"episode_id": 0, "novelty": 1.0, "reward": 0.75}]
    assert bad.column("reason").to_pylist() == ["empty", "engine_error", "engine_error"]
    assert bad.column("detail").to_pylist()[1:] == ["no relevance from some judge"] * 2
