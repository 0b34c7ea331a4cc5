"""The numbers of the document: what counts, against whom, and what is left open."""

import json
import math
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from evaluation_made_up import UNRELATED, outputs, row, table
from hypothesis import given, settings
from hypothesis import strategies as st

from udrl.evaluate.metrics import compute as metrics
from udrl.evaluate.outputs import OUTPUTS, PAIRWISE
from udrl.hashing import stable_id
from udrl.tasks import load_tasks

TASKS = load_tasks(["text_to_image", "text_to_template", "image_search"])
NATS = {"kind": "likelihood", "believable": True, "of_teacher": False, "auc": {"shuffled": 0.9}}
NATS |= {"ratio": True, "unrelated": UNRELATED}
WEAK = {**NATS, "believable": False, "ratio": False}


def compute(table: pa.Table, **given: Any) -> dict[str, Any]:
    defaults = {"tasks": TASKS, "judges": {}, "pairwise": None, "training": None, "embed": None, "bootstrap": 100, "seed": 0}
    return metrics.compute(table, **{**defaults, **given})


def test_a_rejected_output_counts_as_zero_and_for_a_judge_as_it_stands_in_the_table() -> None:
    found = compute(
        table(
            row(intent=0, policy="teacher", relevance=0.8, judge_x=2.0),
            row(intent=1, policy="teacher", relevance=None, prompt="", reason="echo", n_words=0, judge_x=-1.0),
            row(intent=0, policy="student", relevance=0.6, judge_x=1.0),
            row(intent=1, policy="student", relevance=0.9, prompt="", reason="truncated", n_words=7, judge_x=-1.0),
            row(intent=2, policy="student", relevance=0.3, judge_x=2.0),
            judges=("x",),
        ),
        judges={"x": {**NATS, "unrelated": -1.0}},
    )["tasks"]["text_to_image"]
    assert found["policies"]["teacher"]["relevance"]["value"] == pytest.approx(0.4)
    assert found["policies"]["student"]["relevance"]["value"] == pytest.approx(0.3)
    assert found["policies"]["student"]["judges"]["x"]["value"] == pytest.approx(2 / 3)
    assert found["policies"]["student"]["rejected"] == pytest.approx(1 / 3)
    against = found["against"]["teacher"]
    assert against["relevance"]["ratio"]["value"] == pytest.approx(0.75)
    assert against["relevance"]["ratio_accepted"]["value"] == pytest.approx(0.45 / 0.8)
    assert against["judges"]["x"]["difference"]["value"] == pytest.approx(2 / 3 - 1 / 2)


def judged(student: list[float], teacher: list[float], **facts: Any) -> dict[str, float]:
    """The ratio of a judge's means, an intent each."""
    rows = [
        row(intent=i, policy=p, judge_x=s) for p, v in (("student", student), ("teacher", teacher)) for i, s in enumerate(v)
    ]
    found = compute(table(*rows, judges=("x",)), judges={"x": {**NATS, **facts}})
    return found["overall"]["against"]["teacher"]["judges"]["x"]["ratio"]


def test_the_ratio_of_two_policies_is_of_what_a_judge_sees_above_unrelated_prompts() -> None:
    found = judged([0.5, 1.5, 2.5], [1.0, 2.0, 3.0], unrelated=-1.0)  # 1.5 + 1 over 2 + 1
    assert found["value"] == pytest.approx(2.5 / 3)
    assert 1.5 / 2 - 1e-6 <= found["low"] < found["value"] < found["high"] <= 3.5 / 4 + 1e-6  # paired: no intent has another
    assert judged([0.6, 0.6], [0.8, 0.8], unrelated=0.4)["value"] == pytest.approx(0.5)  # a cosine that is never near 0
    assert math.isnan(judged([0.6, 0.6], [0.8, 0.8], ratio=False)["value"])


def test_there_is_no_ratio_to_a_policy_that_is_not_surely_above_unrelated_prompts() -> None:
    assert math.isnan(judged([1.0] * 6, [0.3, -0.2, 0.2, -0.1, 0.1, -0.2], unrelated=0.0)["value"])
    assert math.isnan(judged([1.0] * 6, [-0.1] * 6, unrelated=0.0)["value"])
    assert judged([1.0] * 6, [0.5] * 6, unrelated=0.0)["value"] == pytest.approx(2)


