"""Render a task and an intent as the teacher's input: raw few-shot text or chat messages, for one prompt or several."""

import json

from udrl.tasks.task import Example, Task

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
