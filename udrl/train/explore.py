"""A round's exploration: the student writes for training intents under commands from just above what the buffer achieved.

The reward that is asked for is drawn from U[M, M + S], M and S the mean and standard deviation of the best episodes, and the
length from theirs (Srivastava et al. 2019, arXiv 1912.02877, algorithm 2: there, too, a return and a horizon). Draws are made
request by request from a hash, so a request asks for the same whoever makes it and however often.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field

from udrl import cluster, storage
from udrl.commands import ANY, Command, CommandVocabulary
from udrl.context import StageContext
from udrl.errors import UserError
from udrl.generate.expand import TRAIN
from udrl.generate.prepare import shard_size
from udrl.generate.stage import Inspect
from udrl.hashing import differences, fingerprint, stable_id
from udrl.policies.policy import Policy, Row
from udrl.policies.requests import Requests, count_intents, key_columns, read_intents
from udrl.policies.stage import complete
from udrl.policies.statistics import CompletionStatistics
from udrl.policies.student import student_policy
from udrl.recipe import Recipe
from udrl.tasks import Task
from udrl.train.achieved import best, counted
from udrl.train.hindsight import find_bins

DRAWS = "commands.json"


class Draw(BaseModel):
    """What one task's commands are drawn from."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    mean: float = Field(description="M: mean reward of the buffer's best episodes")
    sd: float = Field(description="S: its standard deviation")
    edges: list[float] = Field(description="of the student's reward bins; empty: every command asks for the top bin")
    bins: int = Field(description="reward bins of the student")
    lengths: list[float] = Field(description="of the best episodes, how many have 1, 2, ... words")

    def command(self, task: str, *key: object) -> Command:
        """The command of the request that ``key`` names."""
        rng = np.random.default_rng(stable_id("command", task, *key))
        wanted, place = rng.uniform(self.mean, self.mean + self.sd), rng.random()
        reward = int(find_bins(np.array([wanted]), self.edges)[0]) if self.edges else self.bins - 1
        up_to = np.cumsum(self.lengths)
        # A task whose best prompts are all over the longest command leaves the length open.
        words = 1 + int(np.searchsorted(up_to, place * up_to[-1], side="right")) if sum(self.lengths) else ANY
        return Command(task=task, words=words, reward=reward)


def draws(buffer: pa.Table, vocabulary: CommandVocabulary, share: float) -> dict[str, Draw]:
    """What to draw from, task by task, given the buffer's tally and the commands of the student that will be asked.

    Bins ranked within the intent say nothing of a reward's height, so there the top bin is asked for.
    """
    found = {}
    for task, learnt in vocabulary.tasks.items():
        top = best(buffer, task, share)
        found[task] = Draw(
            mean=top.mean,
            sd=top.sd,
            edges=learnt.edges if vocabulary.rank_within == "task" else [],
            bins=vocabulary.reward_bins,
            lengths=top.lengths[1 : vocabulary.max_words + 1].tolist(),
        )
    return found


def drawn_places(start: int, stop: int, wanted: int, among: int, *key: object) -> np.ndarray:
    """Positions of the drawn intents ``start`` to ``stop`` of ``wanted``, int64, rising and distinct.

    One is drawn from each of ``wanted`` equal stretches of the file, so that no list of all of them is ever made.
    """
    stretch = np.arange(start, stop + 1) * among // wanted
    width = np.diff(stretch)
    chance = np.array([stable_id("intent", *key, i) for i in range(start, stop)], dtype=np.int64)
    return stretch[:-1] + chance % width


