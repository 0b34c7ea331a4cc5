"""Generation for real: Ray Data, vLLM, the bundled teacher; a user's own task and intents; resume."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from udrl import storage
from udrl.episodes import EPISODES, iter_tables
from udrl.errors import UserError
from udrl.policies import engine, generate
from udrl.recipe import Recipe

pytestmark = pytest.mark.usefixtures("local_ray")

MUSIC = """
name: music_search
title: Music search
instruction: Each intent is followed by a short query for a music library.
label: Query
examples:
  - {intent: song for a slow morning, prompt: calm acoustic guitar morning instrumental}
  - {intent: party for my daughter, prompt: upbeat kids pop dance party}
  - {intent: rainy day reading, prompt: soft piano jazz rain ambience}
format: {min_words: 2, max_words: 14}
"""


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A fifth task by one YAML file and intents by one JSONL file, two of them unusable."""
    folder = tmp_path_factory.mktemp("generate")
    (folder / "music.yaml").write_text(MUSIC)
    intents = ["birthday song for a dinosaur fan", "music for a long train ride", "", "songs for baking bread", None]
    (folder / "intents.jsonl").write_text("".join(json.dumps({"q": text}) + "\n" for text in intents))
    values = {
        "name": "music",
        "storage": str(folder / "run"),
        "tasks": [str(folder / "music.yaml"), "image_search"],
        "intents": {"source": str(folder / "intents.jsonl"), "column": "q", "heldout": 0},
        "teacher": {"samples": 2, "shard_size": 4, "sampling": {"max_tokens": 24}, "engine": {"max_num_seqs": 8}},
        "evaluate": {"lengths": [6]},
    }
    return {"values": values, "summary": generate.run(Recipe.model_validate(values))}


def run(setup: dict[str, Any], **more: Any) -> dict[str, Any]:
    return generate.run(Recipe.model_validate(setup["values"] | more))


def test_every_request_is_an_episode_or_a_reject(setup: dict[str, Any]) -> None:
    summary, where = setup["summary"], setup["values"]["storage"]
    assert summary["requested"] == 3 * 2 * 2
    assert summary["accepted"] + summary["rejected"] == summary["requested"]
    ids = [
        i
        for side in ("episodes", "rejects")
        for t in iter_tables(storage.join(where, side))
        for i in t["episode_id"].to_pylist()
    ]
    assert len(ids) == len(set(ids)) == summary["requested"]


def test_episodes_have_the_schema_and_load_as_a_dataset(setup: dict[str, Any]) -> None:
    from datasets import load_dataset

    where = storage.join(setup["values"]["storage"], "episodes")
    table = pa.concat_tables(list(iter_tables(where)))
    assert table.schema.equals(EPISODES)
    assert table.num_rows, "the teacher wrote nothing usable"
    loaded = load_dataset("parquet", data_files=f"{where}/*.parquet", split="train")
    assert loaded.column_names == EPISODES.names
    assert {"music_search"} <= set(table["task"].to_pylist())


def test_a_finished_job_starts_no_engine(setup: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def no_engine(*_: object) -> None:
        raise AssertionError("an engine was configured")

    monkeypatch.setattr(engine, "_config", no_engine)
    again = run(setup)
    assert again["generated_now"] == 0
    assert again["reused"] == again["requested"]
    assert again["accepted"] == setup["summary"]["accepted"]


def test_lost_files_are_made_again_and_the_rest_is_kept(setup: dict[str, Any]) -> None:
    ledger = storage.join(setup["values"]["storage"], "completions", setup["summary"]["ledger"])
    parts = [n for n in storage.list_files(ledger) if n.startswith("part-")]
    lost = storage.read_table(storage.join(ledger, parts[0]), ["episode_id"])["episode_id"].to_pylist()
    storage.remove(storage.join(ledger, parts[0]))
    storage.remove(storage.join(setup["values"]["storage"], "episodes"))
    again = run(setup)
    assert again["generated_now"] == len(lost)
    ids = [i for s in engine.shards_of(ledger) for i in engine.completed_shard(ledger, s)["episode_id"].to_pylist()]
    assert len(ids) == len(set(ids)) == again["requested"]
    assert set(lost) <= set(ids)


def test_a_changed_recipe_never_mixes_with_old_rows(setup: dict[str, Any]) -> None:
    changed = {"teacher": setup["values"]["teacher"] | {"sampling": {"max_tokens": 20}}}
    with pytest.raises(UserError, match="policy"):
        run(setup, resume="always", **changed)
    # Refused before anything was touched: the old rows still stand.
    assert run(setup)["generated_now"] == 0


def test_other_weights_rescore_and_pay_for_nothing(setup: dict[str, Any]) -> None:
    before = pa.concat_tables(list(iter_tables(storage.join(setup["values"]["storage"], "episodes")))).sort_by("episode_id")
    again = run(setup, rewards={"weights": {"relevance": 0, "novelty": 1, "repetition": 0, "format": 0}})
    after = pa.concat_tables(list(iter_tables(storage.join(setup["values"]["storage"], "episodes")))).sort_by("episode_id")
    assert again["generated_now"] == 0
    assert before["prompt"] == after["prompt"]
    assert after["reward"].to_pylist() == pytest.approx(after["novelty"].to_pylist())


def test_a_teacher_can_be_asked_by_its_chat_template(tmp_path: Path, setup: dict[str, Any]) -> None:
    teacher = setup["values"]["teacher"] | {"style": "chat", "samples": 1, "sampling": {"max_tokens": 48}}
    summary = run(setup, storage=str(tmp_path / "run"), teacher=teacher)
    assert summary["requested"] == 3 * 2
    table = pa.concat_tables(engine.completed_shard(f"{tmp_path}/run/completions/{summary['ledger']}", s) for s in range(2))
    assert all(table["error"].to_numpy(zero_copy_only=False) == "")
    assert all("<|im_" not in text and text.strip() for text in table["completion"].to_pylist())


def test_an_engine_that_refuses_everything_ends_the_job_with_its_words(tmp_path: Path, setup: dict[str, Any]) -> None:
    teacher = setup["values"]["teacher"] | {"engine": {"max_model_len": 64}}  # shorter than the few-shot prefix
    with pytest.raises(UserError, match="refuses every request"):
        run(setup, storage=str(tmp_path / "run"), teacher=teacher)
    assert not list((tmp_path / "run").rglob("part-*"))
