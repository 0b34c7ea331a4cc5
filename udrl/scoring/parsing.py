"""Parse completions into prompts or rejects: one result for each requested prompt, with its script and language identified."""

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

from udrl.episodes import Reason
from udrl.scoring import rewards as components
from udrl.tasks import Task
from udrl.text import count_words

# Lenient limits: a weak prompt is kept with its low reward, so that the student learns prompts of low reward.
MIN_NOVELTY = 0.2  # share of words; below, the prompt adds nothing to the intent
MIN_DISTINCT_PAIRS = 0.6  # share of word pairs; below, the prompt repeats itself
CHARACTERS_PER_WORD = 64  # longest text is this times max_words, so that a task's patterns never run on a megabyte
MAX_ERROR = 500  # characters of an engine's error

_SPACE = re.compile(r"\s+")
_QUOTES = "\"'“”‘’`*"
# vLLM's errors for a request that exceeds its context (0.32: v1/engine/input_processor.py, renderers/params.py).
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

_LIST = re.compile(r'"prompts"\s*:\s*\[')
_TOKEN = re.compile(r'["\[\]{}]')
# Possessive quantifiers: a string without an end is scanned once, not once per possible start.
_STRING = re.compile(r'"((?:[^"\\]++|\\.)*+)"', re.DOTALL)
_KEY = re.compile(r"\s*+:")
_ESCAPE = re.compile(r"\\(.)", re.DOTALL)
_ESCAPED = {"n": "\n", "t": "\t", "r": "\n", "b": " ", "f": " "}


class ParsedPrompt(NamedTuple):
    """One requested prompt. ``reason`` is "" if it is accepted; ``completion`` is its raw text."""

    prompt: str
    reason: str
    detail: str
    completion: str


def parse_row(task: Task, row: Mapping[str, Any]) -> list[ParsedPrompt]:
    """Return one result for each prompt that a ledger row requested (``row["prompts"]``; absent or null: one).

    All complete prompts of a structured completion are used, even if the rest is malformed. The others are TRUNCATED if the
    completion was cut and MISSING if it ended; the first of them has the raw text.
    """
    intent, completion = row["intent"] or "", row["completion"] or ""
    finish, error = row["finish_reason"] or "", row["error"] or ""
    requested = row.get("prompts") or 1
    if requested == 1:
        return [_parse_one(task, intent, completion, finish, error)]
    if error or not completion.strip():
        return [_parse_one(task, intent, completion, finish, error)] * requested
    texts = extract_strings(completion, requested)
    results = [_parse_one(task, intent, text, "stop", "") for text in texts]
    reason = Reason.TRUNCATED if finish == "length" else Reason.MISSING
    if not texts and _REFUSAL.match(clean(completion)):
        reason = Reason.REFUSAL
    detail = f"{len(texts)} of {requested} prompts"
    raw_texts = [replace_surrogates(completion)] + [""] * requested
    return results + [ParsedPrompt("", str(reason), detail, raw) for raw in raw_texts[: requested - len(texts)]]


