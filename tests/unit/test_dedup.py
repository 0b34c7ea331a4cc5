"""Duplicates are detected independently of the order of work, in a known amount of memory."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from udrl.recipe import Deduplicate
from udrl.scoring import deduplication as dedup

LONG = "three columns under a steaming bowl playful rounded lettering orange and cream prices aligned right"
Text = tuple[str, str, str]


def verdicts(texts: list[Text], near: float | None = 0.8) -> list[int]:
    deduplicator = dedup.BloomDeduplicator(len(texts), Deduplicate(near=near))
    return deduplicator.check_and_add(0, dedup.compute_keys(texts, near)).tolist()


def test_the_same_prompt_for_the_same_intent_and_task_is_a_duplicate_in_any_case() -> None:
    texts = [("a fox", "paint", LONG), ("a fox", "paint", LONG.upper()), ("a fox", "find", LONG), ("an owl", "paint", LONG)]
    assert verdicts(texts, near=None) == [dedup.NEW, dedup.EXACT, dedup.NEW, dedup.NEW]


def test_the_same_prompt_for_another_intent_is_a_near_duplicate_within_its_task() -> None:
    texts = [("a fox", "paint", LONG), ("an owl", "paint", LONG + "!"), ("an owl", "find", LONG)]
    assert verdicts(texts) == [dedup.NEW, dedup.NEAR, dedup.NEW]


def test_prompts_with_another_word_order_differ() -> None:
    texts = [("a", "paint", "a green bench and a red car"), ("a", "paint", "a red bench and a green car")]
    assert verdicts(texts) == [dedup.NEW, dedup.NEW]


def test_a_rejected_prompt_is_not_added() -> None:
    deduplicator = dedup.BloomDeduplicator(10, Deduplicate())
    keys = dedup.compute_keys([("a", "t", LONG), ("b", "t", LONG)], 0.8)
    assert deduplicator.check_and_add(0, keys).tolist() == [dedup.NEW, dedup.NEAR]
    assert deduplicator.check_and_add(1, keys[1:]).tolist() == [dedup.NEAR]  # of the first; EXACT if it had been added


@pytest.mark.parametrize("near", [0.7, 0.8, 0.9])
def test_pairs_are_detected_with_the_probability_of_their_similarity(near: float) -> None:
    """Of 1,000 pairs of one Jaccard similarity s, 1 - (1 - s^rows)^bands collide."""
    bands, rows = dedup.choose_bands(near)
    common, own = 20, 2
    s = common / (common + 2 * own)
    texts: list[Text] = []
    for n in range(1000):
        shared = [f"w{n}x{i}" for i in range(common + 1)]  # common + 1 words make `common` pairs
        texts += [("a", f"task {n}", " ".join(shared + [f"{side}{n}x{i}" for i in range(own)])) for side in "pq"]
    keys = dedup.compute_keys(texts, near)[:, 1:].reshape(1000, 2, bands)
    share = (keys[:, 0] == keys[:, 1]).any(axis=1).mean()
    assert share == pytest.approx(1 - (1 - s**rows) ** bands, abs=0.07)


def test_different_prompts_are_accepted() -> None:
    rng = np.random.default_rng(0)
    texts = [("a", "t", " ".join(f"w{i}" for i in rng.integers(0, 5000, 12))) for _ in range(5000)]
    assert verdicts(texts) == [dedup.NEW] * len(texts)


def test_the_keys_of_a_prompt_do_not_depend_on_its_batch() -> None:
    """A resumed run computes the keys of accepted prompts only, in other batches than before."""
    rng = np.random.default_rng(0)
    texts = [("a", "t", " ".join(f"w{i}" for i in rng.integers(0, 9999, n))) for n in rng.integers(1, 400, 300)]
    one_by_one = np.vstack([dedup.compute_keys([text], 0.8) for text in texts])
    assert (dedup.compute_keys(texts, 0.8) == one_by_one).all()


@given(st.lists(st.tuples(st.text(max_size=5), st.just("t"), st.text(max_size=40)), max_size=20), st.data())
def test_the_verdicts_do_not_depend_on_where_a_run_was_killed(texts: list[Text], data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, len(texts)))
    uninterrupted = verdicts(texts) if texts else []
    keys = [dedup.compute_keys(part, 0.8) for part in (texts[:cut], texts[cut:])]
    before = np.array(uninterrupted[:cut], dtype=np.int8)
    resumed = dedup.BloomDeduplicator(len(texts), Deduplicate())
    assert resumed.add_known(0, keys[0][before == dedup.NEW]) == int((before == dedup.NEW).sum())
    assert resumed.check_and_add(1, keys[1]).tolist() == uninterrupted[cut:]


def test_calls_out_of_order_are_refused() -> None:
    deduplicator = dedup.BloomDeduplicator(10, Deduplicate())
    with pytest.raises(RuntimeError, match="call 1 arrived when 0 was due"):
        deduplicator.check_and_add(1, dedup.compute_keys([], 0.8))


def test_the_memory_is_as_documented() -> None:
    config = Deduplicate()
    deduplicator = dedup.BloomDeduplicator(100_000, config)
    actual = sum(f.size_in_bits for f in deduplicator.filters) / 8
    assert dedup.filter_bytes(100_000, config) == pytest.approx(actual, rel=0.01)
    assert dedup.megabytes_per_million(config) == pytest.approx(30, abs=1)
    assert dedup.megabytes_per_million(Deduplicate(near=None)) == pytest.approx(3, abs=0.1)
