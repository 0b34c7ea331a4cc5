"""Rows of outputs: of evaluated policies, through the vLLM stage and the scoring pass, and of trivial baselines.

Trivial baselines are policies without a model, which show how much a metric or a judge gives for nothing.
"""

import os
from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa

from udrl import storage
from udrl.context import StageContext
from udrl.evaluate.document import Interval, PolicyProfile
from udrl.evaluate.evaluated_policies import EvaluatedPolicy
from udrl.evaluate.judges.controls import shuffle_intents
from udrl.evaluate.outputs import OUTPUTS, STUDENT, TEACHER
from udrl.evaluate.speed import PolicySpeed
from udrl.hashing import stable_id
from udrl.policies.policy import Row
from udrl.policies.requests import Requests
from udrl.policies.stage import complete
from udrl.recipe import Recipe
from udrl.run import EvaluatedPolicyPaths
from udrl.scoring.parsing import clean
from udrl.scoring.score import score
from udrl.tasks import Task
from udrl.text import count_words

SHARD_ROWS = 128


def write_outputs(evaluated: EvaluatedPolicy, paths: EvaluatedPolicyPaths, recipe: Recipe, tasks: Sequence[Task]) -> pa.Table:
    """Complete and score the policy's requests; return them as a table of :data:`~udrl.evaluate.outputs.OUTPUTS`.

    Completions that exist in ``paths`` are reused.
    """
    probes = {row["episode_id"]: row["probe"] for row in evaluated.requests}
    requests = [{name: value for name, value in row.items() if name != "probe"} for row in evaluated.requests]
    context, name = StageContext.of(recipe), evaluated.name
    complete(evaluated.policy, Requests.of_rows(requests, SHARD_ROWS), paths.completions, f"evaluate {name}", context=context)
    score(paths.completions, paths.scoring, tasks, recipe.rewards, f"score {name}", deduplicate=False, context=context)
    rows = [{**row, "probe": probes[row["episode_id"]]} for row in (*_accepted_rows(paths), *_rejected_rows(paths))]
    return pa.Table.from_pylist([{name: row.get(name) for name in OUTPUTS.names} for row in rows], schema=OUTPUTS)


def _accepted_rows(paths: EvaluatedPolicyPaths) -> list[Row]:
    return [{**row, "reason": ""} for table in storage.iter_tables(paths.scoring.episodes) for row in table.to_pylist()]


def _rejected_rows(paths: EvaluatedPolicyPaths) -> list[Row]:
    return [
        {**row, "prompt": "", "n_words": count_words(clean(row["completion"]))}
        for table in storage.iter_tables(paths.scoring.rejects)
        for row in table.to_pylist()
    ]


def policy_profile(evaluated: EvaluatedPolicy, speed: PolicySpeed | None) -> PolicyProfile:
    """Return the policy's model, sampling and speed."""
    policy = evaluated.policy
    profile = PolicyProfile(
        kind=evaluated.kind,
        model=policy.model,
        revision=policy.revision,
        sampling=policy.sampling.model_dump(),
        seed=policy.engine.kwargs.get("seed", 0),  # 0 is vLLM's default
        parameters=count_parameters(policy.path),
    )
    if speed is not None:
        profile.tokens_per_second, profile.memory_mib = speed.tokens_per_second, speed.memory_mib
        profile.latency_p50, profile.latency_p95 = speed.latency_p50, speed.latency_p95
        profile.prompts_per_second = speed.prompts_per_second_spread or Interval(value=speed.prompts_per_second)
        price = policy.placement.dollars_per_hour
        profile.dollars_per_1000 = None if price is None else price / 3600 * 1000 / speed.prompts_per_second
    return profile


def count_parameters(folder: str) -> int | None:
    """Return the parameters of a local model, from the headers of its safetensors files; None for a model on a hub."""
    if not os.path.isdir(folder):
        return None
    from safetensors import safe_open

    total = 0
    for name in os.listdir(folder):
        if name.endswith(".safetensors"):
            with safe_open(os.path.join(folder, name), framework="numpy") as tensors:
                total += sum(int(np.prod(tensors.get_slice(key).get_shape())) for key in tensors.keys())  # noqa: SIM118
    return total or None


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
