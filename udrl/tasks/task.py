"""A task: a kind of prompt to write, defined by one YAML file; users add tasks without code.

A task and an intent are rendered as the teacher's input: raw few-shot text or chat messages, for one prompt or several.
"""

import importlib.resources
import json
import os
import re
from collections.abc import Sequence

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from udrl.errors import UserError
from udrl.text import count_words

# Languages that the language identifier (py3langid) distinguishes.
LANGUAGES = frozenset(
    (  # noqa: SIM905
        "ace af am an ar ary arz as az ba bcl be bg bn br bs ca crh cs cy da de dz el en eo es et eu ext fa fi fo fr "
        "fuv fy ga gcf gcr gd gl gom grc gu gug guw ha hbo he hi hr ht hu hy id ig is it ja jv ka kab kik kk km kn ko "
        "ku ky la lb lg lij ln lo lt ltg lv mg mk ml mn mr ms mt my ne nl nn no nso oc om or pa pcm pl ps pt qu ro ru "
        "rw sa sdh se si sk sl sn so sq sr st sv sw ta te tg th tk tl tr tt ug uk ur uz uzs vec vi vo wa wuu xh yo yue "
        "zh zu"
    ).split()
)


class Example(BaseModel):
    """One few-shot example of a task."""

    model_config = ConfigDict(extra="forbid")
    intent: str = Field(min_length=1)
    prompt: str = Field(min_length=1)


class Format(BaseModel):
    """Rules that reject a malformed prompt or score a well-formed one."""

    model_config = ConfigDict(extra="forbid")
    min_words: int = Field(4, ge=1)
    max_words: int = Field(40, ge=2)
    reject: list[str] = Field(
        default_factory=list, description="regular expressions of malformed prompts (searched, ignoring case)"
    )
    prefer: list[str] = Field(
        default_factory=list,
        description="regular expressions of good prompts; the format score is the share of them that a prompt matches",
    )
    languages: list[str] = Field(
        default_factory=list, description="ISO 639 codes; prompts in other languages are rejected; empty: any language"
    )

    @field_validator("reject", "prefer")
    @classmethod
    def _compile(cls, patterns: list[str]) -> list[str]:
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"not a regular expression: {pattern!r} ({error})") from error
        return patterns

    @field_validator("languages")
    @classmethod
    def _check_languages(cls, languages: list[str]) -> list[str]:
        unknown = sorted(set(languages) - LANGUAGES)
        if unknown:
            raise ValueError(f"unknown language {', '.join(unknown)}; use any of {' '.join(sorted(LANGUAGES))}")
        return languages

    @model_validator(mode="after")
    def _check_range(self) -> "Format":
        if self.min_words > self.max_words:
            raise ValueError(f"min_words {self.min_words} is above max_words {self.max_words}")
        return self


class Task(BaseModel):
    """A kind of prompt: its instruction and examples for the teacher, and its format rules."""

    model_config = ConfigDict(extra="forbid")
    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    title: str
    instruction: str = Field(min_length=1, description="the instruction to the teacher")
    label: str = Field("Prompt", description="the word before each prompt in the raw few-shot text")
    examples: list[Example] = Field(min_length=3)
    format: Format = Format()

    def find_violation(self, prompt: str) -> str | None:
        """Return the first format rule that ``prompt`` violates, as text, or None."""
        n = count_words(prompt)
        if not self.format.min_words <= n <= self.format.max_words:
            return f"{n} words; {self.format.min_words} to {self.format.max_words} are allowed"
        for pattern in self.format.reject:
            if re.search(pattern, prompt, re.IGNORECASE):
                return f"matches {pattern!r}"
        return None

    def format_score(self, prompt: str) -> float:
        """Return the share of the preferred patterns that ``prompt`` matches, 0 to 1; 1 if the task has none."""
        if not self.format.prefer:
            return 1.0
        return sum(bool(re.search(p, prompt, re.IGNORECASE)) for p in self.format.prefer) / len(self.format.prefer)


