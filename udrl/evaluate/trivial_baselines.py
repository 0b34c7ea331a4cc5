"""Trivial baselines: policies without a model, which show how much a metric or a judge gives for nothing."""

from collections.abc import Callable

import numpy as np
import pyarrow as pa

from udrl.evaluate.judges.validation import shuffle_intents
from udrl.evaluate.outputs import OUTPUTS, STUDENT, TEACHER
from udrl.hashing import stable_id
from udrl.policies.policy import Row
from udrl.recipe import Recipe
from udrl.text import count_words

# (intents, prompts) -> relevance of each pair by the scorer that made the training reward; NaN if that scorer is a judge.
Relevance = Callable[[list[str], list[str]], np.ndarray]


def trivial_baseline_outputs(recipe: Recipe, outputs: pa.Table, relevance: Relevance) -> pa.Table:
    """Return rows of :data:`~udrl.evaluate.outputs.OUTPUTS` for the trivial baselines that the recipe names.

    ``echo`` repeats the intent; ``shuffled`` gives the teacher's prompt for another intent of the task; ``best-of-N`` is the
    one of the teacher's N samples with the highest training reward. None of them is ever rejected. Without outputs of the
    teacher there is only ``echo``.
    """
    names = recipe.evaluate.trivial_baselines
    default = [row for row in outputs.to_pylist() if row["probe"] == "default"]
    teacher = [row for row in default if row["policy"] == TEACHER and row["prompt"]]
    rows = [*(_echo(default) if "echo" in names else []), *(_shuffled(teacher, recipe.seed) if "shuffled" in names else [])]
    scores = relevance([row["intent"] for row in rows], [row["prompt"] for row in rows])
    rows = [{**row, "relevance": float(score)} for row, score in zip(rows, scores, strict=True)]
    if "best_of" in names and recipe.evaluate.samples > 1:
        rows += _best_of(teacher, recipe.evaluate.samples)
    return pa.Table.from_pylist(rows, schema=OUTPUTS)


def _echo(default: list[Row]) -> list[Row]:
    one_per_intent = {(row["intent_id"], row["task"]): row for row in default if row["policy"] == STUDENT}
    return [_unscored("echo", row, row["intent"]) for row in one_per_intent.values()]


def _shuffled(teacher: list[Row], seed: int) -> list[Row]:
    others = shuffle_intents([row["intent"] for row in teacher], [row["task"] for row in teacher], seed)
    ids = {row["intent"]: row["intent_id"] for row in teacher}
    return [
        _unscored("shuffled", {**row, "intent": other, "intent_id": ids[other]}, row["prompt"])
        for row, other in zip(teacher, others, strict=True)
        if other  # a task with one intent has no other
    ]


def _best_of(teacher: list[Row], samples: int) -> list[Row]:
    best: dict[tuple[int, str], Row] = {}
    for row in teacher:
        key = (row["intent_id"], row["task"])
        if key not in best or row["reward"] > best[key]["reward"]:
            best[key] = row
    return [_renamed(f"best-of-{samples}", {**row, "variation": 0}) for row in best.values()]


def _unscored(name: str, row: Row, prompt: str) -> Row:
    scores = dict.fromkeys(("relevance", "novelty", "repetition", "format", "length", "reward"))
    return _renamed(name, {**row, **scores, "prompt": prompt, "n_words": count_words(prompt), "reason": "",
                           "command_words": -1, "command_reward": -1, "input_tokens": 0, "output_tokens": 0,
                           "finish_reason": "stop"})  # fmt: skip


def _renamed(name: str, row: Row) -> Row:
    key = stable_id(name, row["intent_id"], row["task"], row["variation"])
    return {**row, "policy": name, "model": name, "model_revision": "", "request_fingerprint": "", "episode_id": key}
