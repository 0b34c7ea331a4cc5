"""Controls: prompts that are worse than a true pair's prompt by construction, on which judges are validated.

True pairs come from the gold set of the package, ``gold/TASK.jsonl``, written by hand, and from the run's own outputs. A judge
that only the run's own pairs validate would be discredited by a weak writer, whom it should convict.
"""

import importlib.resources
import json
from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple, get_args

import numpy as np
import pyarrow as pa

from udrl.evaluate.document import ControlKind
from udrl.hashing import stable_id
from udrl.intents.content_words import FUNCTION_WORDS, content_words
from udrl.text import words

CONTROL_KINDS: tuple[ControlKind, ...] = get_args(ControlKind)
# Attacks that no gate was made against or fitted to: they test whether a judge holds beyond the attacks that were foreseen.
HELD_OUT_KINDS: tuple[ControlKind, ...] = ("reversed", "spliced", "other_subject")
CONTROLS = pa.schema(
    [
        ("pair", pa.int64()),  # index of the true pair that it is compared with: same intent and task
        ("kind", pa.string()),
        ("intent", pa.string()),
        ("task", pa.string()),
        ("prompt", pa.string()),
    ]
)
PRAISE = ("masterpiece", "best quality", "highly detailed", "8k", "award-winning", "professional")
STOCK = (
    *("soft natural light", "clean white background", "warm muted colors", "high resolution", "simple modern layout"),
    *("bold clear headline", "calm mood", "sharp focus", "gentle camera movement", "wide angle view"),
)


class Pair(NamedTuple):
    """A request and a prompt that fulfills it."""

    intent: str
    task: str
    prompt: str


@cache
def gold_pairs(task: str) -> tuple[Pair, ...]:
    """Return the hand-written pairs of a shipped task; none for another task."""
    file = importlib.resources.files("udrl.evaluate.judges") / "gold" / f"{task}.jsonl"
    if not file.is_file():
        return ()
    rows = map(json.loads, file.read_text(encoding="utf-8").splitlines())
    return tuple(Pair(row["intent"], task, row["prompt"]) for row in rows)


def is_prose(prompts: Sequence[str]) -> bool:
    """Whether the order of words matters: most of the prompts have a comma or a function word, unlike lists of keywords."""
    texts = sum("," in prompt or not FUNCTION_WORDS.isdisjoint(prompt.lower().split()) for prompt in prompts)
    return 2 * texts > len(prompts)


def make_controls(pairs: Sequence[Pair], seed: int, donors: Sequence[Pair] = ()) -> pa.Table:
    """Return worse prompts for each true pair, as :data:`CONTROLS`; deterministic for a ``seed``.

    ``donors`` are further pairs whose prompts may stand for those of another task.

    - ``shuffled``: the prompt for another intent of the task;
    - ``echo``: the intent; ``near_echo``: the intent and two stock phrases;
    - ``stuffed``: the intent's content words twice, and words of praise;
    - ``truncated``: the prompt's first third;
    - ``loop``: the prompt's first quarter, or the intent's first content words, again and again;
    - ``salad``: the prompt's words in random order;
    - ``wrong_task``: the prompt of another task for the same intent, or for the one with the most words in common;
    - ``reversed``: the prompt's words in reverse order;
    - ``spliced``: its first half and the second half of a prompt for another intent;
    - ``other_subject``: the prompt with another intent's content words in place of its own intent's.

    A pair has no control of a kind that would not be worse (the order of keywords), or for which there is no material.
    """
    rng = np.random.default_rng(seed)
    others = shuffle_intents([pair.intent for pair in pairs], [pair.task for pair in pairs], seed)
    prompts_of: dict[tuple[str, str], list[str]] = {}
    for pair in pairs:
        prompts_of.setdefault((pair.task, pair.intent), []).append(pair.prompt)
    find_wrong_task = _wrong_task_finder([*pairs, *donors])
    prose = {task for task in {pair.task for pair in pairs} if is_prose([pair.prompt for pair in pairs if pair.task == task])}
    rows = []
    for i, (pair, other_intent) in enumerate(zip(pairs, others, strict=True)):
        candidates = prompts_of.get((pair.task, other_intent), [])
        other = Pair(other_intent, pair.task, candidates[i % len(candidates)]) if candidates else None
        texts: dict[ControlKind, str] = {
            "shuffled": other.prompt if other else "",
            "echo": pair.intent,
            "stuffed": stuff_keywords(pair.intent),
            "truncated": truncate(pair.prompt),
            "near_echo": _near_echo(pair.intent, i, ", " if pair.task in prose else " "),
            "loop": _loop(pair, i),
            "salad": " ".join(rng.permutation(pair.prompt.split())) if pair.task in prose else "",
            "wrong_task": find_wrong_task(pair),
            "reversed": " ".join(pair.prompt.split()[::-1]) if pair.task in prose else "",
            "spliced": _splice(pair.prompt, other.prompt) if other else "",
            "other_subject": _replace_subject(pair, other) if other else "",
        }
        assert texts.keys() == set(CONTROL_KINDS)
        rows += [
            {"pair": i, "kind": kind, "intent": pair.intent, "task": pair.task, "prompt": text}
            for kind, text in texts.items()
            if text and text != pair.prompt
        ]
    return pa.Table.from_pylist(rows, schema=CONTROLS)


