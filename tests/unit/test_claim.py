"""Verdicts on the claim and the targets: met, missed or open."""

from typing import Any

import pytest
from fakes.fake_evaluation import TASKS, document, interval, judge, outputs
from hypothesis import given
from hypothesis import strategies as st

from udrl.evaluate.document import (
    Claim,
    ClaimPart,
    DiversityRatios,
    Interval,
    JudgeComparison,
    RelevanceComparison,
    Scope,
    Target,
)
from udrl.evaluate.metrics import claim
from udrl.evaluate.metrics import compute as metrics

RUBRIC = judge(kind="rubric")
FIT = {"rubric": RUBRIC}


def scope(
    relevance: Interval,
    rubric: Interval | None = None,
    diversity: Interval | None = None,
    rivals: tuple[str, ...] = ("llama3-8b",),
    fewest: int = 20,
) -> Scope:
    """All tasks together: the same ratios to each of ``rivals``; by the rubric judge only if it has one."""
    whole = document(TASKS, dict.fromkeys(("student", *rivals), "baseline")).overall
    for comparison in whole.comparisons.values():
        comparison.relevance = RelevanceComparison(difference=relevance, ratio=relevance, ratio_accepted=relevance)
        comparison.judges = {"rubric": JudgeComparison(difference=rubric, ratio=rubric)} if rubric else {}
    ratio = diversity or interval(1)
    whole.diversity.ratios = {name: DiversityRatios(distinct_2=ratio, vendi=ratio) for name in rivals}
    whole.diversity.fewest = fewest
    return whole


def verdicts(decided: Claim) -> list[bool | None]:
    return [part.met for part in decided.parts]


@pytest.mark.parametrize(
    ("ratio", "verdict"),
    [
        (interval(0.97, 0.02), True),
        (Interval(value=0.95, low=0.94, high=0.96), True),
        (interval(0.96, 0.03), None),
        (interval(0.93, 0.03), None),
        (interval(0.9, 0.02), False),
        (interval(None), None),
    ],
)
def test_the_whole_interval_decides(ratio: Interval, verdict: bool | None) -> None:
    assert verdicts(claim.decide_claim(scope(interval(1), ratio, ratio), FIT)) == [verdict] * 3


@given(st.lists(st.sampled_from([0.8, 0.94, 0.99]), min_size=1, max_size=3))
def test_the_claim_is_met_by_all_parts_and_missed_by_one(ratios: list[float]) -> None:
    names = tuple(f"model-{i}" for i in range(len(ratios)))
    overall = scope(interval(1, 0), interval(1, 0), rivals=names)
    for name, ratio in zip(names, ratios, strict=True):
        overall.comparisons[name].judges["rubric"].ratio = interval(ratio, 0)
    assert claim.decide_claim(overall, FIT).met is (min(ratios) >= claim.BOUND)


def test_diversity_counts_by_its_interval() -> None:
    decided = claim.decide_claim(scope(interval(1), interval(1), interval(0.9)), FIT)
    assert verdicts(decided) == [True, False, False]
    assert decided.met is False
    assert "diversity (Vendi) against llama3-8b is 90.0% (88.0% to 92.0%)" in decided.text
    assert "relevance (" not in decided.text  # only the parts that missed


@pytest.mark.parametrize("ratio", [0.5, 0.95, 2.0])
def test_diversity_of_few_prompts_decides_nothing(ratio: float) -> None:
    decided = claim.decide_claim(scope(interval(1), interval(1), interval(ratio, 0), fewest=19), FIT)
    assert (verdicts(decided), decided.met) == ([True, None, None], None)
    assert "diversity (Vendi, of 19 prompts only) against llama3-8b is " in decided.text


def test_a_policy_without_diversity_figures_leaves_the_claim_open() -> None:
    overall = scope(interval(1), interval(1), fewest=0)
    overall.diversity.ratios = {}
    decided = claim.decide_claim(overall, FIT)
    assert verdicts(decided) == [True, None, None]
    assert "diversity (distinct-2) against llama3-8b was not measured" in decided.text


