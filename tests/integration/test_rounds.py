"""Rounds for real: a tiny student explores through vLLM, is scored and retrained; a round that goes wrong is left out."""

import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from fakes.vocabularies import fit_to
from ray import cloudpickle

from benchmarks.dummy_engine import DummyEngine
from udrl import storage, tokenizer
from udrl.commands import CommandVocabulary
from udrl.errors import UserError
from udrl.hashing import stable_id
from udrl.policies import stage as engine
from udrl.policies.actor import EMPTY_ANSWER
from udrl.policies.ledger import list_parts
from udrl.policies.policy import Row
from udrl.recipe import Recipe
from udrl.train import fit as train
from udrl.train import stage as rounds

pytestmark = pytest.mark.usefixtures("local_ray")
# The engine below travels to Ray's workers, which know no module of the tests.
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
    """The run's storage, with the training intents that its generate stage would have left."""
    texts = [f"poster of a {SUBJECTS[i % 5]} {i % 3} {i // 2}" for i in range(40)]
    table = pa.table({"intent_id": [stable_id(t) for t in texts], "intent": texts, "subject": texts})
    storage.write_table(storage.join(run_with_episodes, "intents", "here", "train.parquet"), table)
    summary = storage.join(run_with_episodes, "generate.json")
    storage.write_json(summary, {**storage.read_json(summary), "intents": "here", "requested": 300})
    return run_with_episodes


def rows(*folders: str) -> list[Row]:
    return [row for folder in folders for part in storage.iter_tables(folder) for row in part.to_pylist()]


def start_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.train.torch import TorchTrainer

    def started(*_: object, **__: object) -> None:
        raise AssertionError("an engine or a training was started")

    monkeypatch.setattr(engine, "_dataset", started)
    monkeypatch.setattr(TorchTrainer, "fit", started)


def test_a_round_explores_under_commands_and_learns_from_the_buffer(
    run: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = train.run(recipe(run))
    facts = rounds.run(recipe(run, rounds=1))
    first, second = storage.join(run, "rounds", "0"), storage.join(run, "rounds", "1")
    # The student of the run without rounds is round 0's.
    assert storage.read_json(storage.join(first, "student", "training.json"))["fingerprint"] == before["fingerprint"]

    # Every request is an episode or a reject, once.
    told = storage.read_json(storage.join(second, "round.json"))
    good, bad = (rows(storage.join(second, name)) for name in ("episodes", "rejects"))
    assert told["requested"] == 40 * 2 * 2 == len({r["episode_id"] for r in good + bad}) == len(good) + len(bad)
    assert (told["accepted"], told["rejected"]) == (len(good), len(bad))
    assert Counter(r["reason"] for r in bad) == told["reasons"]
    assert good
    assert {(r["policy"], r["round"]) for r in good + bad} == {("student", 1)}
    assert set(Counter(r["intent_id"] for r in good + bad).values()) == {4}

    # Commands: lengths that the best teacher's prompts had, rewards from their mean upwards.
    teacher = pa.concat_tables(list(storage.iter_tables(storage.join(run, "episodes"))))
    vocabulary = CommandVocabulary.load(storage.join(first, "student"))
    for task in vocabulary.tasks:
        mine = teacher.filter(pc.equal(teacher.column("task"), task))
        rewards, words = (mine.column(name).to_numpy() for name in ("reward", "n_words"))
        best = rewards >= np.quantile(rewards, 0.69)
        asked = [r for r in good + bad if r["task"] == task]
        assert {r["command_words"] for r in asked} <= set(words[best].tolist())
        assert len({r["command_words"] for r in asked}) > 3
        assert {r["command_reward"] for r in asked} == {vocabulary.reward_bins - 1}

    # The next student learnt from both rounds, and is the one that is served.
    learnt = CommandVocabulary.load(storage.join(run, "student"))
    assert sum(sum(t.counts) for t in learnt.tasks.values()) == 240 + len(good)
    exported = storage.read_json(storage.join(run, "student", "training.json"))
    assert exported["fingerprint"] == facts["fingerprint"] != before["fingerprint"]
    weights = [storage.read_bytes(storage.join(u, "student", "model.safetensors")) for u in (first, second, run)]
    assert weights[0] != weights[1] == weights[2]
    assert "not trained" not in rounds.describe(facts)

    start_nothing(monkeypatch)
    capsys.readouterr()
    again = rounds.run(recipe(run, rounds=1))
    assert again == facts
    assert "explored and scored already" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"samples: 2 -> 1"):
        rounds.run(recipe(run, rounds=1, explore={"samples": 1}))


