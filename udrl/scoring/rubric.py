"""Relevance by a language model: the expected score of each prompt against a rubric.

The judge answers with one token. The score is the mean of the scores weighted by their probabilities (G-Eval, arXiv
2303.16634, section 2), mapped to 0..1. The requests go through the vLLM stage that the policies use.
"""

import logging
import math
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

log = logging.getLogger(__name__)
TOP_TOKENS = 20  # log-probabilities per answer; vLLM's default limit (max_logprobs)
MIN_MASS = 0.5  # probability; a judgment with less of it on valid answers counts as a parse failure
# A request row's columns for the judge, and the columns of a candidate that they come from; "prompt" is vLLM's own key.
JUDGED_COLUMNS = {"judged": "prompt"}
# Reads an answer: the most probable first tokens and their log-probabilities -> (value, probability of valid answers).
AnswerReader = Callable[[Sequence[str], Sequence[float]], tuple[float, float]]

# Ends directly before the score: most vocabularies split a space and a digit into two tokens.
_FIELDS = "Request: {intent}\n{label}: {prompt}\nScore="
RUBRIC = """\
You judge what was written for {title} from a person's request. Score it from 1 to {top}:
1 = about something else
{low} = names the request but is vague, mostly repeats it, or is hard to read
{high} = keeps all of the request and adds fitting detail
{top} = faithful in every word, specific, fluent, ready to be used
Answer with the number only."""


@dataclass(frozen=True)
class JudgmentCounts:
    """Judgments: ``unparsed`` have too little probability on scores; of these, ``unscored`` have none, and relevance 0."""

    total: int = 0
    unparsed: int = 0
    unscored: int = 0

    def __add__(self, other: "JudgmentCounts") -> "JudgmentCounts":
        return JudgmentCounts(self.total + other.total, self.unparsed + other.unparsed, self.unscored + other.unscored)

    def describe(self) -> str:
        return (
            f"{self.total:,} judgments; parse failures {self.unparsed / max(self.total, 1):.1%} (less than half of the"
            f" probability on scores), of them {self.unscored:,} without any score, relevance 0"
        )


def judge_relevance(
    filtered: str, out: str, config: RubricJudge, tasks: Sequence[Task], context: StageContext = DEFAULT_CONTEXT
) -> JudgmentCounts:
    """Score the candidates of ``filtered`` (rows without a ``reason``) into files of the same names under ``out``.

    Columns: episode_id int64; relevance float32 in 0..1; mass float32, the probability on scores. The scale is 1 to 10, or 1
    to 9 (see :func:`highest_score`). If any candidate was judged now, the share of parse failures is logged.

    Raises:
        UserError: the judge can't be placed or refuses every request.
    """
    unjudged = unjudged_files(filtered, out)
    if unjudged:
        policy = rubric_policy(config, tasks)
        judge_candidates(filtered, out, policy, relevance_reader(policy), context=context)
    counts = sum(storage.map_files(_count_judgments, [storage.join(out, name) for name in _shard_names(out)]), JudgmentCounts())
    if unjudged:
        log.info(f"judge {config.model}: {counts.describe()}")
    return counts


def rubric_policy(config: RubricJudge, tasks: Sequence[Task], name: str = "judge") -> Policy:
    """Return the judge as a policy, whose request rows have the prompt to judge in the column ``judged``."""
    path = models.resolve(config.model)
    chat = config.style == "chat"
    top = highest_score(path, config.revision)
    render = _RenderRubric({t.name: t for t in tasks}, chat, path, config.revision, top)
    return Policy(
        name=name,
        model=config.model,
        path=path,
        revision=models.revision(config.model, config.revision),
        render=render,
        sampling=Sampling(temperature=0, min_p=0, max_tokens=1),  # vLLM reports the log-probabilities of temperature 1
        engine=config.engine,
        placement=config.placement,
        describe={"style": config.style, "rubric": [RUBRIC, _FIELDS, top], "tasks": task_inputs(tasks)},
        top_tokens=TOP_TOKENS,
    )


def task_inputs(tasks: Sequence[Task]) -> list[dict[str, Any]]:
    """Return the parts of each task that a judge sees, for fingerprints."""
    fields = {"name", "title", "label"}
    return [{**t.model_dump(include=fields), "examples": [e.model_dump() for e in t.examples[:3]]} for t in tasks]


