"""Exploration: the student of the last round writes prompts under commands from just above the buffer's best rewards.

The commanded reward is drawn from U[M, M + S], where M and S are the mean and standard deviation of the best episodes, and the
commanded length from theirs (Srivastava et al. 2019, arXiv 1912.02877, algorithm 2, which also draws a return and a horizon).
Every draw is a hash of its request, so a request has the same command on every machine and in every rerun.
"""

import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import ConfigDict, Field, model_validator

from udrl import cluster, storage
from udrl.commands import ANY, Command, CommandVocabulary
from udrl.context import StageContext
from udrl.errors import UserError
from udrl.generate.stage import RejectInspector, default_shard_size
from udrl.hashing import stable_id
from udrl.policies.policy import Policy, Row
from udrl.policies.requests import Requests, count_intents, key_columns, read_intents
from udrl.policies.stage import complete
from udrl.policies.student import student_policy
from udrl.recipe import Recipe
from udrl.run import Document, GenerateSummary, Manifest, Run
from udrl.tasks import Task
from udrl.train.hindsight import find_bins
from udrl.train.round_statistics import best_episodes, count_folders

log = logging.getLogger(__name__)

# ---- commands


class CommandDistribution(Document):
    """The distribution that one task's commands are drawn from."""

    model_config = ConfigDict(frozen=True)
    mean: float = Field(description="M: mean reward of the buffer's best episodes")
    sd: float = Field(description="S: its standard deviation")
    edges: list[float] = Field(description="of the student's reward bins; if empty, every command asks for the top bin")
    bins: int = Field(description="reward bins of the student")
    lengths: list[float] = Field(description="number of the best episodes with 1, 2, ... words")

    def draw(self, task: str, *key: object) -> Command:
        """Draw the command of the request that ``key`` identifies."""
        rng = np.random.default_rng(stable_id("command", task, *key))
        desired_reward, quantile = rng.uniform(self.mean, self.mean + self.sd), rng.random()
        reward = int(find_bins(np.array([desired_reward]), self.edges)[0]) if self.edges else self.bins - 1
        if not sum(self.lengths):  # all of the task's best prompts are longer than the longest command
            return Command(task=task, words=ANY, reward=reward)
        cumulative = np.cumsum(self.lengths)
        words = 1 + int(np.searchsorted(cumulative, quantile * cumulative[-1], side="right"))
        return Command(task=task, words=words, reward=reward)


class CommandDistributions(Document):
    """``commands.json`` of a round's ledger: the distribution of each task."""

    tasks: dict[str, CommandDistribution]

    @model_validator(mode="before")
    @classmethod
    def _accept_tasks_only(cls, value: Any) -> Any:
        """Runs made before 2026-11-25 have the tasks at the top level."""
        return value if "tasks" in value else {"tasks": value}


def fit_command_distributions(
    counts: pa.Table, vocabulary: CommandVocabulary, top_share: float
) -> dict[str, CommandDistribution]:
    """Fit each task's distribution to the counts of the buffer, in the bins of the student that will explore.

    Bins that are ranked within the intent say nothing about a reward's height; commands then ask for the top bin.
    """
    distributions = {}
    for task, task_commands in vocabulary.tasks.items():
        best = best_episodes(counts, task, top_share)
        distributions[task] = CommandDistribution(
            mean=best.mean,
            sd=best.sd,
            edges=task_commands.edges if vocabulary.rank_within == "task" else [],
            bins=vocabulary.reward_bins,
            lengths=best.lengths[1 : vocabulary.max_words + 1].tolist(),
        )
    return distributions


# ---- requests


def draw_positions(start: int, stop: int, n_drawn: int, n_intents: int, *key: object) -> np.ndarray:
    """Return the file positions of drawn intents ``start`` to ``stop``; int64, rising and distinct.

    The file is divided into ``n_drawn`` equal stretches, and one of the intents of each is drawn, so that no list of all
    positions is ever made.
    """
    bounds = np.arange(start, stop + 1) * n_intents // n_drawn
    offsets = np.array([stable_id("intent", *key, i) for i in range(start, stop)], dtype=np.int64)
    return bounds[:-1] + offsets % np.diff(bounds)


