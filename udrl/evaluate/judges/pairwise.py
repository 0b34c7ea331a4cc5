"""A language model compares two prompts for one request and answers A or B; the probabilities of both tokens say how sure.

Judges prefer what stands first or second whatever it says, so every pair is shown in both orders and the difference is told
(Zheng et al. 2023, arXiv 2306.05685, section 3.4).
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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

SHOWN = {"judged": "prompt", "against": "other_prompt"}  # request column -> column of the table that is asked about
_FIELDS = "Request: {intent}\nA: {first}\nB: {second}\nBetter:"
_INSTRUCTION = """\
You compare two texts, A and B, that were written for {title} from one person's request.
The better one keeps all of the request, adds fitting detail and reads well. One that is about something else, or only \
repeats the request, is worse. Their order and length mean nothing.
Answer with A or B only."""


@dataclass(frozen=True)
class _Render:
    """Request row -> the instruction, compared examples of the row's task, and the two prompts to compare."""

    tasks: dict[str, Task]
    chat: bool
    path: str
    revision: str | None

    def __call__(self, row: Row) -> dict[str, Any]:
        task = self.tasks[row["task"]]
        instruction = _INSTRUCTION.format(title=task.title.lower())
        asked = _fields(row["intent"], row["judged"], row["against"])
        if not self.chat:
            shots = "".join(f"{pair} {better}\n\n" for pair, better in _compared(task))
            return {"prompt": f"{instruction}\n\n{shots}{asked}"}
        messages = [{"role": "system", "content": instruction}]
        for pair, better in _compared(task):
            messages += [{"role": "user", "content": pair}, {"role": "assistant", "content": better}]
        return {"tokenized_prompt": encode_chat(self.path, self.revision, [*messages, {"role": "user", "content": asked}])}


def _fields(intent: str, first: str, second: str) -> str:
    texts = {"intent": intent, "first": first, "second": second}
    return _FIELDS.format(**{name: " ".join(text.split()) for name, text in texts.items()})


def _compared(task: Task) -> list[tuple[str, str]]:
    """Examples of the task against one of another intent and against an echo, A and B equally often the better."""
    one, two, three = task.examples[:3]
    return [
        (_fields(one.intent, one.prompt, two.prompt), "A"),
        (_fields(two.intent, three.prompt, two.prompt), "B"),
        (_fields(three.intent, three.intent, three.prompt), "B"),
        (_fields(one.intent, one.prompt, one.intent), "A"),
    ]


def facts(tasks: Sequence[Task]) -> dict[str, Any]:
    """What an answer depends on beside the model."""
    return {"pairwise": [_INSTRUCTION, _FIELDS], "tasks": rubric.task_inputs(tasks)}


def policy(judge: Judge, tasks: Sequence[Task]) -> Policy:
    """The judge as a policy of the shared stage; a request row carries the prompts as ``judged`` and ``against``."""
    path = models.resolve(judge.model)
    return Policy(
        name=f"judge {judge.display_name}",
        model=judge.model,
        path=path,
        revision=models.revision(judge.model, judge.revision),
        render=_Render({t.name: t for t in tasks}, judge.style == "chat", path, judge.revision),
        sampling=Sampling(temperature=0, min_p=0, max_tokens=1),  # the log-probabilities are those of temperature 1
        engine=judge.engine,
        placement=judge.placement,
        describe={"style": judge.style, **facts(tasks)},
        top_tokens=rubric.TOP_TOKENS,
    )


def preference(tokens: Sequence[str], logprobs: Sequence[float]) -> tuple[float, float]:
    """(probability of A among A and B, probability on both together), from the likeliest tokens. Without any: (NaN, 0)."""
    shares = {"A": 0.0, "B": 0.0}
    for token, logprob in zip(tokens, logprobs, strict=True):
        if token.strip() in shares:
            shares[token.strip()] += math.exp(logprob)
    mass = sum(shares.values())
    return (shares["A"] / mass, min(mass, 1.0)) if mass > 0 else (math.nan, 0.0)


def both_orders(first: tuple[float, float], swapped: tuple[float, float]) -> tuple[float, float, bool]:
    """(preference for a prompt where it is shown first, the same where it is shown second, whether both orders parsed), from
    :func:`preference` of the pair as it stands and of the pair swapped."""
    return first[0], 1 - swapped[0], min(first[1], swapped[1]) >= rubric.MIN_MASS


def comparisons(outputs: pa.Table, limit: int, seed: int) -> list[tuple[Row, Row]]:
    """(row of the student, row of another policy) to compare: default probe, same intent, task and variation.

    A policy without that variation is compared by its variation 0. At most ``limit`` a task and policy, drawn by ``seed``;
    rejected ones among them, or a policy could hide its failures.
    """
    rows = [row for row in outputs.to_pylist() if row["probe"] == "default"]
    by_place = {(row["policy"], row["task"], row["intent_id"], row["variation"]): row for row in rows}
    others = dict.fromkeys(row["policy"] for row in rows if row["policy"] != STUDENT)
    found: dict[tuple[str, str], list[tuple[Row, Row]]] = defaultdict(list)
    for row in (row for row in rows if row["policy"] == STUDENT):
        for other in others:
            place = (other, row["task"], row["intent_id"])
            against = by_place.get((*place, row["variation"])) or by_place.get((*place, 0))
            if against:
                found[row["task"], other].append((row, against))
    chosen: list[tuple[Row, Row]] = []
    for key, pairs in found.items():
        order = np.random.default_rng(stable_id(seed, *key)).permutation(len(pairs))[:limit]
        chosen += [pairs[i] for i in sorted(order)]
    return chosen


def settled(mine: bool, theirs: bool) -> float | None:
    """The preference for mine where it needs no judge, told whether each was accepted: a rejected output loses, and two are
    even."""
    return None if mine and theirs else 0.5 if mine == theirs else float(mine)
