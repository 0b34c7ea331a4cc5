"""Diversity on values worked out by hand, and what must hold for any texts."""

import math
import zlib
from collections import Counter

import numpy as np
import pytest
from evaluation_made_up import WORDS, row, table
from hypothesis import given, settings
from hypothesis import strategies as st

from udrl.evaluation import diversity
from udrl.evaluation.outputs import columns

texts = st.lists(st.lists(st.sampled_from(WORDS), min_size=4, max_size=4), min_size=2, max_size=12)
uneven = st.lists(st.lists(st.sampled_from("abc"), min_size=1, max_size=7), min_size=2, max_size=6)


def letters(*lines: str) -> list[list[str]]:
    return [list(line) for line in lines]


def test_distinct_and_compression_against_hand_counts() -> None:
    assert diversity.distinct(letters("abab"), 2) == pytest.approx(2 / 3)  # ab ba ab
    assert diversity.distinct(letters("abab"), 1) == pytest.approx(1 / 2)
    assert diversity.distinct(letters("ab", "cd"), 2) == 1
    assert math.isnan(diversity.distinct(letters("a"), 2))
    raw = b"soft light\nsoft light"
    assert diversity.compression_ratio(["soft light", "soft light"]) == len(raw) / len(zlib.compress(raw, 9))