def relevance_reader(policy: Policy) -> AnswerReader:
    """Return :func:`relevance` on the scale of a :func:`rubric_policy`."""
    return partial(relevance, top=policy.render.top)  # type: ignore[attr-defined]


def highest_score(path: str, revision: str | None) -> int:
    """Return 10 if the tokenizer has one token for it, else 9.

    In a vocabulary that splits numbers into digits (SmolLM2, Qwen), the first token of 10 is the token of 1.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path, revision=revision)
    one, ten = (tokenizer.encode(f"Score={n}", add_special_tokens=False) for n in (1, 10))
    return 10 if len(one) == len(ten) else 9


@dataclass(frozen=True)
class _RenderRubric:
    """Renders a request row: the rubric, graded examples of the row's task, and the pair to grade."""

    tasks: dict[str, Task]
    chat: bool
    path: str
    revision: str | None
    top: int

    def __call__(self, row: Row) -> dict[str, Any]:
        task = self.tasks[row["task"]]
        rubric = RUBRIC.format(title=task.title.lower(), top=self.top, low=round(self.top / 3), high=self.top - 2)
        graded = [(_render_pair(task, intent, prompt), str(score)) for intent, prompt, score in _grade_examples(task, self.top)]
        question = _render_pair(task, row["intent"], row["judged"])
        if not self.chat:
            shots = "".join(f"{pair}{score}\n\n" for pair, score in graded)
            return {"prompt": f"{rubric}\n\n{shots}{question}"}
        messages = [{"role": "system", "content": rubric}]
        for pair, score in graded:
            messages += [{"role": "user", "content": pair}, {"role": "assistant", "content": score}]
        return {"tokenized_prompt": encode_chat(self.path, self.revision, [*messages, {"role": "user", "content": question}])}


def _render_pair(task: Task, intent: str, prompt: str) -> str:
    return _FIELDS.format(intent=" ".join(intent.split()), label=task.label, prompt=" ".join(prompt.split()))


def _grade_examples(task: Task, top: int) -> list[tuple[str, str, int]]:
    """Return (intent, prompt, score) that show the scale: matching pairs, prompts of another intent, and an echo."""
    first, second, third = task.examples[:3]
    return [
        (first.intent, first.prompt, top),
        (second.intent, third.prompt, 1),
        (third.intent, third.intent, round(top / 3)),
        (second.intent, second.prompt, top - 1),
        (third.intent, first.prompt, 1),
    ]


def expected_score(tokens: Sequence[str], logprobs: Sequence[float], top: int) -> tuple[float, float]:
    """Return (expected score, probability on scores) from the most probable tokens; (nan, 0) if none is a score.

    A token is a score if it is a number from 1 to ``top``, ignoring surrounding white space. The expectation is over scores.
    """
    scores = {str(n): n for n in range(1, top + 1)}
    pairs = [(scores[t.strip()], math.exp(p)) for t, p in zip(tokens, logprobs, strict=True) if t.strip() in scores]
    mass = sum(p for _, p in pairs)
    return (sum(score * p for score, p in pairs) / mass, min(mass, 1.0)) if mass > 0 else (math.nan, 0.0)


def relevance(tokens: Sequence[str], logprobs: Sequence[float], top: int) -> tuple[float, float]:
    """Return (relevance in 0..1, probability on scores).

    A judgment with little probability on scores still gives its expectation. One with none gives 0: the student must not
    learn an unjudged prompt as a good one.
    """
    score, mass = expected_score(tokens, logprobs, top)
    if math.isnan(score):
        return 0.0, mass
    return min(max((score - 1) / (top - 1), 0.0), 1.0), mass  # clipped, since dividing by the mass may round the score up


def _count_judgments(uri: str) -> JudgmentCounts:
    table = storage.read_table(uri, ["mass"])
    mass = np.zeros(0) if "mass" not in table.column_names else table.column("mass").to_numpy()
    return JudgmentCounts(len(mass), int((mass < MIN_MASS).sum()), int((mass == 0).sum()))


def _shard_names(folder: str) -> list[str]:
    return [name for name in storage.list_files(folder) if name.startswith("part-")]


