"""Requests and responses of OpenAI's completions and chat completions.

``model`` is the model or ``model:task``. The command fields task, length and reward are allowed in addition to OpenAI's own
keys (``extra_body`` of its clients). Keys that this server does not support are refused by name, unless their value has no
effect.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from serve.engine_protocol import SamplingOptions
from serve.request_errors import RequestError
from serve.schemas import MAX_SEED, CommandFields, Intent, PromptCommand, Usage

ZeroOrNull = Annotated[float, Field(ge=0, le=0)] | None


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class OpenAIRequest(CommandFields):
    """The fields that both OpenAI endpoints share."""

    model: str = Field(description="an id of GET /v1/models: the model, or model:task")
    n: int | None = Field(None, strict=True, ge=1)
    temperature: float | None = Field(None, strict=True, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(None, strict=True, gt=0, le=1, allow_inf_nan=False)
    seed: int | None = Field(None, strict=True, ge=0, le=MAX_SEED)
    max_tokens: int | None = Field(None, strict=True, ge=1, description="capped at the recipe's serve.sampling.max_tokens")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # Accepted only with values that have no effect.
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: Literal[False] | None = None
    presence_penalty: ZeroOrNull = None
    frequency_penalty: ZeroOrNull = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    stop: Annotated[list[str], Field(max_length=0)] | None = None

    def options(self) -> SamplingOptions:
        return SamplingOptions(self.temperature, self.top_p, self.seed, self.max_tokens)


class CompletionRequest(OpenAIRequest):
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


class ChatRequest(OpenAIRequest):
    """Body of ``POST /v1/chat/completions``.

    The last user message is the intent; other messages are ignored, because a student understands neither instructions nor a
    history.
    """

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, strict=True, ge=1)
    logprobs: Literal[False] | None = None
    response_format: ResponseFormat | None = None

    def intent(self) -> str:
        """Return the last user message.

        Raises:
            RequestError: there is none, or it is empty.
        """
        texts = [message.text().strip() for message in self.messages if message.role == "user"]
        if not texts or not texts[-1]:
            raise RequestError("messages: no text in the last user message; put the intent there", "messages")
        return texts[-1]

    def options(self) -> SamplingOptions:
        limit = self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens
        return SamplingOptions(self.temperature, self.top_p, self.seed, limit)


class PromptOutcome(BaseModel):
    """The achieved values of a choice, in addition to OpenAI's keys."""

    task: str
    words: int
    command: PromptCommand
    on_length: bool | None


class Choice(BaseModel):
    index: int
    finish_reason: Literal["stop", "length"] | None
    logprobs: None = None
    udrl: PromptOutcome | None = None


class TextChoice(Choice):
    text: str


class AssistantMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(Choice):
    message: AssistantMessage


class OpenAIResponse(BaseModel):
    id: str
    created: int
    model: str
    system_fingerprint: str | None = Field(description="hash of the weights, if the export names one")


class CompletionResponse(OpenAIResponse):
    object: Literal["text_completion"] = "text_completion"
    choices: list[TextChoice]
    usage: Usage


class ChatResponse(OpenAIResponse):
    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]
    usage: Usage