def test_an_independent_judge_decides_before_the_training_s_scorer() -> None:
    decided = claim.decide_claim(scope(interval(1.0), interval(0.8)), FIT)
    name = "relevance (judge rubric) against llama3-8b"
    assert decided.parts[0] == ClaimPart(name=name, interval=interval(0.8), met=False)


@pytest.mark.parametrize(("ratio", "verdict"), [(1.0, None), (0.94, None), (0.8, False)])
def test_the_scorer_of_the_training_can_miss_the_claim_but_never_meet_it(ratio: float, verdict: bool | None) -> None:
    for judges, by_rubric in ((FIT, None), ({}, interval(1))):  # a fit judge that did not score this policy, or none
        decided = claim.decide_claim(scope(interval(ratio), by_rubric), judges)
        assert decided.parts[0].name.startswith("relevance (the scorer that made the training reward, because ")
        assert (decided.parts[0].met, decided.met) == (verdict, verdict)
        assert "relevance (the scorer that made the training reward, because " in decided.text
        assert ("can be missed, but not met" in decided.text) is (verdict is None)
        assert "embedder" not in decided.text


@pytest.mark.parametrize("flaw", [{"validated": False}, {"ratio_scale": False}, {"is_teacher": True}])
def test_a_judge_that_is_not_fit_does_not_decide(flaw: dict[str, bool]) -> None:
    assert claim.judge_of_claim(FIT) == "rubric"
    assert claim.judge_of_claim({"rubric": judge(kind="rubric", **flaw)}) is None
    sharper = {"kind": "rubric", "auc": {"shuffled": 0.95}}
    assert claim.judge_of_claim({"rubric": RUBRIC, "sharper": judge(**sharper)}) == "sharper"
    assert claim.judge_of_claim({"rubric": RUBRIC, "sharper": judge(**sharper, **flaw)}) == "rubric"


def test_the_claim_is_about_the_baselines_and_the_teacher() -> None:
    assert claim.rivals(["echo", "best-of-4", "llama3-8b", "shuffled", "student", "teacher"]) == ["llama3-8b", "teacher"]
    assert claim.rivals(["echo", "best-of-4", "student", "teacher"]) == ["teacher"]
    without_rival = claim.decide_claim(scope(interval(1), rivals=("echo",)), FIT)
    assert (without_rival.met, without_rival.parts) == (None, [])
    three = scope(interval(1), interval(1), rivals=("llama3-8b", "qwen3-8b", "teacher"))
    decided = claim.decide_claim(three, FIT)
    assert (decided.met, len(decided.parts)) == (True, 9)
    assert "within 6% of llama3-8b, qwen3-8b and the teacher in" in decided.text
    three.comparisons["teacher"].judges["rubric"].ratio = interval(0.8)
    assert claim.decide_claim(three, FIT).met is False
    teacher_only = claim.decide_claim(scope(interval(1), interval(1), rivals=("teacher",)), FIT)
    assert "within 6% of the teacher (no baseline wrote) in" in teacher_only.text


def targets(policies: tuple[str, ...], **changes: Any) -> list[Target]:
    table = outputs(policies={name: name for name in policies})
    rows = [{**r, **changes} if r["policy"] == "student" and r["task"] == "image_search" else r for r in table.to_pylist()]
    nothing: dict[str, Any] = {"tasks": [], "judges": {}, "pairwise": None, "training": None, "embed": None}
    return metrics.compute(type(table).from_pylist(rows, schema=table.schema), **nothing, bootstrap=100).targets


def test_targets_are_met_missed_or_not_measured() -> None:
    assert [t.met for t in targets(("teacher", "student"))] == [True] * 6
    without_teacher = targets(("student",))
    assert [t.met for t in without_teacher] == [None, None, None, True, True, True]
    assert [t.measured for t in without_teacher][:3] == ["-"] * 3
    bad = targets(("teacher", "student"), relevance=0.1, n_words=40)
    assert [t.met for t in bad] == [False, False, False, False, False, False]
    assert bad[2].measured == "2 of 3 tasks; missed by image_search"