def unjudged_files(filtered: str, out: str) -> list[str]:
    """Return the names of the shards of ``filtered`` that have no file under ``out``."""
    judged = set(_shard_names(out))
    return [name for name in _shard_names(filtered) if name not in judged]


def judge_candidates(
    filtered: str,
    out: str,
    policy: Policy,
    read: AnswerReader,
    *,
    column: str = "relevance",
    columns: Mapping[str, str] = JUDGED_COLUMNS,
    context: StageContext = DEFAULT_CONTEXT,
) -> None:
    """Ask ``policy`` for its first token on each unjudged candidate of ``filtered`` and write the values that ``read`` gets.

    Files under ``out`` have the candidates' names and the columns episode_id int64, ``column`` float32, mass float32. Each
    candidate is one request of the shared vLLM stage. Its answers stay in ``out``/ledger-<fingerprint>, so a rerun requests
    only missing ones. ``columns`` maps columns of a request row to those of a candidate.

    Raises:
        UserError: the judge can't be placed or refuses every request.
    """
    # Finished shards are included, because a shard's number in the ledger must not depend on which are finished.
    names, unjudged = _shard_names(filtered), unjudged_files(filtered, out)
    ledger = storage.join(out, f"ledger-{policy.fingerprint}")
    complete(policy, judgment_requests(policy, filtered, names, columns), ledger, policy.name, context=context)

    import ray

    parts = list_parts(ledger)
    work = [(name, parts.get(names.index(name), [])) for name in unjudged]
    collect = CollectAnswers(filtered, ledger, out, read, column, work)
    dataset = ray.data.range(len(work), override_num_blocks=len(work)).map_batches(collect, batch_size=None, num_cpus=0.5)
    batches = dataset.iter_batches(batch_size=None)
    for _ in iterate_with_watchdog(batches, context.watchdog_minutes, f"{policy.name}: collect answers"):
        pass


def judgment_requests(policy: Policy, filtered: str, names: Sequence[str], columns: Mapping[str, str]) -> Requests:
    """Return one request per candidate and one shard per file."""
    sizes = [len(_read_candidates(filtered, name, ["reason"])) for name in names]
    candidate_columns = ["reason", "episode_id", "intent_id", "intent", "task", *columns.values()]

    def rows(shard: int) -> Iterator[Row]:
        for row in _read_candidates(filtered, names[shard], candidate_columns):
            keys = key_columns(policy, row["intent_id"], row["intent"], row["task"], 0)
            texts = {name: row[source] for name, source in columns.items()}
            yield {**keys, **texts, "episode_id": judgment_id(policy.fingerprint, row["episode_id"])}

    return Requests(sum(sizes), len(names), rows, lambda shard: sizes[shard])


def judgment_id(fingerprint: str, episode_id: int) -> int:
    return stable_id(fingerprint, "judge", episode_id)


def _read_candidates(filtered: str, name: str, columns: list[str]) -> list[Row]:
    rows: list[Row] = storage.read_table(storage.join(filtered, name), columns).to_pylist()
    return [row for row in rows if row["reason"] == ""]


@dataclass(frozen=True)
class CollectAnswers:
    """Writes a shard's file of values from the judge's ledger."""

    filtered: str
    ledger: str
    out: str
    read: AnswerReader
    column: str
    work: list[tuple[str, list[str]]]  # (file name, files of the ledger)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"rows": np.array([self._collect(*self.work[index]) for index in batch["id"]])}

    def _collect(self, name: str, parts: list[str]) -> int:
        answers = read_shard(self.ledger, parts).to_pylist() if parts else []
        by_id = {row["episode_id"]: row for row in answers}
        fingerprint = answers[0]["request_fingerprint"] if answers else ""
        ids = [row["episode_id"] for row in _read_candidates(self.filtered, name, ["reason", "episode_id"])]
        rows = [by_id[judgment_id(fingerprint, episode_id)] for episode_id in ids]
        judgments = [self.read(row["top_tokens"], row["top_logprobs"]) for row in rows]
        values, masses = (np.array([judgment[i] for judgment in judgments], dtype=np.float32) for i in (0, 1))
        table = pa.table({"episode_id": pa.array(ids, pa.int64()), self.column: values, "mass": masses})
        storage.write_table(storage.join(self.out, name), table)
        return len(ids)
