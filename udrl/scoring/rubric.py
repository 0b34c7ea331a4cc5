"""Relevance by a language model: each prompt is scored against a rubric, as the expectation over the score tokens.

The judge answers with one token. Its distribution tells more than the token drawn: the score is the mean of the scores
under their probabilities (G-Eval, arXiv 2303.16634, section 2), mapped to 0..1. The vLLM stage of the policies is shared.
"""

import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from udrl import models, storage
from udrl.context import DEFAULT_CONTEXT, StageContext
from udrl.hashing import stable_id
from udrl.policies.ledger import list_parts, read_shard
from udrl.policies.policy import Policy, Row
from udrl.policies.requests import Requests, key_columns
from udrl.policies.stage import complete
from udrl.policies.teacher import encode_chat
from udrl.recipe import RubricJudge, Sampling
from udrl.tasks import Task
from udrl.watchdog import iterate_with_watchdog

TOP = 20  # what vLLM gives at most unless told otherwise (max_logprobs)
HALF = 0.5  # a judgement with less of its probability on scores counts as a parse failure

# Ends right before the score: in most vocabularies a digit and the space before it are two tokens.
_FIELDS = "Request: {intent}\n{label}: {prompt}\nScore="
RUBRIC = """\
You judge what was written for {title} from a person's request. Score it from 1 to {top}:
1 = about something else
{low} = names the request but is vague, mostly repeats it, or is hard to read
{high} = keeps all of the request and adds fitting detail
{top} = faithful in every word, specific, fluent, ready to be used
Answer with the number only."""


@dataclass(frozen=True)
class _Render:
    """Request row with the column ``judged`` -> the rubric, graded examples of the row's task, and the pair to grade."""

    tasks: dict[str, Task]
    chat: bool
    path: str
    revision: str | None
    top: int

    def __call__(self, row: Row) -> dict[str, Any]:
        task = self.tasks[row["task"]]
        rubric = RUBRIC.format(title=task.title.lower(), top=self.top, low=round(self.top / 3), high=self.top - 2)
        graded = [(_pair(task, intent, prompt), str(score)) for intent, prompt, score in _graded(task, self.top)]
        asked = _pair(task, row["intent"], row["judged"])
        if not self.chat:
            shots = "".join(f"{pair}{score}\n\n" for pair, score in graded)
            return {"prompt": f"{rubric}\n\n{shots}{asked}"}
        messages = [{"role": "system", "content": rubric}]
        for pair, score in graded:
            messages += [{"role": "user", "content": pair}, {"role": "assistant", "content": score}]
        return {"tokenized_prompt": encode_chat(self.path, self.revision, [*messages, {"role": "user", "content": asked}])}


def _pair(task: Task, intent: str, prompt: str) -> str:
    return _FIELDS.format(intent=" ".join(intent.split()), label=task.label, prompt=" ".join(prompt.split()))


def _graded(task: Task, top: int) -> list[tuple[str, str, int]]:
    """(intent, prompt, score) that show the scale: an example as it is, one under another's intent, one that only repeats."""
    first, second, third = task.examples[:3]
    return [
        (first.intent, first.prompt, top),
        (second.intent, third.prompt, 1),
        (third.intent, third.intent, round(top / 3)),
        (second.intent, second.prompt, top - 1),
        (third.intent, first.prompt, 1),
    ]


def rubric_policy(config: RubricJudge, tasks: Sequence[Task], name: str = "judge") -> Policy:
    """The judge as a policy of the shared stage; a request row carries the prompt to judge as ``judged``."""
    path = models.resolve(config.model)
    chat = config.style == "chat"
    top = highest_score(path, config.revision)
    render = _Render({t.name: t for t in tasks}, chat, path, config.revision, top)
    return Policy(
        name=name,
        model=config.model,
        path=path,
        revision=models.revision(config.model, config.revision),
        render=render,
        sampling=Sampling(temperature=0, min_p=0, max_tokens=1),  # the log-probabilities are those of temperature 1
        engine=config.engine,
        placement=config.placement,
        describe={"style": config.style, "rubric": [RUBRIC, _FIELDS, top], "tasks": facts(tasks)},
        top_tokens=TOP,
    )


