"""``metrics.json`` as a typed document: unknown numbers, misspelled names, missing parts."""

import json
import math
from pathlib import Path

import pytest
from fakes import fake_evaluation as made_up
from pydantic import ValidationError

from udrl.errors import UserError
from udrl.evaluate.document import EvaluationDocument, Interval, JudgeProfile, PolicyProfile


def test_a_saved_document_loads_unchanged_and_ignores_keys_of_other_versions(tmp_path: Path) -> None:
    document, file = made_up.document(), tmp_path / "metrics.json"
    document.save(str(file))
    assert EvaluationDocument.load(str(file)) == document
    file.write_text(json.dumps({**json.loads(file.read_text()), "losses": [[1, 4.5]]}))
    assert EvaluationDocument.load(str(file)) == document


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    values = made_up.document().model_dump(mode="json")
    del values["tasks"]["image_search"]["reward"]
    (tmp_path / "metrics.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"metrics\.json: tasks\.image_search\.reward: Field required"):
        EvaluationDocument.load(str(tmp_path / "metrics.json"))


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
