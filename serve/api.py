"""What goes over the wire: requests, answers and the one shape of an error. No Ray here.

Every 4xx and 5xx body is ``{"error": {"message", "type", "param"}}``; ``param`` is the dotted request key to mend, or null.
The names are those that OpenAI's clients read.
"""

from typing import Annotated, Any, Literal

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator
from starlette.exceptions import HTTPException

# vLLM seeds sample i with seed + i and torch takes 64 bits: a bound far below that can never overflow in the engine.
MAX_SEED = 2**32 - 1
ANYTHING: Literal["any"] = "any"
ALL: Literal["all"] = "all"

Intent = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]


class Words(BaseModel):
    """A range of lengths, both ends included."""

    model_config = ConfigDict(extra="forbid")
    min: int = Field(strict=True, ge=1)
    max: int = Field(strict=True, ge=1)

    @model_validator(mode="after")
    def _ordered(self) -> "Words":
        if self.min > self.max:
            raise ValueError(f"min {self.min} is more than max {self.max}")
        return self


Length = Annotated[int, Field(strict=True)] | Words | Literal["any"] | None
Reward = Annotated[int, Field(strict=True)] | Literal["any"] | None


class Commanding(BaseModel):
    """What every way of asking can command. Numbers are strict: ``"12"`` and ``true`` are mistakes, not 12 and 1."""

    model_config = ConfigDict(extra="forbid")
    task: str | list[str] | None = Field(
        None, description="a task of the model, several, or 'all'; may be left out where the model has one. See GET /v1/models"
    )
    length: Length = Field(
        None,
        description="words wanted: exactly so many, or from min to max, and then it is kept or reported as missed; 'any':"
        " nothing is commanded; null: the task's usual length is commanded, and a miss is no miss",
    )
    reward: Reward = Field(None, description="reward bin wanted; null: the best in distribution; 'any': nothing is commanded")


class Drawing(Commanding):
    """A native request but for its intent."""

    n: int = Field(1, strict=True, ge=1, description="distinct prompts wanted of each task")
    seed: int | None = Field(None, strict=True, ge=0, le=MAX_SEED)
    temperature: float | None = Field(
        None, strict=True, ge=0, le=2, allow_inf_nan=False, description="null: the recipe's serve.sampling.temperature"
    )


class PromptsRequest(Drawing):
    """Body of ``POST /v1/prompts``."""

    intent: Intent
    stream: bool = Field(False, strict=True, description="answer with server-sent events: delta, redraft, prompt, done, error")


class BatchRequest(Drawing):
    """Body of ``POST /v1/prompts/batch``: many intents under one command."""

    intents: list[Intent] = Field(min_length=1)


class CommandMeant(BaseModel):
    """The command that the student was given; null where it was told nothing ("any")."""

    words: int | None
    reward: int | None


class Prompt(BaseModel):
    task: str
    text: str
    words: int = Field(description="achieved length")
    command: CommandMeant
    on_length: bool | None = Field(description="achieved lies within what was asked; null where no length was asked")
    finish_reason: Literal["stop", "length"] = Field(
        description="stop: the student ended it; length: cut off at the token limit"
    )


class Usage(BaseModel):
    """Tokens of all drafts, those that were not answered with too: that is what the engine did."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0
    drafts: int = Field(0, description="drafts written for the prompts answered with")

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
    revision: str | None = Field(description="hash of the weights that wrote, where the export names one")
    intent: str
    prompts: list[Prompt] = Field(description="grouped by task, in the order asked")
    missing: int = Field(description="prompts that could not be made distinct")
    usage: Usage


class BatchResult(BaseModel):
    """One intent's prompts, or why there are none."""

    intent: str
    prompts: list[Prompt] = []
    missing: int = 0
    error: "ErrorDetail | None" = None


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
    """An OpenAI model object, with what can be commanded beside it."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "udrl"
    task: str | None = Field(description="the task that this id stands for; null: the id of the model itself")
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


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None


class ErrorBody(BaseModel):
    error: ErrorDetail


class RequestError(Exception):
    """A request that can't be answered; becomes the error body."""

    def __init__(
        self,
        message: str,
        param: str | None,
        status: int = 422,
        kind: str = "invalid_request",
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message, self.param, self.status, self.kind, self.retry_after = message, param, status, kind, retry_after

    def detail(self) -> ErrorDetail:
        return ErrorDetail(message=self.message, type=self.kind, param=self.param)

    def response(self) -> JSONResponse:
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse({"error": self.detail().model_dump()}, self.status, headers)


def validation_error(problems: list[Any]) -> RequestError:
    """The first of pydantic's problems as a request error that names the key."""
    # A union has a problem for each of its members: the one that got furthest into the request is the one that was meant.
    same = [problem for problem in problems if problem["loc"][:2] == problems[0]["loc"][:2]]
    problem = max(same, key=lambda one: len(one["loc"]))
    if problem["type"] == "json_invalid":
        return RequestError(f"the body is not JSON: {problem['ctx']['error']}", None, 400, "invalid_json")
    # Behind the key pydantic names the member of a union that failed ("constrained-str", "Words"): no key of the request.
    path = [str(part) for part in problem["loc"] if part not in ("body", "path", "query") and _is_key(part)]
    if not path:
        return RequestError("expected a JSON object, sent with Content-Type: application/json", None)
    param = ".".join(path)
    message = {"extra_forbidden": "unknown key", "missing": "must be given"}.get(problem["type"], problem["msg"])
    if path == ["length"] and problem["type"] != "value_error":
        message = "expected a number of words, {'min': a, 'max': b}, 'any' or null"
    elif path[0] == "reward":
        message = "expected a bin, 'any' or null"
    return RequestError(f"{param}: {message}", param)


def _is_key(part: int | str) -> bool:
    return isinstance(part, int) or (part.isidentifier() and part not in ("str", "int", "float", "bool", "Words"))


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
        if error.status_code == 400:  # the one that FastAPI raises: the bytes are no JSON of a sane depth and size
            return RequestError("the body is not JSON that can be read", None, 400, "invalid_json").response()
        kind = "not_found" if error.status_code == 404 else "invalid_request"
        response = RequestError(error.detail, None, error.status_code, kind).response()
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(Exception)
    async def _internal(_: Request, __: Exception) -> JSONResponse:
        return RequestError("internal error; the server's log has the cause", None, 500, "internal_error").response()