def facts(tasks: Sequence[Task]) -> list[dict[str, Any]]:
    """What a judge is shown of each task."""
    shown = {"name", "title", "label"}
    return [{**t.model_dump(include=shown), "examples": [e.model_dump() for e in t.examples[:3]]} for t in tasks]


def reader(policy: Policy) -> "Read":
    """:func:`relevance` on the scale of a :func:`rubric_policy`."""
    return partial(relevance, top=policy.render.top)  # type: ignore[attr-defined]


def highest_score(path: str, revision: str | None) -> int:
    """10 where the tokenizer has one token for it, else 9: of a vocabulary that writes digits one by one (SmolLM2, Qwen),
    the first token of 10 is that of 1."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path, revision=revision)
    one, ten = (tokenizer.encode(f"Score={n}", add_special_tokens=False) for n in (1, 10))
    return 10 if len(one) == len(ten) else 9


def expected_score(tokens: Sequence[str], logprobs: Sequence[float], top: int) -> tuple[float, float]:
    """(expected score, probability on scores) from the likeliest tokens; the expectation is over the scores alone.

    A token is a score if it is a number of 1 to ``top`` but for white space around it. Without any: (nan, 0).
    """
    scores = {str(n): n for n in range(1, top + 1)}
    found = [(scores[t.strip()], math.exp(p)) for t, p in zip(tokens, logprobs, strict=True) if t.strip() in scores]
    mass = sum(p for _, p in found)
    return (sum(score * p for score, p in found) / mass, min(mass, 1.0)) if mass > 0 else (math.nan, 0.0)


def relevance(tokens: Sequence[str], logprobs: Sequence[float], top: int) -> tuple[float, float]:
    """(relevance in 0..1, probability on scores).

    A judgement with little probability on scores still gives its expectation. One with none gives 0: what was not judged
    must not be learnt as good.
    """
    score, mass = expected_score(tokens, logprobs, top)
    # Clipped, since dividing by the mass may round the highest score up.
    return (0.0 if math.isnan(score) else min(max((score - 1) / (top - 1), 0.0), 1.0)), mass


def judge_relevance(
    filtered: str, out: str, config: RubricJudge, tasks: Sequence[Task], context: StageContext = DEFAULT_CONTEXT
) -> Counter[str]:
    """Score the candidates of ``filtered/part-<shard>.parquet`` (rows whose ``reason`` is empty) into files of the same names
    under ``out``: episode_id int64, relevance float32 in 0..1, mass float32, the probability that stood on scores.

    The scale is 1 to 10, or 1 to 9 (see :func:`highest_score`). The share of judgements that did not parse is printed where
    any was made.

    Returns:
        Counts over all files: ``rows``; ``unparsed`` with less than half of the probability on scores; of them ``unjudged``
        without any, whose relevance is 0.

    Raises:
        UserError: the judge can't be placed or refuses every request.
    """
    asked = unanswered(filtered, out)
    if asked:
        policy = rubric_policy(config, tasks)
        answer(filtered, out, policy, reader(policy), context=context)
    counts = count(out)
    if asked:
        print(_report(counts, config.model), file=sys.stderr)
    return counts


def _report(counts: Counter[str], model: str) -> str:
    n = max(counts["rows"], 1)
    return (
        f"judge {model}: {counts['rows']:,} judgements; parse failures {counts['unparsed'] / n:.1%} (less than half of the"
        f" probability on scores), of them {counts['unjudged']:,} without any score, relevance 0"
    )


def count(out: str) -> Counter[str]:
    """Judgements under ``out``, those that did not parse, and those without any answer."""
    counts: Counter[str] = Counter(rows=0, unparsed=0, unjudged=0)
    for of_file in storage.map_files(_count, [storage.join(out, name) for name in _shards(out)]):
        counts.update(of_file)
    return counts


def _count(uri: str) -> dict[str, int]:
    table = storage.read_table(uri, ["mass"])
    mass = np.zeros(0) if "mass" not in table.column_names else table.column("mass").to_numpy()
    return {"rows": len(mass), "unparsed": int((mass < HALF).sum()), "unjudged": int((mass == 0).sum())}


def _shards(folder: str) -> list[str]:
    return [name for name in storage.list_files(folder) if name.startswith("part-")]


def unanswered(filtered: str, out: str) -> list[str]:
    """Names of the shards of ``filtered`` that have no file under ``out``."""
    done = set(_shards(out))
    return [name for name in _shards(filtered) if name not in done]


JUDGED = {"judged": "prompt"}
# The likeliest first tokens with their log-probabilities -> (value, probability on what counts as an answer).
Read = Callable[[Sequence[str], Sequence[float]], tuple[float, float]]


def answer(
    filtered: str,
    out: str,
    policy: Policy,
    read: Read,
    *,
    column: str = "relevance",
    shown: Mapping[str, str] = JUDGED,
    context: StageContext = DEFAULT_CONTEXT,
) -> None:
    """Ask ``policy`` for its first token on each candidate of ``filtered`` that has no answer under ``out``, and write what
    ``read`` makes of it: episode_id int64, ``column`` float32, mass float32, in files of the candidates' names.

    One request a candidate goes through the shared vLLM stage; its answers stay in ``out``/ledger-<fingerprint>, so a rerun
    asks only what is missing, and finished shards are not read again. ``shown`` names the columns of a request row after
    those of a candidate (``prompt`` itself is the engine's word).

    Raises:
        UserError: the judge can't be placed or refuses every request.
    """
    # All shards, the finished ones too: their places in the ledger must not depend on which were finished.
    names, todo = _shards(filtered), unanswered(filtered, out)
    ledger = storage.join(out, f"ledger-{policy.fingerprint}")
    complete(policy, _requests(policy, filtered, names, shown), ledger, policy.name, context=context)

    import ray

    parts = list_parts(ledger)
    work = [(name, parts.get(names.index(name), [])) for name in todo]
    collect = _Collect(filtered, ledger, out, read, column, work)
    dataset = ray.data.range(len(work), override_num_blocks=len(work)).map_batches(collect, batch_size=None, num_cpus=0.5)
    for _ in iterate_with_watchdog(dataset.iter_batches(batch_size=None), context.watchdog_minutes, f"{policy.name}, collect"):
        pass


def _requests(policy: Policy, filtered: str, names: Sequence[str], shown: Mapping[str, str]) -> Requests:
    """One request for each candidate, a shard for each file."""
    sizes = [len(_candidates(filtered, name, ["reason"])) for name in names]
    columns = ["reason", "episode_id", "intent_id", "intent", "task", *shown.values()]

    def rows(shard: int) -> Iterator[Row]:
        for row in _candidates(filtered, names[shard], columns):
            keys = key_columns(policy, row["intent_id"], row["intent"], row["task"], 0)
            texts = {name: row[origin] for name, origin in shown.items()}
            yield {**keys, **texts, "episode_id": _judgement_id(policy.fingerprint, row["episode_id"])}

    return Requests(sum(sizes), len(names), rows, lambda shard: sizes[shard])


def _judgement_id(fingerprint: str, episode_id: int) -> int:
    return stable_id(fingerprint, "judge", episode_id)


def _candidates(filtered: str, name: str, columns: list[str]) -> list[Row]:
    rows: list[Row] = storage.read_table(storage.join(filtered, name), columns).to_pylist()
    return [row for row in rows if row["reason"] == ""]


@dataclass(frozen=True)
class _Collect:
    """Shard -> its file of values, from the judge's ledger."""

    filtered: str
    ledger: str
    out: str
    read: Read
    column: str
    work: list[tuple[str, list[str]]]

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"rows": np.array([self._shard(*self.work[index]) for index in batch["id"]])}

    def _shard(self, name: str, parts: list[str]) -> int:
        answers = read_shard(self.ledger, parts).to_pylist() if parts else []
        by_id = {row["episode_id"]: row for row in answers}
        fingerprint = answers[0]["request_fingerprint"] if answers else ""
        ids = [row["episode_id"] for row in _candidates(self.filtered, name, ["reason", "episode_id"])]
        rows = [by_id[_judgement_id(fingerprint, episode_id)] for episode_id in ids]
        found = [self.read(row["top_tokens"], row["top_logprobs"]) for row in rows]
        values, masses = (np.array([pair[i] for pair in found], dtype=np.float32) for i in (0, 1))
        table = pa.table({"episode_id": pa.array(ids, pa.int64()), self.column: values, "mass": masses})
        storage.write_table(storage.join(self.out, name), table)
        return len(ids)
