"""The numbers of the document: how outputs count, which policies are compared, and which numbers stay unknown."""

from typing import Any

import pyarrow as pa
import pytest
from fakes.fake_evaluation import embed, judge, outputs, row, table
from hypothesis import given, settings
from hypothesis import strategies as st

from udrl.evaluate.document import UNKNOWN, Interval, Measurements, Scope
from udrl.evaluate.metrics import compute as metrics
from udrl.evaluate.outputs import OUTPUTS
from udrl.hashing import stable_id

NATS = judge()
WEAK = judge(validated=False, ratio_scale=False)


def compute(table: pa.Table, **changes: Any) -> Measurements:
    defaults: dict[str, Any] = {"judges": {}, "training": None, "embed": embed, "bootstrap": 100, "seed": 0}
    defaults["subject_words"] = {stable_id(0): ["balloon"], stable_id(1): ["kites", "golden"]}
    return metrics.compute(table, **{**defaults, **changes})


def both_scopes(measured: Measurements) -> list[Scope]:
    return [measured.overall, *measured.tasks.values()]


def test_a_rejected_output_counts_as_zero_and_for_a_judge_as_it_stands_in_the_table() -> None:
    scope = compute(
        table(
            row(intent=0, policy="teacher", relevance=0.8, judge_x=2.0),
            row(intent=1, policy="teacher", relevance=None, prompt="", reason="echo", n_words=0, judge_x=0.0),
            row(intent=0, policy="student", relevance=0.6, judge_x=1.0),
            row(intent=1, policy="student", relevance=0.9, prompt="", reason="truncated", n_words=7, judge_x=0.0),
            row(intent=2, policy="student", relevance=0.3, judge_x=2.0),
            judges=("x",),
        ),
        judges={"x": judge(unrelated_score=-1.0)},
    ).tasks["text_to_image"]
    assert scope.policies["teacher"].relevance.value == pytest.approx(0.4)
    assert scope.policies["student"].relevance.value == pytest.approx(0.3)
    assert scope.policies["student"].judges["x"].value == pytest.approx(1)
    assert scope.policies["student"].rejected == pytest.approx(1 / 3)
    comparison = scope.comparisons["teacher"]
    assert comparison.relevance.value == pytest.approx(0.75)
    assert comparison.relevance_accepted.value == pytest.approx(0.45 / 0.8)
    assert comparison.judges["x"].value == pytest.approx((1 + 1) / (1 + 1))


def test_coverage_repetition_and_copies_count_rejected_outputs_as_misses() -> None:
    rows = [
        row(intent=0, prompt="two balloons, two balloons in soft light"),  # says a pair twice, and holds the subject's plural
        row(intent=1, prompt="a kite in the wind"),  # one of two words
        row(intent=0, variation=1, prompt="", reason="echo", n_words=0, relevance=None),
        row(intent=0, policy="teacher", prompt="a soft golden balloon"),
    ]
    training = [pa.table({"task": ["text_to_image"], "prompt": ["x"], "policy": ["teacher"]})]
    student = (scope := compute(table(*rows), training=training).overall).policies["student"]
    assert student.coverage.value == pytest.approx((1 + 0.5 + 0) / 3)
    assert student.clean.value == pytest.approx(1 / 3)
    assert (student.accepted["coverage"].value, student.accepted["clean"].value) == pytest.approx((0.75, 0.5))
    assert (student.rejected, student.reasons) == (pytest.approx(1 / 3), {"echo": 1})
    assert student.copied_8 == UNKNOWN  # no prompt has eight words
    comparison = scope.comparisons["teacher"]
    assert comparison.coverage.value == pytest.approx(0.5)


def judge_ratio(student: list[float], teacher: list[float], **profile: Any) -> Interval:
    """Return the ratio of a judge's scores, one for each intent."""
    rows = [
        row(intent=i, policy=p, judge_x=s) for p, v in (("student", student), ("teacher", teacher)) for i, s in enumerate(v)
    ]
    measured = compute(table(*rows, judges=("x",)), judges={"x": judge(**profile)})
    return measured.overall.comparisons["teacher"].judges["x"]


def test_a_judge_s_ratio_is_of_the_scores_above_those_of_unrelated_prompts() -> None:
    ratio = judge_ratio([0.5, 1.5, 2.5], [1.0, 2.0, 3.0], unrelated_score=-1.0)  # 1.5 + 1 over 2 + 1
    assert ratio.value == pytest.approx(2.5 / 3)
    assert 1.5 / 2 - 1e-6 <= ratio.low < ratio.value < ratio.high <= 3.5 / 4 + 1e-6  # paired: the range of the intents' ratios
    assert judge_ratio([0.6, 0.6], [0.8, 0.8], unrelated_score=0.4).value == pytest.approx(0.5)  # a cosine is never near 0
    assert judge_ratio([0.6, 0.6], [0.8, 0.8], ratio_scale=False) == UNKNOWN


def test_there_is_no_ratio_to_a_policy_that_is_not_surely_above_unrelated_prompts() -> None:
    assert judge_ratio([1.0] * 6, [0.3, -0.2, 0.2, -0.1, 0.1, -0.2], unrelated_score=0.0) == UNKNOWN
    assert judge_ratio([1.0] * 6, [-0.1] * 6, unrelated_score=0.0) == UNKNOWN
    assert judge_ratio([1.0] * 6, [0.5] * 6, unrelated_score=0.0).value == pytest.approx(2)


