"""What goes over the wire: requests, answers, the one shape of an error, and the pure steps between them. No Ray here.

Every 4xx and 5xx body is ``{"error": {"message", "field", "type"}}``; ``field`` is the request key to mend, or null.
"""

from typing import Annotated, Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, StringConstraints
from starlette.exceptions import HTTPException

from udrl.commands import ANY, Command, Vocabulary
from udrl.episodes import word_count
from udrl.policies.policy import draws
from udrl.recipe import Sampling

MAX_PROMPTS = 16
MAX_INTENT_CHARACTERS = 2000
# vLLM seeds sample i with seed + i and torch takes 64 bits: a bound far below that can never overflow in the engine.
MAX_SEED = 2**32 - 1


class PromptsRequest(BaseModel):
    """Body of ``POST /v1/prompts``. Numbers are strict: ``"12"`` and ``true`` are mistakes, not 12 and 1."""

    model_config = ConfigDict(extra="forbid")
    intent: Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=MAX_INTENT_CHARACTERS)]
    task: str = Field(description="a task of the model, see GET /v1/models")
    length: int | None = Field(None, strict=True, description="words wanted; null: what the task's best episodes had")
    reward: int | None = Field(None, strict=True, description="reward bin wanted; null: the best in distribution")
    n: int = Field(1, strict=True, ge=1, le=MAX_PROMPTS)
    seed: int | None = Field(None, strict=True, ge=0, le=MAX_SEED)
    temperature: float | None = Field(None, strict=True, ge=0, le=2, allow_inf_nan=False)


class CommandMeant(BaseModel):
    """The command that the student was given; null where it was told nothing ("any")."""

    words: int | None
    reward: int | None


class Prompt(BaseModel):
    text: str
    words: int = Field(description="achieved length")
    on_length: bool | None = Field(description="achieved equals commanded; null where no length was commanded")
    finish_reason: str | None = Field(description="stop: the student ended it; length: cut off at the token limit")


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int


class PromptsResponse(BaseModel):
    model: str
    task: str
    intent: str
    command: CommandMeant
    prompts: list[Prompt]
    usage: Usage


class TaskCard(BaseModel):
    default_words: int
    default_reward: int
    usual_words: list[int] = Field(description="p5, median, p95 of the training episodes")


class ModelCard(BaseModel):
    """An OpenAI model object, with what can be commanded beside it."""

    id: str
    object: str = "model"
    created: int
    owned_by: str = "udrl"
    max_words: int
    reward_bins: int
    max_prompts: int = MAX_PROMPTS
    tasks: dict[str, TaskCard]


class ModelList(BaseModel):
    object: str = "list"
    data: list[ModelCard]


class RequestError(Exception):
    """A request that can't be answered; becomes the error body."""

    def __init__(self, message: str, field: str | None, status: int = 422, kind: str = "invalid_request") -> None:
        super().__init__(message)
        self.message, self.field, self.status, self.kind = message, field, status, kind

    def response(self) -> JSONResponse:
        return JSONResponse({"error": {"message": self.message, "field": self.field, "type": self.kind}}, self.status)


def resolve(request: PromptsRequest, vocabulary: Vocabulary) -> Command:
    """The command a request means: what it leaves out is the task's default from ``commands.json``.

    Raises:
        RequestError: the task, length or reward bin is not in the model's vocabulary.
    """
    if request.task not in vocabulary.tasks:
        raise RequestError(f"task: not one of this model's: {', '.join(vocabulary.tasks)}", "task")
    if request.length is not None and not 1 <= request.length <= vocabulary.max_words:
        raise RequestError(f"length: {request.length} lies outside 1..{vocabulary.max_words} words", "length")
    if request.reward is not None and not 0 <= request.reward < vocabulary.reward_bins:
        raise RequestError(f"reward: {request.reward} lies outside bins 0..{vocabulary.reward_bins - 1}", "reward")
    default = vocabulary.default(request.task)
    words = default.words if request.length is None else request.length
    reward = default.reward if request.reward is None else request.reward
    return Command(task=request.task, words=words, reward=reward)