def exploration_requests(
    policy: Policy,
    intents: str,
    n_intents: int,
    samples: int,
    distributions: Mapping[str, CommandDistribution],
    round_: int,
    seed: int,
) -> Requests:
    """Return requests for ``n_intents`` of a file x every task x ``samples``, each under its own command; cut lazily."""
    n_in_file = count_intents(intents)
    n_drawn = min(n_intents, n_in_file)
    per_intent = len(distributions) * samples
    per_shard = max(1, default_shard_size(n_drawn * per_intent) // per_intent)

    def bounds(shard: int) -> tuple[int, int]:
        return shard * per_shard, min((shard + 1) * per_shard, n_drawn)

    def rows(shard: int) -> Iterator[Row]:
        positions = draw_positions(*bounds(shard), n_drawn, n_in_file, seed, round_)
        for intent_id, intent in read_intents(intents, positions):
            for task, distribution in distributions.items():
                for variation in range(samples):
                    command = distribution.draw(task, seed, round_, intent_id, variation)
                    columns = {"command_words": command.words, "command_reward": command.reward, "round": round_}
                    yield key_columns(policy, intent_id, intent, task, variation, **columns)

    def size(shard: int) -> int:
        start, stop = bounds(shard)
        return (stop - start) * per_intent

    return Requests(n_drawn * per_intent, -(-n_drawn // per_shard), rows, size)


# ---- one round's exploration


@dataclass(frozen=True)
class Exploration:
    """One round's exploration before it starts."""

    round: int
    policy: Policy
    vocabulary: CommandVocabulary
    intents: str  # URI of the training intents
    n_intents: int  # intents to write for
    samples: int  # prompts for each intent and task
    manifest: Manifest  # of everything that the ledger's rows depend on
    ledgers: str  # URI of the folder of the round's ledgers

    @property
    def ledger(self) -> str:
        return storage.join(self.ledgers, self.manifest.fingerprint)

    @property
    def n_prompts(self) -> int:
        return self.n_intents * len(self.vocabulary.tasks) * self.samples


def plan_exploration(recipe: Recipe, round_: int) -> Exploration:
    """Plan a round's exploration by the student of the round before.

    Raises:
        UserError: the run's intents are gone, or there is no student.
    """
    config, run = recipe.explore, Run(recipe.storage)
    student = run.round(round_ - 1).student.folder
    policy, vocabulary = student_policy(student, config.sampling, config.engine, config.placement)
    intents = training_intents(recipe)
    n_intents = min(config.intents or sys.maxsize, count_intents(intents))
    inputs = {  # the keys are part of existing runs' fingerprints
        # The student's revision identifies the buffer that it was trained on, and so the distributions of its commands.
        "student": policy.fingerprint_inputs(),
        "round": round_,
        "intents": n_intents,
        "intents_source": intents.split("/intents/")[-1],
        "samples": config.samples,
        "top_share": config.top_share,
        "tasks": list(vocabulary.tasks),
        "seed": recipe.seed,
    }
    ledgers = run.round(round_).scoring.ledgers
    return Exploration(round_, policy, vocabulary, intents, n_intents, config.samples, Manifest.of(inputs), ledgers)


def training_intents(recipe: Recipe) -> str:
    """Return the Parquet file of the run's training intents, including those grown by the teacher.

    Raises:
        UserError: there is no finished generate stage.
    """
    run = Run(recipe.episodes_storage())
    summary = GenerateSummary.load_if_exists(run.generate_summary)
    if summary and summary.intents:
        paths = run.intents(summary.intents)
        for uri in (paths.train_expanded, paths.train):
            if storage.exists(uri):
                return uri
    raise UserError(f"{run.storage}: no training intents of a finished generate stage; run jobs.generate first")


def explore(
    recipe: Recipe, exploration: Exploration, tasks: Sequence[Task], buffer: Sequence[str], context: StageContext
) -> None:
    """Let the student write the prompts that the round's ledger lacks.

    Args:
        recipe: of the run.
        exploration: of the round.
        tasks: of the run.
        buffer: folders of the earlier rounds' episodes.
        context: of the stage.

    Raises:
        UserError: the round was explored with other settings, under ``resume: always``; or the engine can't be placed.
        StalledError: nothing was written for ``recipe.watchdog_minutes``.
    """
    round_ = exploration.round
    _check_other_ledgers(recipe, exploration)
    exploration.manifest.save_to(exploration.ledger)
    distributions = _load_or_fit_distributions(recipe, exploration, buffer)
    requests = exploration_requests(
        exploration.policy,
        exploration.intents,
        exploration.n_intents,
        exploration.samples,
        distributions,
        round_,
        recipe.seed,
    )
    log.info(
        f"round {round_}: {exploration.n_intents:,} intents x {len(distributions)} tasks x {exploration.samples} samples ="
        f" {requests.total:,} prompts by the student of round {round_ - 1}"
    )
    cluster.connect()
    label = f"round {round_}: explore"
    complete(exploration.policy, requests, exploration.ledger, label, inspect=RejectInspector(tasks), context=context)


def _load_or_fit_distributions(
    recipe: Recipe, exploration: Exploration, buffer: Sequence[str]
) -> dict[str, CommandDistribution]:
    """Return the distributions of a round, from its ledger if it has them.

    They are saved because sums that are added in another order could draw other commands in a rerun.
    """
    uri = storage.join(exploration.ledger, "commands.json")
    saved = CommandDistributions.load_if_exists(uri)
    if not saved:
        fitted = fit_command_distributions(count_folders(buffer), exploration.vocabulary, recipe.explore.top_share)
        saved = CommandDistributions(tasks=fitted)
        saved.save(uri)
    # Requests are cut in the order of the vocabulary's tasks; the file is sorted by name.
    return {task: saved.tasks[task] for task in exploration.vocabulary.tasks}


def _check_other_ledgers(recipe: Recipe, exploration: Exploration) -> None:
    """Refuse to leave a ledger of other settings behind under ``resume: always``; otherwise name the changes."""
    others = storage.list_folders(exploration.ledgers)
    if exploration.manifest.fingerprint in others or not others:
        return
    old = Manifest.load_from(storage.join(exploration.ledgers, others[-1]))
    changes = "; ".join(old.differences(exploration.manifest)[:5]) if old else "settings that were not saved"
    if recipe.resume == "always":
        raise UserError(
            f"round {exploration.round}: explored with other settings: {changes}; undo the change, or set"
            " resume=if_possible to explore it again and keep the old completions"
        )
    log.warning(
        f"round {exploration.round}: explored with other settings: {changes}; exploring it again, the old completions stay in"
        f" {exploration.ledgers}"
    )
