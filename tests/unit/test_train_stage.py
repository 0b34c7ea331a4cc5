"""The train stage's plan of a round, and the copy of a student."""

from pathlib import Path
from typing import Any

import pytest

from udrl import storage
from udrl.errors import UserError
from udrl.recipe import Recipe
from udrl.run import EpisodeSource, GenerateSummary, RoundRecord, RoundsSummary, Run, StudentPaths, TrainingSummary
from udrl.train import stage
from udrl.train.fit import first_training, training_fingerprint

VALUES = {"name": "x", "storage": "run", "tasks": ["text_to_image", "image_search"], "intents": {"limit": 10}, "rounds": 1}


def test_a_copied_student_is_complete(tmp_path: Path) -> None:
    source, target = StudentPaths(str(tmp_path / "a")), StudentPaths(str(tmp_path / "b"))
    for name in ("model.safetensors", "training.json", "zebra.json"):
        storage.write_bytes(storage.join(source.folder, name), name.encode())
    storage.write_bytes(storage.join(target.folder, "stale.json"), b"")
    stage.copy_student(source, target)
    assert storage.list_files(target.folder) == storage.list_files(source.folder)
    assert storage.read_bytes(target.training) == b"training.json"


@pytest.mark.parametrize("objective", ["sft", "sft_top"])
def test_rounds_need_a_student_that_follows_commands(objective: str) -> None:
    with pytest.raises(UserError, match=r"train\.objective=udrl"):
        stage.run(Recipe.model_validate({**VALUES, "train": {"objective": objective}}))


def test_the_fingerprint_of_a_retraining_is_that_of_earlier_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another fingerprint would train existing runs again; computed with the version of 2026-11-24."""
    monkeypatch.chdir(tmp_path)
    recipe, run = Recipe.model_validate({**VALUES, "explore": {"intents": 70}}), Run("run")
    GenerateSummary(ledger="l", scoring="s", accepted=5, requested=9).save(run.generate_summary)
    first = first_training(recipe, run.round(0).student.folder)
    assert training_fingerprint(recipe, first) == "e6f2463d310faf87"
    rounds = [
        RoundRecord(round=0, origin="a", accepted=5),
        RoundRecord(round=1, origin="b", accepted=7, keep=0.5),
    ]
    retraining = stage.plan_retraining(recipe, first, rounds, TrainingSummary(fingerprint="f"))
    assert retraining.sources == (
        EpisodeSource(folder="run/episodes"),
        EpisodeSource(folder="run/rounds/1/episodes", keep=0.5),
    )
    assert (retraining.start, retraining.target) == ("run/rounds/0/student", "run/rounds/1/student")
    assert training_fingerprint(stage.with_retraining_settings(recipe), retraining) == "5e5e86dbbcaa8ac3"


def test_round_records_of_earlier_versions_load(tmp_path: Path) -> None:
    """These are records as the version of 2026-11-24 wrote them."""
    zero: dict[str, Any] = {"round": 0, "origin": "a", "requested": None, "accepted": 5, "refused": ""}
    zero["achieved"] = {"paint": {"episodes": 5, "mean": 0.5, "sd": 0.1}}
    commands = {"requests": 8, "mean_words": 9.5, "reward_bins": {"4": 8}, "words_off": None, "within_2": None}
    diversity = {"n": 4, "words": 6, "distinct_2": [0.9, 0.8], "compression": [1.5, 1.6], "ratio": 0.89}
    one = {
        **{"round": 1, "origin": "b", "ledger": "c", "student": "d", "requested": 8, "accepted": 7, "rejected": 1},
        **{"reasons": {"echo": 1}, "commands": {"paint": commands}, "achieved": zero["achieved"]},
        **{"before": zero["achieved"], "diversity": {"paint": diversity}, "keep": 0.5, "refused": ""},
    }
    storage.write_json(str(tmp_path / "rounds.json"), {"rounds": [zero, one], "student": 1})
    summary = RoundsSummary.load(str(tmp_path / "rounds.json"))
    assert [record.accepted for record in summary.rounds] == [5, 7]
    assert summary.rounds[1].model_dump(mode="json") == one
