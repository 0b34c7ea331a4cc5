"""The verdicts: what is met, what is missed, and what the numbers leave open."""

import math
from typing import Any

import pytest
from evaluation_made_up import interval, outputs
from hypothesis import given
from hypothesis import strategies as st

from udrl.evaluation import claim, metrics

RUBRIC = {"ratio": True, "believable": True, "of_teacher": False, "auc": {"shuffled": 0.9}}
FIT = {"rubric": RUBRIC}


def overall(relevance: dict, rubric: dict | None = None, varied: float = 1.0, others: tuple[str, ...] = ("llama3-8b",)) -> dict:
    judges = {"rubric": {"ratio": rubric}} if rubric else {}
    figures = {"distinct_2": 0.5, "vendi": 40.0}
    return {
        "policies": dict.fromkeys(("student", *others)),
        "against": {name: {"relevance": {"ratio": relevance}, "judges": judges} for name in others},
        "diversity": {
            "policies": {**dict.fromkeys(others, figures), "student": {name: varied * f for name, f in figures.items()}}
        },
    }


@pytest.mark.parametrize(
    ("ratio", "met"),
    [
        (interval(0.97, 0.02), True),
        ({"value": 0.95, "low": 0.94, "high": 0.96}, True),
        (interval(0.96, 0.03), None),
        (interval(0.93, 0.03), None),
        (interval(0.9, 0.02), False),
        (interval(math.nan), None),
    ],
)
def test_the_whole_interval_decides(ratio: dict[str, float], met: bool | None) -> None:
    assert claim.claim(overall(ratio), {})["parts"][0]["met"] is met


@given(st.lists(st.sampled_from([0.8, 0.94, 0.99]), min_size=1, max_size=3))
def test_the_claim_is_met_by_all_parts_and_missed_by_one(ratios: list[float]) -> None:
    names = tuple(f"model-{i}" for i in range(len(ratios)))
    found = overall(interval(1, 0), others=names)
    for name, ratio in zip(names, ratios, strict=True):
        found["against"][name]["relevance"] = {"ratio": interval(ratio, 0)}
    assert claim.claim(found, {})["met"] is (min(ratios) >= claim.BOUND)


def test_diversity_counts_by_its_value() -> None:
    found = claim.claim(overall(interval(1), varied=0.9), {})
    assert [(part["interval"]["value"], part["met"]) for part in found["parts"][1:]] == [(pytest.approx(0.9), False)] * 2
    assert found["met"] is False
    assert "diversity (Vendi) against llama3-8b is 90.0%" in found["text"]
    assert "relevance (" not in found["text"]  # only what missed


def test_an_independent_judge_decides_before_the_training_s_embedder() -> None:
    found = claim.claim(overall(interval(1.0), interval(0.8)), FIT)
    assert found["parts"][0] == {
        "what": "relevance (judge rubric) against llama3-8b",
        "interval": interval(0.8),
        "met": False,
    }
    without = claim.claim(overall(interval(1.0), interval(0.8)), {})
    assert without["parts"][0]["what"].startswith("relevance (the training's own embedder")
    assert without["parts"][0]["met"] is True


@pytest.mark.parametrize("flaw", [{"believable": False}, {"ratio": False}, {"of_teacher": True}])
def test_a_judge_that_is_not_fit_does_not_decide(flaw: dict[str, Any]) -> None:
    assert claim.judge_of_claim(FIT) == "rubric"
    assert claim.judge_of_claim({"rubric": {**RUBRIC, **flaw}}) is None
    better = {**RUBRIC, "auc": {"shuffled": 0.95}}
    assert claim.judge_of_claim({"rubric": RUBRIC, "better": better}) == "better"
    assert claim.judge_of_claim({"rubric": RUBRIC, "better": {**better, **flaw}}) == "rubric"


def test_the_claim_is_about_baselines_or_without_any_about_the_teacher() -> None:
    assert claim.others(["echo", "best-of-4", "llama3-8b", "shuffled", "student", "teacher"]) == ["llama3-8b"]
    assert claim.others(["echo", "best-of-4", "student", "teacher"]) == ["teacher"]
    nothing = claim.claim(overall(interval(1), others=("echo",)), FIT)
    assert (nothing["met"], nothing["parts"]) == (None, [])
    assert claim.claim(overall(interval(1), others=("teacher",)), FIT)["met"] is True


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
