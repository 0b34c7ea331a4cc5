"""The policies that an evaluation runs (student, teacher, baselines), the intents that they get, and the requests of each.

The intents are held-out ones of the run, or those of another source. All policies go through one vLLM stage with the same task
templates, intents and number of samples.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import yaml

from udrl import intents, storage
from udrl.commands import CommandVocabulary
from udrl.errors import UserError
from udrl.hashing import fingerprint, stable_id
from udrl.intents.content_words import content_words
from udrl.policies.policy import Policy, Row
from udrl.policies.requests import key_columns
from udrl.policies.student import student_policy
from udrl.policies.teacher import teacher_policy
from udrl.recipe import Baseline, Recipe, Teacher
from udrl.run import EvaluatedPolicyPaths, EvaluationPaths, GenerateSummary, Run
from udrl.tasks import Task

MAX_SOURCE_INTENTS = 1_000_000  # intents read from a source; the reader keeps a hash of each in memory to skip repeated ones


class EvaluatedIntent(NamedTuple):
    intent_id: int
    text: str
    subject: str = ""  # as its source names it; "" if the source has no subjects

    def subject_words(self) -> list[str]:
        """Return the words that a prompt for it must keep: its subject's, or else all of its content words."""
        return content_words(self.subject or self.text)


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
    table = storage.read_table(uri, ["intent_id", "intent", "subject"])
    if not table.num_rows:
        raise UserError(f"{uri}: no held-out intent; raise intents.heldout, or set evaluate.source")
    order = np.random.default_rng(recipe.seed).permutation(table.num_rows)[: recipe.evaluate.intents]
    selected = table.take(sorted(order))
    columns = [selected.column(name).to_pylist() for name in ("intent_id", "intent", "subject")]
    return [EvaluatedIntent(*values) for values in zip(*columns, strict=True)]


# The first variation of each probe. A sweep never shares an id with a default sample of the same command.
FIRST_VARIATION = {"default": 0, "length": 1000, "reward": 2000, "reach": 3000}


@dataclass(frozen=True)
class EvaluatedPolicy:
    """A policy and its requests; each request has a ``probe``, one of :data:`udrl.evaluate.outputs.PROBES`."""

    kind: Literal["student", "teacher", "baseline"]
    policy: Policy
    requests: list[Row]

    @property
    def name(self) -> str:
        return self.policy.name

    def paths(self, evaluation: EvaluationPaths) -> EvaluatedPolicyPaths:
        """Return the folder of its outputs, which is named after everything they depend on."""
        ids = [row["episode_id"] for row in self.requests]
        inputs = [self.policy.fingerprint, {**self.policy.engine.kwargs, "logits_processors": None}, ids]
        return evaluation.policy(self.name, fingerprint(inputs))


def gather_policies(recipe: Recipe, tasks: Sequence[Task], intents: Sequence[EvaluatedIntent]) -> list[EvaluatedPolicy]:
    """Return the policies that the recipe evaluates, the student first.

    Raises:
        UserError: there is no student yet, or a model is missing.
    """
    config = recipe.evaluate
    student, vocabulary = student_policy(Run(recipe.storage).student.folder, config.sampling, config.engine, config.placement)
    requests = student_requests(student, vocabulary, tasks, intents, recipe)
    policies = [EvaluatedPolicy("student", student, requests)]
    if config.teacher:
        policies.append(_with_requests("teacher", teacher_policy(recipe.teacher, tasks), tasks, intents, recipe))
    for baseline in config.baselines:
        policy = dataclasses.replace(teacher_policy(_as_teacher(baseline), tasks), name=baseline.name)
        policies.append(_with_requests("baseline", policy, tasks, intents, recipe))
    return policies


def _as_teacher(baseline: Baseline) -> Teacher:
    return Teacher(**{name: getattr(baseline, name) for name in Baseline.model_fields if name != "name"})