def test_a_validated_judge_can_decide_the_claim() -> None:
    parts = compute(outputs(intents=24), judges={"gated": NATS}).claim.parts
    parts = [part for part in parts if part.name.startswith("relevance (judge")]
    names = [part.name for part in parts]
    assert names == [f"relevance (judge gated) against {name}" for name in ("llama3-8b", "qwen3-8b", "teacher")]
    assert all(part.interval.value is not None for part in parts)


def test_the_claim_s_ratios_of_diversity_have_intervals_over_intents() -> None:
    measured = compute(outputs(intents=40))
    for scope in both_scopes(measured):
        assert set(scope.diversity.ratios) == {"teacher", "llama3-8b", "qwen3-8b"}
    figures = measured.overall.diversity.policies
    for part in measured.claim.parts:
        if part.name.startswith("diversity (Vendi"):
            other = part.name.split()[-1]
            interval = part.interval
            assert interval.value == pytest.approx(figures["student"].vendi / figures[other].vendi)
            assert interval.low < interval.value < interval.high
            assert interval.high - interval.low < 0.3


def test_a_model_that_is_rejected_on_one_task_has_no_ratio_of_diversity_over_all_tasks() -> None:
    rows = [
        {**r, "prompt": "", "reason": "empty"} if r["policy"] == "teacher" and r["task"] == "image_search" else r
        for r in outputs(intents=30).to_pylist()
    ]
    measured = compute(table(*rows, judges=("gated",)))
    assert measured.overall.diversity.ratios["teacher"].vendi == UNKNOWN
    assert measured.overall.diversity.ratios["llama3-8b"].vendi.value > 0
    assert measured.tasks["text_to_image"].diversity.ratios["teacher"].vendi.value > 0


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.floats(0, 0.5, width=32), min_size=1, max_size=10),
    st.lists(st.floats(0.625, 1, width=32), min_size=1, max_size=10),
)
def test_mixing_in_better_outputs_raises_the_mean_and_the_judge(worse: list[float], better: list[float]) -> None:
    def means(scores: list[float]) -> tuple[float, float]:
        rows = [row(intent=i, relevance=s, judge_x=s) for i, s in enumerate(scores)]
        student = compute(table(*rows, judges=("x",))).overall.policies["student"]
        return student.relevance.value, student.judges["x"].value

    for before, after in zip(means(worse), means(worse + better), strict=True):
        assert after > before


def test_the_student_is_compared_with_every_other_policy() -> None:
    measured = compute(outputs(judges=("nats", "weak")), judges={"nats": NATS, "weak": WEAK})
    for scope in both_scopes(measured):
        assert set(scope.comparisons) == set(scope.policies) - {"student"}
        for name, comparison in scope.comparisons.items():
            assert comparison.judges["weak"] == UNKNOWN
            if name != "shuffled":
                assert comparison.judges["nats"].value > 0
    assert measured.overall.comparisons["echo"].relevance.high < 1
    assert measured.overall.comparisons["shuffled"].relevance.low > 1


def test_only_the_default_probe_counts_for_the_quality_of_a_policy() -> None:
    rows = [row(relevance=0.5), row(probe="length", command_words=6, relevance=0.1)]
    rows += [row(probe="reach", command_words=40, relevance=0.0, prompt="", reason="empty", n_words=0)]
    measured = compute(table(*rows))
    student = measured.overall.policies["student"]
    assert (student.n, student.rejected, student.relevance.value) == (1, 0, 0.5)
    assert [level.words for level in measured.tasks["text_to_image"].reach.levels] == [40]
    assert measured.overall.length.n == 1


def test_copies_are_looked_for_in_all_parts_of_training() -> None:
    prompts = [f"paint an owl {i} in soft light at dawn" for i in range(20)]
    rows = [row(intent=i, prompt=prompt, n_words=9) for i, prompt in enumerate(prompts)]
    parts = iter([pa.table({"prompt": prompts[:10]}), pa.table({"prompt": ["x", *prompts[10:15]]})])
    measured = compute(table(*rows), training=parts)
    assert measured.training_prompts == 16
    assert measured.overall.policies["student"].copied_8.value == pytest.approx(15 / 20)


def test_the_same_outputs_give_the_same_numbers() -> None:
    one, two = (compute(outputs(), judges={"gated": NATS}) for _ in range(2))
    assert one.model_dump_json() == two.model_dump_json()


@pytest.mark.parametrize(
    "table",
    [
        OUTPUTS.empty_table(),
        outputs(policies={"teacher": "teacher"}),
        outputs(policies={"student": "student"}, judges=()),
        table(row(prompt="", reason="engine_error", n_words=0, relevance=None, reward=None)),
        table(row(policy="teacher"), row(probe="length", command_words=6), row(probe="reward", command_reward=2)),
    ],
    ids=["nothing", "teacher", "student only", "one rejected row", "one row a probe"],
)
def test_missing_policies_and_probes_leave_numbers_unknown(table: pa.Table) -> None:
    measured = compute(table)
    assert measured.rows == table.num_rows
    assert measured.claim.met is None or measured.claim.parts
    assert Measurements.model_validate_json(measured.model_dump_json()) == measured