def reject_reasons(task: Task, row: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return (reason, detail) of each prompt that ``row`` requested; reason "" if the completion itself is acceptable."""
    return [(parsed.reason, parsed.detail) for parsed in parse_row(task, row)]


def _parse_one(task: Task, intent: str, completion: str, finish: str, error: str) -> ParsedPrompt:
    prompt, reason, detail = parse(task, intent, completion, finish, error)
    return ParsedPrompt(prompt, str(reason or ""), replace_surrogates(detail), replace_surrogates(completion))


def parse(task: Task, intent: str, completion: str, finish_reason: str, error: str) -> tuple[str, Reason | None, str]:
    """Return (prompt, reason, detail) of a completion that is one prompt; ``reason`` is None if it is accepted."""
    if error:
        return "", Reason.INPUT_TOO_LONG if _TOO_LONG.search(error) else Reason.ENGINE_ERROR, error[:MAX_ERROR]
    prompt = replace_surrogates(clean(completion))
    if not prompt:
        return prompt, Reason.EMPTY, ""
    if _REFUSAL.match(prompt):
        return prompt, Reason.REFUSAL, prompt[:80]
    if finish_reason == "length" and "\n" not in completion.strip():
        return prompt, Reason.TRUNCATED, "no end within max_tokens"
    reason, detail = _check_prompt(task, intent, prompt, completion)
    return prompt, reason, detail


def clean(completion: str) -> str:
    """Return the first line with white space folded and surrounding quotes and asterisks removed."""
    line = completion.strip().split("\n", 1)[0]
    return _SPACE.sub(" ", line).strip().strip(_QUOTES).strip()


def _check_prompt(task: Task, intent: str, prompt: str, completion: str) -> tuple[Reason | None, str]:
    """Return the first reason to reject a complete line, from cheap checks to expensive ones."""
    if _GARBLED.search(prompt) or _GARBLED.search(completion.strip().split("\n", 1)[0]):
        return Reason.GARBLED, "contains control characters or invalid bytes"
    if len(prompt) > CHARACTERS_PER_WORD * task.format.max_words:
        return Reason.MALFORMED, f"{len(prompt):,} characters"
    texts = tuple(text for example in task.examples for text in (example.intent, example.prompt))
    if (script := foreign_script(prompt, intent, _scripts_of_examples(texts))) is not None:
        return Reason.WRONG_SCRIPT, script
    folded = prompt.casefold()
    if any(folded == example.prompt.casefold() for example in task.examples):
        return Reason.FEW_SHOT_LEAK, "copies an example of the task"
    problem = task.find_violation(prompt)
    if problem:
        return Reason.MALFORMED, problem
    if components.novelty(intent, prompt) < MIN_NOVELTY:
        return Reason.ECHO, "adds little to the intent"
    if components.repetition(prompt) < MIN_DISTINCT_PAIRS:
        return Reason.REPETITIVE, ""
    if task.format.languages and (other := foreign_language(prompt, tuple(task.format.languages))) is not None:
        return Reason.WRONG_LANGUAGE, other
    return None, ""


@lru_cache(maxsize=64)
def _scripts_of_examples(texts: tuple[str, ...]) -> frozenset[str]:
    return scripts("".join(texts))


def extract_strings(text: str, limit: int) -> list[str]:
    """Return the complete strings of the JSON list under ``"prompts"``, or else of the first list; at most ``limit``.

    The JSON may be cut off or sloppy: other text may surround it, strings may contain raw line breaks and escapes that JSON
    does not define, and items may be objects, whose values count. A string without its closing quote is incomplete.
    """
    start = _LIST.search(text)
    position = start.end() if start else text.find("[") + 1
    if not position:
        return []
    strings: list[str] = []
    depth = 0
    while len(strings) < limit and (token := _TOKEN.search(text, position)):
        position = token.end()
        if token[0] in "[{":
            depth += 1
        elif token[0] in "]}":
            depth -= 1
            if depth < 0:
                break
        else:
            string = _STRING.match(text, token.start())
            if not string:
                break
            position = string.end()
            if not _KEY.match(text, position):
                strings.append(_unescape(string[1]))
    return strings


def _unescape(body: str) -> str:
    try:
        value = json.loads(f'"{body}"', strict=False)
    except json.JSONDecodeError:
        return _ESCAPE.sub(lambda match: _ESCAPED.get(match[1], match[1]), body)
    return str(value)


def replace_surrogates(text: str) -> str:
    """Replace lone surrogates, which a JSON escape may contain and UTF-8 can't encode, by U+FFFD."""
    return text if text.isascii() else text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


# A text is in another language if the allowed ones together have a lower probability. 0.01% of 14,900 English prompts
# (T2I-CompBench, TIFA, the bundled teacher's for images, templates and video) fall below 0.02, and 2.6% of keyword queries.
MIN_PROBABILITY = 0.02
MIN_WORDS = 4  # the identifier only guesses on shorter texts

# Scripts that are mixed within one language.
_SAME_SCRIPT = {"HIRAGANA": "CJK", "KATAKANA": "CJK", "BOPOMOFO": "CJK", "IDEOGRAPHIC": "CJK", "HANGUL": "HANGUL"}


@lru_cache(maxsize=65_536)
def script(letter: str) -> str:
    """Return the script of one letter from its Unicode name: LATIN, CYRILLIC, CJK, ..."""
    plain = unicodedata.normalize("NFKC", letter)[:1]  # maps full-width and mathematical letters to those of their script
    name = unicodedata.name(plain, "UNKNOWN").split(" ", 1)[0].split("-", 1)[0]
    return _SAME_SCRIPT.get(name, name)


@lru_cache(maxsize=16)
def scripts(text: str) -> frozenset[str]:
    """Return the scripts of the letters of ``text``."""
    if text.isascii():
        return frozenset({"LATIN"}) if any(map(str.isalpha, text)) else frozenset()
    return frozenset(script(letter) for letter in set(text) if letter.isalpha())


def foreign_script(prompt: str, intent: str, allowed: frozenset[str]) -> str | None:
    """Return the script of ``prompt`` if most of its letters are in neither ``intent``'s nor the ``allowed`` scripts."""
    if prompt.isascii() and "LATIN" in allowed:
        return None
    counts = Counter(script(letter) for letter in prompt if letter.isalpha())
    expected = allowed | scripts(intent)
    foreign = {name: n for name, n in counts.items() if name not in expected}
    if 2 * sum(foreign.values()) <= counts.total():
        return None
    return max(foreign, key=lambda name: (foreign[name], name)).lower()


def foreign_language(prompt: str, languages: tuple[str, ...]) -> str | None:
    """Return the most probable language of ``prompt`` (ISO 639-1) if it is in none of ``languages``, else None."""
    if count_words(prompt) < MIN_WORDS:
        return None
    probabilities = dict(_load_identifier().rank(prompt))
    if sum(probabilities.get(language, 0.0) for language in languages) >= MIN_PROBABILITY:
        return None
    best = max(probabilities, key=lambda language: probabilities[language])
    return None if best == "zxx" else best  # zxx: not a language, such as numbers; other checks cover those


@lru_cache(maxsize=1)
def _load_identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)  # half a second per process
