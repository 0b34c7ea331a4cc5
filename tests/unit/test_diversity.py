"""Diversity on values worked out by hand, and properties of any texts."""

import math
import zlib
from collections import Counter

import numpy as np
import pytest
from fakes.fake_evaluation import WORDS, row, table
from hypothesis import given, settings
from hypothesis import strategies as st

from udrl.evaluate.document import UNKNOWN, Diversity, DiversityFigures, Interval
from udrl.evaluate.metrics import diversity
from udrl.evaluate.outputs import Columns, columns

texts = st.lists(st.lists(st.sampled_from(WORDS), min_size=4, max_size=4), min_size=2, max_size=12)
uneven = st.lists(st.lists(st.sampled_from("abc"), min_size=1, max_size=7), min_size=2, max_size=6)


WRITERS = ["student", "teacher"]
ACROSS = ("distinct_1", "distinct_2", "compression", "self_bleu", "vendi")


def measure(rows: Columns, writers: list[str]) -> Diversity:
    return diversity.measure_task(rows, writers).diversity


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
    similar = diversity.similarities(letters("abc", "abd", "xyz"))
    assert similar == pytest.approx(np.array([[1, 0.5, 0], [0.5, 1, 0], [0, 0, 1]]))


def test_with_embeddings_texts_are_as_alike_as_their_vectors() -> None:
    vectors = {"a b": [1.0, 0.0], "b a": [0.6, 0.8]}
    similar = diversity.similarities(letters("ab", "ba", "ab"), lambda lines: np.array([vectors[line] for line in lines]))
    assert similar == pytest.approx(np.array([[1, 0.6, 1], [0.6, 1, 0.6], [1, 0.6, 1]]))


@settings(deadline=None, max_examples=40)
@given(texts)
def test_copies_are_the_least_varied_texts(words: list[list[str]]) -> None:
    copies = [words[0]] * len(words)
    of_copies, of_words = (diversity.figures_across(t, diversity.similarities(t)) for t in (copies, words))
    for higher in ("distinct_1", "distinct_2", "vendi"):
        assert of_copies[higher] <= of_words[higher] + 1e-9
    assert of_copies["vendi"] == pytest.approx(1)
    assert of_words["vendi"] <= len(words) + 1e-9
    assert of_copies["self_bleu"] == pytest.approx(1)
    assert of_words["self_bleu"] <= 1 + 1e-9
    same, mixed = diversity.figures_within([copies]), diversity.figures_within([words])
    assert (same["within_distance"], same["within_vendi"]) == (0, pytest.approx(1))
    assert mixed["within_distance"] >= 0
    assert mixed["within_vendi"] >= 1 - 1e-9


def test_within_an_intent_only_its_own_prompts_are_compared() -> None:
    figures = diversity.figures_within([letters("abc", "bcd"), letters("xyz", "uvw"), letters("abc")])
    assert figures["within_distance"] == pytest.approx((0.5 + 1) / 2)  # 2 of 4 words in common; none
    half = diversity.vendi(np.array([[1, 0.5], [0.5, 1]]))  # one of two word pairs in common
    assert figures["within_vendi"] == pytest.approx((half + 2) / 2)
    assert all(math.isnan(value) for value in diversity.figures_within([letters("abc")]).values())


def test_diversity_compares_equal_lengths_and_equal_numbers() -> None:
    rng = np.random.default_rng(0)
    rows = []
    for i in range(40):  # both sample one distribution, but the teacher writes three times as much, twice as often
        for policy, words, samples in (("teacher", 30, 2), ("student", 10, 1)):
            for v in range(samples):
                prompt = " ".join(rng.choice(WORDS, words))
                rows.append(row(intent=i, policy=policy, variation=v, prompt=prompt, n_words=words))
    measured = measure(columns(table(*rows)), WRITERS)
    assert (measured.words, measured.n) == (10, 40)
    student, teacher = measured.policies["student"], measured.policies["teacher"]
    assert student.distinct_2 == pytest.approx(teacher.distinct_2, rel=0.15)
    assert student.self_bleu == pytest.approx(teacher.self_bleu, rel=0.15)
    assert student.vendi == pytest.approx(teacher.vendi, rel=0.15)
    assert student.compression == pytest.approx(teacher.compression, rel=0.1)
    assert student.within_distance is None
    assert teacher.within_vendi > 1