def engine_request(ids: list[int], request: PromptsRequest, sampling: Sampling, *, context: int, end: int) -> dict[str, Any]:
    """The OpenAI completions body, with vLLM's extra keys, that the engine is sent.

    Args:
        ids: the encoded intent and command.
        context: tokens that the engine holds for intent, command and prompt together.
        end: id of ``<|end|>``.

    Raises:
        RequestError: the intent leaves no room for a prompt, or several prompts are asked of greedy decoding.
    """
    room = context - sampling.max_tokens
    if len(ids) > room:
        raise RequestError(f"intent: too long for this model: {len(ids)} tokens with its command, at most {room}", "intent")
    temperature = sampling.temperature if request.temperature is None else request.temperature
    if temperature == 0 and request.n > 1:
        raise RequestError("n: must be 1 at temperature 0, where every prompt would be the same", "n")
    body: dict[str, Any] = {
        **draws(sampling),
        "prompt": ids,
        "n": request.n,
        "temperature": temperature,
        "stop_token_ids": [end],
    }
    if request.seed is not None:
        body["seed"] = request.seed
    return body


def answer(model: str, request: PromptsRequest, command: Command, completion: dict[str, Any]) -> PromptsResponse:
    """The response from the engine's completion: ``choices`` with text and finish_reason, and ``usage``."""
    prompts = []
    for choice in completion["choices"]:
        text = choice["text"].strip()
        words = word_count(text)
        on_length = None if command.words == ANY else words == command.words
        prompts.append(Prompt(text=text, words=words, on_length=on_length, finish_reason=choice["finish_reason"]))
    return PromptsResponse(
        model=model,
        task=request.task,
        intent=request.intent,
        command=CommandMeant(
            words=None if command.words == ANY else command.words,
            reward=None if command.reward == ANY else command.reward,
        ),
        prompts=prompts,
        usage=Usage(**completion["usage"]),
    )


def model_card(model: str, created: int, vocabulary: Vocabulary) -> ModelCard:
    tasks = {
        name: TaskCard(default_words=t.default_words, default_reward=t.default_reward, usual_words=t.words)
        for name, t in vocabulary.tasks.items()
    }
    return ModelCard(id=model, created=created, max_words=vocabulary.max_words, reward_bins=vocabulary.reward_bins, tasks=tasks)


def validation_error(problems: list[Any]) -> RequestError:
    """The first of pydantic's problems as a request error that names the field."""
    problem = problems[0]
    path = [str(part) for part in problem["loc"] if part != "body"]
    if problem["type"] == "json_invalid":
        return RequestError(f"the body is not JSON: {problem['ctx']['error']}", None, 400, "invalid_json")
    if not path:
        return RequestError("expected a JSON object, sent with Content-Type: application/json", None)
    field = ".".join(path)
    message = problem["msg"]
    if problem["type"] == "extra_forbidden":
        message = f"unknown key; allowed: {', '.join(PromptsRequest.model_fields)}"
    elif problem["type"] == "missing":
        message = "must be given"
    return RequestError(f"{field}: {message}", field)


def install_error_handlers(app: FastAPI) -> None:
    """Give every failure of ``app`` the one error shape; what went wrong inside stays in the log."""

    @app.exception_handler(RequestError)
    async def _request(_: Request, error: RequestError) -> JSONResponse:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def _validation(_: Request, error: RequestValidationError) -> JSONResponse:
        return validation_error(list(error.errors())).response()

    @app.exception_handler(HTTPException)
    async def _http(_: Request, error: HTTPException) -> JSONResponse:
        kind = "not_found" if error.status_code == 404 else "invalid_request"
        return RequestError(error.detail, None, error.status_code, kind).response()

    @app.exception_handler(Exception)
    async def _internal(_: Request, __: Exception) -> JSONResponse:
        return RequestError("internal error; the server's log has the cause", None, 500, "internal_error").response()
