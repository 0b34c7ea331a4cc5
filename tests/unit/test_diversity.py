"""Diversity on values worked out by hand, and properties of any texts."""

import math

import numpy as np
import pytest
from fakes.fake_evaluation import WORDS, embed, row, table
from hypothesis import given, settings
from hypothesis import strategies as st

from udrl.evaluate.document import UNKNOWN, Diversity, DiversityFigures, Interval
from udrl.evaluate.metrics import diversity
from udrl.evaluate.outputs import Columns, columns

texts = st.lists(st.lists(st.sampled_from(WORDS), min_size=4, max_size=4), min_size=2, max_size=12)
WRITERS = ["student", "teacher"]


def measure(rows: Columns, writers: list[str]) -> Diversity:
    groups = diversity.IntentGroups.of(rows["intent_id"])
    return diversity.measure_task(rows, writers, embed=embed, groups=groups).diversity


def letters(*lines: str) -> list[list[str]]:
    return [list(line) for line in lines]


def test_distinct_pairs_against_hand_counts() -> None:
    assert diversity.distinct_pairs(letters("abab")) == pytest.approx(2 / 3)  # ab ba ab
    assert diversity.distinct_pairs(letters("ab", "cd")) == 1
    assert math.isnan(diversity.distinct_pairs(letters("a")))


def test_vendi_score_against_hand_counts() -> None:
    assert diversity.vendi(np.eye(5)) == pytest.approx(5)
    assert diversity.vendi(np.ones((5, 5))) == pytest.approx(1)
    two = diversity.vendi(np.array([[1, 0.6], [0.6, 1]]))  # eigenvalues of half of it: 0.8 and 0.2
    assert two == pytest.approx(math.exp(-(0.8 * math.log(0.8) + 0.2 * math.log(0.2))))
    assert diversity.vendi(np.kron(np.eye(3), np.ones((2, 2)))) == pytest.approx(3)  # three texts, twice each
    assert math.isnan(diversity.vendi(np.zeros((0, 0))))


def test_the_fake_embeddings_are_as_alike_as_their_word_pairs() -> None:
    similar = diversity.similarities(letters("abc", "abd", "xyz"), embed)
    assert similar == pytest.approx(np.array([[1, 0.5, 0], [0.5, 1, 0], [0, 0, 1]]))


def test_texts_are_as_alike_as_their_vectors() -> None:
    vectors = {"a b": [1.0, 0.0], "b a": [0.6, 0.8]}
    similar = diversity.similarities(letters("ab", "ba", "ab"), lambda lines: np.array([vectors[line] for line in lines]))
    assert similar == pytest.approx(np.array([[1, 0.6, 1], [0.6, 1, 0.6], [1, 0.6, 1]]))


@settings(deadline=None, max_examples=40)
@given(texts)
def test_copies_are_the_least_varied_texts(words: list[list[str]]) -> None:
    copies = [words[0]] * len(words)
    assert diversity.distinct_pairs(copies) <= diversity.distinct_pairs(words)
    assert diversity.vendi(diversity.similarities(copies, embed)) == pytest.approx(1)
    assert 1 - 1e-9 <= diversity.vendi(diversity.similarities(words, embed)) <= len(words) + 1e-9


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
    assert student.vendi == pytest.approx(teacher.vendi, rel=0.15)


def test_a_trivial_baseline_has_no_figures_and_does_not_shorten_the_cut() -> None:
    rng = np.random.default_rng(0)
    rows = [
        row(intent=i, policy=policy, prompt=" ".join(rng.choice(WORDS, words)), n_words=words)
        for i in range(10)
        for policy, words in (("student", 12), ("teacher", 12), ("echo", 4))
    ]
    measured = measure(columns(table(*rows)), WRITERS)
    assert (measured.words, measured.n, set(measured.policies)) == (12, 10, set(WRITERS))


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
    assert measured.policies["student"].distinct_2 == pytest.approx(4 / 6)  # d e f, d e f, x y z


def test_more_prompts_for_an_intent_do_not_lower_the_figures_across_intents() -> None:
    rng = np.random.default_rng(1)
    once = [(p, i, 0, " ".join(rng.choice(WORDS, 8))) for i in range(30) for p in WRITERS]
    again = [(p, i, v, prompt) for p, i, _, prompt in once for v in range(4)]
    one, four = (measure(rows_of(*rows), WRITERS) for rows in (once, again))
    assert (one.n, four.n) == (30, 30)
    assert one.policies == four.policies


def test_writers_are_compared_on_the_intents_that_all_of_them_have_a_prompt_for() -> None:
    rows = rows_of(
        *(("teacher", i, 0, f"t{i} u{i}" if i != 3 else None) for i in range(6)),
        *(("student", i, 0, "a b" if i in (0, 3) else f"s{i} r{i}" if i != 5 else None) for i in range(6)),
    )
    measured = measure(rows, WRITERS)
    assert measured.n == 4  # 0, 1, 2 and 4
    assert measured.policies["student"].distinct_2 == 1  # a b is used for intent 0 only


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


def test_figures_without_a_group_are_those_of_the_texts_that_remain() -> None:
    rng = np.random.default_rng(0)
    prompts = [" ".join(rng.choice(WORDS, 6)) for _ in range(30)]
    rows = rows_of(*(("student", i, 0, prompt) for i, prompt in enumerate(prompts)))
    groups = diversity.IntentGroups.of(rows["intent_id"])
    without = diversity.measure_task(rows, ["student"], embed=embed, groups=groups).without["student"]
    stays = dict(zip(groups.intents.tolist(), groups.remaining[3].tolist(), strict=True))
    kept = [p.split() for p, intent in zip(prompts, rows["intent_id"].tolist(), strict=True) if stays[intent]]
    assert without["distinct_2"][3] == pytest.approx(diversity.distinct_pairs(kept))
    assert without["vendi"][3] == pytest.approx(diversity.vendi(diversity.similarities(kept, embed)))


def measure_with_groups(prompts: dict[str, list[str]]) -> diversity.TaskDiversity:
    rows = rows_of(*((p, i, 0, prompt) for p, texts in prompts.items() for i, prompt in enumerate(texts)))
    return diversity.measure_task(rows, list(prompts), embed=embed, groups=diversity.IntentGroups.of(rows["intent_id"]))


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
    return diversity.TaskDiversity(Diversity(words=words, n=n, fewest=n, policies=figures), {})


def test_over_tasks_the_figures_are_averaged() -> None:
    measured = diversity.average_over_tasks([task(10, 8, student=2.0), task(5, 11, student=4.0)])
    assert (measured.words, measured.n, measured.fewest) == (9.5, 15, 5)
    assert measured.policies["student"] == DiversityFigures(vendi=3)


def test_over_all_tasks_a_policy_has_no_figure_that_it_lacks_on_one() -> None:
    measured = diversity.average_over_tasks([task(student=2.0, echo=9.0), task(student=3.0, echo=None)]).policies
    assert (measured["student"].vendi, measured["echo"].vendi) == (2.5, None)
