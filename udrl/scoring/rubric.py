"""Relevance by a language model: each prompt is scored against a rubric, as the expectation over the score tokens.

The judge answers with one token. Its distribution tells more than the token drawn: the score is the mean of the scores
under their probabilities (G-Eval, arXiv 2303.16634, section 2), mapped to 0..1. The vLLM stage of the policies is shared.
"""

import math
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from udrl import models, storage
from udrl.episodes import stable_id
from udrl.policies.engine import complete
from udrl.policies.ledger import Requests, list_parts, read_shard
from udrl.policies.policy import Policy, Row
from udrl.policies.teacher import chat_ids, key_columns
from udrl.recipe import RubricJudge, Sampling
from udrl.tasks import Task
from udrl.watchdog import watched

TOP = 20  # what vLLM gives at most unless told otherwise (max_logprobs)
HALF = 0.5  # a judgement with less of its probability on scores counts as a parse failure
RELEVANCE = pa.schema([("episode_id", pa.int64()), ("relevance", pa.float32())])

# Ends right before the score: in most vocabularies a digit and the space before it are two tokens.
_FIELDS = "Request: {intent}\n{label}: {prompt}\nScore="
_RUBRIC = """\
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
        rubric = _RUBRIC.format(title=task.title.lower(), top=self.top, low=round(self.top / 3), high=self.top - 2)
        graded = [(_pair(task, intent, prompt), str(score)) for intent, prompt, score in _graded(task, self.top)]
        asked = _pair(task, row["intent"], row["judged"])
        if not self.chat:
            shots = "".join(f"{pair}{score}\n\n" for pair, score in graded)
            return {"prompt": f"{rubric}\n\n{shots}{asked}"}
        messages = [{"role": "system", "content": rubric}]
        for pair, score in graded:
            messages += [{"role": "user", "content": pair}, {"role": "assistant", "content": score}]
        return {"tokenized_prompt": chat_ids(self.path, self.revision, [*messages, {"role": "user", "content": asked}])}


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


def rubric_policy(config: RubricJudge, tasks: Sequence[Task]) -> Policy:
    """The judge as a policy of the shared stage; a request row carries the prompt to judge as ``judged``."""
    path = models.resolve(config.model)
    chat = config.style == "chat"
    top = highest_score(path, config.revision)
    render = _Render({t.name: t for t in tasks}, chat, path, config.revision, top)
    return Policy(
        name="judge",
        model=config.model,
        path=path,
        revision=models.revision(config.model, config.revision),
        render=render,
        sampling=Sampling(temperature=0, min_p=0, max_tokens=1),  # the log-probabilities are those of temperature 1
        engine=config.engine,
        placement=config.placement,
        describe={"style": config.style, "rubric": [_RUBRIC, _FIELDS, top], "tasks": [_facts(t) for t in tasks]},
        top_tokens=TOP,
    )


def _facts(task: Task) -> dict[str, Any]:
    return {**task.model_dump(include={"name", "title", "label"}), "examples": [e.model_dump() for e in task.examples[:3]]}


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


def relevance(tokens: Sequence[str], logprobs: Sequence[float], top: int) -> tuple[float, bool]:
    """(relevance in 0..1, whether the judgement parsed).

    A judgement with little probability on scores still gives its expectation. One with none gives 0: what was not judged
    must not be learnt as good.
    """
    score, mass = expected_score(tokens, logprobs, top)
    return (0.0 if math.isnan(score) else (score - 1) / (top - 1)), mass >= HALF


def judge_relevance(sifted: str, out: str, config: RubricJudge, tasks: Sequence[Task], watchdog_minutes: float = 30.0) -> None:
    """Score the candidates of ``sifted/part-<shard>.parquet`` (rows whose ``reason`` is empty) into files of the same names
    under ``out``: episode_id int64, relevance float32 in 0..1.

    One request a candidate goes through the shared vLLM stage; its answers stay in ``out``/ledger-<fingerprint>, so a rerun
    asks only what is missing, and finished shards are not read again. The scale is 1 to 10, or 1 to 9 (see
    :func:`highest_score`). The share of judgements that did not parse is printed at the end.

    Raises:
        UserError: the judge can't be placed or refuses every request.
    """
    names = [name for name in storage.list_files(sifted) if name.startswith("part-")]
    done = set(storage.list_files(out))
    todo = [name for name in names if name not in done]
    if not todo:
        return
    policy = rubric_policy(config, tasks)
    # All shards, the finished ones too: their places in the ledger must not depend on which were finished.
    ledger = storage.join(out, f"ledger-{policy.fingerprint}")
    complete(policy, _requests(policy, sifted, names), ledger, "judge", watchdog_minutes=watchdog_minutes)

    import ray

    parts = list_parts(ledger)
    work = [(name, parts.get(names.index(name), [])) for name in todo]
    collect = _Collect(sifted, ledger, out, policy.render.top, work)  # type: ignore[attr-defined]
    dataset = ray.data.range(len(work), override_num_blocks=len(work)).map_batches(collect, batch_size=None, num_cpus=0.5)
    counts: Counter[str] = Counter()
    for batch in watched(dataset.iter_batches(batch_size=None), watchdog_minutes, "judge, collect"):
        for key in ("rows", "unparsed", "unjudged"):
            counts[key] += int(np.sum(batch[key]))
    print(_report(counts, policy.model), file=sys.stderr)


def _report(counts: Counter[str], model: str) -> str:
    n = max(counts["rows"], 1)
    return (
        f"judge {model}: {counts['rows']:,} judgements; parse failures {counts['unparsed'] / n:.1%} (less than half of the"
        f" probability on scores), of them {counts['unjudged']:,} without any score, relevance 0"
    )


def _requests(policy: Policy, sifted: str, names: Sequence[str]) -> Requests:
    """One request for each candidate, a shard for each file."""
    sizes = [len(_candidates(sifted, name, ["reason"])) for name in names]

    def rows(shard: int) -> Iterator[Row]:
        for row in _candidates(sifted, names[shard], ["reason", "episode_id", "intent_id", "intent", "task", "prompt"]):
            keys = key_columns(policy, row["intent_id"], row["intent"], row["task"], 0)
            yield {**keys, "episode_id": _judgement_id(policy.fingerprint, row["episode_id"]), "judged": row["prompt"]}

    return Requests(sum(sizes), len(names), rows, lambda shard: sizes[shard])


def _judgement_id(fingerprint: str, episode_id: int) -> int:
    return stable_id(fingerprint, "judge", episode_id)


def _candidates(sifted: str, name: str, columns: list[str]) -> list[Row]:
    rows: list[Row] = storage.read_table(storage.join(sifted, name), columns).to_pylist()
    return [row for row in rows if row["reason"] == ""]


@dataclass(frozen=True)
class _Collect:
    """Shard -> its file of relevances, from the judge's ledger."""

    sifted: str
    ledger: str
    out: str
    top: int
    work: list[tuple[str, list[str]]]

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        counts: dict[str, list[int]] = {"rows": [], "unparsed": [], "unjudged": []}
        for index in batch["id"]:
            for key, n in zip(counts, self._shard(*self.work[index]), strict=True):
                counts[key].append(n)
        return {key: np.array(ns) for key, ns in counts.items()}

    def _shard(self, name: str, parts: list[str]) -> tuple[int, int, int]:
        answers = read_shard(self.ledger, parts).to_pylist() if parts else []
        by_id = {row["episode_id"]: row for row in answers}
        fingerprint = answers[0]["request_fingerprint"] if answers else ""
        ids = [row["episode_id"] for row in _candidates(self.sifted, name, ["reason", "episode_id"])]
        values, parsed = [], 0
        unjudged = 0
        for episode_id in ids:
            row = by_id[_judgement_id(fingerprint, episode_id)]
            value, whole = relevance(row["top_tokens"], row["top_logprobs"], self.top)
            values.append(value)
            parsed += whole
            unjudged += math.isnan(expected_score(row["top_tokens"], row["top_logprobs"], self.top)[0])
        table = pa.table([ids, np.array(values, dtype=np.float32)], schema=RELEVANCE)
        storage.write_table(storage.join(self.out, name), table)
        return len(ids), len(ids) - parsed, unjudged
