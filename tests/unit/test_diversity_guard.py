"""The replay share, and the refusal of rounds that lost diversity."""

from pathlib import Path

import pytest
from fakes.fake_episodes import write_episodes
from hypothesis import given, settings
from hypothesis import strategies as st

from udrl.hashing import stable_id
from udrl.train.round_statistics import measure_diversity, reason_to_refuse, share_to_train_on


def text(intent: int, salt: str, words: int = 8) -> str:
    return " ".join(f"w{stable_id(salt, intent, i) % 400}" for i in range(words))


@settings(deadline=None)
@given(st.integers(1, 10_000), st.integers(1, 10_000), st.floats(0, 0.99))
def test_earlier_episodes_keep_their_share_of_the_mix(earlier: int, new: int, replay: float) -> None:
    share = share_to_train_on(earlier, new, replay)
    assert 0 <= share <= 1
    assert earlier / (earlier + share * new) >= replay - 1e-9
    if share < 1:  # no more new episodes are left out than necessary
        assert earlier / (earlier + (share + 1e-4) * new) <= replay + 1e-6


def test_the_share_to_train_on_in_round_numbers() -> None:
    assert share_to_train_on(1000, 500, 0.5) == 1.0
    assert share_to_train_on(1000, 4000, 0.5) == 0.25
    assert share_to_train_on(1000, 4000, 0.0) == 1.0


def test_a_round_of_repetitive_prompts_is_refused(tmp_path: Path) -> None:
    rows = {
        "first": [{"intent_id": i // 2, "prompt": text(i, "first")} for i in range(400)],
        "varied": [{"intent_id": i, "prompt": text(i, "new")} for i in range(200)],
        "dull": [{"intent_id": i, "prompt": f"w{i % 5} same words again and again for ever"} for i in range(200)],
    }
    first, varied, dull = (write_episodes(str(tmp_path / name), part, 3) for name, part in rows.items())
    good, bad = measure_diversity(first, varied, 200), measure_diversity(first, dull, 200)
    assert good["paint"].n == bad["paint"].n == 200
    # As computed with the version of 2026-11-24.
    assert good["paint"].distinct_2 == (0.995, 0.9971428571428571)
    assert good["paint"].ratio == 1.0021536252692032
    assert bad["paint"].ratio is not None
    assert bad["paint"].ratio < 0.1
    assert bad["paint"].compression is not None
    assert bad["paint"].compression[1] > 3 * bad["paint"].compression[0]
    assert reason_to_refuse(200, good, 0.7) == ""
    assert "paint 0.0" in reason_to_refuse(200, bad, 0.7)
    assert reason_to_refuse(200, bad, 0.0) == ""


def test_a_round_without_accepted_prompts_is_refused() -> None:
    assert "no prompt" in reason_to_refuse(0, {}, 0.7)


def test_one_prompt_per_common_intent_is_compared_at_one_length(tmp_path: Path) -> None:
    # The round has half of the intents, four longer prompts for each: none of that is a lack of diversity.
    rows = {
        "first": [{"intent_id": i, "prompt": text(i, "first", 6)} for i in range(200)],
        "new": [{"intent_id": i // 4, "prompt": text(i // 4, "new", 30)} for i in range(400)],
    }
    first, new = (write_episodes(str(tmp_path / name), part) for name, part in rows.items())
    diversity = measure_diversity(first, new, n_intents=100)["paint"]
    assert (diversity.n, diversity.words) == (100, 6)
    assert diversity.ratio == pytest.approx(1, abs=0.05)


def test_a_round_without_comparable_prompts_is_not_refused(tmp_path: Path) -> None:
    first = write_episodes(str(tmp_path / "a"), [{"intent_id": 1, "prompt": "one two three"}])
    new = write_episodes(str(tmp_path / "b"), [{"intent_id": 2, "prompt": "one two three"}])
    diversity = measure_diversity(first, new, 1)
    assert diversity["paint"].ratio is None
    assert reason_to_refuse(1, diversity, 0.9) == ""