def requests(
    policy: Policy, intents: str, wanted: int, samples: int, drawn: Mapping[str, Draw], round_: int, seed: int
) -> Requests:
    """``wanted`` intents of a Parquet file x every task x ``samples``, each under a command of its own; cut lazily."""
    among = count_intents(intents)
    wanted = min(wanted, among)
    per_intent = len(drawn) * samples
    per_shard = max(1, shard_size(wanted * per_intent) // per_intent)

    def stop(shard: int) -> int:
        return min((shard + 1) * per_shard, wanted)

    def rows(shard: int) -> Iterator[Row]:
        places = drawn_places(shard * per_shard, stop(shard), wanted, among, seed, round_)
        for intent_id, intent in read_intents(intents, places):
            for task, draw in drawn.items():
                for variation in range(samples):
                    asked = draw.command(task, seed, round_, intent_id, variation)
                    more = {"command_words": asked.words, "command_reward": asked.reward, "round": round_}
                    yield key_columns(policy, intent_id, intent, task, variation, **more)

    def size(shard: int) -> int:
        return (stop(shard) - shard * per_shard) * per_intent

    return Requests(wanted * per_intent, -(-wanted // per_shard), rows, size)


@dataclass(frozen=True)
class Plan:
    """One round's exploration, before it is made: ``facts`` is all that its rows depend on, ``mark`` their hash. ``intents``
    says how many are asked about."""

    round: int
    policy: Policy
    vocabulary: CommandVocabulary
    source: str
    intents: int
    facts: dict[str, Any]
    mark: str
    ledgers: str  # the folder of this round's, one a mark

    @property
    def ledger(self) -> str:
        return storage.join(self.ledgers, self.mark)


def plan(recipe: Recipe, round_: int, student: str, folder: str) -> Plan:
    """What the student in the folder ``student`` will be asked in a round that lies in ``folder``.

    Raises:
        UserError: the run's intents are gone, or there is no student.
    """
    config = recipe.explore
    policy, vocabulary = student_policy(student, config.sampling, config.engine, config.placement)
    source = training_intents(recipe)
    intents = min(config.intents or sys.maxsize, count_intents(source))
    facts = {
        # The student's revision stands for the buffer that it learnt from, and so for what commands are drawn from.
        "student": policy.fingerprint_inputs(),
        "round": round_,
        "intents": intents,
        "intents_source": source.split("/intents/")[-1],
        "samples": config.samples,
        "top_share": config.top_share,
        "tasks": list(vocabulary.tasks),
        "seed": recipe.seed,
    }
    return Plan(round_, policy, vocabulary, source, intents, facts, fingerprint(facts), storage.join(folder, "completions"))


def training_intents(recipe: Recipe) -> str:
    """The Parquet file of the run's training intents, grown ones included."""
    run = recipe.episodes_storage()
    summary = storage.join(run, "generate.json")
    name = storage.read_json(summary).get("intents") if storage.exists(summary) else None
    for file in (TRAIN, "train.parquet"):
        uri = storage.join(run, "intents", str(name), file)
        if name and storage.exists(uri):
            return uri
    raise UserError(f"{run}: no training intents of a finished generate stage; run jobs.generate first")


def explore(
    recipe: Recipe, what: Plan, tasks: Sequence[Task], buffer: Sequence[str], context: StageContext
) -> CompletionStatistics:
    """Let the student write what is missing of ``what``; ``buffer`` are the folders of the earlier rounds' episodes.

    Raises:
        UserError: this round was explored with other settings, under ``resume: always``; or the engine can't be had.
        StalledError: nothing was written for ``recipe.watchdog_minutes``.
    """
    _refuse_changes(recipe, what)
    storage.write_json(storage.join(what.ledger, "about.json"), what.facts)
    drawn = _drawn(recipe, what, buffer)
    asked = requests(what.policy, what.source, what.intents, recipe.explore.samples, drawn, what.round, recipe.seed)
    print(
        f"round {what.round}: {what.intents:,} intents x {len(drawn)} tasks x {recipe.explore.samples} samples ="
        f" {asked.total:,} prompts by the student of round {what.round - 1}",
        file=sys.stderr,
    )
    cluster.connect()
    return complete(
        what.policy,
        asked,
        what.ledger,
        f"round {what.round}: explore",
        inspect=Inspect(tasks),
        context=context,
    )


def _drawn(recipe: Recipe, what: Plan, buffer: Sequence[str]) -> dict[str, Draw]:
    """What commands are drawn from. Kept beside the rows: sums in another order would draw other commands on a rerun."""
    uri = storage.join(what.ledger, DRAWS)
    if not storage.exists(uri):
        found = draws(counted(buffer), what.vocabulary, recipe.explore.top_share)
        storage.write_json(uri, {task: draw.model_dump() for task, draw in found.items()})
    # In the order of the tasks, whatever the file's: requests are cut in it.
    kept = storage.read_json(uri)
    return {task: Draw.model_validate(kept[task]) for task in what.vocabulary.tasks}


def _refuse_changes(recipe: Recipe, what: Plan) -> None:
    """A ledger of other settings is never mixed with, and under ``resume: always`` not left behind either."""
    others = storage.list_folders(what.ledgers)
    if what.mark in others or not others:
        return
    old = storage.read_json(storage.join(what.ledgers, others[-1], "about.json"))
    changed = "; ".join(differences(old, what.facts)[:5])
    if recipe.resume == "always":
        raise UserError(
            f"round {what.round}: explored with other settings: {changed}; undo the change, or set resume=if_possible to"
            " start anew beside it"
        )
    print(f"round {what.round}: {changed}; starting anew, the old completions stay in {what.ledgers}", file=sys.stderr)
