"""OpenAI's completions and chat completions, spoken well enough that its clients work unchanged.

The prompt, or the last user message, is the intent. ``model`` is the model, or ``model:task``, which needs no further key;
task, length and reward may stand beside OpenAI's own keys (``extra_body`` of its clients). Keys that would change the answer
and that this server does not know are refused by name; those that ask for nothing are let through.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from serve.api import MAX_SEED, Commanding, CommandMeant, Intent, Prompt, RequestError, Usage

Nothing = Annotated[float, Field(ge=0, le=0)] | None


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class _Request(Commanding):
    model: str = Field(description="an id of GET /v1/models: the model, or model:task")
    n: int | None = Field(None, strict=True, ge=1)
    temperature: float | None = Field(None, strict=True, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(None, strict=True, gt=0, le=1, allow_inf_nan=False)
    seed: int | None = Field(None, strict=True, ge=0, le=MAX_SEED)
    max_tokens: int | None = Field(
        None, strict=True, ge=1, description="at most the recipe's serve.sampling.max_tokens is used"
    )
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # Accepted where they ask for nothing.
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: Literal[False] | None = None
    presence_penalty: Nothing = None
    frequency_penalty: Nothing = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    stop: Annotated[list[str], Field(max_length=0)] | None = None

    def sampling(self) -> dict[str, Any]:
        """What it says about how drafts are drawn, under the engine's names."""
        names = ("temperature", "top_p", "seed", "max_tokens")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


class CompletionRequest(_Request):
    """Body of ``POST /v1/completions``."""

    prompt: Intent | Annotated[list[Intent], Field(min_length=1)] = Field(description="the intent, or several")
    echo: Literal[False] | None = None
    logprobs: None = None
    suffix: None = None

    def intents(self) -> list[str]:
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt


class TextPart(BaseModel):
    model_config = ConfigDict(extra="forbid")
    type: Literal["text"]
    text: str


class Message(BaseModel):
    model_config = ConfigDict(extra="forbid")
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    def text(self) -> str:
        return self.content if isinstance(self.content, str) else " ".join(part.text for part in self.content)


class ResponseFormat(BaseModel):
    model_config = ConfigDict(extra="forbid")
    type: Literal["text"]


class ChatRequest(_Request):
    """Body of ``POST /v1/chat/completions``. The last user message is the intent; a student knows no instructions and no
    history, so other messages are not read."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, strict=True, ge=1)
    logprobs: Literal[False] | None = None
    response_format: ResponseFormat | None = None

    def intent(self) -> str:
        """Raises:
        RequestError: no user message, or an empty one.
        """
        texts = [message.text().strip() for message in self.messages if message.role == "user"]
        if not texts or not texts[-1]:
            raise RequestError("messages: the last user message is the intent, and there is none", "messages")
        return texts[-1]

    def sampling(self) -> dict[str, Any]:
        limit = self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens
        return {**super().sampling(), **({} if limit is None else {"max_tokens": limit})}


class Achieved(BaseModel):
    """What stands beside OpenAI's keys in each choice."""

    task: str
    words: int
    command: CommandMeant
    on_length: bool | None


class Choice(BaseModel):
    index: int
    finish_reason: Literal["stop", "length"] | None
    logprobs: None = None
    udrl: Achieved | None = None


class TextChoice(Choice):
    text: str


class AssistantMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(Choice):
    message: AssistantMessage


class _Answer(BaseModel):
    id: str
    created: int
    model: str
    system_fingerprint: str | None = Field(description="hash of the weights, where the export names one")


class CompletionResponse(_Answer):
    object: Literal["text_completion"] = "text_completion"
    choices: list[TextChoice]
    usage: Usage


class ChatResponse(_Answer):
    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]
    usage: Usage


def achieved(prompt: Prompt) -> Achieved:
    return Achieved(task=prompt.task, words=prompt.words, command=prompt.command, on_length=prompt.on_length)


def text_choice(index: int, prompt: Prompt) -> TextChoice:
    return TextChoice(index=index, text=prompt.text, finish_reason=prompt.finish_reason, udrl=achieved(prompt))


def chat_choice(index: int, prompt: Prompt) -> ChatChoice:
    message = AssistantMessage(content=prompt.text)
    return ChatChoice(index=index, message=message, finish_reason=prompt.finish_reason, udrl=achieved(prompt))


def text_chunk(index: int, text: str, prompt: Prompt | None) -> dict[str, Any]:
    """A choice of a streamed completion; ``prompt`` with the last piece of its choice."""
    return {"text": text, **_ending(index, prompt)}


def chat_chunk(index: int, text: str, prompt: Prompt | None, *, first: bool) -> dict[str, Any]:
    """A choice of a streamed chat completion; the first one of a choice names the role."""
    delta = {**({"role": "assistant"} if first else {}), **({"content": text} if text or first else {})}
    return {"delta": delta, **_ending(index, prompt)}


def _ending(index: int, prompt: Prompt | None) -> dict[str, Any]:
    ending: dict[str, Any] = {"index": index, "finish_reason": None, "logprobs": None}
    if prompt is not None:
        ending |= {"finish_reason": prompt.finish_reason, "udrl": achieved(prompt).model_dump()}
    return ending


def task_of(model: str, known: str, tasks: list[str]) -> str | None:
    """The task that a model's id stands for; None: the model itself.

    Raises:
        RequestError: 404, no such model.
    """
    name, colon, task = model.partition(":")
    if name != known or (colon and task not in tasks):
        names = ", ".join([known, *(f"{known}:{task}" for task in tasks)])
        raise RequestError(f"model: {model[:100]!r} is not served here; there are {names}", "model", 404, "not_found")
    return task or None
