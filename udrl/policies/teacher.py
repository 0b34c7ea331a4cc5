"""The teacher as a policy: few-shot or chat requests, for one prompt or for several at once as guided JSON."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from udrl import models
from udrl.errors import UserError
from udrl.policies.policy import Policy, Row
from udrl.recipe import Teacher
from udrl.tasks import Task, render_chat, render_chat_json, render_completion, render_completion_json
from udrl.tokenizer import load_pretrained_tokenizer

MAX_PROMPTS = 32  # in one structured request


def teacher_policy(config: Teacher, tasks: Sequence[Task]) -> Policy:
    """Return the teacher with the few-shot templates of ``tasks``.

    Raises:
        UserError: ``teacher.structured`` names a task that the run does not have, or a number out of range.
    """
    chat = config.style == "chat"
    path = models.resolve(config.model)
    describe: dict[str, Any] = {"style": config.style, "tasks": [t.model_dump(exclude={"format"}) for t in tasks]}
    if config.structured:
        _check_structured(config.structured, tasks)
        guides = {t.name: structured_outputs(t, config.structured[t.name]) for t in tasks if t.name in config.structured}
        describe["structured"] = {name: [config.structured[name], guide] for name, guide in guides.items()}
    return Policy(
        name="teacher",
        model=config.model,
        path=path,
        revision=models.revision(config.model, config.revision),
        render=_TeacherRequest({t.name: t for t in tasks}, chat, path, config.revision, config.sampling.max_tokens),
        sampling=config.sampling,
        engine=config.engine,
        placement=config.placement,
        stop=() if chat else ("\n",),
        describe=describe,
    )


def _check_structured(structured: dict[str, int], tasks: Sequence[Task]) -> None:
    names = [t.name for t in tasks]
    problems = [
        f"teacher.structured.{name}: no such task in this run; its tasks are {', '.join(names)}"
        for name in structured
        if name not in names
    ]
    problems += [
        f"teacher.structured.{name}: {n} prompts in one request; 1 to {MAX_PROMPTS} are allowed"
        for name, n in structured.items()
        if not 1 <= n <= MAX_PROMPTS
    ]
    if problems:
        raise UserError("\n".join(problems))


@dataclass(frozen=True)
class _TeacherRequest:
    """Render a request row as few-shot text, or as the token ids of a chat."""

    tasks: dict[str, Task]
    chat: bool
    path: str
    revision: str | None
    max_tokens: int  # of one prompt

    def __call__(self, row: Row) -> dict[str, Any]:
        task, intent, n = self.tasks[row["task"]], row["intent"], row["prompts"]
        sampling = {"sampling": self._structured_sampling(task, n)} if n > 1 else {}
        if self.chat:
            messages = render_chat_json(task, intent, n) if n > 1 else render_chat(task, intent)
            return {"tokenized_prompt": encode_chat(self.path, self.revision, messages), **sampling}
        return {"prompt": render_completion_json(task, intent, n) if n > 1 else render_completion(task, intent), **sampling}

    def _structured_sampling(self, task: Task, n: int) -> dict[str, Any]:
        return {
            "max_tokens": n * self.max_tokens + _FRAME_TOKENS,
            "stop": [],  # a model may write a newline before the JSON; it ends plain completions only
            "structured_outputs": structured_outputs(task, n),
        }


_FRAME_TOKENS = 16  # tokens of {"prompts": [ and ]} in any tokenizer; the max_tokens of each prompt cover its quotes and comma
_LONGEST_WORD = 40  # characters


def structured_outputs(task: Task, n: int) -> dict[str, Any]:
    """Return the guide for ``{"prompts": [...]}`` with exactly ``n`` strings.

    The result has the arguments of ``vllm.sampling_params.StructuredOutputsParams``. It is a regular expression, not a JSON
    schema: a schema allows any white space unless the whole engine is configured otherwise, and a weak model then fills its
    budget with it. A string may be one word longer than the task allows, so that a completion that does not end is rejected for
    its length instead of cut to fit. Repetition bounds apply only to single character classes (here, to the letters of a word):
    xgrammar then takes 0.1 ms per token, and 150 to 360 ms if a bounded repetition contains alternatives.
    """
    word = rf'(\\")?[^"\\\x00-\x20]{{1,{_LONGEST_WORD}}}(\\")?[.,;:!?]?'
    text = rf'"{word}( {word}){{0,{task.format.max_words}}}"'
    return {"regex": rf' ?\{{"prompts": \[{text}(, {text}){{{n - 1}}}\]\}}'}


def encode_chat(path: str, revision: str | None, messages: list[dict[str, str]]) -> list[int]:
    """Return the token ids of ``messages`` and of the opening of the answer.

    Ids, not text: a Llama 3 template writes its own begin-of-text token, and the engine would put a second one before it.
    """
    tokenizer = load_pretrained_tokenizer(path, revision)
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
