"""Who is evaluated: the student, its teacher, baselines, and yardsticks that cost nothing and show what a figure is worth.

All that write go through one vLLM stage with the same task templates, intents and number of draws.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa

from udrl import storage
from udrl.commands import CommandVocabulary
from udrl.evaluate.judges.ask_judges import CONTROLLED
from udrl.evaluate.judges.validation import KINDS, shuffled
from udrl.evaluate.outputs import STUDENT, TEACHER
from udrl.hashing import stable_id
from udrl.policies.policy import Policy, Row
from udrl.policies.requests import key_columns
from udrl.policies.student import student_policy
from udrl.policies.teacher import teacher_policy
from udrl.recipe import Baseline, Recipe, Teacher
from udrl.tasks import Task
from udrl.text import count_words

# Variations of the sweeps are numbered apart, so that they never share an id with a default draw of the same command.
VARIATION = {"default": 0, "length": 1000, "reward": 2000, "reach": 3000}
Kind = Literal["student", "teacher", "baseline", "yardstick"]
Intent = tuple[int, str]  # id and text
# (intents, prompts) -> relevance of each pair, as the training's scorer sees it.
Relevance = Callable[[list[str], list[str]], np.ndarray]


@dataclass(frozen=True)
class EvaluatedPolicy:
    """A policy with its requests; each has a ``probe`` (see :data:`udrl.evaluate.outputs.PROBES`)."""

    kind: Kind
    policy: Policy
    requests: list[Row]


def gather(recipe: Recipe, tasks: Sequence[Task], chosen: Sequence[Intent]) -> tuple[list[EvaluatedPolicy], CommandVocabulary]:
    """The contenders that write, the student first, and the student's commands.

    Raises:
        UserError: no student yet, or a model can't be found.
    """
    config = recipe.evaluate
    student, vocabulary = student_policy(
        storage.join(recipe.storage, "student"), config.sampling, config.engine, config.placement
    )
    found = [EvaluatedPolicy("student", student, _student_requests(student, vocabulary, tasks, chosen, recipe))]
    if config.teacher:
        found.append(_writer("teacher", teacher_policy(recipe.teacher, tasks), tasks, chosen, recipe))
    for baseline in config.baselines:
        policy = dataclasses.replace(teacher_policy(_as_teacher(baseline), tasks), name=baseline.name)
        found.append(_writer("baseline", policy, tasks, chosen, recipe))
    return found, vocabulary


def _as_teacher(baseline: Baseline) -> Teacher:
    return Teacher(**{name: getattr(baseline, name) for name in Baseline.model_fields if name != "name"})


def _writer(kind: Kind, policy: Policy, tasks: Sequence[Task], chosen: Sequence[Intent], recipe: Recipe) -> EvaluatedPolicy:
    requests = [
        {**key_columns(policy, intent_id, intent, task.name, variation), "probe": "default"}
        for intent_id, intent in chosen
        for task in tasks
        for variation in range(recipe.evaluate.samples)
    ]
    # A pool sized to write millions of episodes would wait for machines that an evaluation has no use for.
    place = policy.placement
    replicas = min(place.replicas, max(1, recipe.evaluate.placement.replicas))
    policy = dataclasses.replace(policy, placement=place.model_copy(update={"replicas": replicas}))
    return EvaluatedPolicy(kind, policy, requests)


def _student_requests(
    policy: Policy, vocabulary: CommandVocabulary, tasks: Sequence[Task], chosen: Sequence[Intent], recipe: Recipe
) -> list[Row]:
    config, rows = recipe.evaluate, []
    # Spread over all of them: a source may be sorted.
    swept = {chosen[i][0] for i in np.linspace(0, len(chosen) - 1, min(config.sweep_intents, len(chosen))).round().astype(int)}
    for task in tasks:
        default = vocabulary.default(task.name)
        if takes_commands(vocabulary):
            own = {"words": config.words, "reward": config.reward}
            default = default.model_copy(update={name: value for name, value in own.items() if value is not None})
        asked = [("default", v, default.words, default.reward) for v in range(config.samples)]
        if takes_commands(vocabulary):
            lengths = config.lengths or usual_lengths(vocabulary, task.name)
            asked += [("length", 0, n, default.reward) for n in lengths]
            asked += [("reach", 0, n, default.reward) for n in unusual_lengths(vocabulary, task.name) if n not in lengths]
            asked += [("reward", 0, default.words, b) for b in range(vocabulary.reward_bins)]
        for intent_id, intent in chosen:
            for probe, variation, words, reward in asked:
                if probe != "default" and intent_id not in swept:
                    continue
                number = VARIATION[probe] + variation
                row = key_columns(policy, intent_id, intent, task.name, number, command_words=words, command_reward=reward)
                rows.append({**row, "probe": probe})
    # The requests of an intent beside each other: they share its prefix in the engine's cache.
    place = {intent_id: i for i, (intent_id, _) in enumerate(chosen)}
    return sorted(rows, key=lambda row: place[row["intent_id"]])


def takes_commands(vocabulary: CommandVocabulary) -> bool:
    """Whether the student learnt to follow commands: plain fine-tuning knows the task alone."""
    return vocabulary.objective == "udrl"


def usual_lengths(vocabulary: CommandVocabulary, task: str, steps: int = 5) -> list[int]:
    """Lengths from the 5th to the 95th percentile of a task's training episodes, evenly spaced: what is in distribution."""
    low, high = _usual(vocabulary, task)
    return sorted({int(n) for n in np.linspace(low, high, steps).round()})


