"""Diversity on values worked out by hand, and what must hold for any texts."""

import math
import zlib
from collections import Counter
from typing import Any

import numpy as np
import pytest
from evaluation_made_up import WORDS, row, table
from hypothesis import given, settings
from hypothesis import strategies as st

from udrl.evaluate.metrics import diversity
from udrl.evaluate.outputs import columns

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


def written(*given: tuple[str, int, int, str | None]) -> diversity.Columns:
    """Rows of (policy, intent, variation, prompt); None: rejected."""
    return columns(
        table(
            *(
                row(intent=i, policy=p, variation=v, prompt=prompt or "", reason="" if prompt else "echo", n_words=0)
                for p, i, v, prompt in given
            )
        )
    )


WRITERS = ["student", "teacher"]


def test_across_intents_each_gives_its_first_accepted_prompt_that_is_long_enough() -> None:
    rows = written(
        *(("teacher", i, 0, f"t{i} u{i} v{i}") for i in range(3)),
        *(("student", 0, v, prompt) for v, prompt in ((2, "a b c"), (1, "d e f"), (0, None))),
        *(("student", 1, v, prompt) for v, prompt in ((0, "g h"), (1, "d e f"))),
        *(("student", 2, v, "x y z") for v in range(2)),
    )
    found = diversity.table(rows, writers=WRITERS)
    assert (found["words"], found["n"]) == (3, 3)
    assert found["policies"]["student"]["distinct_1"] == pytest.approx(6 / 9)  # d e f, d e f, x y z
    assert found["policies"]["student"]["within_distance"] == pytest.approx((1 + 0) / 2)  # all draws of intents 0 and 2


def test_more_draws_of_an_intent_do_not_lower_the_figures_across_intents() -> None:
    rng = np.random.default_rng(1)
    once = [(p, i, 0, " ".join(rng.choice(WORDS, 8))) for i in range(30) for p in WRITERS]
    again = [(p, i, v, prompt) for p, i, _, prompt in once for v in range(4)]
    one, four = (diversity.table(written(*rows), writers=WRITERS) for rows in (once, again))
    assert (one["n"], four["n"]) == (30, 30)
    for policy in WRITERS:
        across = [{name: found["policies"][policy][name] for name in diversity.ACROSS} for found in (one, four)]
        assert across[0] == across[1]


def test_writers_are_compared_on_the_intents_that_all_of_them_answered() -> None:
    rows = written(
        *(("teacher", i, 0, f"t{i} u{i}" if i != 3 else None) for i in range(6)),
        *(("student", i, 0, "a b" if i in (0, 3) else f"s{i} r{i}" if i != 5 else None) for i in range(6)),
    )
    found = diversity.table(rows, writers=WRITERS)
    assert found["n"] == 4  # 0, 1, 2 and 4
    assert found["policies"]["student"]["distinct_1"] == 1  # a b stands for intent 0 alone


def test_yardsticks_with_one_draw_an_intent_have_figures() -> None:
    rng = np.random.default_rng(0)
    rows = [(p, i, v, " ".join(rng.choice(WORDS, 8))) for p in WRITERS for i in range(20) for v in range(2)]
    rows += [(p, i, 0, " ".join(rng.choice(WORDS, 8))) for p in ("echo", "best-of-2") for i in range(20)]
    rows.append(("student", 7, 0, None))
    found = diversity.table(written(*rows), writers=WRITERS)
    for policy in ("echo", "best-of-2"):
        assert not any(math.isnan(found["policies"][policy][figure]) for figure in diversity.ACROSS)


def test_a_yardstick_gives_others_for_the_intents_that_it_lacks() -> None:
    rows = written(
        *((p, i, 0, f"{p}{i} x{i}" if (p, i) != ("student", 0) else None) for p in WRITERS for i in range(5)),
        *(("best-of-2", i, 0, f"b{i} c{i}") for i in (0, 2, 3, 4)),
        *(("shuffled", i, 0, f"b{i} c{i}") for i in (2, 3, 4)),
    )
    found = diversity.table(rows, writers=WRITERS)
    assert found["n"] == 4
    assert found["policies"]["best-of-2"]["distinct_1"] == 1
    assert "shuffled" not in found["policies"]


def test_a_writer_with_nearly_everything_rejected_leaves_the_others_comparable() -> None:
    rng = np.random.default_rng(0)
    policies = ["student", "teacher", "llama3-8b"]
    rows = [
        (p, i, v, " ".join(rng.choice(WORDS, 8)) if p != "llama3-8b" or i == 0 else None)
        for p in policies
        for i in range(30)
        for v in range(2)
    ]
    found = diversity.table(written(*rows), writers=policies)
    assert found["n"] == 30
    assert all(math.isnan(value) for value in found["policies"]["llama3-8b"].values())
    assert not any(math.isnan(found["policies"][p][f]) for p in WRITERS for f in (*diversity.ACROSS, *diversity.WITHIN))
    half = [r for r in rows if r[0] != "llama3-8b" or r[1] == 0] + [
        ("llama3-8b", i, 0, "a b c d e f g h") for i in range(1, 15)
    ]
    assert diversity.table(written(*half), writers=policies)["n"] == 15  # half as many as the median: it counts


