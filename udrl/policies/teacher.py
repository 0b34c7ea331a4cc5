"""The teacher as a policy, and the requests that a run makes of it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from udrl import models, storage
from udrl.commands import ANY
from udrl.errors import UserError
from udrl.hashing import stable_id
from udrl.policies.ledger import Requests
from udrl.policies.policy import Policy, Row
from udrl.recipe import Teacher
from udrl.tasks import Task, render_chat, render_chat_json, render_completion, render_completion_json


@dataclass(frozen=True)
class _Render:
    """Request row -> few-shot text, or the token ids of a chat; for several prompts at once, their JSON guided."""

    tasks: dict[str, Task]
    chat: bool
    path: str
    revision: str | None
    max_tokens: int  # of one prompt

    def __call__(self, row: Row) -> dict[str, Any]:
        task, intent, n = self.tasks[row["task"]], row["intent"], row["prompts"]
        # The newline that ends a plain completion must not end JSON: a model may write one before it.
        guided = {"max_tokens": n * self.max_tokens + _FRAME_TOKENS, "stop": [], "structured_outputs": json_of(task, n)}
        more = {"sampling": guided} if n > 1 else {}
        if not self.chat:
            return {"prompt": render_completion_json(task, intent, n) if n > 1 else render_completion(task, intent), **more}
        messages = render_chat_json(task, intent, n) if n > 1 else render_chat(task, intent)
        return {"tokenized_prompt": chat_ids(self.path, self.revision, messages), **more}


_FRAME_TOKENS = 16  # {"prompts": [ and ]} in any tokenizer; each further prompt has its own share
_LONGEST_WORD = 40  # characters


def json_of(task: Task, n: int) -> dict[str, Any]:
    """``vllm.sampling_params.StructuredOutputsParams`` for ``{"prompts": [...]}`` with exactly ``n`` strings.

    A regular expression and no JSON schema: a schema leaves white space free unless the whole engine is told otherwise,
    and a weak model then fills its budget with it. A string may be one word longer than the task allows, so that what
    finds no end is rejected for its length and not cut to fit. Bounds stand on single character classes (here one bounds
    a word): xgrammar takes 0.1 ms a token for this, and 150 to 360 ms where a bounded repetition holds alternatives.
    """
    word = rf'(\\")?[^"\\\x00-\x20]{{1,{_LONGEST_WORD}}}(\\")?[.,;:!?]?'
    text = rf'"{word}( {word}){{0,{task.format.max_words}}}"'
    return {"regex": rf' ?\{{"prompts": \[{text}(, {text}){{{n - 1}}}\]\}}'}


def chat_ids(path: str, revision: str | None, messages: list[dict[str, str]]) -> list[int]:
    """Token ids of ``messages`` and the opening of the answer.

    Ids, not text: a Llama 3 template writes its own begin-of-text token, and the engine would put another before it.
    """
    tokenizer = _tokenizer(path, revision)
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)


@lru_cache(maxsize=2)
def _tokenizer(path: str, revision: str | None) -> Any:
    """Loaded once a worker process, not once a task."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path, revision=revision)


def teacher_policy(config: Teacher, tasks: Sequence[Task]) -> Policy:
    """The teacher with the few-shot templates of ``tasks``.

    Raises:
        UserError: ``teacher.structured`` names a task that the run does not have, or a number out of range.
    """
    chat = config.style == "chat"
    path = models.resolve(config.model)
    describe: dict[str, Any] = {"style": config.style, "tasks": [t.model_dump(exclude={"format"}) for t in tasks]}
    if config.structured:
        _check_structured(config.structured, tasks)
        of_task = {t.name: json_of(t, config.structured[t.name]) for t in tasks if t.name in config.structured}
        describe["structured"] = {name: [config.structured[name], guide] for name, guide in of_task.items()}
    return Policy(
        name="teacher",
        model=config.model,
        path=path,
        revision=models.revision(config.model, config.revision),
        render=_Render({t.name: t for t in tasks}, chat, path, config.revision, config.sampling.max_tokens),
        sampling=config.sampling,
        engine=config.engine,
        placement=config.placement,
        stop=() if chat else ("\n",),
        describe=describe,
    )