def _with_requests(
    kind: Literal["teacher", "baseline"],
    policy: Policy,
    tasks: Sequence[Task],
    intents: Sequence[EvaluatedIntent],
    recipe: Recipe,
) -> EvaluatedPolicy:
    """Add the requests of a policy that takes no commands."""
    requests = [
        {**key_columns(policy, intent_id, text, task.name, variation), "probe": "default"}
        for intent_id, text, _ in intents
        for task in tasks
        for variation in range(recipe.evaluate.samples)
    ]
    # A pool that is sized to write millions of episodes would wait for machines that an evaluation does not need.
    replicas = min(policy.placement.replicas, max(1, recipe.evaluate.placement.replicas))
    placement = policy.placement.model_copy(update={"replicas": replicas})
    return EvaluatedPolicy(kind, dataclasses.replace(policy, placement=placement), requests)


def student_requests(
    policy: Policy, vocabulary: CommandVocabulary, tasks: Sequence[Task], intents: Sequence[EvaluatedIntent], recipe: Recipe
) -> list[Row]:
    """Return the student's requests: every intent at the default command, and sweeps of length and reward on some of them.

    The requests of an intent are adjacent, so that the engine's prefix cache is used.
    """
    # Intents of the sweeps are spread over all of them: a source may be sorted.
    n_swept = min(recipe.evaluate.sweep_intents, len(intents))
    swept = {intents[i][0] for i in np.linspace(0, len(intents) - 1, n_swept).round().astype(int)}
    rows = []
    for task in tasks:
        commands = _commands(vocabulary, task.name, recipe)
        for intent_id, text, _ in intents:
            for probe, number, words, reward in commands:
                if probe != "default" and intent_id not in swept:
                    continue
                variation = FIRST_VARIATION[probe] + number
                row = key_columns(policy, intent_id, text, task.name, variation, command_words=words, command_reward=reward)
                rows.append({**row, "probe": probe})
    positions = {intent.intent_id: i for i, intent in enumerate(intents)}
    return sorted(rows, key=lambda row: positions[row["intent_id"]])


def _commands(vocabulary: CommandVocabulary, task: str, recipe: Recipe) -> list[tuple[str, int, int, int]]:
    """(probe, number of the sample, words, reward bin) of every request for one intent."""
    config, default = recipe.evaluate, vocabulary.default(task)
    if not takes_commands(vocabulary):
        return [("default", sample, default.words, default.reward) for sample in range(config.samples)]
    words = default.words if config.words is None else config.words
    reward = default.reward if config.reward is None else config.reward
    lengths = config.lengths or usual_lengths(vocabulary, task)
    return [
        *(("default", sample, words, reward) for sample in range(config.samples)),
        *(("length", 0, n, reward) for n in lengths),
        *(("reach", 0, n, reward) for n in unusual_lengths(vocabulary, task) if n not in lengths),
        *(("reward", 0, words, level) for level in range(vocabulary.reward_bins)),
    ]


def takes_commands(vocabulary: CommandVocabulary) -> bool:
    """Whether the student was trained to follow commands; a plainly fine-tuned one knows only the task."""
    return vocabulary.objective == "udrl"


def usual_lengths(vocabulary: CommandVocabulary, task: str, steps: int = 5) -> list[int]:
    """Return evenly spaced in-distribution lengths: the 5th to the 95th percentile of the task's training episodes."""
    low, high = _usual_range(vocabulary, task)
    return sorted({int(n) for n in np.linspace(low, high, steps).round()})


def unusual_lengths(vocabulary: CommandVocabulary, task: str) -> list[int]:
    """Return lengths outside that range: half of its lower end, the middle between its upper end and the cap, and the cap."""
    low, high = _usual_range(vocabulary, task)
    lengths = {low // 2, (high + vocabulary.max_words + 1) // 2, vocabulary.max_words}
    return sorted(n for n in lengths if 1 <= n < low or high < n <= vocabulary.max_words)


def _usual_range(vocabulary: CommandVocabulary, task: str) -> tuple[int, int]:
    low, _, high = (min(max(n, 1), vocabulary.max_words) for n in vocabulary.tasks[task].words)
    return low, high