def test_a_likelihood_judge_can_decide_the_claim() -> None:
    found = compute(outputs(intents=24), judges={"likelihood": NATS})["claim"]
    against = [part["what"] for part in found["parts"] if part["what"].startswith("relevance")]
    assert against == [f"relevance (judge likelihood) against {name}" for name in ("llama3-8b", "qwen3-8b", "teacher")]
    assert not any(math.isnan(part["interval"]["value"]) for part in found["parts"])


def test_the_claim_s_ratios_of_diversity_have_intervals_over_intents() -> None:
    found = compute(outputs(intents=40))
    for scope in (found["overall"], *found["tasks"].values()):
        assert set(scope["diversity"]["ratios"]) == {"teacher", "llama3-8b", "qwen3-8b"}
    figures = found["overall"]["diversity"]["policies"]
    for part in found["claim"]["parts"]:
        if part["what"].startswith("diversity (Vendi"):
            other = part["what"].split()[-1]
            interval = part["interval"]
            assert interval["value"] == pytest.approx(figures["student"]["vendi"] / figures[other]["vendi"])
            assert interval["low"] < interval["value"] < interval["high"]
            assert interval["high"] - interval["low"] < 0.3


def test_a_model_that_is_silent_on_one_task_has_no_ratio_of_diversity_over_all() -> None:
    rows = [
        {**r, "prompt": "", "reason": "empty"} if r["policy"] == "teacher" and r["task"] == "image_search" else r
        for r in outputs(intents=30).to_pylist()
    ]
    found = compute(table(*rows, judges=("likelihood",)))
    assert math.isnan(found["overall"]["diversity"]["ratios"]["teacher"]["vendi"]["value"])
    assert found["overall"]["diversity"]["ratios"]["llama3-8b"]["vendi"]["value"] > 0
    assert found["tasks"]["text_to_image"]["diversity"]["ratios"]["teacher"]["vendi"]["value"] > 0


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.floats(0, 0.5, width=32), min_size=1, max_size=10),
    st.lists(st.floats(0.625, 1, width=32), min_size=1, max_size=10),
)
def test_mixing_in_better_outputs_raises_the_mean_and_the_judge(worse: list[float], better: list[float]) -> None:
    def means(scores: list[float]) -> tuple[float, float]:
        rows = [row(intent=i, relevance=s, judge_x=s) for i, s in enumerate(scores)]
        found = compute(table(*rows, judges=("x",)))["overall"]["policies"]["student"]
        return found["relevance"]["value"], found["judges"]["x"]["value"]

    for before, after in zip(means(worse), means(worse + better), strict=True):
        assert after > before


def test_the_student_stands_against_every_other_policy() -> None:
    found = compute(outputs(judges=("nats", "weak")), judges={"nats": NATS, "weak": WEAK})
    for scope in (found["overall"], *found["tasks"].values()):
        assert set(scope["against"]) == set(scope["policies"]) - {"student"}
        for name, against in scope["against"].items():
            assert math.isnan(against["judges"]["weak"]["ratio"]["value"])
            if name != "shuffled":
                assert against["judges"]["nats"]["ratio"]["value"] > 0
    assert found["overall"]["against"]["echo"]["relevance"]["difference"]["high"] < 0
    assert found["overall"]["against"]["shuffled"]["relevance"]["difference"]["low"] > 0


def test_only_the_default_probe_tells_how_good_a_policy_is() -> None:
    rows = [row(relevance=0.5), row(probe="length", command_words=6, relevance=0.1)]
    rows += [row(probe="reach", command_words=40, relevance=0.0, prompt="", reason="empty", n_words=0)]
    found = compute(table(*rows))
    assert found["overall"]["policies"]["student"]["relevance"]["value"] == 0.5
    assert found["rejected"] == {"default": 0, "length": 0, "reach": 1, "reward": pytest.approx(math.nan, nan_ok=True)}
    assert [level["words"] for level in found["tasks"]["text_to_image"]["reach"]["levels"]] == [40]
    assert found["overall"]["length"]["n"] == 1


def pair(intent: int, first: float | None, second: float | None, **values: Any) -> dict[str, Any]:
    fixed = {"judge": "p", "task": "text_to_image", "policy": "student", "other": "teacher", "variation": 0, "parsed": True}
    return {**fixed, "intent_id": stable_id(intent), "first": first, "second": second, **values}


