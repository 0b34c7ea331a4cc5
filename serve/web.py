"""The HTTP application in front of an engine. It does not need Ray: tests run it with an engine of their own."""

from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.middleware.cors import CORSMiddleware

from serve import schemas
from serve.drafts import DraftAccepted, DraftRejected
from serve.engine_protocol import TextDelta
from serve.guard import GuardMiddleware, KeyLimits
from serve.keys import KeyRing
from serve.openai_api import add_openai_routes
from serve.request_errors import RequestError, describe_errors, install_error_handlers
from serve.resolver import ResolvedRequest
from serve.service import PromptService, TaskEvent, to_prompt
from serve.streaming import describe_stream, encode_event, stream_response

PLAYGROUND = Path(__file__).parent / "playground" / "index.html"
# The page is self-contained; injected content could neither load nor send anything elsewhere.
PLAYGROUND_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


def create_app(service: PromptService, keys: KeyRing | None, is_ready: Callable[[], Awaitable[bool]]) -> FastAPI:
    """Return the application: routes, error handlers, access control.

    Args:
        keys: None turns keys off; then only callers on loopback are answered.
        is_ready: whether an engine has finished its warm-up.
    """
    settings = service.settings
    # FastAPI's own /docs page loads its scripts from a public host.
    app = FastAPI(
        title="udrl",
        version="1",
        summary="Prompts for downstream systems, written by a small model under commands for task, length and quality.",
        docs_url=None,
        redoc_url=None,
    )
    install_error_handlers(app)
    limits, n_replicas = settings.limits, settings.ingress_replicas
    app.add_middleware(
        GuardMiddleware,
        keys=keys,
        limits=KeyLimits(
            body_bytes=limits.body_bytes,
            concurrent=max(limits.concurrent // n_replicas, 1),
            per_minute=max(limits.per_minute // n_replicas, 1),
        ),
        on_request_end=service.metrics.count_request,
    )
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"],
        )
    _add_native_routes(app, service)
    add_openai_routes(app, service)
    _add_operations_routes(app, service, is_ready)
    if keys is not None:
        _declare_keys(app)
    return app


def _add_native_routes(app: FastAPI, service: PromptService) -> None:
    errors = describe_errors(400, 401, 403, 413, 422, 429, 500, 503, 504)
    stream = {
        "content": describe_stream("delta", "redraft", "prompt", "done", "error"),
        "description": "the prompts, or with stream=true their events",
    }

    @app.post("/v1/prompts", response_model=schemas.PromptsResponse, responses={**errors, 200: stream})
    async def prompts(body: schemas.PromptsRequest) -> Response:
        """Write prompts for an intent: for one task, several or all."""
        request = service.resolver.resolve(body.intent, body, body.n, body.options())
        service.resolver.require_total_within_limit([request])
        if body.stream:
            events = service.events(request, live=True)
            return await stream_response(events, lambda events: _encode_stream(service, request, events))
        return JSONResponse((await service.answer(request)).model_dump())

    @app.post("/v1/prompts/batch", responses=errors)
    async def batch(body: schemas.BatchRequest) -> schemas.BatchResponse:
        """Write prompts for many intents under one command. An intent that fails carries its own error."""
        limit = service.settings.limits.batch
        if len(body.intents) > limit:
            raise RequestError(f"intents: too many ({len(body.intents)}); send at most {limit}", "intents")
        requests = [
            service.resolver.resolve(intent, body, body.n, body.options(), param=f"intents.{i}")
            for i, intent in enumerate(body.intents)
        ]
        service.resolver.require_total_within_limit(requests)
        usage, results = schemas.Usage(), []
        for request, answer in zip(requests, await service.answer_all(requests), strict=True):
            usage.add(request.cost.prompt_tokens, request.cost.completion_tokens, request.cost.drafts)
            if isinstance(answer, RequestError):
                results.append(schemas.BatchResult(intent=request.intent, missing=request.n_prompts, error=answer.detail()))
            else:
                results.append(schemas.BatchResult(intent=request.intent, prompts=answer.prompts, missing=answer.missing))
        return schemas.BatchResponse(
            id=requests[0].id, created=requests[0].created, model=service.model, results=results, usage=usage
        )


async def _encode_stream(
    service: PromptService, request: ResolvedRequest, events: AsyncIterator[TaskEvent]
) -> AsyncIterator[str]:
    n_accepted = 0
    async for item in events:
        head = {"index": item.index, "task": item.spec.task}
        match item.event:
            case TextDelta(text=text):
                yield encode_event({**head, "text": text}, "delta")
            case DraftRejected(words=words, reason=reason):
                yield encode_event({**head, "words": words, "reason": reason}, "redraft")
            case DraftAccepted(draft=draft):
                n_accepted += 1
                yield encode_event({**head, **to_prompt(item.spec, draft).model_dump()}, "prompt")
    summary = {
        "id": request.id,
        "model": service.model,
        "revision": request.cost.revision,
        "missing": request.n_prompts - n_accepted,
        "usage": request.usage().model_dump(),
    }
    yield encode_event(summary, "done")


def _add_operations_routes(app: FastAPI, service: PromptService, is_ready: Callable[[], Awaitable[bool]]) -> None:
    @app.get("/healthz")
    async def healthz() -> schemas.Health:
        """This process is up. Serve watches the engines' health: it restarts a replica that fails its check."""
        return schemas.Health(status="ok", model=service.model)

    @app.get("/readyz", responses=describe_errors(503))
    async def readyz() -> schemas.Health:
        """An engine has finished its warm-up, or a request can start one if the recipe scales to zero."""
        if not await is_ready():
            raise RequestError("the engine is still starting; try again", None, 503, "starting", 5)
        return schemas.Health(status="ready", model=service.model)

    text = {"content": {"text/plain": {"schema": {"type": "string"}}}, "description": "Prometheus' text format"}

    @app.get("/metrics", response_model=None, responses={**describe_errors(401, 403), 200: text})
    async def metrics() -> Response:
        """Counters of this server, Ray Serve and vLLM on all nodes, for Prometheus."""
        return PlainTextResponse(await service.metrics.page(), media_type="text/plain; version=0.0.4")

    page = PLAYGROUND.read_text(encoding="utf-8")

    @app.get("/", response_class=HTMLResponse)
    async def playground() -> HTMLResponse:
        """The playground."""
        return HTMLResponse(page, headers=PLAYGROUND_HEADERS)


def _declare_keys(app: FastAPI) -> None:
    """State in the OpenAPI document that requests carry a bearer key."""
    default_openapi = app.openapi

    def openapi() -> dict[str, Any]:
        schema = default_openapi()
        schema.setdefault("components", {})["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        for path, operations in schema["paths"].items():
            if path.startswith("/v1/") or path == "/metrics":
                for operation in operations.values():
                    operation["security"] = [{"key": []}]
        return schema

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's documented way to extend the document
