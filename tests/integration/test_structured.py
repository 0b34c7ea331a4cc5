"""Guided decoding, intent expansion and the rubric judge with Ray Data, vLLM and the bundled teacher."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from udrl import intents, storage
from udrl.generate.expand import HeldOutSubjects, expand_intents
from udrl.intents.intent import INTENT_SCHEMA
from udrl.policies.ledger import list_parts, read_shard
from udrl.policies.requests import intent_requests
from udrl.policies.stage import complete
from udrl.policies.teacher import teacher_policy
from udrl.recipe import Recipe
from udrl.run import IntentPaths, Run
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
def paths(recipe: Recipe) -> IntentPaths:
    paths = Run(recipe.storage).intents("source")
    intents.split_intents(recipe.intents, recipe.seed, paths)
    return paths


@pytest.fixture(scope="module")
def rows(recipe: Recipe, paths: IntentPaths) -> list[dict[str, Any]]:
    policy = teacher_policy(recipe.teacher, load_tasks(recipe.tasks))
    few = storage.join(paths.folder, "few.parquet")
    storage.write_table(few, storage.read_table(paths.train).slice(0, 5))
    teacher = recipe.teacher
    requests = intent_requests(policy, few, recipe.tasks, teacher.samples, 64, teacher.structured)
    out = storage.join(recipe.storage, "ledger")
    complete(policy, requests, out, "structured")
    table = pa.concat_tables(read_shard(out, names) for names in list_parts(out).values())
    assert table.num_rows == requests.total == 5 * (4 + 2)
    return table.to_pylist()


def test_structured_requests_give_the_requested_number_of_prompts(rows: list[dict[str, Any]]) -> None:
    assert not [row["error"] for row in rows if row["error"]]
    structured = [row for row in rows if row["prompts"] > 1]
    assert {(row["task"], row["prompts"], row["variation"]) for row in structured} == {("image_search", 3, 0)}
    assert {row["variation"] for row in rows if row["task"] == "image_search"} == {0, 3}
    whole = [row for row in structured if row["finish_reason"] == "stop"]
    assert whole
    for row in whole:
        assert len(json.loads(row["completion"])["prompts"]) == 3
    plain = [row for row in rows if row["prompts"] == 1]
    assert not any('{"prompts"' in row["completion"] or "\n" in row["completion"] for row in plain)


def test_the_teacher_adds_intents_without_held_out_subjects(recipe: Recipe, paths: IntentPaths) -> None:
    n = expand_intents(recipe, paths).intents
    assert 0 < n <= 8
    new = storage.read_table(paths.expanded)
    train = storage.read_table(paths.train)
    both = storage.read_table(paths.train_expanded)
    assert new.num_rows == n
    assert new.schema.equals(INTENT_SCHEMA)
    assert both.equals(pa.concat_tables([train, new]))
    assert len(set(both["intent_id"].to_pylist())) == both.num_rows
    subjects = HeldOutSubjects()
    subjects.add(storage.read_table(paths.heldout)["subject"].to_pylist())
    assert not [text for text in new["intent"].to_pylist() if text in subjects]


def test_a_second_expansion_gives_the_same_without_an_engine(recipe: Recipe, paths: IntentPaths) -> None:
    first = expand_intents(recipe, paths)
    new = storage.read_table(paths.expanded)
    ledgers = Run(recipe.storage).expansions
    files = storage.file_sizes(ledgers)
    assert expand_intents(recipe, paths) == first
    for uri in (paths.expansion, paths.expanded):  # as if it had been killed before its end
        storage.remove(uri)
    assert expand_intents(recipe, paths) == first
    assert storage.read_table(paths.expanded).equals(new)
    assert storage.file_sizes(ledgers) == files  # neither completions nor an attempt were added


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
    scored = {name: storage.read_table(storage.join(out, name)) for name in storage.list_files(out)}
    assert [table["episode_id"].to_pylist() for table in scored.values()] == [[1, 2, 3], [11, 12, 13]]
    values = [v for table in scored.values() for v in table["relevance"].to_pylist()]
    assert all(0 < v < 1 for v in values), "scores are expectations, not samples"
    assert "6 judgments; parse failures 0.0%" in capfd.readouterr().err
    storage.remove(storage.join(out, "part-00000001.parquet"))
    judge_relevance(filtered, out, recipe.rewards.judge, load_tasks(["text_to_image"]))
    assert storage.read_table(storage.join(out, "part-00000001.parquet")).equals(scored["part-00000001.parquet"])
