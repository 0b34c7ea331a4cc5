"""Rounds with real training: a tiny student explores through vLLM, is scored and retrained; a dull round is refused."""

import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from fakes.fake_vocabulary import fit_to
from ray import cloudpickle

from benchmarks.dummy_engine import DummyEngine
from udrl import storage, tokenizer
from udrl.commands import CommandVocabulary
from udrl.errors import UserError
from udrl.hashing import stable_id
from udrl.policies.actor import EMPTY_ANSWER
from udrl.policies.ledger import list_parts
from udrl.policies.policy import Row
from udrl.recipe import Recipe
from udrl.run import GenerateSummary, RoundRecord, RoundsSummary, Run, TrainingSummary
from udrl.train import stage
from udrl.train.fit import first_training, training_fingerprint

pytestmark = pytest.mark.usefixtures("local_ray")
# Ray's workers cannot import the module of the engine below.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

SUBJECTS = ["owl", "fox", "lynx", "otter", "heron"]


def recipe(run: str, **more: Any) -> Recipe:
    values: dict[str, Any] = {
        "name": "tiny",
        "storage": run,
        "tasks": ["text_to_image", "image_search"],
        "intents": {"limit": 10},
        "student": {"depth": 2, "width": 128, "vocab_size": 500, "context": 64},
        "train": {"epochs": 12, "batch_tokens": 512, "checkpoint_every": 100, "sample_intents": 0},
        "explore": {"samples": 2, "epochs": 1, "sampling": {"temperature": 1.0, "max_tokens": 24}, **more.pop("explore", {})},
        "evaluate": {"lengths": [6, 10]},
    }
    return Recipe.model_validate(values | more)


@pytest.fixture
def run(run_with_episodes: str) -> str:
    """Add the training intents that the run's generate stage would have left; return the run's storage."""
    paths = Run(run_with_episodes)
    texts = [f"poster of a {SUBJECTS[i % 5]} {i % 3} {i // 2}" for i in range(40)]
    table = pa.table({"intent_id": [stable_id(t) for t in texts], "intent": texts, "subject": texts})
    storage.write_table(paths.intents("here").train, table)
    summary = GenerateSummary.load(paths.generate_summary)
    summary.model_copy(update={"intents": "here", "requested": 300}).save(paths.generate_summary)
    return run_with_episodes


def rows(*folders: str) -> list[Row]:
    return [row for folder in folders for part in storage.iter_tables(folder) for row in part.to_pylist()]