def _check_structured(structured: dict[str, int], tasks: Sequence[Task]) -> None:
    known = [t.name for t in tasks]
    problems = [
        f"teacher.structured.{name}: no such task in this run; its tasks are {', '.join(known)}"
        for name in structured
        if name not in known
    ]
    problems += [
        f"teacher.structured.{name}: {n} prompts in one request; 1 to {_MOST_PROMPTS} are allowed"
        for name, n in structured.items()
        if not 1 <= n <= _MOST_PROMPTS
    ]
    if problems:
        raise UserError("\n".join(problems))


_MOST_PROMPTS = 32


def key_columns(policy: Policy, intent_id: int, intent: str, task: str, variation: int, **more: Any) -> Row:
    """The key columns of one request that its policy does not give, and ``prompts``, how many prompts it asks for.

    The id covers everything that tells two requests of a run apart.
    """
    words, reward, round_ = more.get("command_words", ANY), more.get("command_reward", ANY), more.get("round", 0)
    prompts = more.get("prompts", 1)
    structured = ("prompts", prompts) if prompts > 1 else ()
    return {
        "episode_id": stable_id(policy.fingerprint, intent_id, task, variation, round_, words, reward, *structured),
        "intent_id": intent_id,
        "intent": intent,
        "task": task,
        "round": round_,
        "variation": variation,
        "command_words": words,
        "command_reward": reward,
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
    """Every intent of a Parquet file x every task x ``samples``, cut into shards by arithmetic: nothing is listed.

    ``samples`` counts prompts. A task in ``structured`` asks for that many in one request, the last for what remains, and
    such a row's ``variation`` is that of its first prompt. The result counts requests, not prompts.
    """
    n_intents = count_intents(intents)
    of_task = {task: _groups(samples, (structured or {}).get(task, 1)) for task in tasks}
    per_intent = sum(map(len, of_task.values()))
    intents_per_shard = max(1, shard_size // per_intent)
    shards = -(-n_intents // intents_per_shard)

    def rows(shard: int) -> Iterator[Row]:
        start = shard * intents_per_shard
        for intent_id, intent in read_intents(intents, np.arange(start, min(start + intents_per_shard, n_intents))):
            for task, groups in of_task.items():
                for variation, prompts in groups:
                    yield key_columns(policy, intent_id, intent, task, variation, prompts=prompts)

    def size(shard: int) -> int:
        return (min((shard + 1) * intents_per_shard, n_intents) - shard * intents_per_shard) * per_intent

    return Requests(n_intents * per_intent, shards, rows, size)


def count_intents(uri: str) -> int:
    """Rows of an intents file, from its footer."""
    fs, path = storage.open_filesystem(uri)
    with fs.open_input_file(path) as source:
        return pq.ParquetFile(source).metadata.num_rows


def read_intents(uri: str, places: np.ndarray) -> Iterator[tuple[int, str]]:
    """(id, text) of the intents at ``places``, in rising order, reading the row groups that hold them and no others."""
    fs, path = storage.open_filesystem(uri)
    with fs.open_input_file(path) as source:
        file = pq.ParquetFile(source)
        offset = 0
        for group in range(file.num_row_groups):
            n = file.metadata.row_group(group).num_rows
            mine = places[(places >= offset) & (places < offset + n)] - offset
            if len(mine):
                table = file.read_row_group(group, columns=["intent_id", "intent"]).take(mine)
                yield from zip(table.column("intent_id").to_pylist(), table.column("intent").to_pylist(), strict=True)
            offset += n


def _groups(samples: int, at_once: int) -> list[tuple[int, int]]:
    """(first variation, prompts) of each request for one intent and task."""
    return [(first, min(at_once, samples - first)) for first in range(0, samples, at_once)]
