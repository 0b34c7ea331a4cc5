"""Requests: intents x tasks x samples, cut into shards, each request with the key columns of its episode."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow.parquet as pq

from udrl import storage
from udrl.commands import ANY
from udrl.hashing import stable_id
from udrl.policies.policy import Policy, Row


@dataclass(frozen=True)
class Requests:
    """A sharded set of requests.

    ``rows(shard)`` runs in a Ray task and yields rows with the key columns of an episode.
    """

    total: int
    shards: int
    rows: Callable[[int], Iterator[Row]]
    shard_size: Callable[[int], int]

    @classmethod
    def of_rows(cls, rows: list[Row], size: int) -> "Requests":
        """Cut a list that fits in memory into shards of ``size`` requests."""
        shards = [rows[i : i + size] for i in range(0, len(rows), size)]
        return cls(len(rows), len(shards), lambda shard: iter(shards[shard]), lambda shard: len(shards[shard]))


def key_columns(
    policy: Policy,
    intent_id: int,
    intent: str,
    task: str,
    variation: int,
    *,
    round: int = 0,
    command_words: int = ANY,
    command_reward: int = ANY,
    prompts: int = 1,
) -> Row:
    """Return the key columns of one request, except those of its policy.

    ``prompts`` is the number of prompts that it asks for. The id covers everything in which two requests of a run can differ.
    """
    structured = ("prompts", prompts) if prompts > 1 else ()
    parts = (policy.fingerprint, intent_id, task, variation, round, command_words, command_reward, *structured)
    return {
        "episode_id": stable_id(*parts),
        "intent_id": intent_id,
        "intent": intent,
        "task": task,
        "round": round,
        "variation": variation,
        "command_words": command_words,
        "command_reward": command_reward,
        "prompts": prompts,
    }


def intent_requests(
    policy: Policy,
    intents: str,
    tasks: Sequence[str],
    samples: int,
    shard_size: int,
    structured: Mapping[str, int] | None = None,
) -> Requests:
    """Return requests for every intent x every task x ``samples`` prompts.

    ``intents`` is a Parquet file; no list of requests is made in memory. A task in ``structured`` gets that many prompts from
    one request, fewer from the last of an intent; ``variation`` is then the number of the first prompt. The result counts
    requests, not prompts.
    """
    n_intents = count_intents(intents)
    groups_by_task = {task: _group_samples(samples, (structured or {}).get(task, 1)) for task in tasks}
    per_intent = sum(map(len, groups_by_task.values()))
    intents_per_shard = max(1, shard_size // per_intent)
    shards = -(-n_intents // intents_per_shard)

    def rows(shard: int) -> Iterator[Row]:
        start = shard * intents_per_shard
        for intent_id, intent in read_intents(intents, np.arange(start, min(start + intents_per_shard, n_intents))):
            for task, groups in groups_by_task.items():
                for variation, prompts in groups:
                    yield key_columns(policy, intent_id, intent, task, variation, prompts=prompts)

    def size(shard: int) -> int:
        return (min((shard + 1) * intents_per_shard, n_intents) - shard * intents_per_shard) * per_intent

    return Requests(n_intents * per_intent, shards, rows, size)


def count_intents(uri: str) -> int:
    """Return the number of rows of an intents file, from its footer."""
    fs, path = storage.open_filesystem(uri)
    with fs.open_input_file(path) as source:
        return pq.ParquetFile(source).metadata.num_rows


def read_intents(uri: str, positions: np.ndarray) -> Iterator[tuple[int, str]]:
    """Yield (id, text) of the intents at these row numbers, in ascending order.

    Row groups without any of them are not read.
    """
    fs, path = storage.open_filesystem(uri)
    with fs.open_input_file(path) as source:
        file = pq.ParquetFile(source)
        offset = 0
        for group in range(file.num_row_groups):
            n = file.metadata.row_group(group).num_rows
            in_group = positions[(positions >= offset) & (positions < offset + n)] - offset
            if len(in_group):
                table = file.read_row_group(group, columns=["intent_id", "intent"]).take(in_group)
                yield from zip(table.column("intent_id").to_pylist(), table.column("intent").to_pylist(), strict=True)
            offset += n


def _group_samples(samples: int, group_size: int) -> list[tuple[int, int]]:
    """Return (first variation, prompts) of each request for an intent and task."""
    return [(first, min(group_size, samples - first)) for first in range(0, samples, group_size)]