@settings(deadline=None, max_examples=30)
@given(texts, st.integers(0, 9))
def test_figures_of_some_texts_are_those_of_these_texts_alone(lines: list[list[str]], seed: int) -> None:
    kept = np.random.default_rng(seed).random((5, len(lines))) < 0.5
    similar = diversity.kernel(lines)
    for some, pairs, score in zip(kept, diversity.distinct_of(lines, 2, kept), diversity.vendi_of(similar, kept), strict=True):
        chosen = [line for line, keep in zip(lines, some, strict=True) if keep]
        assert pairs == pytest.approx(diversity.distinct(chosen, 2), nan_ok=True)
        assert score == pytest.approx(diversity.vendi(diversity.kernel(chosen)), nan_ok=True)


def measured(prompts: dict[str, list[str]]) -> diversity.Varied:
    rows = written(*((p, i, 0, prompt) for p, mine in prompts.items() for i, prompt in enumerate(mine)))
    return diversity.measure(rows, writers=list(prompts), groups=diversity.Groups.of(rows["intent_id"]))


def test_a_policy_is_as_varied_as_itself_without_doubt() -> None:
    rng = np.random.default_rng(3)
    same = [" ".join(rng.choice(WORDS, 6)) for _ in range(30)]
    found = diversity.ratios([measured({"student": same, "teacher": same})] * 2)
    for figure in diversity.COMPARED:
        assert found["teacher"][figure] == pytest.approx({"value": 1, "low": 1, "high": 1})


def test_a_ratio_s_interval_covers_about_95_times_in_100_though_a_vendi_score_grows_with_the_number() -> None:
    rng = np.random.default_rng(5)
    found: dict[str, list[dict[str, float]]] = {figure: [] for figure in diversity.COMPARED}
    for _ in range(100):
        prompts = {
            policy: [
                " ".join(rng.choice(vocabulary, 6, p=1 / vocabulary / (1 / vocabulary).sum()).astype(str)) for _ in range(24)
            ]
            for policy, vocabulary in (("student", np.arange(1, 40)), ("teacher", np.arange(1, 90)))
        }
        for figure, interval in diversity.ratios([measured(prompts)])["teacher"].items():
            found[figure].append(interval)
    for each in found.values():
        true = np.mean([interval["value"] for interval in each])
        assert sum(interval["low"] <= true <= interval["high"] for interval in each) >= 88


def test_over_tasks_a_ratio_is_of_the_means_and_needs_every_task() -> None:
    one = measured({"student": ["a b c", "d e f"], "teacher": ["a b c", "d e f"], "x": ["a b c", "a b c"]})
    two = measured({"student": ["a b c", "a b c"], "teacher": ["a b c", "d e f"]})
    found = diversity.ratios([one, two])
    assert found["teacher"]["distinct_2"]["value"] == pytest.approx((1 + 0.5) / (1 + 1))
    assert found["teacher"]["vendi"]["value"] == pytest.approx((2 + 1) / (2 + 2))
    assert math.isnan(found["x"]["vendi"]["value"])
    assert diversity.ratios([one])["x"]["vendi"]["value"] == pytest.approx(2)


def test_over_tasks_the_figures_are_averaged() -> None:
    one, two = ({**dict.fromkeys((*diversity.ACROSS, *diversity.WITHIN), math.nan), "vendi": v} for v in (2.0, 4.0))
    found = diversity.over_tasks(
        [{"words": 8, "n": 10, "policies": {"student": one}}, {"words": 11, "n": 5, "policies": {"student": two}}]
    )
    assert (found["words"], found["n"], found["policies"]["student"]["vendi"]) == (9.5, 15, 3)
    assert found["fewest"] == 5
    assert math.isnan(found["policies"]["student"]["distinct_2"])


def test_over_all_tasks_a_policy_has_no_figure_that_it_lacks_on_one() -> None:
    blank = dict.fromkeys((*diversity.ACROSS, *diversity.WITHIN), float("nan"))

    def task(**distinct: float) -> dict[str, Any]:
        return {"n": 9, "words": 5, "policies": {name: {**blank, "distinct_2": value} for name, value in distinct.items()}}

    found = diversity.over_tasks([task(student=0.5, echo=0.9), task(student=0.7, echo=float("nan"))])["policies"]
    assert found["student"]["distinct_2"] == pytest.approx(0.6)
    assert np.isnan(found["echo"]["distinct_2"])
