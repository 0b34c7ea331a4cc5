"""Pairwise judges: a language model compares two prompts for one request and answers A or B.

The probabilities of both tokens give the preference. Judges prefer a position regardless of the text, so every pair is shown
in both orders and the difference is reported (Zheng et al. 2023, arXiv 2306.05685, section 3.4).
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from udrl import models
from udrl.evaluate.outputs import STUDENT
from udrl.hashing import stable_id
from udrl.policies.policy import Policy, Row
from udrl.policies.teacher import encode_chat
from udrl.recipe import Judge, Sampling
from udrl.scoring import rubric
from udrl.tasks import Task

SHOWN_COLUMNS = {"judged": "prompt", "against": "other_prompt"}  # request column -> column of the questions
_FIELDS = "Request: {intent}\nA: {first}\nB: {second}\nBetter:"
_INSTRUCTION = """\
You compare two texts, A and B, that were written for {title} from one person's request.
The better one keeps all of the request, adds fitting detail and reads well. One that is about something else, or only \
repeats the request, is worse. Their order and length mean nothing.
Answer with A or B only."""


class Comparison(NamedTuple):
    """Preferences for the first of two prompts, 0 to 1; NaN if the judge failed."""

    first: float  # when it is shown first
    second: float  # when it is shown second
    parsed: bool  # whether the judge answered A or B in both orders


# ---- the judge as a policy


@dataclass(frozen=True)
class RenderComparison:
    """Request row -> the instruction, compared examples of the row's task, and the two prompts to compare."""

    tasks: dict[str, Task]
    chat: bool
    path: str
    revision: str | None

    def __call__(self, row: Row) -> dict[str, Any]:
        task = self.tasks[row["task"]]
        instruction = _INSTRUCTION.format(title=task.title.lower())
        pair = _fields(row["intent"], row["judged"], row["against"])
        if not self.chat:
            shots = "".join(f"{example} {better}\n\n" for example, better in compared_examples(task))
            return {"prompt": f"{instruction}\n\n{shots}{pair}"}
        messages = [{"role": "system", "content": instruction}]
        for example, better in compared_examples(task):
            messages += [{"role": "user", "content": example}, {"role": "assistant", "content": better}]
        return {"tokenized_prompt": encode_chat(self.path, self.revision, [*messages, {"role": "user", "content": pair}])}


def _fields(intent: str, first: str, second: str) -> str:
    texts = {"intent": intent, "first": first, "second": second}
    return _FIELDS.format(**{name: " ".join(text.split()) for name, text in texts.items()})


def compared_examples(task: Task) -> list[tuple[str, str]]:
    """Return (pair, better) of examples against another intent's and against an echo; A and B win equally often."""
    one, two, three = task.examples[:3]
    return [
        (_fields(one.intent, one.prompt, two.prompt), "A"),
        (_fields(two.intent, three.prompt, two.prompt), "B"),
        (_fields(three.intent, three.intent, three.prompt), "B"),
        (_fields(one.intent, one.prompt, one.intent), "A"),
    ]


def fingerprint_inputs(tasks: Sequence[Task]) -> dict[str, Any]:
    """Return everything except the model that an answer depends on."""
    # The keys are part of existing runs' fingerprints.
    return {"pairwise": [_INSTRUCTION, _FIELDS], "tasks": rubric.task_inputs(tasks)}


def pairwise_policy(judge: Judge, tasks: Sequence[Task]) -> Policy:
    """Return the judge as a policy of the shared vLLM stage; request rows hold the prompts as ``judged`` and ``against``."""
    path = models.resolve(judge.model)
    return Policy(
        name=f"judge {judge.display_name}",
        model=judge.model,
        path=path,
        revision=models.revision(judge.model, judge.revision),
        render=RenderComparison({t.name: t for t in tasks}, judge.style == "chat", path, judge.revision),
        sampling=Sampling(temperature=0, min_p=0, max_tokens=1),  # vLLM's log-probabilities are those of temperature 1
        engine=judge.engine,
        placement=judge.placement,
        describe={"style": judge.style, **fingerprint_inputs(tasks)},
        top_tokens=rubric.TOP_TOKENS,
    )


def preference(tokens: Sequence[str], logprobs: Sequence[float]) -> tuple[float, float]:
    """Return (probability of A among A and B, probability of both) from the likeliest tokens; (NaN, 0) without any."""
    shares = {"A": 0.0, "B": 0.0}
    for token, logprob in zip(tokens, logprobs, strict=True):
        if token.strip() in shares:
            shares[token.strip()] += math.exp(logprob)
    mass = sum(shares.values())
    return (shares["A"] / mass, min(mass, 1.0)) if mass > 0 else (math.nan, 0.0)


def combine_orders(shown_first: tuple[float, float], shown_second: tuple[float, float]) -> Comparison:
    """Combine the :func:`preference` of a pair and that of the same pair swapped."""
    parsed = min(shown_first[1], shown_second[1]) >= rubric.MIN_MASS
    return Comparison(shown_first[0], 1 - shown_second[0], parsed)


# ---- pairs to compare


def pairs_to_compare(outputs: pa.Table, limit: int, seed: int) -> list[tuple[Row, Row]]:
    """Return (student's row, other policy's row) of the default probe with equal intent, task and variation.

    A policy without that variation is compared by its variation 0. At most ``limit`` pairs a task and policy are sampled;
    rejected outputs are among them, since otherwise a policy could hide its failures.
    """
    rows = [row for row in outputs.to_pylist() if row["probe"] == "default"]
    by_key = {(row["policy"], row["task"], row["intent_id"], row["variation"]): row for row in rows}
    others = dict.fromkeys(row["policy"] for row in rows if row["policy"] != STUDENT)
    pairs: dict[tuple[str, str], list[tuple[Row, Row]]] = defaultdict(list)
    for row in (row for row in rows if row["policy"] == STUDENT):
        for other in others:
            key = (other, row["task"], row["intent_id"])
            other_row = by_key.get((*key, row["variation"])) or by_key.get((*key, 0))
            if other_row:
                pairs[row["task"], other].append((row, other_row))
    sampled: list[tuple[Row, Row]] = []
    for task_and_policy, candidates in pairs.items():
        order = np.random.default_rng(stable_id(seed, *task_and_policy)).permutation(len(candidates))[:limit]
        sampled += [candidates[i] for i in sorted(order)]
    return sampled


def settle_without_judge(student_accepted: bool, other_accepted: bool) -> float | None:
    """Return the preference for the student if an output was rejected: it loses, two rejected ones tie. None: ask."""
    if student_accepted and other_accepted:
        return None
    return 0.5 if student_accepted == other_accepted else float(student_accepted)
