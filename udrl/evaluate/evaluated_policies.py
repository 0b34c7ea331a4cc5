"""The policies that an evaluation runs: the student, its teacher and the baselines, with the requests of each.

All of them go through one vLLM stage with the same task templates, intents and number of samples.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from udrl.commands import CommandVocabulary
from udrl.evaluate.evaluated_intents import EvaluatedIntent
from udrl.hashing import fingerprint
from udrl.policies.policy import Policy, Row
from udrl.policies.requests import key_columns
from udrl.policies.student import student_policy
from udrl.policies.teacher import teacher_policy
from udrl.recipe import Baseline, Recipe, Teacher
from udrl.run import EvaluatedPolicyPaths, EvaluationPaths, Run
from udrl.tasks import Task

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


def gather_policies(
    recipe: Recipe, tasks: Sequence[Task], intents: Sequence[EvaluatedIntent]
) -> tuple[list[EvaluatedPolicy], CommandVocabulary]:
    """Return the policies that the recipe evaluates, the student first, and the student's command vocabulary.

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
    return policies, vocabulary


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
        for intent_id, text in intents
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
        for intent_id, text in intents:
            for probe, number, words, reward in commands:
                if probe != "default" and intent_id not in swept:
                    continue
                variation = FIRST_VARIATION[probe] + number
                row = key_columns(policy, intent_id, text, task.name, variation, command_words=words, command_reward=reward)
                rows.append({**row, "probe": probe})
    positions = {intent_id: i for i, (intent_id, _) in enumerate(intents)}
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
