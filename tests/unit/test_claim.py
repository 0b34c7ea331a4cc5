"""The verdicts: what is met, what is missed, and what the numbers leave open."""

import math
from typing import Any

import pytest
from evaluation_made_up import interval, outputs
from hypothesis import given
from hypothesis import strategies as st

from udrl.evaluate.metrics import claim
from udrl.evaluate.metrics import compute as metrics

RUBRIC = {"ratio": True, "believable": True, "of_teacher": False, "auc": {"shuffled": 0.9}}
FIT = {"rubric": RUBRIC}


def overall(
    relevance: dict,
    rubric: dict | None = None,
    varied: dict | None = None,
    others: tuple[str, ...] = ("llama3-8b",),
    fewest: int = 20,
) -> dict:
    judges = {"rubric": {"ratio": rubric}} if rubric else {}
    return {
        "policies": dict.fromkeys(("student", *others)),
        "against": {name: {"relevance": {"ratio": relevance}, "judges": judges} for name in others},
        "diversity": {
            "ratios": {name: dict.fromkeys(("distinct_2", "vendi"), varied or interval(1)) for name in others},
            "fewest": fewest,
        },
    }


def met(found: dict[str, Any]) -> list[bool | None]:
    return [part["met"] for part in found["parts"]]


@pytest.mark.parametrize(
    ("ratio", "verdict"),
    [
        (interval(0.97, 0.02), True),
        ({"value": 0.95, "low": 0.94, "high": 0.96}, True),
        (interval(0.96, 0.03), None),
        (interval(0.93, 0.03), None),
        (interval(0.9, 0.02), False),
        (interval(math.nan), None),
    ],
)
def test_the_whole_interval_decides(ratio: dict[str, float], verdict: bool | None) -> None:
    assert met(claim.claim(overall(interval(1), ratio, ratio), FIT)) == [verdict] * 3


@given(st.lists(st.sampled_from([0.8, 0.94, 0.99]), min_size=1, max_size=3))
def test_the_claim_is_met_by_all_parts_and_missed_by_one(ratios: list[float]) -> None:
    names = tuple(f"model-{i}" for i in range(len(ratios)))
    found = overall(interval(1, 0), interval(1, 0), others=names)
    for name, ratio in zip(names, ratios, strict=True):
        found["against"][name]["judges"] = {"rubric": {"ratio": interval(ratio, 0)}}
    assert claim.claim(found, FIT)["met"] is (min(ratios) >= claim.BOUND)


def test_diversity_counts_by_its_interval() -> None:
    found = claim.claim(overall(interval(1), interval(1), interval(0.9)), FIT)
    assert met(found) == [True, False, False]
    assert found["met"] is False
    assert "diversity (Vendi) against llama3-8b is 90.0% (88.0% to 92.0%)" in found["text"]
    assert "relevance (" not in found["text"]  # only what missed


@pytest.mark.parametrize("ratio", [0.5, 0.95, 2.0])
def test_diversity_of_few_prompts_decides_nothing(ratio: float) -> None:
    found = claim.claim(overall(interval(1), interval(1), interval(ratio, 0), fewest=19), FIT)
    assert (met(found), found["met"]) == ([True, None, None], None)
    assert "diversity (Vendi, of 19 prompts only) against llama3-8b is " in found["text"]


def test_a_policy_without_figures_of_diversity_leaves_the_claim_open() -> None:
    lacking = overall(interval(1), interval(1))
    lacking["diversity"] = {"ratios": {}, "fewest": 0}
    found = claim.claim(lacking, FIT)
    assert met(found) == [True, None, None]
    assert "diversity (distinct-2) against llama3-8b was not measured" in found["text"]


def test_an_independent_judge_decides_before_the_training_s_scorer() -> None:
    found = claim.claim(overall(interval(1.0), interval(0.8)), FIT)
    assert found["parts"][0] == {
        "what": "relevance (judge rubric) against llama3-8b",
        "interval": interval(0.8),
        "met": False,
    }


@pytest.mark.parametrize(("ratio", "verdict"), [(1.0, None), (0.94, None), (0.8, False)])
def test_what_the_student_was_trained_towards_can_be_missed_but_never_met(ratio: float, verdict: bool | None) -> None:
    for told, asked in ((FIT, None), ({}, interval(1))):  # a fit judge that was not asked here, or none
        found = claim.claim(overall(interval(ratio), asked), told)
        assert found["parts"][0]["what"].startswith("relevance (the scorer that made the training reward, ")
        assert (found["parts"][0]["met"], found["met"]) == (verdict, verdict)
        assert "relevance (the scorer that made the training reward, " in found["text"]
        assert ("can be missed, but not met" in found["text"]) is (verdict is None)
        assert "embedder" not in found["text"]


@pytest.mark.parametrize("flaw", [{"believable": False}, {"ratio": False}, {"of_teacher": True}])
def test_a_judge_that_is_not_fit_does_not_decide(flaw: dict[str, Any]) -> None:
    assert claim.judge_of_claim(FIT) == "rubric"
    assert claim.judge_of_claim({"rubric": {**RUBRIC, **flaw}}) is None
    better = {**RUBRIC, "auc": {"shuffled": 0.95}}
    assert claim.judge_of_claim({"rubric": RUBRIC, "better": better}) == "better"
    assert claim.judge_of_claim({"rubric": RUBRIC, "better": {**better, **flaw}}) == "rubric"


def test_the_claim_is_about_the_baselines_and_the_teacher() -> None:
    assert claim.others(["echo", "best-of-4", "llama3-8b", "shuffled", "student", "teacher"]) == ["llama3-8b", "teacher"]
    assert claim.others(["echo", "best-of-4", "student", "teacher"]) == ["teacher"]
    nothing = claim.claim(overall(interval(1), others=("echo",)), FIT)
    assert (nothing["met"], nothing["parts"]) == (None, [])
    both = overall(interval(1), interval(1), others=("llama3-8b", "qwen3-8b", "teacher"))
    found = claim.claim(both, FIT)
    assert (found["met"], len(found["parts"])) == (True, 9)
    assert "within 6% of llama3-8b, qwen3-8b and the teacher in" in found["text"]
    both["against"]["teacher"]["judges"] = {"rubric": {"ratio": interval(0.8)}}
    assert claim.claim(both, FIT)["met"] is False
    alone = claim.claim(overall(interval(1), interval(1), others=("teacher",)), FIT)
    assert "within 6% of the teacher (no baseline wrote) in" in alone["text"]


def computed(policies: tuple[str, ...], **changes: Any) -> list[dict[str, Any]]:
    table = outputs(policies={name: name for name in policies})
    rows = [{**r, **changes} if r["policy"] == "student" and r["task"] == "image_search" else r for r in table.to_pylist()]
    given: dict[str, Any] = {"tasks": [], "judges": {}, "pairwise": None, "training": None, "embed": None}
    return metrics.compute(type(table).from_pylist(rows, schema=table.schema), **given, bootstrap=100)["targets"]


def test_targets_say_met_missed_and_not_measured() -> None:
    assert [t["met"] for t in computed(("teacher", "student"))] == [True] * 6
    alone = computed(("student",))
    assert [t["met"] for t in alone] == [None, None, None, True, True, True]
    assert [t["measured"] for t in alone][:3] == ["-"] * 3
    bad = computed(("teacher", "student"), relevance=0.1, n_words=40)
    assert [t["met"] for t in bad] == [False, False, False, False, False, False]
    assert bad[2]["measured"] == "2 of 3 tasks; missed by image_search"