class Dull(DummyEngine):
    """Writes one of three sentences, whatever it is asked."""

    async def answer(self, row: Row) -> Row:
        said = ["soft light on a quiet forest path", "a bold poster with warm paper texture", "wide shot of the blue night sky"]
        return {**EMPTY_ANSWER, "completion": said[row["episode_id"] % 3], "finish_reason": "stop", "output_tokens": 9}


def pretend_a_student(settings: Recipe) -> str:
    """Round 0's student without weights: what a stand-in for the engine needs of it, and the mark of a finished training."""
    first = train.first(settings, storage.join(settings.storage, "rounds", "0", "student"))
    table = pa.concat_tables(list(storage.iter_tables(first.sources[0].folder)))
    columns = {name: table.column(name).to_numpy() for name in ("task", "intent_id", "n_words", "reward", "relevance")}
    vocabulary = fit_to(settings.tasks, columns, max_words=40)
    os.makedirs(first.target)
    tokenizer.train(table.column("prompt").to_pylist(), vocabulary, 500).save_pretrained(first.target)
    vocabulary.save(first.target)
    storage.write_json(storage.join(first.target, "config.json"), {"n_positions": 64})
    mark = train.fingerprint(settings, first)
    storage.write_json(storage.join(first.target, "training.json"), {"fingerprint": mark})
    return mark


def test_a_dull_round_is_not_trained_on_and_a_killed_one_goes_on(
    run: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Near-duplicates would reject most of it: here the guard is what is left.
    settings = recipe(run, rounds=2, explore={"samples": 4}, rewards={"deduplicate": {"near": None}})
    mark = pretend_a_student(settings)
    facts = rounds.run(settings, engine_actor=Dull)
    told = storage.read_json(storage.join(run, "rounds", "1", "round.json"))
    assert told["accepted"] > 40
    assert "distinct word pairs" in told["refused"]
    assert f"not trained on: {told['refused']}" in capsys.readouterr().err
    assert not storage.exists(storage.join(run, "rounds", "1", "student"))
    assert not storage.exists(storage.join(run, "rounds", "2"))
    assert storage.read_json(storage.join(run, "student", "training.json"))["fingerprint"] == mark
    assert storage.read_json(storage.join(run, "rounds.json"))["student"] == 0

    # As a driver leaves it that was killed while it explored: one file is missing, and all that follows.
    (ledger,) = (Path(run) / "rounds" / "1" / "completions").iterdir()
    shards = list_parts(str(ledger))
    assert len(shards) > 1
    (ledger / shards[0][0]).unlink()
    for name in ("filtered", "relevance", "episodes", "rejects", "round.json"):
        storage.remove(storage.join(run, "rounds", "1", name))
    kept = {name: (ledger / name).stat().st_mtime_ns for shard in list(shards)[1:] for name in shards[shard]}
    assert rounds.run(settings, engine_actor=Dull)["rounds"] == facts["rounds"]
    assert list(list_parts(str(ledger))) == list(shards)
    assert {name: (ledger / name).stat().st_mtime_ns for name in kept} == kept

    start_nothing(monkeypatch)
    assert rounds.run(settings)["rounds"] == facts["rounds"]