def shuffle_intents(intents: Sequence[str], tasks: Sequence[str], seed: int = 0) -> list[str]:
    """Return for each row another intent of its task; empty if the task has no other.

    Each intent of a task replaces exactly one other, so that true and shuffled pairs have equally hard intents.
    """
    rng = np.random.default_rng(seed)
    successor: dict[tuple[str, str], str] = {}
    for task in sorted(set(tasks)):
        ring = sorted({intent for intent, t in zip(intents, tasks, strict=True) if t == task})
        rng.shuffle(ring)
        for intent, other in zip(ring, [*ring[1:], ring[0]], strict=True):
            successor[task, intent] = other if other != intent else ""
    return [successor[task, intent] for intent, task in zip(intents, tasks, strict=True)]


def stuff_keywords(intent: str) -> str:
    """Return the intent's content words twice, with words of praise between and after them, as a list."""
    content = content_words(intent)
    return ", ".join([*content, *PRAISE[:3], *content, *PRAISE[3:]])


def truncate(prompt: str) -> str:
    """Return the first third of the words, at least one."""
    all_words = prompt.split()
    return " ".join(all_words[: max(1, len(all_words) // 3)])


def sample_per_task(tasks: Sequence[str], limit: int, seed: int) -> list[int]:
    """Return indices of at most ``limit`` random rows of each task."""
    sampled: dict[str, list[int]] = {}
    for i in np.random.default_rng(seed).permutation(len(tasks)):
        own = sampled.setdefault(tasks[i], [])
        if len(own) < limit:
            own.append(int(i))
    return [i for task in sorted(sampled) for i in sampled[task]]


def _near_echo(intent: str, i: int, separator: str) -> str:
    return separator.join([intent.rstrip(".!?"), STOCK[i % len(STOCK)], STOCK[(i + 3) % len(STOCK)]])


def _loop(pair: Pair, i: int) -> str:
    if i % 2:
        return ", ".join([" ".join(content_words(pair.intent)[:3])] * 3)
    all_words = pair.prompt.split()
    loop = all_words[: max(2, len(all_words) // 4)]
    return " ".join((loop * len(all_words))[: len(all_words)])


def _splice(prompt: str, other: str) -> str:
    own, others = prompt.split(), other.split()
    return " ".join([*own[: len(own) // 2], *others[len(others) // 2 :]])


def _replace_subject(pair: Pair, other: Pair) -> str:
    """Put the other intent's content words in place of the intent's words that the prompt has; "" if it has none."""
    own, replacements = set(content_words(pair.intent)), iter(content_words(other.intent) * 9)
    texts = [next(replacements) if set(words(word)) & own else word for word in pair.prompt.split()]
    return " ".join(texts)


def _wrong_task_finder(pairs: Sequence[Pair]) -> Callable[[Pair], str]:
    """Return a function: pair -> prompt of another task for the closest intent; "" with a single task."""
    by_word: dict[str, set[int]] = {}
    for i, pair in enumerate(pairs):
        for word in content_words(pair.intent):
            by_word.setdefault(word, set()).add(i)

    def find(pair: Pair) -> str:
        shared: dict[int, int] = {}
        for word in content_words(pair.intent):
            for j in by_word[word]:
                if pairs[j].task != pair.task:
                    shared[j] = shared.get(j, 0) + 1
        if shared:
            return pairs[max(shared, key=lambda j: (shared[j], -j))].prompt
        rest = [j for j, other in enumerate(pairs) if other.task != pair.task]
        return pairs[rest[stable_id(pair.intent) % len(rest)]].prompt if rest else ""

    return find
