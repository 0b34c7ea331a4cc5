"""Selects the intents of an evaluation: held-out ones of the run, or those of another source."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import yaml

from udrl import intents, storage
from udrl.errors import UserError
from udrl.hashing import stable_id
from udrl.recipe import Recipe
from udrl.run import GenerateSummary, Run

MAX_SOURCE_INTENTS = 1_000_000  # intents read from a source; the reader keeps a hash of each in memory to skip repeated ones


class EvaluatedIntent(NamedTuple):
    intent_id: int
    text: str


def select_intents(recipe: Recipe) -> tuple[list[EvaluatedIntent], str]:
    """Return the intents to evaluate on, and where they come from.

    They come from ``evaluate.source`` if it is set, from ``intents.source`` if the run was made with another one, and
    otherwise from the run's held-out intents. A seed decides which ones if there are more than ``evaluate.intents``.

    Raises:
        UserError: the generate stage is not finished, or there is no held-out intent.
    """
    config = recipe.evaluate
    if config.source:
        source, column = config.source, config.column
    elif _has_new_source(recipe):
        source, column = recipe.intents.source, recipe.intents.column
    else:
        return _heldout_intents(recipe), "the run's held-out intents"
    stream = (intent.text for intent in intents.read(source, column, MAX_SOURCE_INTENTS))
    return [EvaluatedIntent(stable_id(text), text) for text in sample_stream(stream, config.intents, recipe.seed)], source


def sample_stream(texts: Iterator[str], n: int, seed: int) -> list[str]:
    """Return ``n`` texts of a stream in their order, each equally likely (reservoir sampling: Vitter 1985, algorithm R)."""
    rng = np.random.default_rng(seed)
    reservoir: list[tuple[int, str]] = []
    for position, text in enumerate(texts):
        if position < n:
            reservoir.append((position, text))
        elif (slot := int(rng.integers(position + 1))) < n:
            reservoir[slot] = (position, text)
    return [text for _, text in sorted(reservoir)]


def _has_new_source(recipe: Recipe) -> bool:
    """Whether the recipe names a source of intents with which its run was not made."""
    source = recipe.intents.source
    if source.startswith("builtin:"):
        return False
    saved_recipe = Run(recipe.episodes_storage()).recipe
    if not storage.exists(saved_recipe):
        return True
    saved_source = yaml.safe_load(storage.read_bytes(saved_recipe)).get("intents", {}).get("source", "")
    return storage.absolute(source) != storage.absolute(saved_source)


def _heldout_intents(recipe: Recipe) -> list[EvaluatedIntent]:
    run = Run(recipe.episodes_storage())
    summary = GenerateSummary.load_if_exists(run.generate_summary)
    if summary is None:
        raise UserError(f"{run.storage}: no finished generate stage; run jobs.generate first, or set evaluate.source")
    uri = run.intents(summary.intents).heldout
    table = storage.read_table(uri, ["intent_id", "intent"])
    if not table.num_rows:
        raise UserError(f"{uri}: no held-out intent; raise intents.heldout, or set evaluate.source")
    order = np.random.default_rng(recipe.seed).permutation(table.num_rows)[: recipe.evaluate.intents]
    selected = table.take(sorted(order))
    ids, texts = selected.column("intent_id").to_pylist(), selected.column("intent").to_pylist()
    return [EvaluatedIntent(intent_id, text) for intent_id, text in zip(ids, texts, strict=True)]
