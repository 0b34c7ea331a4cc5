"""The generate stage with Ray Data, vLLM and the bundled teacher; a user's own task and intents; resume."""

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from ray import cloudpickle

from benchmarks.dummy_engine import DummyEngine
from udrl import storage
from udrl.episodes import EPISODES, REJECTS
from udrl.errors import UserError
from udrl.generate import plan
from udrl.generate import stage as generate
from udrl.policies.ledger import list_parts, load_attempts, read_shard
from udrl.policies.stage import complete
from udrl.recipe import Recipe
from udrl.run import GenerateSummary, GenerationPlan, Run
from udrl.scoring.parsing import reject_reasons

pytestmark = pytest.mark.usefixtures("local_ray")
# Ray's workers can't import the tests, so the engines below are pickled by value.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

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


# Of the run below, which asks for 7 prompts per intent and task: 3 x (7 plain requests, and structured ones of 3, 3 and 1).
PROMPTS, REQUESTS = 3 * 2 * 7, 3 * (7 + 3)


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Generate with a task from one YAML file and intents from one JSONL file, two of which are unusable."""
    folder = tmp_path_factory.mktemp("generate")
    (folder / "music.yaml").write_text(MUSIC)
    intents = ["birthday song for a dinosaur fan", "music for a long train ride", "", "songs for baking bread", None]
    (folder / "intents.jsonl").write_text("".join(json.dumps({"q": text}) + "\n" for text in intents))
    values = {
        "name": "music",
        "storage": str(folder / "run"),
        "tasks": [str(folder / "music.yaml"), "image_search"],
        "intents": {"source": str(folder / "intents.jsonl"), "column": "q", "heldout": 0},
        "teacher": {
            "samples": 7,
            "structured": {"image_search": 3},
            "shard_size": 4,
            "sampling": {"max_tokens": 24},
            "engine": {"max_num_seqs": 16},
        },
        "evaluate": {"lengths": [6]},
    }
    return {"values": values, "summary": generate.run(Recipe.model_validate(values)), "paths": Run(values["storage"])}


def run(setup: dict[str, Any], **changes: Any) -> GenerateSummary:
    return generate.run(Recipe.model_validate(setup["values"] | changes))


def test_every_request_is_an_episode_or_a_reject(setup: dict[str, Any]) -> None:
    summary, scoring = setup["summary"], setup["paths"].scoring
    assert summary.requested == PROMPTS
    assert summary.accepted + summary.rejected == summary.requested
    ids = [
        i
        for folder in (scoring.episodes, scoring.rejects)
        for t in storage.iter_tables(folder)
        for i in t["episode_id"].to_pylist()
    ]
    assert len(ids) == len(set(ids)) == summary.requested


def test_structured_requests_give_the_requested_number_of_prompts(setup: dict[str, Any]) -> None:
    ledger = setup["paths"].scoring.ledger(setup["summary"].ledger)
    rows = pa.concat_tables(read_shard(ledger, names) for names in list_parts(ledger).values()).to_pylist()
    assert len(rows) == REQUESTS
    assert not [row["error"] for row in rows if row["error"]]
    structured = [row for row in rows if row["prompts"] > 1]
    assert {(row["task"], row["prompts"]) for row in structured} == {("image_search", 3)}
    assert {row["variation"] for row in structured} == {0, 3}
    assert {row["variation"] for row in rows if row["task"] == "image_search"} == {0, 3, 6}
    whole = [row for row in structured if row["finish_reason"] == "stop"]
    assert whole
    for row in whole:
        assert len(json.loads(row["completion"])["prompts"]) == 3
    plain = [row for row in rows if row["prompts"] == 1]
    assert not any('{"prompts"' in row["completion"] or "\n" in row["completion"] for row in plain)


def test_episodes_have_the_schema_and_load_as_a_dataset(setup: dict[str, Any]) -> None:
    from datasets import load_dataset

    folder = setup["paths"].scoring.episodes
    table = pa.concat_tables(list(storage.iter_tables(folder)))
    assert table.schema.equals(EPISODES)
    assert table.num_rows, "the teacher wrote nothing usable"
    loaded = load_dataset("parquet", data_files=f"{folder}/*.parquet", split="train")
    assert loaded.column_names == EPISODES.names
    assert {"music_search"} <= set(table["task"].to_pylist())


class NoEngine(DummyEngine):
    """Fail when it starts."""

    def __init__(self, *_: Any, **__: Any) -> None:
        raise AssertionError("an engine was started")


def test_a_finished_job_starts_no_engine(setup: dict[str, Any]) -> None:
    again = generate.run(Recipe.model_validate(setup["values"]), engine_actor=NoEngine)
    assert again.generated_now == 0
    assert again.reused == REQUESTS
    assert again.accepted == setup["summary"].accepted


def test_only_lost_files_are_generated_again(setup: dict[str, Any]) -> None:
    ledger = setup["paths"].scoring.ledger(setup["summary"].ledger)
    parts = [n for n in storage.list_files(ledger) if n.startswith("part-")]
    lost = storage.read_table(storage.join(ledger, parts[0]), ["episode_id"])["episode_id"].to_pylist()
    storage.remove(storage.join(ledger, parts[0]))
    storage.remove(setup["paths"].scoring.episodes)
    again = generate.run(Recipe.model_validate(setup["values"]), engine_actor=DummyEngine)
    assert again.generated_now == len(lost)
    ids = [i for names in list_parts(ledger).values() for i in read_shard(ledger, names)["episode_id"].to_pylist()]
    assert len(ids) == len(set(ids)) == REQUESTS
    assert set(lost) <= set(ids)


def test_a_changed_recipe_never_mixes_with_old_rows(setup: dict[str, Any]) -> None:
    changed = {"teacher": setup["values"]["teacher"] | {"sampling": {"max_tokens": 20}}}
    with pytest.raises(UserError, match=r"teacher\.sampling\.max_tokens: 24 -> 20; undo the change, or set resume=if_possible"):
        run(setup, **changed)
    # It is refused before any file changes: the old rows are still complete.
    assert run(setup).generated_now == 0


def test_other_weights_rescore_without_generating(setup: dict[str, Any]) -> None:
    episodes = setup["paths"].scoring.episodes
    before = pa.concat_tables(storage.iter_tables(episodes)).sort_by("episode_id")
    again = run(setup, rewards={"weights": {"relevance": 0, "novelty": 1, "repetition": 0, "format": 0}})
    after = pa.concat_tables(storage.iter_tables(episodes)).sort_by("episode_id")
    assert again.generated_now == 0
    assert before["prompt"] == after["prompt"]
    assert after["reward"].to_pylist() == pytest.approx(after["novelty"].to_pylist())


def test_a_chat_teacher_writes_and_what_vllm_refuses_is_a_reject(tmp_path: Path, setup: dict[str, Any]) -> None:
    """Through the chat template, the requests of ``image_search`` are longer than the engine's context."""
    teacher = setup["values"]["teacher"] | {"style": "chat", "samples": 1, "structured": {}, "sampling": {"max_tokens": 48}}
    teacher |= {"engine": {"max_model_len": 160}}
    recipe = Recipe.model_validate(setup["values"] | {"storage": str(tmp_path / "run"), "teacher": teacher})
    prepared = generate.prepare_generation(recipe)
    complete(prepared.policy, prepared.requests, prepared.ledger, "chat")
    rows = pa.concat_tables(read_shard(prepared.ledger, names) for names in list_parts(prepared.ledger).values()).to_pylist()
    written, refused = ([row for row in rows if row["task"] == task.name] for task in prepared.tasks)
    assert (len(written), len(refused)) == (3, 3)
    assert not [row["error"] for row in written if row["error"]]
    assert all("<|im_" not in row["completion"] and row["completion"].strip() for row in written)
    reasons = [reason for row in refused for reason, _ in reject_reasons(prepared.tasks[1], row)]
    assert reasons == 3 * ["input_too_long"]


