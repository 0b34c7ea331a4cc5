"""Verdicts on the claim and the targets: met, missed or open."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from fakes.fake_evaluation import TASKS, areas, document, embed, interval, judge, outputs, row, table
from hypothesis import given
from hypothesis import strategies as st

from udrl.evaluate.document import (
    Claim,
    ClaimPart,
    DiversityRatios,
    Interval,
    JudgeProfile,
    Scope,
    Target,
)
from udrl.evaluate.metrics import claim
from udrl.evaluate.metrics import compute as metrics
from udrl.evaluate.metrics.control import reward_control
from udrl.evaluate.metrics.intervals import Bootstrap
from udrl.evaluate.outputs import columns

RUBRIC = judge(kind="rubric")
FIT = {"rubric": RUBRIC, "gated": judge(kind="gated", gold=areas(0.85))}
INTENTS = 40


def decide(overall: Scope, judges: dict[str, JudgeProfile], intents: int = INTENTS) -> Claim:
    return claim.decide_claim(overall, judges, intents)


def scope(
    relevance: Interval,
    rubric: Interval | None = None,
    diversity: Interval | None = None,
    rivals: tuple[str, ...] = ("llama3-8b",),
    fewest: int = 20,
) -> Scope:
    """All tasks together: the same ratios to each of ``rivals``; by both judges, the same, only if ``rubric`` is given."""
    whole = document(TASKS, dict.fromkeys(("student", *rivals), "baseline")).overall
    for comparison in whole.comparisons.values():
        comparison.relevance = relevance
        comparison.judges = {"rubric": rubric, "gated": rubric} if rubric else {}
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
    assert verdicts(decide(scope(interval(1), ratio, ratio), FIT)) == [verdict] * 4


@given(st.lists(st.sampled_from([0.8, 0.94, 0.99]), min_size=1, max_size=3))
def test_the_claim_is_met_by_all_parts_and_missed_by_one(ratios: list[float]) -> None:
    names = tuple(f"model-{i}" for i in range(len(ratios)))
    overall = scope(interval(1, 0), interval(1, 0), rivals=names)
    for name, ratio in zip(names, ratios, strict=True):
        overall.comparisons[name].judges["rubric"] = interval(ratio, 0)
        overall.comparisons[name].judges["gated"] = interval(1, 0)
    assert decide(overall, FIT).met is (min(ratios) >= claim.BOUND)


def test_diversity_counts_by_its_interval() -> None:
    decided = decide(scope(interval(1), interval(1), interval(0.9)), FIT)
    assert verdicts(decided) == [True, True, False, False]
    assert decided.met is False
    assert "diversity (Vendi) against llama3-8b is 90.0% [88.0%, 92.0%]" in decided.text
    assert "relevance (" not in decided.text  # only the parts that missed


@pytest.mark.parametrize("ratio", [0.5, 0.95, 2.0])
def test_diversity_of_few_prompts_decides_nothing(ratio: float) -> None:
    decided = decide(scope(interval(1), interval(1), interval(ratio, 0), fewest=19), FIT)
    assert (verdicts(decided), decided.met) == ([True, True, None, None], None)
    assert "diversity (Vendi, of 19 prompts only) against llama3-8b is " in decided.text


def test_a_policy_without_diversity_figures_leaves_the_claim_open() -> None:
    overall = scope(interval(1), interval(1), fewest=0)
    overall.diversity.ratios = {}
    decided = decide(overall, FIT)
    assert verdicts(decided) == [True, True, None, None]
    assert "diversity (distinct-2) against llama3-8b was not measured" in decided.text


def test_the_judges_with_the_best_worst_control_decide() -> None:
    blind = judge(gold=areas(0.99, echo=0.2))  # the best on most controls; an echo wins it
    assert claim.deciding_judges({"blind": blind, **FIT}) == ["rubric", "gated", "blind"]
    decided = decide(scope(interval(1.0), interval(0.8)), FIT)
    name = "relevance (judge rubric) against llama3-8b"
    assert decided.parts[0] == ClaimPart(name=name, interval=interval(0.8), met=False)


def test_two_judges_must_agree_that_the_claim_is_met_and_one_can_convict() -> None:
    overall = scope(interval(1), interval(1))
    assert decide(overall, FIT).met is True
    alone = decide(overall, {"rubric": RUBRIC})
    assert (alone.met, verdicts(alone)) == (None, [True, None, True, True])
    assert "1 judge is validated and independent; two must agree" in alone.text
    overall.comparisons["llama3-8b"].judges["gated"] = interval(0.8)
    assert decide(overall, FIT).met is False
    overall.comparisons["llama3-8b"].judges["gated"] = interval(0.95, 0.1)
    assert decide(overall, FIT).met is None


@pytest.mark.parametrize(("ratio", "verdict"), [(1.0, None), (0.94, None), (0.8, False)])
def test_the_scorer_of_the_training_can_miss_the_claim_but_never_meet_it(ratio: float, verdict: bool | None) -> None:
    decided = decide(scope(interval(ratio)), {})
    assert decided.parts[0].name == "relevance (the scorer that made the training reward) against llama3-8b"
    assert (decided.parts[0].met, decided.met) == (verdict, verdict)
    acquitted = decide(scope(interval(ratio), interval(1)), FIT)  # both judges say met
    assert acquitted.met is (verdict is None)


@pytest.mark.parametrize(
    "flaw",
    [{"validated": False}, {"ratio_scale": False}]
    + [{"relation": relation} for relation in ("scorer", "teacher", "teacher's family", "baseline")],
)
def test_a_judge_that_is_not_fit_does_not_decide(flaw: dict[str, Any]) -> None:
    sharper = {"kind": "rubric", "gold": areas(0.99)}
    assert claim.deciding_judges({"sharper": judge(**sharper), **FIT})[0] == "sharper"
    assert claim.deciding_judges({"sharper": judge(**sharper, **flaw), **FIT}) == ["rubric", "gated"]


@pytest.mark.parametrize("ratio", [0.5, 1.5])
def test_too_few_intents_decide_nothing_and_say_so(ratio: float) -> None:
    decided = decide(scope(interval(ratio), interval(ratio)), FIT, intents=19)
    assert decided.parts[0].met is decided.parts[1].met is None
    assert decided.met is None
    assert "Too few intents for a verdict: 19, at least 20 are needed." in decided.text


def test_the_claim_is_about_the_baselines_and_the_teacher() -> None:
    assert claim.rivals(["echo", "best-of-4", "llama3-8b", "shuffled", "student", "teacher"]) == ["llama3-8b", "teacher"]
    assert claim.rivals(["echo", "best-of-4", "student", "teacher"]) == ["teacher"]
    without_rival = decide(scope(interval(1), rivals=("echo",)), FIT)
    assert (without_rival.met, without_rival.parts) == (None, [])
    three = scope(interval(1), interval(1), rivals=("llama3-8b", "qwen3-8b", "teacher"))
    decided = decide(three, FIT)
    assert (decided.met, len(decided.parts)) == (True, 12)
    assert "within 6% of llama3-8b, qwen3-8b and the teacher in" in decided.text
    three.comparisons["teacher"].judges["rubric"] = interval(0.8)
    assert decide(three, FIT).met is False
    teacher_only = decide(scope(interval(1), interval(1), rivals=("teacher",)), FIT)
    assert "within 6% of the teacher (no baseline wrote) in" in teacher_only.text


def targets(policies: tuple[str, ...], intents: int = 80, **changes: Any) -> list[Target]:
    made_up = outputs(policies={name: name for name in policies}, intents=intents)
    rows = [{**r, **changes} if r["policy"] == "student" and r["task"] == "image_search" else r for r in made_up.to_pylist()]
    nothing: dict[str, Any] = {"judges": {}, "training": None, "embed": embed, "subject_words": {}}
    return metrics.compute(pa.Table.from_pylist(rows, schema=made_up.schema), **nothing, bootstrap=200).targets


def verdict_of(some: list[Target], words: str) -> bool | None:
    (target,) = [target for target in some if words in target.name]
    return target.met


def test_targets_are_met_missed_or_open_by_their_intervals() -> None:
    good = targets(("teacher", "student"))
    for words in ("over all tasks", "within two words", "achieved words rises", "relevance rises"):
        assert verdict_of(good, words) is True, words
    assert verdict_of(good, "from training") is None  # training is unknown
    without_teacher = targets(("student",))
    assert [t.measured for t in without_teacher if "teacher" in t.name] == ["-"] * 5
    assert verdict_of(without_teacher, "within two words") is True
    bad = targets(("teacher", "student"), relevance=0.1, n_words=40)
    (every,) = [target for target in bad if "relevance is at least" in target.name and "every task" in target.name]
    assert every.met is False
    assert "missed by image_search" in every.measured
    assert verdict_of(bad, "within two words") is False


def test_no_target_is_met_or_missed_with_too_few_intents() -> None:
    assert {target.met for target in targets(("teacher", "student"), intents=19)} == {None}


def test_a_student_without_control_does_not_meet_a_rising_curve() -> None:
    """By point estimates it would rise on one task in half of the runs."""
    rng = np.random.default_rng(0)
    met = 0
    for seed in range(40):
        rows = [
            row(intent=i, probe="reward", command_reward=level, relevance=float(rng.normal(0.5, 0.1)))
            for i in range(20)
            for level in (0, 4)
        ]
        met += reward_control(columns(table(*rows)), Bootstrap(200, seed)).rises is True
    assert met <= 4  # about one in forty
