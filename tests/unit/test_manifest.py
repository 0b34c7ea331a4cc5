"""A folder keeps its rows as long as their inputs are the same, also if an earlier version wrote its manifest."""

from pathlib import Path

import pytest

from udrl import storage
from udrl.run import Manifest

INPUTS = {"rules": 2, "ledger": "b70d", "known": [], "deduplicate": {"near": 0.8, "false_positives": 1e-05}}
MANIFEST = Manifest.of(INPUTS)


@pytest.fixture
def folder(tmp_path: Path) -> str:
    storage.write_bytes(str(tmp_path / "rows"), b"x")
    return str(tmp_path)


@pytest.mark.parametrize("old", [INPUTS, {**INPUTS, "fingerprint": MANIFEST.fingerprint}])
def test_a_folder_of_an_earlier_version_is_accepted_unchanged(folder: str, old: dict[str, object]) -> None:
    storage.write_json(storage.join(folder, "about.json"), old)
    assert Manifest.load_from(folder) == MANIFEST
    MANIFEST.claim(folder)
    assert storage.list_files(folder) == ["about.json", "rows"]


def test_a_folder_with_the_same_inputs_keeps_its_rows(folder: str) -> None:
    MANIFEST.save_to(folder)
    MANIFEST.claim(folder)
    assert storage.list_files(folder) == ["manifest.json", "rows"]


@pytest.mark.parametrize("name", ["about.json", "manifest.json", None])
def test_a_folder_with_other_inputs_is_cleared(folder: str, name: str | None) -> None:
    other = Manifest.of({**INPUTS, "rules": 1})
    if name:
        storage.write_json(storage.join(folder, name), other.inputs if name == "about.json" else other.model_dump())
    assert not MANIFEST.matches(folder)
    MANIFEST.claim(folder)
    assert storage.list_files(folder) == ["manifest.json"]
    assert MANIFEST.matches(folder)
