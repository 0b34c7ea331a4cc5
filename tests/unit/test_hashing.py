"""Ids and fingerprints name folders and rows of existing runs, so their values must never change."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from udrl.hashing import differences, fingerprint, fingerprint_of_bytes, stable_id

JSON_KEYS = st.text(st.characters(codec="utf-8"), max_size=5)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(JSON_KEYS, inner, max_size=4),
    max_leaves=10,
)
INPUTS = st.dictionaries(JSON_KEYS, VALUES, max_size=4)


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        (("",), 8238016292129134938),
        (("run",), 9053790667580588490),
        (("a red fox",), 2024877603437203571),
        (("a", 1), 4665976284724862560),
        (("a", "b"), 8945880261400226312),
        (("größe", "狐"), 5547900252473729938),
        (("lone \ud800",), 5993792421469627907),
        (("quickstart", "text_to_image", 7, 0, 0), 423908573839738596),
    ],
)
def test_ids_have_the_values_of_earlier_versions(parts: tuple[object, ...], expected: int) -> None:
    assert stable_id(*parts) == expected


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        ({}, "44136fa355b3678a"),
        (["x", 1], "38e37cb98808b9cc"),
        ({"b": 1, "a": [1, 2.5, None, True]}, "8e2ab7c9e0c74ca1"),
        ({"deduplicate": {"false_positives": 1e-05, "near": 0.8}, "text": "größe"}, "2fbfa3f66667e286"),
    ],
)
def test_fingerprints_have_the_values_of_earlier_versions(inputs: Any, expected: str) -> None:
    assert fingerprint(inputs) == expected


def test_streamed_content_and_files_have_the_fingerprints_of_earlier_versions() -> None:
    # Earlier versions hashed json + content, and a file's bytes, with SHA-256 and kept 16 digits.
    assert fingerprint([1], ["a", "b"]) == fingerprint([1], ["ab"]) == fingerprint_of_bytes(b"[1]ab")
    assert fingerprint_of_bytes(b"") == "e3b0c44298fc1c14"


@given(st.lists(st.integers() | st.text(), max_size=5))
def test_an_id_has_63_bits(parts: list[object]) -> None:
    assert 0 <= stable_id(*parts) < 2**63


@given(INPUTS)
def test_a_fingerprint_survives_json_and_any_order_of_keys(inputs: dict[str, Any]) -> None:
    reordered = dict(reversed(list(json.loads(json.dumps(inputs)).items())))
    assert fingerprint(reordered) == fingerprint(inputs)
    assert len(fingerprint(inputs)) == 16


@given(INPUTS, st.sampled_from(["a", "seed"]))
def test_only_changed_inputs_have_differences(inputs: dict[str, Any], key: str) -> None:
    assert differences(inputs, inputs) == []
    assert differences({**inputs, key: 1}, {**inputs, key: 2}) == [f"{key}: 1 -> 2"]


def test_a_difference_names_the_key_and_both_values() -> None:
    old = {"teacher": {"sampling": {"top_k": 0, "stop": ["a", "b"]}}, "seed": 1}
    new = {"teacher": {"sampling": {"top_k": 40, "stop": ["a", "c"]}}, "seed": 1, "samples": 2}
    assert differences(old, new) == [
        "teacher.sampling.top_k: 0 -> 40",
        "teacher.sampling.stop.1: b -> c",
        "samples: None -> 2",
    ]
