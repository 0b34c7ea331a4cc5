"""Errors of a request and their one JSON shape.

Every 4xx and 5xx body is ``{"error": {"message", "type", "param"}}``, the names that OpenAI's clients read; ``param`` is the
dotted key of the request to correct, or null.
"""

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

# Descriptions of the statuses in the OpenAPI document.
STATUS_DESCRIPTIONS = {
    400: "the body is not JSON",
    401: "the key is missing or unknown",
    403: "keys are off and the caller is not on this machine",
    404: "the model does not exist",
    413: "the body is too large",
    422: "a key of the request has a wrong value; `param` names it",
    429: "the API key's rate or concurrency limit is reached; see Retry-After",
    500: "internal error of the server",
    503: "the queue is full or the engine was lost; see Retry-After",
    504: "the request timed out",
}


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None


class ErrorBody(BaseModel):
    error: ErrorDetail


class RequestError(Exception):
    """A failed request: HTTP status, error body and the seconds to wait before a retry."""

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


def make_internal_error() -> RequestError:
    """Return a 500 that reveals no detail."""
    return RequestError("internal error; the cause is in the server's log", None, 500, "internal_error")


def describe_errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the ``responses`` of a FastAPI route for these statuses."""
    return {status: {"model": ErrorBody, "description": STATUS_DESCRIPTIONS[status]} for status in statuses}


def to_request_error(problems: list[Any]) -> RequestError:
    """Return the first of Pydantic's problems as a request error that names the key."""
    # A union has one problem per member; the member that got furthest into the request is the one that the client meant.
    same_key = [problem for problem in problems if problem["loc"][:2] == problems[0]["loc"][:2]]
    problem = max(same_key, key=lambda candidate: len(candidate["loc"]))
    if problem["type"] == "json_invalid":
        return RequestError(f"the body is not valid JSON: {problem['ctx']['error']}", None, 400, "invalid_json")
    path = [str(part) for part in problem["loc"] if part not in ("body", "path", "query") and _is_request_key(part)]
    if not path:
        return RequestError("the body must be a JSON object, sent with Content-Type: application/json", None)
    param = ".".join(path)
    message = {"extra_forbidden": "unknown key; remove it", "missing": "must be given"}.get(problem["type"], problem["msg"])
    if path == ["length"] and problem["type"] != "value_error":
        message = "must be a number of words, {'min': a, 'max': b}, 'any' or null"
    elif path[0] == "reward":
        message = "must be a reward bin, 'any' or null"
    return RequestError(f"{param}: {message}", param)


def _is_request_key(part: int | str) -> bool:
    """Tell keys from the union members ("constrained-str", "LengthRange") that Pydantic appends to the location."""
    return isinstance(part, int) or (part.isidentifier() and part not in ("str", "int", "float", "bool", "LengthRange"))


def install_error_handlers(app: FastAPI) -> None:
    """Give every failure of ``app`` the one error shape; details of internal errors stay in the log."""

    @app.exception_handler(RequestError)
    async def _request(_: Request, error: RequestError) -> JSONResponse:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def _validation(_: Request, error: RequestValidationError) -> JSONResponse:
        return to_request_error(list(error.errors())).response()

    @app.exception_handler(HTTPException)
    async def _http(_: Request, error: HTTPException) -> JSONResponse:
        if error.status_code == 400:  # FastAPI raises it only for bytes that its JSON parser cannot decode
            return RequestError("the body is not valid JSON", None, 400, "invalid_json").response()
        kind = "not_found" if error.status_code == 404 else "invalid_request"
        response = RequestError(error.detail, None, error.status_code, kind).response()
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(Exception)
    async def _internal(_: Request, __: Exception) -> JSONResponse:
        return make_internal_error().response()