def test_a_trivial_baseline_does_not_shorten_the_cut_of_the_others() -> None:
    rng = np.random.default_rng(0)
    rows = [
        row(intent=i, policy=policy, prompt=" ".join(rng.choice(WORDS, words)), n_words=words)
        for i in range(10)
        for policy, words in (("student", 12), ("teacher", 12), ("echo", 4), ("shuffled", 12))
    ]
    measured = measure(columns(table(*rows)), WRITERS)
    assert (measured.words, measured.n) == (12, 10)
    assert set(measured.policies) == {"student", "teacher", "shuffled"}  # an echo has no prompt of twelve words


def rows_of(*prompts: tuple[str, int, int, str | None]) -> Columns:
    """Rows of (policy, intent, variation, prompt); None: rejected."""
    return columns(
        table(
            *(
                row(intent=i, policy=p, variation=v, prompt=prompt or "", reason="" if prompt else "echo", n_words=0)
                for p, i, v, prompt in prompts
            )
        )
    )


def test_across_intents_each_policy_contributes_its_first_accepted_prompt_that_is_long_enough() -> None:
    rows = rows_of(
        *(("teacher", i, 0, f"t{i} u{i} v{i}") for i in range(3)),
        *(("student", 0, v, prompt) for v, prompt in ((2, "a b c"), (1, "d e f"), (0, None))),
        *(("student", 1, v, prompt) for v, prompt in ((0, "g h"), (1, "d e f"))),
        *(("student", 2, v, "x y z") for v in range(2)),
    )
    measured = measure(rows, WRITERS)
    assert (measured.words, measured.n) == (3, 3)
    assert measured.policies["student"].distinct_1 == pytest.approx(6 / 9)  # d e f, d e f, x y z
    assert measured.policies["student"].within_distance == pytest.approx((1 + 0) / 2)  # all prompts for intents 0 and 2


def test_more_prompts_for_an_intent_do_not_lower_the_figures_across_intents() -> None:
    rng = np.random.default_rng(1)
    once = [(p, i, 0, " ".join(rng.choice(WORDS, 8))) for i in range(30) for p in WRITERS]
    again = [(p, i, v, prompt) for p, i, _, prompt in once for v in range(4)]
    one, four = (measure(rows_of(*rows), WRITERS) for rows in (once, again))
    assert (one.n, four.n) == (30, 30)
    for policy in WRITERS:
        across = [measured.policies[policy].model_dump(include=set(ACROSS)) for measured in (one, four)]
        assert across[0] == across[1]


def test_writers_are_compared_on_the_intents_that_all_of_them_have_a_prompt_for() -> None:
    rows = rows_of(
        *(("teacher", i, 0, f"t{i} u{i}" if i != 3 else None) for i in range(6)),
        *(("student", i, 0, "a b" if i in (0, 3) else f"s{i} r{i}" if i != 5 else None) for i in range(6)),
    )
    measured = measure(rows, WRITERS)
    assert measured.n == 4  # 0, 1, 2 and 4
    assert measured.policies["student"].distinct_1 == 1  # a b is used for intent 0 only


def test_trivial_baselines_with_one_prompt_an_intent_have_figures() -> None:
    rng = np.random.default_rng(0)
    rows = [(p, i, v, " ".join(rng.choice(WORDS, 8))) for p in WRITERS for i in range(20) for v in range(2)]
    rows += [(p, i, 0, " ".join(rng.choice(WORDS, 8))) for p in ("echo", "best-of-2") for i in range(20)]
    rows.append(("student", 7, 0, None))
    measured = measure(rows_of(*rows), WRITERS)
    for policy in ("echo", "best-of-2"):
        assert None not in measured.policies[policy].model_dump(include=set(ACROSS)).values()


def test_a_trivial_baseline_contributes_others_for_the_intents_that_it_lacks() -> None:
    rows = rows_of(
        *((p, i, 0, f"{p}{i} x{i}" if (p, i) != ("student", 0) else None) for p in WRITERS for i in range(5)),
        *(("best-of-2", i, 0, f"b{i} c{i}") for i in (0, 2, 3, 4)),
        *(("shuffled", i, 0, f"b{i} c{i}") for i in (2, 3, 4)),
    )
    measured = measure(rows, WRITERS)
    assert measured.n == 4
    assert measured.policies["best-of-2"].distinct_1 == 1
    assert "shuffled" not in measured.policies


def test_a_writer_with_nearly_everything_rejected_leaves_the_others_comparable() -> None:
    rng = np.random.default_rng(0)
    policies = ["student", "teacher", "llama3-8b"]
    rows = [
        (p, i, v, " ".join(rng.choice(WORDS, 8)) if p != "llama3-8b" or i == 0 else None)
        for p in policies
        for i in range(30)
        for v in range(2)
    ]
    measured = measure(rows_of(*rows), policies)
    assert measured.n == 30
    assert measured.policies["llama3-8b"] == DiversityFigures()
    assert all(None not in measured.policies[p].model_dump().values() for p in WRITERS)
    half = [r for r in rows if r[0] != "llama3-8b" or r[1] == 0] + [
        ("llama3-8b", i, 0, "a b c d e f g h") for i in range(1, 15)
    ]
    assert measure(rows_of(*half), policies).n == 15  # half as many as the median: it counts


