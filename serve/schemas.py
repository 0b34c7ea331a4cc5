"""Requests and responses of the native endpoints."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from serve.engine_protocol import SamplingOptions
from serve.request_errors import ErrorDetail

# vLLM seeds sample i with seed + i, and torch takes 64 bits: this bound cannot overflow in the engine.
MAX_SEED = 2**32 - 1
ANY_VALUE: Literal["any"] = "any"
ALL_TASKS: Literal["all"] = "all"

Intent = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]


class LengthRange(BaseModel):
    """A range of lengths in words, both ends included."""

    model_config = ConfigDict(extra="forbid")
    min: int = Field(strict=True, ge=1)
    max: int = Field(strict=True, ge=1)

    @model_validator(mode="after")
    def _require_order(self) -> "LengthRange":
        if self.min > self.max:
            raise ValueError(f"min {self.min} is greater than max {self.max}; swap them")
        return self


Length = Annotated[int, Field(strict=True)] | LengthRange | Literal["any"] | None
Reward = Annotated[int, Field(strict=True)] | Literal["any"] | None


class CommandFields(BaseModel):
    """The command fields of every request. Numbers are strict: ``"12"`` and ``true`` are errors, not 12 and 1."""

    model_config = ConfigDict(extra="forbid")
    task: str | list[str] | None = Field(
        None, description="a task of the model, several, or 'all'; may be left out if the model has one. See GET /v1/models"
    )
    length: Length = Field(
        None,
        description="exact number of words, or a range {'min', 'max'}; kept or reported as missed. 'any': no length is"
        " commanded. null: the task's usual length is commanded, and on_length is null",
    )
    reward: Reward = Field(None, description="reward bin; null: the best in distribution; 'any': no bin is commanded")


class NativeRequest(CommandFields):
    """The fields that the native requests share."""

    n: int = Field(1, strict=True, ge=1, description="number of distinct prompts for each task")
    seed: int | None = Field(None, strict=True, ge=0, le=MAX_SEED)
    temperature: float | None = Field(
        None, strict=True, ge=0, le=2, allow_inf_nan=False, description="null: the recipe's serve.sampling.temperature"
    )

    def options(self) -> SamplingOptions:
        return SamplingOptions(temperature=self.temperature, seed=self.seed)


class PromptsRequest(NativeRequest):
    """Body of ``POST /v1/prompts``."""

    intent: Intent
    stream: bool = Field(False, strict=True, description="answer with server-sent events: delta, redraft, prompt, done, error")


class BatchRequest(NativeRequest):
    """Body of ``POST /v1/prompts/batch``: several intents under one command."""

    intents: list[Intent] = Field(min_length=1)


class PromptCommand(BaseModel):
    """The command that the student received; null for a part that was not commanded ("any")."""

    words: int | None
    reward: int | None


class Prompt(BaseModel):
    """A prompt, its command and its achieved length."""

    task: str
    text: str
    words: int = Field(description="achieved length")
    command: PromptCommand
    on_length: bool | None = Field(description="whether the length lies in the requested range; null if none was requested")
    finish_reason: Literal["stop", "length"] = Field(
        description="stop: the student ended the text; length: it was cut off at the token limit"
    )


class Usage(BaseModel):
    """Tokens of all drafts, rejected ones included."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0
    drafts: int = Field(0, description="drafts that were written for the returned prompts")

    def add(self, prompt_tokens: int, completion_tokens: int, drafts: int) -> None:
        self.prompt_tokens += prompt_tokens
        self.completion_tokens += completion_tokens
        self.total_tokens += prompt_tokens + completion_tokens
        self.drafts += drafts


class PromptsResponse(BaseModel):
    id: str
    object: Literal["prompts"] = "prompts"
    created: int
    model: str
    revision: str | None = Field(description="hash of the weights, if the export names one")
    intent: str
    prompts: list[Prompt] = Field(description="grouped by task, in the requested order")
    missing: int = Field(description="number of requested prompts for which no distinct text was found")
    usage: Usage


class BatchResult(BaseModel):
    """One intent's prompts, or the error that prevented them."""

    intent: str
    prompts: list[Prompt] = []
    missing: int = 0
    error: ErrorDetail | None = None


class BatchResponse(BaseModel):
    id: str
    object: Literal["batch"] = "batch"
    created: int
    model: str
    results: list[BatchResult]
    usage: Usage


class TaskCard(BaseModel):
    default_words: int
    default_reward: int
    usual_words: list[int] = Field(description="p5, median, p95 of the training episodes")


class ModelCard(BaseModel):
    """An OpenAI model object and the commands that the model accepts."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "udrl"
    task: str | None = Field(description="the task of this id; null: the id of the model itself")
    max_words: int
    reward_bins: int
    max_prompts: int
    max_intent_characters: int
    tasks: dict[str, TaskCard]


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class Health(BaseModel):
    status: str
    model: str