def test_self_bleu_against_hand_counts() -> None:
    # 4 of 5 words, 3 of 4 pairs, 2 of 3 triples, 1 of 2 fours stand in the other
    assert diversity.self_bleu(letters("abcde", "abcdf")) == pytest.approx((4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25)
    # a stands three times in one and twice in the other: two count; no triple and no four in common: 0.1 of 2, 0.1 of 1
    assert diversity.self_bleu(letters("aaab", "aacd")) == pytest.approx((2 / 4 * 1 / 3 * 0.1 / 2 * 0.1) ** 0.25)
    assert diversity.self_bleu(letters("abcd", "efgh")) == 0
    assert diversity.self_bleu(letters("abcd", "abcd", "abcd")) == pytest.approx(1)
    assert math.isnan(diversity.self_bleu(letters("abcd")))


def test_self_bleu_makes_a_text_pay_for_being_shorter_than_its_references() -> None:
    short = math.exp(1 - 4 / 2) * (0.1 * 0.1) ** 0.25  # all of its word and pair match
    long = (2 / 4 * 1 / 3 * 0.1 / 2 * 0.1) ** 0.25
    assert diversity.self_bleu(letters("ab", "abcd")) == pytest.approx((short + long) / 2)


def plain_self_bleu(lines: list[list[str]]) -> float:
    """The definition, text by text."""
    scores = []
    for i, line in enumerate(lines):
        others = lines[:i] + lines[i + 1 :]
        score, shares_a_word = 1.0, False
        for n in range(1, 5):
            grams = [Counter(tuple(t[k : k + n]) for k in range(len(t) - n + 1)) for t in (line, *others)]
            matched = sum(min(count, max(other[gram] for other in grams[1:])) for gram, count in grams[0].items())
            shares_a_word |= bool(matched)
            score *= ((matched or 0.1) / max(1, sum(grams[0].values()))) ** 0.25
        closest = min((abs(len(other) - len(line)), len(other)) for other in others)[1]
        penalty = 1.0 if len(line) >= closest else math.exp(1 - closest / len(line))
        scores.append(score * penalty if shares_a_word else 0.0)
    return sum(scores) / len(scores)


@settings(deadline=None, max_examples=60)
@given(uneven)
def test_self_bleu_is_its_definition(lines: list[list[str]]) -> None:
    assert diversity.self_bleu(lines) == pytest.approx(plain_self_bleu(lines))


def test_vendi_score_against_hand_counts() -> None:
    assert diversity.vendi(np.eye(5)) == pytest.approx(5)
    assert diversity.vendi(np.ones((5, 5))) == pytest.approx(1)
    two = diversity.vendi(np.array([[1, 0.6], [0.6, 1]]))  # eigenvalues of half of it: 0.8 and 0.2
    assert two == pytest.approx(math.exp(-(0.8 * math.log(0.8) + 0.2 * math.log(0.2))))
    assert diversity.vendi(np.kron(np.eye(3), np.ones((2, 2)))) == pytest.approx(3)  # three texts, twice each
    assert math.isnan(diversity.vendi(np.zeros((0, 0))))


def test_without_embeddings_texts_are_as_alike_as_their_word_pairs() -> None:
    similar = diversity.kernel(letters("abc", "abd", "xyz"))
    assert similar == pytest.approx(np.array([[1, 0.5, 0], [0.5, 1, 0], [0, 0, 1]]))


def test_with_embeddings_texts_are_as_alike_as_their_vectors() -> None:
    vectors = {"a b": [1.0, 0.0], "b a": [0.6, 0.8]}
    similar = diversity.kernel(letters("ab", "ba", "ab"), lambda lines: np.array([vectors[line] for line in lines]))
    assert similar == pytest.approx(np.array([[1, 0.6, 1], [0.6, 1, 0.6], [1, 0.6, 1]]))


@settings(deadline=None, max_examples=40)
@given(texts)
def test_no_texts_vary_less_than_copies(words: list[list[str]]) -> None:
    copies = [words[0]] * len(words)
    of_copies, of_words = diversity.across(copies), diversity.across(words)
    for higher in ("distinct_1", "distinct_2", "vendi"):
        assert of_copies[higher] <= of_words[higher] + 1e-9
    assert of_copies["vendi"] == pytest.approx(1)
    assert of_words["vendi"] <= len(words) + 1e-9
    assert of_copies["self_bleu"] == pytest.approx(1)
    assert of_words["self_bleu"] <= 1 + 1e-9
    same, mixed = diversity.within([copies]), diversity.within([words])
    assert (same["within_distance"], same["within_vendi"]) == (0, pytest.approx(1))
    assert mixed["within_distance"] >= 0
    assert mixed["within_vendi"] >= 1 - 1e-9


def test_within_an_intent_only_its_own_draws_are_compared() -> None:
    found = diversity.within([letters("abc", "bcd"), letters("xyz", "uvw"), letters("abc")])
    assert found["within_distance"] == pytest.approx((0.5 + 1) / 2)  # 2 of 4 words in common; none
    half = diversity.vendi(np.array([[1, 0.5], [0.5, 1]]))  # one of two word pairs in common
    assert found["within_vendi"] == pytest.approx((half + 2) / 2)
    assert all(math.isnan(value) for value in diversity.within([letters("abc")]).values())


def test_diversity_compares_equal_lengths_and_equal_numbers() -> None:
    rng = np.random.default_rng(0)
    rows = []
    for i in range(40):  # both draw from one distribution, but the teacher writes three times as much, twice as often
        for policy, words, samples in (("teacher", 30, 2), ("student", 10, 1)):
            for v in range(samples):
                prompt = " ".join(rng.choice(WORDS, words))
                rows.append(row(intent=i, policy=policy, variation=v, prompt=prompt, n_words=words))
    found = diversity.table(columns(table(*rows)), writers=["student", "teacher"])
    assert (found["words"], found["n"]) == (10, 40)
    student, teacher = found["policies"]["student"], found["policies"]["teacher"]
    for figure in ("distinct_2", "self_bleu", "vendi"):
        assert student[figure] == pytest.approx(teacher[figure], rel=0.15)
    assert student["compression"] == pytest.approx(teacher["compression"], rel=0.1)
    assert math.isnan(student["within_distance"])
    assert teacher["within_vendi"] > 1


def test_a_yardstick_does_not_shorten_what_the_others_are_compared_at() -> None:
    rng = np.random.default_rng(0)
    rows = [
        row(intent=i, policy=policy, prompt=" ".join(rng.choice(WORDS, words)), n_words=words)
        for i in range(10)
        for policy, words in (("student", 12), ("teacher", 12), ("echo", 4), ("shuffled", 12))
    ]
    found = diversity.table(columns(table(*rows)), writers=["student", "teacher"])
    assert (found["words"], found["n"]) == (12, 10)
    assert set(found["policies"]) == {"student", "teacher", "shuffled"}  # an echo has no prompt of twelve words


def test_over_tasks_the_figures_are_averaged() -> None:
    one, two = ({**dict.fromkeys((*diversity.ACROSS, *diversity.WITHIN), math.nan), "vendi": v} for v in (2.0, 4.0))
    found = diversity.over_tasks(
        [{"words": 8, "n": 10, "policies": {"student": one}}, {"words": 11, "n": 5, "policies": {"student": two}}]
    )
    assert (found["words"], found["n"], found["policies"]["student"]["vendi"]) == (9.5, 15, 3)
    assert math.isnan(found["policies"]["student"]["distinct_2"])
