"""Guided decoding, intent expansion and the rubric judge for real: Ray Data, vLLM, the bundled teacher."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from udrl import intents, storage
from udrl.generate.expand import expand_intents
from udrl.generate.intent_lines import HeldOut
from udrl.intents.intent import INTENT_SCHEMA
from udrl.policies.ledger import list_parts, read_shard
from udrl.policies.requests import intent_requests
from udrl.policies.stage import complete
from udrl.policies.teacher import teacher_policy
from udrl.recipe import Recipe
from udrl.run import IntentPaths
from udrl.scoring.filtering import FILTERED
from udrl.scoring.rubric import judge_relevance
from udrl.tasks import load_tasks

pytestmark = pytest.mark.usefixtures("local_ray")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    values: dict[str, Any] = {
        "name": "structured",
        "storage": str(tmp_path_factory.mktemp("structured")),
        "tasks": ["text_to_image", "image_search"],
        "intents": {"limit": 24, "heldout": 0.3, "expand": {"target": 8, "shown": 6, "per_request": 4}},
        "teacher": {
            "samples": 4,
            "structured": {"image_search": 3},
            "sampling": {"max_tokens": 24, "frequency_penalty": 0.3},
            "engine": {"max_num_seqs": 32},
        },
    }
    return Recipe.model_validate(values)


@pytest.fixture(scope="module")
def folder(recipe: Recipe) -> str:
    folder = storage.join(recipe.storage, "intents")
    intents.split_intents(recipe.intents, recipe.seed, IntentPaths(folder))
    return folder


@pytest.fixture(scope="module")
def rows(recipe: Recipe, folder: str) -> list[dict[str, Any]]:
    policy = teacher_policy(recipe.teacher, load_tasks(recipe.tasks))
    few = storage.read_table(storage.join(folder, "train.parquet")).slice(0, 5)
    storage.write_table(storage.join(folder, "few.parquet"), few)
    teacher = recipe.teacher
    requests = intent_requests(
        policy, storage.join(folder, "few.parquet"), recipe.tasks, teacher.samples, 64, teacher.structured
    )
    out = storage.join(recipe.storage, "ledger")
    complete(policy, requests, out, "structured")
    table = pa.concat_tables(read_shard(out, names) for names in list_parts(out).values())
    assert table.num_rows == requests.total == 5 * (4 + 2)
    return table.to_pylist()


def test_guided_requests_bring_as_many_prompts_as_asked_beside_plain_ones(rows: list[dict[str, Any]]) -> None:
    assert not [row["error"] for row in rows if row["error"]]
    guided = [row for row in rows if row["prompts"] > 1]
    assert {(row["task"], row["prompts"], row["variation"]) for row in guided} == {("image_search", 3, 0)}
    assert {row["variation"] for row in rows if row["task"] == "image_search"} == {0, 3}
    whole = [row for row in guided if row["finish_reason"] == "stop"]
    assert whole
    for row in whole:
        assert len(json.loads(row["completion"])["prompts"]) == 3
    plain = [row for row in rows if row["prompts"] == 1]
    assert not any('{"prompts"' in row["completion"] or "\n" in row["completion"] for row in plain)


def test_the_teacher_grows_intents_that_name_no_held_out_subject(recipe: Recipe, folder: str) -> None:
    n = expand_intents(recipe, folder)
    assert 0 < n <= 8
    grown = storage.read_table(storage.join(folder, "expanded.parquet"))
    train = storage.read_table(storage.join(folder, "train.parquet"))
    both = storage.read_table(storage.join(folder, "train_expanded.parquet"))
    assert grown.num_rows == n
    assert grown.schema.equals(INTENT_SCHEMA)
    assert both.equals(pa.concat_tables([train, grown]))
    assert len(set(both["intent_id"].to_pylist())) == both.num_rows
    held = HeldOut()
    held.add(storage.read_table(storage.join(folder, "heldout.parquet"))["subject"].to_pylist())
    assert not [text for text in grown["intent"].to_pylist() if text in held]


def count_attempts(folder: str) -> int:
    """Count how often an engine was started for a ledger in this local folder."""
    return len(list(Path(folder).rglob("attempts/*.json")))


def test_a_second_expansion_pays_for_nothing_and_gives_the_same(recipe: Recipe, folder: str) -> None:
    first = expand_intents(recipe, folder)
    grown = storage.read_table(storage.join(folder, "expanded.parquet"))
    attempts = count_attempts(recipe.storage)
    assert attempts
    assert expand_intents(recipe, folder) == first
    for name in ("expanded.json", "expanded.parquet"):  # as if it had been killed before its end
        storage.remove(storage.join(folder, name))
    assert expand_intents(recipe, folder) == first
    assert storage.read_table(storage.join(folder, "expanded.parquet")).equals(grown)
    assert count_attempts(recipe.storage) == attempts


def test_a_judge_scores_each_candidate_once(tmp_path: Path, recipe: Recipe, capfd: pytest.CaptureFixture[str]) -> None:
    blank = {"string": "", "int64": 0, "int32": 0}
    filtered, out = str(tmp_path / "filtered"), str(tmp_path / "out")
    for shard in range(2):
        table = [
            {f.name: blank[str(f.type)] for f in FILTERED}
            | {"episode_id": 10 * shard + i, "intent": f"a poster of {i} owls", "task": "text_to_image"}
            | {"prompt": f"{i} owls on a branch, moonlight, woodcut", "reason": "" if i else "echo"}
            for i in range(4)
        ]
        name = f"part-{shard:08d}.parquet"
        storage.write_table(storage.join(filtered, name), pa.Table.from_pylist(table, schema=FILTERED))
    judge_relevance(filtered, out, recipe.rewards.judge, load_tasks(["text_to_image"]))
    found = {name: storage.read_table(storage.join(out, name)) for name in storage.list_files(out)}
    assert [table["episode_id"].to_pylist() for table in found.values()] == [[1, 2, 3], [11, 12, 13]]
    values = [v for table in found.values() for v in table["relevance"].to_pylist()]
    assert all(0 < v < 1 for v in values), "an expectation, not a drawn score"
    assert "6 judgments; parse failures 0.0%" in capfd.readouterr().err
    storage.remove(storage.join(out, "part-00000001.parquet"))
    judge_relevance(filtered, out, recipe.rewards.judge, load_tasks(["text_to_image"]))
    assert storage.read_table(storage.join(out, "part-00000001.parquet")).equals(found["part-00000001.parquet"])
