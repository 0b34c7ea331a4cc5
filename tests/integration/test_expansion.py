"""Intent expansion with Ray Data, vLLM and the bundled teacher."""

from typing import Any

import pyarrow as pa
import pytest

from udrl import intents, storage
from udrl.generate.expand import HeldOutSubjects, expand_intents
from udrl.intents.intent import INTENT_SCHEMA
from udrl.recipe import Recipe
from udrl.run import IntentPaths, Run

pytestmark = pytest.mark.usefixtures("local_ray")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    values: dict[str, Any] = {
        "name": "expansion",
        "storage": str(tmp_path_factory.mktemp("expansion")),
        "tasks": ["text_to_image", "image_search"],
        "intents": {"limit": 24, "heldout": 0.3, "expand": {"target": 8, "shown": 6, "per_request": 4}},
        "teacher": {"engine": {"max_num_seqs": 32}},
    }
    return Recipe.model_validate(values)


@pytest.fixture(scope="module")
def paths(recipe: Recipe) -> IntentPaths:
    paths = Run(recipe.storage).intents("source")
    intents.split_intents(recipe.intents, recipe.seed, paths)
    return paths


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