def forbid_training(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.train.torch import TorchTrainer

    def start(*_: object, **__: object) -> None:
        raise AssertionError("a training was started")

    monkeypatch.setattr(TorchTrainer, "fit", start)


def count_attempts(run: str) -> int:
    """Count how often an engine was started for a ledger of the run."""
    return len(list(Path(run).rglob("attempts/*.json")))


def test_a_round_explores_under_commands_and_trains_on_the_buffer(
    run: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    without_rounds = stage.run(recipe(run)).training
    result = stage.run(recipe(run, rounds=1))
    paths = Run(run)
    # The student of the run without rounds is round 0's.
    assert TrainingSummary.load(paths.round(0).student.training).fingerprint == without_rounds.fingerprint

    # Every request is an episode or a reject, once.
    record, scoring = RoundRecord.load(paths.round(1).record), paths.round(1).scoring
    assert record == result.rounds[1]
    accepted, rejected = rows(scoring.episodes), rows(scoring.rejects)
    both = accepted + rejected
    assert record.requested == 40 * 2 * 2 == len({row["episode_id"] for row in both}) == len(both)
    assert (record.accepted, record.rejected) == (len(accepted), len(rejected))
    assert Counter(row["reason"] for row in rejected) == record.reasons
    assert accepted
    assert {(row["policy"], row["round"]) for row in both} == {("student", 1)}
    assert set(Counter(row["intent_id"] for row in both).values()) == {4}

    # Commands: lengths of the teacher's best prompts, rewards from their mean upwards.
    teacher = pa.concat_tables(list(storage.iter_tables(paths.scoring.episodes)))
    vocabulary = CommandVocabulary.load(paths.round(0).student.folder)
    for task in vocabulary.tasks:
        of_task = teacher.filter(pc.equal(teacher.column("task"), task))
        rewards, words = (of_task.column(name).to_numpy() for name in ("reward", "n_words"))
        is_best = rewards >= np.quantile(rewards, 0.69)
        commanded = [row for row in both if row["task"] == task]
        assert {row["command_words"] for row in commanded} <= set(words[is_best].tolist())
        assert len({row["command_words"] for row in commanded}) > 3
        assert {row["command_reward"] for row in commanded} == {vocabulary.reward_bins - 1}

    # The next student is trained on the episodes of both rounds, and is the run's.
    vocabulary = CommandVocabulary.load(paths.student.folder)
    assert sum(sum(task.counts) for task in vocabulary.tasks.values()) == 240 + len(accepted)
    assert TrainingSummary.load(paths.student.training) == result.training
    assert result.training.fingerprint != without_rounds.fingerprint
    students = [paths.round(0).student, paths.round(1).student, paths.student]
    weights = [storage.read_bytes(storage.join(student.folder, "model.safetensors")) for student in students]
    assert weights[0] != weights[1] == weights[2]
    assert "not trained" not in stage.describe(result)

    forbid_training(monkeypatch)
    capsys.readouterr()
    attempts = count_attempts(run)
    assert attempts
    assert stage.run(recipe(run, rounds=1)) == result
    assert count_attempts(run) == attempts
    assert "already explored and scored" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"samples: 2 -> 1"):
        stage.run(recipe(run, rounds=1, explore={"samples": 1}))


class DullEngine(DummyEngine):
    """Writes one of three sentences for every request."""

    async def answer(self, row: Row) -> Row:
        texts = [
            "soft light on a quiet forest path",
            "a bold poster with warm paper texture",
            "wide shot of the blue night sky",
        ]
        return {**EMPTY_ANSWER, "completion": texts[row["episode_id"] % 3], "finish_reason": "stop", "output_tokens": 9}


def fake_first_student(settings: Recipe) -> str:
    """Export round 0's student without weights, as far as a fake engine needs it; return its fingerprint."""
    student = Run(settings.storage).round(0).student
    first = first_training(settings, student.folder)
    table = pa.concat_tables(list(storage.iter_tables(first.sources[0].folder)))
    columns = {name: table.column(name).to_numpy() for name in ("task", "intent_id", "n_words", "reward", "relevance")}
    vocabulary = fit_to(settings.tasks, columns, max_words=40)
    os.makedirs(student.folder)
    tokenizer.train_tokenizer(table.column("prompt").to_pylist(), vocabulary, 500).save_pretrained(student.folder)
    vocabulary.save(student.folder)
    storage.write_json(student.config, {"n_positions": 64})
    fingerprint = training_fingerprint(settings, first)
    TrainingSummary(fingerprint=fingerprint, weights="none", history=[(1, 1.0)]).save(student.training)
    return fingerprint


def test_a_dull_round_is_not_trained_on_and_a_killed_one_resumes(
    run: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Near-duplicates would reject most prompts; without them only the diversity guard is left.
    settings = recipe(run, rounds=2, explore={"samples": 4}, rewards={"deduplicate": {"near": None}})
    fingerprint = fake_first_student(settings)
    result = stage.run(settings, engine_actor=DullEngine)
    paths = Run(run)
    record = RoundRecord.load(paths.round(1).record)
    assert record.accepted > 40
    assert "distinct word pairs" in record.refused
    assert f"not trained on: {record.refused}" in capsys.readouterr().err
    assert not storage.exists(paths.round(1).student.folder)
    assert not storage.exists(paths.round(2).folder)
    assert TrainingSummary.load(paths.student.training).fingerprint == fingerprint
    assert RoundsSummary.load(paths.rounds_summary).student == 0

    # The state that a driver leaves that is killed while the student explores: one file of completions is missing, and
    # everything that follows.
    (ledger,) = Path(paths.round(1).scoring.ledgers).iterdir()
    shards = list_parts(str(ledger))
    assert len(shards) > 1
    (ledger / shards[0][0]).unlink()
    for uri in [*paths.round(1).scoring.scored, paths.round(1).record]:
        storage.remove(uri)
    remaining = {name: (ledger / name).stat().st_mtime_ns for shard in list(shards)[1:] for name in shards[shard]}
    assert stage.run(settings, engine_actor=DullEngine).rounds == result.rounds
    assert list(list_parts(str(ledger))) == list(shards)
    assert {name: (ledger / name).stat().st_mtime_ns for name in remaining} == remaining

    forbid_training(monkeypatch)
    attempts = count_attempts(run)
    assert stage.run(settings).rounds == result.rounds
    assert count_attempts(run) == attempts
