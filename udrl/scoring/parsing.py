"""A raw completion becomes prompts, or rejections with their reasons: one result for each prompt that was asked for."""

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

from udrl.episodes import Reason
from udrl.scoring import language as writing
from udrl.scoring import lenient_json as salvage
from udrl.scoring import rewards as components
from udrl.tasks import Task

# A prompt under these says nothing that the intent did not, or says it again and again. They are lenient on purpose:
# weak prompts are kept with their low reward, since the student learns what a low reward looks like.
MIN_NOVELTY = 0.2
MIN_DISTINCT_PAIRS = 0.6
# A prompt longer than this is no prompt; the patterns of a task file need not be quick on a megabyte.
CHARACTERS_PER_WORD = 64

_SPACE = re.compile(r"\s+")
_QUOTES = "\"'“”‘’`*"
# What vLLM says of a request that does not fit its context (0.32: v1/engine/input_processor.py, renderers/params.py).
_TOO_LONG = re.compile(r"longer than the maximum\s+model length|maximum context length is")
_CANNOT = (
    r"(?:can(?:no|['’])?t|cannot|can not|won['’]?t|will not|am unable to|['’]m unable to|am not able to|['’]m not able to)"
)
_DO = r"(?:help|assist|do that|fulfil|comply|provide|create|generate|write|produce|engage|support)"
_REFUSAL = re.compile(
    r"(?:sorry,? (?:but )?)?i(?:['’]m| am) (?:very |so |really |truly )?sorry(?:[,.]| but| that| i\b)"
    r"|sorry, (?:but )?(?:i|we|as)\b"
    rf"|(?:unfortunately,? )?i ?{_CANNOT} {_DO}"
    r"|as an ai\b|as a (?:large )?language model|i(?:['’]m| am) (?:just |only )?an ai\b"
    r"|(?:my apologies|i apologi[sz]e)[,. ]|i (?:do not|don['’]t) feel comfortable",
    re.IGNORECASE,
)
_GARBLED = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\ufffd\ufffe\uffff]")


class Parsed(NamedTuple):
    """One prompt that was asked for. ``reason`` is "" for a good one; ``completion`` is the raw text that it comes from."""

    prompt: str
    reason: str
    detail: str
    completion: str


def clean(completion: str) -> str:
    """The first line, white space folded, surrounding quotes and markers off."""
    line = completion.strip().split("\n", 1)[0]
    return _SPACE.sub(" ", line).strip().strip(_QUOTES).strip()


def parse(task: Task, intent: str, completion: str, finish_reason: str, error: str) -> tuple[str, Reason | None, str]:
    """Return (prompt, reason, detail) of a completion that is one prompt; ``reason`` is None for a good one."""
    if error:
        return "", Reason.INPUT_TOO_LONG if _TOO_LONG.search(error) else Reason.ENGINE_ERROR, error[:500]
    prompt = salvage.storable(clean(completion))
    if not prompt:
        return prompt, Reason.EMPTY, ""
    if _REFUSAL.match(prompt):
        return prompt, Reason.REFUSAL, prompt[:80]
    if finish_reason == "length" and "\n" not in completion.strip():
        return prompt, Reason.TRUNCATED, "no end within max_tokens"
    reason, detail = _judge(task, intent, prompt, completion)
    return prompt, reason, detail


def _judge(task: Task, intent: str, prompt: str, completion: str) -> tuple[Reason | None, str]:
    """What is wrong with a whole line: the cheap and the telling first."""
    if _GARBLED.search(prompt) or _GARBLED.search(completion.strip().split("\n", 1)[0]):
        return Reason.GARBLED, "holds control characters or broken bytes"
    if len(prompt) > CHARACTERS_PER_WORD * task.format.max_words:
        return Reason.MALFORMED, f"{len(prompt):,} characters"
    if (script := writing.foreign_script(prompt, intent, _shown(task.name, _texts(task)))) is not None:
        return Reason.WRONG_SCRIPT, script
    folded = prompt.casefold()
    if any(folded == e.prompt.casefold() for e in task.examples):
        return Reason.FEW_SHOT_LEAK, "copies an example of the task"
    problem = task.malformed(prompt)
    if problem:
        return Reason.MALFORMED, problem
    if components.novelty(intent, prompt) < MIN_NOVELTY:
        return Reason.ECHO, "says little that the intent does not"
    if components.repetition(prompt) < MIN_DISTINCT_PAIRS:
        return Reason.REPETITIVE, ""
    if task.format.languages and (language := writing.foreign_language(prompt, tuple(task.format.languages))) is not None:
        return Reason.WRONG_LANGUAGE, language
    return None, ""


def _texts(task: Task) -> tuple[str, ...]:
    return tuple(text for e in task.examples for text in (e.intent, e.prompt))


@lru_cache(maxsize=64)
def _shown(name: str, texts: tuple[str, ...]) -> frozenset[str]:
    return writing.scripts("".join(texts))


def parse_row(task: Task, row: Mapping[str, Any]) -> list[Parsed]:
    """The results of one ledger row: as many as it asked for prompts (``row["prompts"]``, absent or null: one).

    Of a structured completion whatever is whole is kept, however the rest looks. What is missing is TRUNCATED where the
    completion was cut and MISSING where it ended, and the first such result has the raw text.
    """
    intent, completion = row["intent"] or "", row["completion"] or ""
    finish, error = row["finish_reason"] or "", row["error"] or ""
    asked = row.get("prompts") or 1
    if asked == 1:
        return [_parsed(task, intent, completion, finish, error)]
    if error or not completion.strip():
        first = _parsed(task, intent, completion, finish, error)
        return [first] * asked
    found = salvage.strings(completion, asked)
    results = [_parsed(task, intent, text, "stop", "") for text in found]
    reason = Reason.TRUNCATED if finish == "length" else Reason.MISSING
    if not found and _REFUSAL.match(clean(completion)):
        reason = Reason.REFUSAL
    detail = f"{len(found)} of {asked} prompts"
    raws = [salvage.storable(completion)] + [""] * asked
    return results + [Parsed("", str(reason), detail, raw) for raw in raws[: asked - len(found)]]


def _parsed(task: Task, intent: str, completion: str, finish: str, error: str) -> Parsed:
    prompt, reason, detail = parse(task, intent, completion, finish, error)
    return Parsed(prompt, str(reason or ""), salvage.storable(detail), salvage.storable(completion))


def reasons_of(task: Task, row: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(reason, detail) of each prompt that ``row`` asked for, "" for a good one: what one completion alone tells."""
    return [(parsed.reason, parsed.detail) for parsed in parse_row(task, row)]