@settings(deadline=None, max_examples=30)
@given(texts, st.integers(0, 9))
def test_figures_of_a_subset_are_those_of_its_texts(lines: list[list[str]], seed: int) -> None:
    subsets = np.random.default_rng(seed).random((5, len(lines))) < 0.5
    pairs = diversity.distinct_of_subsets(lines, 2, subsets)
    scores = diversity.vendi_of_subsets(diversity.similarities(lines), subsets)
    for i, subset in enumerate(subsets):
        texts = [line for line, keep in zip(lines, subset, strict=True) if keep]
        assert pairs[i] == pytest.approx(diversity.distinct(texts, 2), nan_ok=True)
        assert scores[i] == pytest.approx(diversity.vendi(diversity.similarities(texts)), nan_ok=True)


def measure_with_groups(prompts: dict[str, list[str]]) -> diversity.TaskDiversity:
    rows = rows_of(*((p, i, 0, prompt) for p, texts in prompts.items() for i, prompt in enumerate(texts)))
    return diversity.measure_task(rows, list(prompts), groups=diversity.IntentGroups.of(rows["intent_id"]))


def test_the_ratio_of_a_policy_to_itself_is_one_without_doubt() -> None:
    rng = np.random.default_rng(3)
    same = [" ".join(rng.choice(WORDS, 6)) for _ in range(30)]
    ratios = diversity.average_over_tasks([measure_with_groups({"student": same, "teacher": same})] * 2).ratios["teacher"]
    for ratio in (ratios.distinct_2, ratios.vendi):
        assert (ratio.value, ratio.low, ratio.high) == pytest.approx((1, 1, 1))


def test_a_ratio_s_interval_covers_about_95_times_in_100_though_a_vendi_score_grows_with_the_number() -> None:
    rng = np.random.default_rng(5)
    intervals: dict[str, list[Interval]] = {"distinct_2": [], "vendi": []}
    for _ in range(100):
        prompts = {
            policy: [
                " ".join(rng.choice(vocabulary, 6, p=1 / vocabulary / (1 / vocabulary).sum()).astype(str)) for _ in range(24)
            ]
            for policy, vocabulary in (("student", np.arange(1, 40)), ("teacher", np.arange(1, 90)))
        }
        for figure, interval in diversity.with_ratios(measure_with_groups(prompts)).ratios["teacher"]:
            intervals[figure].append(interval)
    for each in intervals.values():
        true = np.mean([interval.value for interval in each])
        assert sum(interval.low <= true <= interval.high for interval in each) >= 88


def test_over_tasks_a_ratio_is_of_the_means_and_needs_every_task() -> None:
    one = measure_with_groups({"student": ["a b c", "d e f"], "teacher": ["a b c", "d e f"], "x": ["a b c", "a b c"]})
    two = measure_with_groups({"student": ["a b c", "a b c"], "teacher": ["a b c", "d e f"]})
    ratios = diversity.average_over_tasks([one, two]).ratios
    assert ratios["teacher"].distinct_2.value == pytest.approx((1 + 0.5) / (1 + 1))
    assert ratios["teacher"].vendi.value == pytest.approx((2 + 1) / (2 + 2))
    assert ratios["x"].vendi == UNKNOWN
    assert diversity.with_ratios(one).ratios["x"].vendi.value == pytest.approx(2)


def task(n: int = 9, words: int = 5, **vendi: float | None) -> diversity.TaskDiversity:
    """One task's diversity: the Vendi score of each policy."""
    figures = {policy: DiversityFigures(vendi=score) for policy, score in vendi.items()}
    return diversity.TaskDiversity(Diversity(words=words, n=n, policies=figures), {})


def test_over_tasks_the_figures_are_averaged() -> None:
    measured = diversity.average_over_tasks([task(10, 8, student=2.0), task(5, 11, student=4.0)])
    assert (measured.words, measured.n, measured.fewest) == (9.5, 15, 5)
    assert measured.policies["student"] == DiversityFigures(vendi=3)


def test_over_all_tasks_a_policy_has_no_figure_that_it_lacks_on_one() -> None:
    measured = diversity.average_over_tasks([task(student=2.0, echo=9.0), task(student=3.0, echo=None)]).policies
    assert (measured["student"].vendi, measured["echo"].vendi) == (2.5, None)