class Refusing(DummyEngine):
    """Refuse every request."""

    async def answer(self, row: dict[str, Any]) -> dict[str, Any]:
        raise ValueError("The decoder prompt (length 80) is longer than the maximum model length of 64.")


def test_an_engine_that_refuses_every_request_ends_the_job_with_its_error(tmp_path: Path, setup: dict[str, Any]) -> None:
    recipe = Recipe.model_validate(setup["values"] | {"storage": str(tmp_path / "run")})
    with pytest.raises(UserError, match=r"refuses every request: ValueError: .* maximum model length of 64"):
        generate.run(recipe, engine_actor=Refusing)
    assert not list((tmp_path / "run").rglob("part-*"))


def test_a_finished_run_shows_its_cost(setup: dict[str, Any]) -> None:
    text = generate.describe(setup["summary"])
    for part in (
        "tokens in",
        "prefix-cache hit rate",
        "time to first token",
        "engines busy",
        "engine-hours",
        "intents left out",
    ):
        assert part in text
    ledger = setup["paths"].scoring.ledger(setup["summary"].ledger)
    assert sum(attempt.rows for attempt in load_attempts(ledger)) >= REQUESTS


def test_a_dry_run_plans_without_leaving_completions(setup: dict[str, Any], tmp_path: Path) -> None:
    values = setup["values"] | {"storage": str(tmp_path / "planned"), "dry_run": True}
    calibrated = plan.plan_generation(Recipe.model_validate(values), engine_actor=DummyEngine)
    assert f"{REQUESTS} for {PROMPTS} prompts (counted)" in plan.describe_plan(calibrated)
    assert calibrated.generation_seconds is not None
    assert calibrated.generation_seconds.basis == "measured"
    assert GenerationPlan.load(Run(values["storage"]).plan) == calibrated
    with_speed = Recipe.model_validate(values | {"teacher": values["teacher"] | {"tokens_per_second": 1000}})
    estimated = plan.plan_generation(with_speed, engine_actor=NoEngine)
    assert estimated.generation_seconds is not None
    assert estimated.generation_seconds.basis == "assumed"
    assert not list((tmp_path / "planned").rglob("part-*"))


