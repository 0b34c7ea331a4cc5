"""What was said before is found, in any order of work, in memory that is known beforehand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from udrl.recipe import Deduplicate
from udrl.scoring import deduplication as dedup

LONG = "three columns under a steaming bowl playful rounded lettering orange and cream prices aligned right"
Text = tuple[str, str, str]


def verdicts(texts: list[Text], near: float | None = 0.8) -> list[int]:
    said = dedup.BloomDeduplicator(len(texts), Deduplicate(near=near))
    return said.check_and_add(0, dedup.keys(texts, near)).tolist()


def test_the_same_prompt_for_the_same_intent_and_task_is_a_duplicate_whatever_its_case() -> None:
    texts = [("a fox", "paint", LONG), ("a fox", "paint", LONG.upper()), ("a fox", "find", LONG), ("an owl", "paint", LONG)]
    assert verdicts(texts, near=None) == [dedup.NEW, dedup.EXACT, dedup.NEW, dedup.NEW]


def test_the_same_prompt_for_another_intent_is_near_within_its_task() -> None:
    texts = [("a fox", "paint", LONG), ("an owl", "paint", LONG + "!"), ("an owl", "find", LONG)]
    assert verdicts(texts) == [dedup.NEW, dedup.NEAR, dedup.NEW]


def test_word_order_tells_prompts_apart() -> None:
    texts = [("a", "paint", "a green bench and a red car"), ("a", "paint", "a red bench and a green car")]
    assert verdicts(texts) == [dedup.NEW, dedup.NEW]


def test_a_rejected_prompt_is_not_remembered() -> None:
    said = dedup.BloomDeduplicator(10, Deduplicate())
    keys = dedup.keys([("a", "t", LONG), ("b", "t", LONG)], 0.8)
    assert said.check_and_add(0, keys).tolist() == [dedup.NEW, dedup.NEAR]
    assert said.check_and_add(1, keys[1:]).tolist() == [dedup.NEAR]  # by what the first left, not as its own duplicate


@pytest.mark.parametrize("near", [0.7, 0.8, 0.9])
def test_pairs_are_found_as_often_as_their_similarity_says(near: float) -> None:
    """Of 1,000 pairs of one Jaccard similarity s, 1 - (1 - s^rows)^bands collide."""
    bands, rows = dedup.bands(near)
    common, own = 20, 2
    s = common / (common + 2 * own)
    texts: list[Text] = []
    for n in range(1000):
        shared = [f"w{n}x{i}" for i in range(common + 1)]  # common + 1 words make `common` pairs
        texts += [("a", f"task {n}", " ".join(shared + [f"{side}{n}x{i}" for i in range(own)])) for side in "pq"]
    keys = dedup.keys(texts, near)[:, 1:].reshape(1000, 2, bands)
    found = (keys[:, 0] == keys[:, 1]).any(axis=1).mean()
    assert found == pytest.approx(1 - (1 - s**rows) ** bands, abs=0.07)


def test_unlike_prompts_are_kept() -> None:
    rng = np.random.default_rng(0)
    texts = [("a", "t", " ".join(f"w{i}" for i in rng.integers(0, 5000, 12))) for _ in range(5000)]
    assert verdicts(texts) == [dedup.NEW] * len(texts)


def test_a_prompt_has_the_same_keys_whatever_it_is_signed_with() -> None:
    """A run that goes on signs the kept prompts alone, so a batch must not leave its mark on a signature."""
    rng = np.random.default_rng(0)
    texts = [("a", "t", " ".join(f"w{i}" for i in rng.integers(0, 9999, n))) for n in rng.integers(1, 400, 300)]
    alone = np.vstack([dedup.keys([text], 0.8) for text in texts])
    assert (dedup.keys(texts, 0.8) == alone).all()


@settings(deadline=None)  # signing loads a library in the first example
@given(st.lists(st.tuples(st.text(max_size=5), st.just("t"), st.text(max_size=40)), max_size=20), st.data())
def test_what_is_kept_does_not_depend_on_where_the_work_was_cut(texts: list[Text], data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, len(texts)))
    whole = verdicts(texts) if texts else []
    keys = [dedup.keys(part, 0.8) for part in (texts[:cut], texts[cut:])]
    before = np.array(whole[:cut], dtype=np.int8)
    resumed = dedup.BloomDeduplicator(len(texts), Deduplicate())
    assert resumed.add_known(0, keys[0][before == dedup.NEW]) == int((before == dedup.NEW).sum())
    assert resumed.check_and_add(1, keys[1]).tolist() == whole[cut:]


def test_shards_out_of_order_are_refused() -> None:
    said = dedup.BloomDeduplicator(10, Deduplicate())
    with pytest.raises(RuntimeError, match="step 1 came where 0 was due"):
        said.check_and_add(1, dedup.keys([], 0.8))


def test_memory_is_what_the_documentation_says() -> None:
    config = Deduplicate()
    said = dedup.BloomDeduplicator(100_000, config)
    real = sum(f.size_in_bits for f in said.filters) / 8
    assert dedup.bytes_of(100_000, config) == pytest.approx(real, rel=0.01)
    assert dedup.megabytes_per_million(config) == pytest.approx(30, abs=1)
    assert dedup.megabytes_per_million(Deduplicate(near=None)) == pytest.approx(3, abs=0.1)