def unusual_lengths(vocabulary: CommandVocabulary, task: str) -> list[int]:
    """Lengths outside that range which can be commanded: half the lowest, half-way to the cap, and the cap."""
    low, high = _usual(vocabulary, task)
    reached = {low // 2, (high + vocabulary.max_words + 1) // 2, vocabulary.max_words}
    return sorted(n for n in reached if 1 <= n < low or high < n <= vocabulary.max_words)


def _usual(vocabulary: CommandVocabulary, task: str) -> tuple[int, int]:
    low, _, high = (min(max(n, 1), vocabulary.max_words) for n in vocabulary.tasks[task].words)
    return low, high


def judged_texts(recipe: Recipe, contenders: Sequence[EvaluatedPolicy], tasks: int) -> dict[bool, int]:
    """How many texts a pointwise judge (False) and a pairwise one (True) will be asked about at most: outputs, yardsticks
    and the controls that it is validated on."""
    config = recipe.evaluate
    rows = sum(row["probe"] in ("default", "reward") for c in contenders for row in c.requests)
    intents_ = len({row["intent_id"] for c in contenders for row in c.requests})
    teachers = sum(len(c.requests) for c in contenders if c.kind == "teacher")
    cheap = ("echo" in config.trivial_baselines) * intents_ * tasks + ("shuffled" in config.trivial_baselines) * teachers
    controls = CONTROLLED * len(KINDS) * tasks
    others = len(contenders) - 1 + len(config.trivial_baselines)
    return {
        False: rows + cheap + controls,
        True: 2 * (min(config.pairs, intents_ * config.samples) * tasks * others + controls),
    }


def yardsticks(recipe: Recipe, outputs: pa.Table, relevance: Relevance) -> list[Row]:
    """Rows of :data:`~udrl.evaluate.outputs.OUTPUTS` for the yardsticks that the recipe names, the default probe alone.

    ``echo`` repeats the intent; ``shuffled`` gives the teacher's prompt for another intent of the task; ``best-of-N`` is the
    one of the teacher's N draws with the highest training reward. None is rejected for what it is: it shows how much a
    judge gives for nothing. Without the teacher's outputs there is only ``echo``. ``relevance`` may give NaN.
    """
    wanted = recipe.evaluate.trivial_baselines
    rows = [row for row in outputs.to_pylist() if row["probe"] == "default"]
    written = [row for row in rows if row["policy"] == TEACHER and row["prompt"]]
    found: list[Row] = []
    if "echo" in wanted:
        first = {(row["intent_id"], row["task"]): row for row in rows if row["policy"] == STUDENT}
        found += [_yardstick("echo", row, row["intent"]) for row in first.values()]
    if "shuffled" in wanted and written:
        others = shuffled([row["intent"] for row in written], [row["task"] for row in written], recipe.seed)
        ids = {row["intent"]: row["intent_id"] for row in written}
        for row, other in zip(written, others, strict=True):
            if other:  # a task with one intent has no other
                found.append(_yardstick("shuffled", {**row, "intent": other, "intent_id": ids[other]}, row["prompt"]))
    scores = relevance([row["intent"] for row in found], [row["prompt"] for row in found])
    for row, score in zip(found, scores, strict=True):
        row["relevance"] = float(score)
    if "best_of" in wanted and recipe.evaluate.samples > 1:
        best: dict[tuple[int, str], Row] = {}
        for row in written:
            key = (row["intent_id"], row["task"])
            if key not in best or row["reward"] > best[key]["reward"]:
                best[key] = row
        name = f"best-of-{recipe.evaluate.samples}"
        found += [_named(name, {**row, "variation": 0}) for row in best.values()]
    return found


def _yardstick(name: str, row: Row, prompt: str) -> Row:
    scores = dict.fromkeys(("relevance", "novelty", "repetition", "format", "length", "reward"))
    return _named(name, {**row, **scores, "prompt": prompt, "n_words": count_words(prompt), "reason": "", "command_words": -1,
                         "command_reward": -1, "input_tokens": 0, "output_tokens": 0, "finish_reason": "stop"})  # fmt: skip


def _named(name: str, row: Row) -> Row:
    key = stable_id(name, row["intent_id"], row["task"], row["variation"])
    return {**row, "policy": name, "model": name, "model_revision": "", "request_fingerprint": "", "episode_id": key}