COMPLETIONS_OF_ALL_KINDS = {
    "": "empty",
    " \n ": "empty",
    "I'm sorry, but I can't help with that request.": "refusal",
    "http://example.org/cat.jpg free download here": "malformed",
    "красная лиса на снегу в лесу под луной": "wrong_script",
    "soft \ufffd\ufffd light over calm water at dawn": "garbled",
    "wide quiet harbor photo, wide quiet harbor photo, wide quiet harbor photo": "repetitive",
    "bright city skyline photo " * 4_000: "malformed",
}


class Weak(DummyEngine):
    """Answer with each kind of bad completion in turn, and sometimes with an error of the engine."""

    async def answer(self, row: dict[str, Any]) -> dict[str, Any]:
        answer = await super().answer(row)
        turn = row["variation"] % (len(COMPLETIONS_OF_ALL_KINDS) + 2)
        if turn == len(COMPLETIONS_OF_ALL_KINDS):
            raise ValueError("The decoder prompt (length 4096) is longer than the maximum model length of 1024.")
        if turn < len(COMPLETIONS_OF_ALL_KINDS):
            answer["completion"] = list(COMPLETIONS_OF_ALL_KINDS)[turn]
        return answer


def weak_run(tmp_path: Path, **teacher: Any) -> dict[str, Any]:
    # All of a length at which the dummy engine's good answers are accepted.
    source = tmp_path / "intents.txt"
    source.write_text("\n".join(f"watercolor poster of a red fox in scene {i}" for i in range(40)))
    return {
        "name": "weak",
        "storage": str(tmp_path / "run"),
        "tasks": ["text_to_image"],
        "intents": {"source": str(source), "heldout": 0},
        "teacher": {"samples": 10, "shard_size": 50, **teacher},
    }


def test_bad_completions_become_rejects_with_their_reason(tmp_path: Path) -> None:
    recipe = Recipe.model_validate(weak_run(tmp_path, max_rejects=1))
    summary = generate.run(recipe, engine_actor=Weak)
    assert summary.accepted + summary.rejected == summary.requested == 400
    expected = Counter(40 * list(COMPLETIONS_OF_ALL_KINDS.values())) + Counter({"input_too_long": 40})
    reasons = Counter(summary.reasons)
    assert {reason: n for reason, n in reasons.items() if "duplicate" not in reason and reason != "echo"} == expected
    for table in storage.iter_tables(Run(recipe.storage).scoring.rejects):
        assert table.schema.equals(REJECTS)

    # The run loads as a data set. The cache is separate, because `datasets` identifies a folder by its last name only.
    from datasets import load_dataset

    cache = str(tmp_path / "cache")
    assert load_dataset(recipe.storage, split="train", cache_dir=cache).num_rows == summary.accepted > 0
    assert load_dataset(recipe.storage, "rejects", split="train", cache_dir=cache).num_rows == summary.rejected

    # ``resume: never`` generates everything again.
    again = generate.run(Recipe.model_validate(weak_run(tmp_path, max_rejects=1) | {"resume": "never"}), engine_actor=Weak)
    assert again.generated_now == again.requested == summary.requested
    assert (again.reused, again.reasons) == (0, summary.reasons)


def test_a_run_with_mostly_rejects_ends_early_with_the_reason(tmp_path: Path) -> None:
    recipe = Recipe.model_validate(weak_run(tmp_path))
    with pytest.raises(UserError, match=r"9\d% of the first .* prompts are rejected.*malformed.*teacher.max_rejects"):
        generate.run(recipe, engine_actor=Weak)