def shipped_tasks() -> list[str]:
    """Return the names of the tasks that come with the package."""
    files = importlib.resources.files(__package__).iterdir()
    return sorted(f.name.removesuffix(".yaml") for f in files if f.name.endswith(".yaml"))


def load_task(name: str) -> Task:
    """Load a shipped task by name, or a task file by path.

    Raises:
        UserError: there is no such task, or the file is malformed.
    """
    if name in shipped_tasks():
        text = importlib.resources.files(__package__).joinpath(f"{name}.yaml").read_text(encoding="utf-8")
    elif os.path.isfile(name):
        with open(name, encoding="utf-8", errors="replace") as source:
            text = source.read()
    else:
        raise UserError(f"task {name}: not shipped and no such file; use one of {', '.join(shipped_tasks())}, or a file's path")
    try:
        values = yaml.safe_load(text)
        if not isinstance(values, dict):
            raise UserError(f"task file {name}: not a mapping ({type(values).__name__}); write keys and values")
        return Task.model_validate(values)
    except yaml.YAMLError as error:
        raise UserError(f"task file {name}: not YAML: {' '.join(str(error).split())}") from error
    except ValidationError as error:
        lines = [f"task file {name}: {'.'.join(map(str, p['loc']))}: {p['msg']}" for p in error.errors()]
        raise UserError("\n".join(lines)) from error


def load_tasks(names: Sequence[str]) -> list[Task]:
    """Load several tasks.

    Raises:
        UserError: as in :func:`load_task`; or two tasks have the same name.
    """
    tasks = [load_task(name) for name in names]
    seen: set[str] = set()
    for task, origin in zip(tasks, names, strict=True):
        if task.name in seen:
            raise UserError(f"task file {origin}: the task name {task.name!r} is defined twice; rename one of them")
        seen.add(task.name)
    return tasks


_JSON_INSTRUCTION = "Answer with JSON, as many different ones as the number after the request asks for."


def render_completion(task: Task, intent: str) -> str:
    """Return raw few-shot text that ends right before the prompt; a newline ends the completion."""
    examples = "".join(f"Intent: {e.intent}\n{task.label}: {e.prompt}\n\n" for e in task.examples)
    return f"{task.instruction.strip()}\n\n{examples}Intent: {intent}\n{task.label}:"


def render_chat(task: Task, intent: str) -> list[dict[str, str]]:
    """Return chat messages: the instruction, the examples as turns, then the intent."""
    messages = [{"role": "system", "content": task.instruction.strip()}]
    for e in task.examples:
        messages += [{"role": "user", "content": e.intent}, {"role": "assistant", "content": e.prompt}]
    return [*messages, {"role": "user", "content": intent}]


def render_completion_json(task: Task, intent: str, n: int) -> str:
    """Return raw few-shot text that ends right before JSON with ``n`` prompts, ``{"prompts": [...]}``.

    Each example requests one prompt. Examples with longer arrays, made of several examples' prompts under a list of their
    intents, made the bundled teacher lose the intent: relevance 0.20 to 0.28 instead of 0.40 to 0.52.
    """
    examples = "".join(f"Intent: {e.intent} (1)\n{task.label}: {_json_answer(e)}\n\n" for e in task.examples)
    return f"{task.instruction.strip()} {_JSON_INSTRUCTION}\n\n{examples}Intent: {intent} ({n})\n{task.label}:"


def render_chat_json(task: Task, intent: str, n: int) -> list[dict[str, str]]:
    """Return chat messages that request JSON with ``n`` prompts: instruction, examples as turns, then the intent."""
    messages = [{"role": "system", "content": f"{task.instruction.strip()} {_JSON_INSTRUCTION}"}]
    for e in task.examples:
        messages += [{"role": "user", "content": f"{e.intent} (1)"}, {"role": "assistant", "content": _json_answer(e)}]
    return [*messages, {"role": "user", "content": f"{intent} ({n})"}]


def _json_answer(example: Example) -> str:
    return json.dumps({"prompts": [example.prompt]}, ensure_ascii=False)
