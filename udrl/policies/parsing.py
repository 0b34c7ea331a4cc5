"""A raw completion becomes a prompt, or a rejection with its reason."""

import re

from udrl.episodes import Reason
from udrl.rewards import components
from udrl.tasks import Task

# A prompt under these says nothing that the intent did not, or says it again and again. They are lenient on purpose:
# weak prompts are kept with their low reward, since the student learns what a low reward looks like.
MIN_NOVELTY = 0.2
MIN_DISTINCT_PAIRS = 0.6

_SPACE = re.compile(r"\s+")
_QUOTES = "\"'“”‘’`*"


def clean(completion: str) -> str:
    """The first line, white space folded, surrounding quotes and markers off."""
    line = completion.strip().split("\n", 1)[0]
    return _SPACE.sub(" ", line).strip().strip(_QUOTES).strip()


def parse(task: Task, intent: str, completion: str, finish_reason: str, error: str) -> tuple[str, Reason | None, str]:
    """Return (prompt, reason, detail); ``reason`` is None for a good prompt."""
    if error:
        return "", Reason.ENGINE_ERROR, error[:500]
    prompt = clean(completion)
    if not prompt:
        return prompt, Reason.EMPTY, ""
    if finish_reason == "length" and "\n" not in completion.strip():
        return prompt, Reason.TRUNCATED, "no end within max_tokens"
    folded = prompt.casefold()
    if any(folded == e.prompt.casefold() for e in task.examples):
        return prompt, Reason.FEW_SHOT_LEAK, "copies an example of the task"
    problem = task.malformed(prompt)
    if problem:
        return prompt, Reason.MALFORMED, problem
    if components.novelty(intent, prompt) < MIN_NOVELTY:
        return prompt, Reason.ECHO, "says little that the intent does not"
    if components.repetition(prompt) < MIN_DISTINCT_PAIRS:
        return prompt, Reason.REPETITIVE, ""
    return prompt, None, ""