def test_a_pairwise_judge_s_preference_is_the_mean_of_both_orders() -> None:
    rows = [row(intent=i, policy=p) for i in range(4) for p in ("student", "teacher")]
    rows[6] |= {"prompt": "", "reason": "echo"}  # the student's for the last intent: settled without the judge
    said = [pair(0, 0.9, 0.7), pair(1, 0.8, 0.2), pair(2, 0.9, 0.9, parsed=False), pair(3, 0.0, 0.0)]
    found = compute(table(*rows), pairwise=pa.Table.from_pylist(said, schema=PAIRWISE))["overall"]["against"]["teacher"]
    told = found["pairwise"]["p"]
    assert told["preferred"]["value"] == pytest.approx((0.8 + 0.5 + 0.0) / 3)
    assert (told["n"], told["settled"]) == (3, 1)
    assert told["position_bias"] == pytest.approx((0.2 + 0.6) / 2)
    assert told["consistent"] == 0.5


def test_a_policy_with_one_draw_is_settled_by_that_draw() -> None:
    rows = [row(variation=v) for v in range(2)]
    rows.append(row(policy="best-of-2", prompt="", reason="echo"))
    said = [pair(0, 1.0, 1.0, other="best-of-2", variation=v) for v in range(2)]
    found = compute(table(*rows), pairwise=pa.Table.from_pylist(said, schema=PAIRWISE))
    told = found["overall"]["against"]["best-of-2"]["pairwise"]["p"]
    assert (told["n"], told["settled"]) == (2, 2)
    assert math.isnan(told["consistent"])


def test_rejections_alone_are_no_preference_of_a_judge() -> None:
    rows = [row(intent=i, policy=p) for i in range(3) for p in ("student", "teacher")]
    rows[5] |= {"prompt": "", "reason": "echo"}
    said = [pair(0, 0.9, 0.9, parsed=False), pair(1, None, None, parsed=False), pair(2, 1.0, 1.0)]
    found = compute(table(*rows), pairwise=pa.Table.from_pylist(said, schema=PAIRWISE))["overall"]["against"]["teacher"]
    told = found["pairwise"]["p"]
    assert all(math.isnan(value) for value in told["preferred"].values())
    assert (told["n"], told["settled"]) == (1, 1)


def test_training_is_read_once_for_what_is_copied_and_for_what_is_recognised() -> None:
    prompts = [f"{word} owl {i} {word} light {word}" for word in ("paint", "plan", "find") for i in range(20)]
    names = [task.name for task in TASKS for _ in range(20)]
    rows = [row(name, i, prompt=prompt, n_words=6) for i, (name, prompt) in enumerate(zip(names, prompts, strict=True))]
    parts = iter([pa.table({"task": names, "prompt": prompts, "policy": ["teacher"] * 60})])
    found = compute(table(*rows), training=parts)
    assert found["novelty"] == {
        "training": 60,
        "policies": {"student": {"exact": 1, "copied_5": 1, "copied_8": pytest.approx(math.nan, nan_ok=True)}},
    }
    accuracy = found["overall"]["accuracy"]
    assert (accuracy["classifier"]["n"], accuracy["classifier"]["policies"]["student"]) == (60, 1)
    image = found["tasks"]["text_to_image"]["accuracy"]
    assert (image["classifier"]["policies"]["student"], image["format"]["policies"]["student"]) == (1, 1)


def test_the_same_outputs_give_the_same_numbers() -> None:
    def embed(texts: list[str]) -> np.ndarray:
        vectors = np.array([[1 + len(set(text)), len(text), text.count("a")] for text in texts], dtype=float)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    one, two = (json.dumps(compute(outputs(), judges={"likelihood": NATS}, embed=embed)) for _ in range(2))
    assert one == two  # plain JSON it is, too


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
def test_missing_policies_and_probes_leave_the_shape_of_the_document(table: pa.Table) -> None:
    found = compute(table)
    assert found["rows"] == table.num_rows
    parts = {"policies", "against", "diversity", "length", "reach", "accuracy"}
    assert set(found["overall"]) == parts
    assert all(set(scope) == {*parts, "reward"} for scope in found["tasks"].values())
    assert found["claim"]["met"] is None or found["claim"]["parts"]
    json.dumps(found)
