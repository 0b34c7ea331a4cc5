"""The teacher as a policy, and the requests that a run makes of it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import pyarrow.parquet as pq

from udrl import models, storage
from udrl.commands import ANY
from udrl.episodes import stable_id
from udrl.policies.engine import Requests
from udrl.policies.policy import Policy, Row
from udrl.recipe import Teacher
from udrl.tasks import Task, render_chat, render_completion


@dataclass(frozen=True)
class _Render:
    """Request row -> few-shot text, or the token ids of a chat."""

    tasks: dict[str, Task]
    chat: bool
    path: str
    revision: str | None

    def __call__(self, row: Row) -> dict[str, Any]:
        task = self.tasks[row["task"]]
        if not self.chat:
            return {"prompt": render_completion(task, row["intent"])}
        tokenizer = _tokenizer(self.path, self.revision)
        # Ids, not text: a Llama 3 template writes its own begin-of-text token, and the engine would put another before it.
        messages = render_chat(task, row["intent"])
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
        return {"tokenized_prompt": ids}


@lru_cache(maxsize=2)
def _tokenizer(path: str, revision: str | None) -> Any:
    """Loaded once a worker process, not once a task."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path, revision=revision)


def teacher_policy(config: Teacher, tasks: Sequence[Task]) -> Policy:
    """The teacher with the few-shot templates of ``tasks``."""
    chat = config.style == "chat"
    path = models.resolve(config.model)
    return Policy(
        name="teacher",
        model=config.model,
        path=path,
        revision=models.revision(config.model, config.revision),
        render=_Render({t.name: t for t in tasks}, chat, path, config.revision),
        sampling=config.sampling,
        engine=config.engine,
        placement=config.placement,
        stop=() if chat else ("\n",),
        describe={"style": config.style, "tasks": [t.model_dump(exclude={"format"}) for t in tasks]},
    )


def key_columns(policy: Policy, intent_id: int, intent: str, task: str, variation: int, **more: Any) -> Row:
    """The key columns of one request that its policy does not give.

    The id covers everything that tells two requests of a run apart.
    """
    words, reward, round_ = more.get("command_words", ANY), more.get("command_reward", ANY), more.get("round", 0)
    return {
        "episode_id": stable_id(policy.fingerprint, intent_id, task, variation, round_, words, reward),
        "intent_id": intent_id,
        "intent": intent,
        "task": task,
        "round": round_,
        "variation": variation,
        "command_words": words,
        "command_reward": reward,
    }


def intent_requests(policy: Policy, intents: str, tasks: Sequence[str], samples: int, shard_size: int) -> Requests:
    """Every intent of a Parquet file x every task x ``samples``, cut into shards by arithmetic: nothing is listed."""
    fs, path = storage.open_filesystem(intents)
    with fs.open_input_file(path) as source:
        n_intents = pq.ParquetFile(source).metadata.num_rows
    per_intent = len(tasks) * samples
    intents_per_shard = max(1, shard_size // per_intent)
    shards = -(-n_intents // intents_per_shard)

    def rows(shard: int) -> Iterator[Row]:
        start = shard * intents_per_shard
        for intent_id, intent in _slice(intents, start, min(start + intents_per_shard, n_intents)):
            for task in tasks:
                for variation in range(samples):
                    yield key_columns(policy, intent_id, intent, task, variation)

    def size(shard: int) -> int:
        return (min((shard + 1) * intents_per_shard, n_intents) - shard * intents_per_shard) * per_intent

    return Requests(n_intents * per_intent, shards, rows, size)


def _slice(uri: str, start: int, stop: int) -> Iterator[tuple[int, str]]:
    """Rows [start, stop) of an intents file, reading the row groups that hold them and no others."""
    fs, path = storage.open_filesystem(uri)
    with fs.open_input_file(path) as source:
        file = pq.ParquetFile(source)
        offset = 0
        for group in range(file.num_row_groups):
            n = file.metadata.row_group(group).num_rows
            if offset < stop and offset + n > start:
                table = file.read_row_group(group, columns=["intent_id", "intent"])
                part = table.slice(max(start - offset, 0), min(stop, offset + n) - max(start, offset))
                yield from zip(part.column("intent_id").to_pylist(), part.column("intent").to_pylist(), strict=True)
            offset += n
