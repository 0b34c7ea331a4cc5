"""The HTTP application in front of an engine. It needs no Ray: tests run it with an engine of their own."""

import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.middleware.cors import CORSMiddleware

from serve import api, openai_api
from serve.api import RequestError
from serve.drafts import Ask, Grown, Redrafted, Settled
from serve.guard import Guard, Limits
from serve.keys import KeyRing
from serve.service import Service, TaskEvent, Work

PLAYGROUND = Path(__file__).parent / "playground" / "index.html"
# The page carries all it needs; nothing it could be made to contain may load or send anything elsewhere.
PLAYGROUND_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
STREAM_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}  # the latter: nginx must not hold pieces back

_WHAT = {
    400: "the body is not JSON",
    401: "no key, or not a known one",
    403: "keys are off and the caller is not on this machine",
    404: "no such model",
    413: "the body is too large",
    422: "a key of the request is wrong; `param` names it",
    429: "the key's rate or concurrency is used up; see Retry-After",
    500: "a fault of the server",
    503: "too much is waiting, or the engine was lost: see Retry-After",
    504: "not answered in time",
}


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": api.ErrorBody, "description": _WHAT[status]} for status in statuses}


_GENERATION = _errors(400, 401, 403, 413, 422, 429, 500, 503, 504)


def _sse(*names: str) -> dict[str, Any]:
    """The content of a streamed answer: events of these names, with JSON as their data."""
    properties = {"event": {"enum": [*names, "message"]}, "data": {"type": "string", "description": "JSON"}}
    return {"text/event-stream": {"itemSchema": {"type": "object", "required": ["data"], "properties": properties}}}


_NATIVE_STREAM = _sse("delta", "redraft", "prompt", "done", "error")
_OPENAI_STREAM = _sse("error")


def create(
    service: Service,
    keys: KeyRing | None,
    ready: Callable[[], Awaitable[bool]],
) -> FastAPI:
    """The application: routes, errors, guard.

    Args:
        keys: who may ask; None: keys are off, and only loopback is answered.
        ready: whether an engine is warmed up.
    """
    settings = service.settings
    # FastAPI's own /docs page loads its scripts from a public host.
    app = FastAPI(
        title="udrl",
        version="1",
        summary="Prompts for downstream systems, written by a small model at the task, length and quality commanded.",
        docs_url=None,
        redoc_url=None,
    )
    api.install_error_handlers(app)
    limits, shares = settings.limits, settings.ingress_replicas
    app.add_middleware(
        Guard,
        keys=keys,
        limits=Limits(limits.body_bytes, max(limits.concurrent // shares, 1), max(limits.per_minute // shares, 1)),
        seen=service.meters.request,
    )
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"],
        )
    _native(app, service)
    _openai(app, service)
    _operations(app, service, ready)
    if keys is not None:
        _declare_keys(app)
    return app


def _native(app: FastAPI, service: Service) -> None:
    def understand(intent: str, request: api.Drawing, param: str = "intent") -> Work:
        given = {"temperature": request.temperature, "seed": request.seed}
        sampling: Any = {name: value for name, value in given.items() if value is not None}
        return service.understand(intent, request, request.n, sampling, param=param)

    @app.post(
        "/v1/prompts",
        response_model=api.PromptsResponse,
        responses={
            **_GENERATION,
            200: {"content": _NATIVE_STREAM, "description": "the prompts, or with stream=true their events"},
        },
    )
    async def prompts(request: api.PromptsRequest) -> Response:
        """Write prompts for an intent: for one task, several or all."""
        (work,) = service.bound([understand(request.intent, request)])
        if request.stream:
            return await _streamed(service.events(work, live=True), lambda events: _native_stream(service, work, events))
        return JSONResponse((await service.prompts(work)).model_dump())

    @app.post("/v1/prompts/batch", responses=_GENERATION)
    async def batch(request: api.BatchRequest) -> api.BatchResponse:
        """Write prompts for many intents under one command. An intent that fails carries its own error."""
        if len(request.intents) > service.settings.limits.batch:
            raise RequestError(f"intents: {len(request.intents)} of them, at most {service.settings.limits.batch}", "intents")
        works = service.bound([understand(intent, request, f"intents.{place}") for place, intent in enumerate(request.intents)])
        usage, results = api.Usage(), []
        for work, answer in zip(works, await service.batch(works), strict=True):
            usage.add(work.cost.prompt_tokens, work.cost.completion_tokens, work.cost.drafts)
            if isinstance(answer, RequestError):
                results.append(api.BatchResult(intent=work.intent, missing=work.size, error=answer.detail()))
            else:
                results.append(api.BatchResult(intent=work.intent, prompts=answer.prompts, missing=answer.missing))
        return api.BatchResponse(id=works[0].id, created=works[0].created, model=service.model, results=results, usage=usage)


def _openai(app: FastAPI, service: Service) -> None:
    tasks = list(service.vocabulary.tasks)

    def understand(request: Any, intents: list[str], param: str) -> list[Work]:
        task = openai_api.task_of(request.model, service.model, tasks)
        if task is not None:
            if request.task not in (None, task):
                raise RequestError(f"task: the model {request.model!r} stands for {task!r} already", "task")
            request = request.model_copy(update={"task": task})
        if len(intents) > service.settings.limits.batch:
            raise RequestError(f"{param}: {len(intents)} of them, at most {service.settings.limits.batch}", param)
        sampling: Ask = request.sampling()
        # A client that sets the token limit itself has asked for what is cut; OpenAI's n makes no promise of distinct texts.
        whole = "max_tokens" not in sampling
        return service.bound(
            [
                service.understand(i, request, request.n or 1, sampling, whole=whole, distinct=False, param=param)
                for i in intents
            ]
        )

    def head(work: Work, model: str) -> dict[str, Any]:
        return {"id": work.id, "created": work.created, "model": model, "system_fingerprint": work.cost.revision}

    async def answered(works: list[Work]) -> tuple[list[api.Prompt], api.Usage]:
        usage, prompts = api.Usage(), []
        for answer in await service.batch(works):
            if isinstance(answer, RequestError):
                raise answer
            prompts += answer.prompts
            usage.add(answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.drafts)
        return prompts, usage

    async def stream(request: Any, works: list[Work], kind: str, chunk: Callable[..., dict[str, Any]]) -> Response:
        if len(works) > 1:
            raise RequestError("stream: takes one prompt at a time", "stream")
        work = works[0]
        # What was sent can't be taken back: pieces go out as they grow only where no draft can be dropped.
        live = all(wanted.least is None for wanted in work.wanted)
        if live:
            work.wanted = [wanted.first_come() for wanted in work.wanted]

        async def lines(events: AsyncIterator[TaskEvent]) -> AsyncIterator[str]:
            sent: set[int] = set()
            usage = bool(request.stream_options and request.stream_options.include_usage)

            def line(choices: list[dict[str, Any]], **more: Any) -> str:
                return _data({**head(work, request.model), "object": kind, "choices": choices, **more})

            async for item in events:
                first = item.index not in sent
                if isinstance(item.event, Grown):
                    sent.add(item.index)
                    yield line([chunk(item.index, item.event.text, None, first)])
                elif isinstance(item.event, Settled):
                    prompt = service.prompt(item)
                    yield line([chunk(item.index, "" if live and not first else prompt.text, prompt, first)])
            if usage:
                yield line([], usage=work.usage().model_dump())
            yield "data: [DONE]\n\n"

        return await _streamed(service.events(work, live=live), lines)

    @app.post(
        "/v1/completions",
        response_model=openai_api.CompletionResponse,
        responses={
            **_GENERATION,
            **_errors(404),
            200: {"content": _OPENAI_STREAM, "description": "OpenAI's answer, or its chunks"},
        },
    )
    async def completions(request: openai_api.CompletionRequest) -> Response:
        """OpenAI's completions: the prompt is the intent."""
        works = understand(request, request.intents(), "prompt")
        if request.stream:
            return await stream(
                request, works, "text_completion", lambda i, text, prompt, _: openai_api.text_chunk(i, text, prompt)
            )
        found, usage = await answered(works)
        choices = [openai_api.text_choice(index, prompt) for index, prompt in enumerate(found)]
        answer = openai_api.CompletionResponse(**head(works[0], request.model), choices=choices, usage=usage)
        return JSONResponse(answer.model_dump())

    @app.post(
        "/v1/chat/completions",
        response_model=openai_api.ChatResponse,
        responses={
            **_GENERATION,
            **_errors(404),
            200: {"content": _OPENAI_STREAM, "description": "OpenAI's answer, or its chunks"},
        },
    )
    async def chat(request: openai_api.ChatRequest) -> Response:
        """OpenAI's chat completions: the last user message is the intent."""
        works = understand(request, [request.intent()], "messages")
        if request.stream:
            return await stream(
                request,
                works,
                "chat.completion.chunk",
                lambda i, text, prompt, first: openai_api.chat_chunk(i, text, prompt, first=first),
            )
        found, usage = await answered(works)
        choices = [openai_api.chat_choice(index, prompt) for index, prompt in enumerate(found)]
        answer = openai_api.ChatResponse(**head(works[0], request.model), choices=choices, usage=usage)
        return JSONResponse(answer.model_dump())

    @app.get("/v1/models", responses=_errors(401, 403))
    async def models() -> api.ModelList:
        """The model, what can be commanded of it, and one id more for each of its tasks."""
        return api.ModelList(data=service.cards())

    @app.get("/v1/models/{model}", responses=_errors(401, 403, 404))
    async def model(model: str) -> api.ModelCard:
        task = openai_api.task_of(model, service.model, tasks)
        return next(card for card in service.cards() if card.task == task)


def _operations(app: FastAPI, service: Service, ready: Callable[[], Awaitable[bool]]) -> None:
    @app.get("/healthz")
    async def healthz() -> api.Health:
        """This process is up. The engines' health is Serve's to watch: it restarts a replica that fails its check."""
        return api.Health(status="ok", model=service.model)

    @app.get("/readyz", responses=_errors(503))
    async def readyz() -> api.Health:
        """An engine is warmed up, or may be started by a request where the recipe scales to zero."""
        if not await ready():
            raise RequestError("no engine is ready yet", None, 503, "starting", 5)
        return api.Health(status="ready", model=service.model)

    text = {"content": {"text/plain": {"schema": {"type": "string"}}}, "description": "Prometheus' text format"}

    @app.get("/metrics", response_model=None, responses={**_errors(401, 403), 200: text})
    async def metrics() -> Response:
        """The server's, Serve's and vLLM's counters of all nodes, for Prometheus."""
        return PlainTextResponse(await service.meters.page(), media_type="text/plain; version=0.0.4")

    page = PLAYGROUND.read_text(encoding="utf-8")

    @app.get("/", response_class=HTMLResponse)
    async def playground() -> HTMLResponse:
        """The playground."""
        return HTMLResponse(page, headers=PLAYGROUND_HEADERS)


def _declare_keys(app: FastAPI) -> None:
    """Say in the OpenAPI document that requests carry a bearer key."""
    made = app.openapi

    def openapi() -> dict[str, Any]:
        schema = made()
        schema.setdefault("components", {})["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        for path, operations in schema["paths"].items():
            if path.startswith("/v1/") or path == "/metrics":
                for operation in operations.values():
                    operation["security"] = [{"key": []}]
        return schema

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's documented way to extend the document


async def _streamed(
    events: AsyncGenerator[TaskEvent, None], lines: Callable[[AsyncIterator[TaskEvent]], AsyncIterator[str]]
) -> Response:
    """Stream ``lines`` of ``events``. The first event is waited for: what fails before it has a status of its own.

    Raises:
        RequestError: the first event failed.
    """
    first = await anext(events, None)

    async def again() -> AsyncIterator[TaskEvent]:
        if first is not None:
            yield first
        async for event in events:
            yield event

    async def body() -> AsyncIterator[str]:
        try:
            async for line in lines(again()):
                yield line
        except RequestError as error:
            yield _data({"error": error.detail().model_dump()}, "error")
        except Exception:
            # The status has gone out; the client must still be told that this is not the end of an answer.
            import logging

            logging.getLogger(__name__).exception("a stream failed")
            failure = RequestError("internal error; the server's log has the cause", None, 500, "internal_error")
            yield _data({"error": failure.detail().model_dump()}, "error")
        finally:
            await events.aclose()  # giving it up cancels what the engine writes

    return StreamingResponse(body(), media_type="text/event-stream", headers=STREAM_HEADERS)


async def _native_stream(service: Service, work: Work, events: AsyncIterator[TaskEvent]) -> AsyncIterator[str]:
    settled = 0
    async for item in events:
        head = {"index": item.index, "task": item.wanted.command.task}
        match item.event:
            case Grown(text=text):
                yield _data({**head, "text": text}, "delta")
            case Redrafted(words=words, reason=reason):
                yield _data({**head, "words": words, "reason": reason}, "redraft")
            case Settled():
                settled += 1
                yield _data({**head, **service.prompt(item).model_dump()}, "prompt")
    ending = {"id": work.id, "model": service.model, "revision": work.cost.revision, "missing": work.size - settled}
    yield _data({**ending, "usage": work.usage().model_dump()}, "done")


def _data(value: dict[str, Any], event: str | None = None) -> str:
    return (
        f"event: {event}\n" if event else ""
    ) + f"data: {json.dumps(value)}\n\n"  # ASCII: some clients take U+2028 for the end of a line
