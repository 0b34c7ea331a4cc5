"""OpenAI's completions and chat completions: routes with which OpenAI's clients work unchanged.

The prompt, or the last user message, is the intent.
"""

from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response

from serve import schemas
from serve.drafts import DraftAccepted
from serve.engine_protocol import TextDelta
from serve.openai_schemas import (
    AssistantMessage,
    ChatChoice,
    ChatRequest,
    ChatResponse,
    CompletionRequest,
    CompletionResponse,
    OpenAIRequest,
    PromptOutcome,
    TextChoice,
)
from serve.request_errors import RequestError, describe_errors
from serve.resolver import ResolvedRequest
from serve.schemas import Prompt, Usage
from serve.service import PromptService, TaskEvent, to_prompt
from serve.streaming import describe_stream, encode_event, stream_response

# Encodes a choice of a streamed response from its index, its text, the prompt (only in its last chunk) and whether this is its
# first chunk.
ChunkEncoder = Callable[[int, str, Prompt | None, bool], dict[str, Any]]


def parse_model_id(model_id: str, served_model: str, tasks: list[str]) -> str | None:
    """Return the task of ``model:task``; None for the model itself.

    Raises:
        RequestError: 404, the model or task does not exist.
    """
    name, colon, task = model_id.partition(":")
    if name != served_model or (colon and task not in tasks):
        names = ", ".join([served_model, *(f"{served_model}:{task}" for task in tasks)])
        raise RequestError(f"model: unknown model ({model_id[:100]!r}); use one of {names}", "model", 404, "not_found")
    return task or None


def add_openai_routes(app: FastAPI, service: PromptService) -> None:
    """Add ``/v1/completions``, ``/v1/chat/completions`` and ``/v1/models``."""
    tasks = list(service.vocabulary.tasks)
    errors = describe_errors(400, 401, 403, 404, 413, 422, 429, 500, 503, 504)
    stream = {"content": describe_stream("error"), "description": "OpenAI's response, or its chunks"}

    @app.post("/v1/completions", response_model=CompletionResponse, responses={**errors, 200: stream})
    async def completions(body: CompletionRequest) -> Response:
        """OpenAI's completions: the prompt is the intent."""
        requests = _resolve(service, body, body.intents(), "prompt")
        if body.stream:
            return await _stream(service, body, requests, "text_completion", _encode_text_chunk)
        prompts, usage = await _answer(service, requests)
        choices = [_to_text_choice(index, prompt) for index, prompt in enumerate(prompts)]
        response = CompletionResponse(**_response_head(requests[0], body.model), choices=choices, usage=usage)
        return JSONResponse(response.model_dump())

    @app.post("/v1/chat/completions", response_model=ChatResponse, responses={**errors, 200: stream})
    async def chat(body: ChatRequest) -> Response:
        """OpenAI's chat completions: the last user message is the intent."""
        requests = _resolve(service, body, [body.intent()], "messages")
        if body.stream:
            return await _stream(service, body, requests, "chat.completion.chunk", _encode_chat_chunk)
        prompts, usage = await _answer(service, requests)
        choices = [_to_chat_choice(index, prompt) for index, prompt in enumerate(prompts)]
        response = ChatResponse(**_response_head(requests[0], body.model), choices=choices, usage=usage)
        return JSONResponse(response.model_dump())

    @app.get("/v1/models", responses=describe_errors(401, 403))
    async def models() -> schemas.ModelList:
        """The model, the commands that it accepts, and one more id for each of its tasks."""
        return schemas.ModelList(data=service.model_cards())

    @app.get("/v1/models/{model}", responses=describe_errors(401, 403, 404))
    async def model(model: str) -> schemas.ModelCard:
        task = parse_model_id(model, service.model, tasks)
        return next(card for card in service.model_cards() if card.task == task)


def _resolve(service: PromptService, body: OpenAIRequest, intents: list[str], param: str) -> list[ResolvedRequest]:
    task = parse_model_id(body.model, service.model, list(service.vocabulary.tasks))
    if task is not None:
        if body.task not in (None, task):
            raise RequestError(f"task: contradicts the model {body.model!r}; leave one of them out", "task")
        body = body.model_copy(update={"task": task})
    limit = service.settings.limits.batch
    if len(intents) > limit:
        raise RequestError(f"{param}: too many ({len(intents)}); send at most {limit}", param)
    options = body.options()
    requests = [
        service.resolver.resolve(
            intent,
            body,
            body.n or 1,
            options,
            reject_cut=options.max_tokens is None,  # a client that sets the limit itself accepts cut texts
            reject_duplicates=False,  # OpenAI's n does not promise distinct texts
            param=param,
        )
        for intent in intents
    ]
    service.resolver.require_total_within_limit(requests)
    return requests


def _response_head(request: ResolvedRequest, model: str) -> dict[str, Any]:
    return {"id": request.id, "created": request.created, "model": model, "system_fingerprint": request.cost.revision}


async def _answer(service: PromptService, requests: list[ResolvedRequest]) -> tuple[list[Prompt], Usage]:
    usage, prompts = Usage(), []
    for answer in await service.answer_all(requests):
        if isinstance(answer, RequestError):
            raise answer
        prompts += answer.prompts
        usage.add(answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.drafts)
    return prompts, usage


async def _stream(
    service: PromptService, body: OpenAIRequest, requests: list[ResolvedRequest], object_name: str, encode_chunk: ChunkEncoder
) -> Response:
    if len(requests) > 1:
        raise RequestError("stream: not possible for several prompts; send one prompt per request", "stream")
    request = requests[0]
    # Text that was sent cannot be retracted: stream it live only if no draft can be rejected.
    live = all(spec.min_words is None for spec in request.specs)
    if live:
        request.specs = [spec.accepting_any() for spec in request.specs]

    def encode(choices: list[dict[str, Any]], **fields: Any) -> str:
        return encode_event({**_response_head(request, body.model), "object": object_name, "choices": choices, **fields})

    async def lines(events: AsyncIterator[TaskEvent]) -> AsyncIterator[str]:
        started: set[int] = set()
        async for item in events:
            is_first = item.index not in started
            match item.event:
                case TextDelta(text=text):
                    started.add(item.index)
                    yield encode([encode_chunk(item.index, text, None, is_first)])
                case DraftAccepted(draft=draft):
                    prompt = to_prompt(item.spec, draft)
                    text = prompt.text if is_first or not live else ""  # live text has been sent already
                    yield encode([encode_chunk(item.index, text, prompt, is_first)])
        if body.stream_options and body.stream_options.include_usage:
            yield encode([], usage=request.usage().model_dump())
        yield "data: [DONE]\n\n"

    return await stream_response(service.events(request, live=live), lines)


def _to_outcome(prompt: Prompt) -> PromptOutcome:
    return PromptOutcome(task=prompt.task, words=prompt.words, command=prompt.command, on_length=prompt.on_length)


def _to_text_choice(index: int, prompt: Prompt) -> TextChoice:
    return TextChoice(index=index, text=prompt.text, finish_reason=prompt.finish_reason, udrl=_to_outcome(prompt))


def _to_chat_choice(index: int, prompt: Prompt) -> ChatChoice:
    message = AssistantMessage(content=prompt.text)
    return ChatChoice(index=index, message=message, finish_reason=prompt.finish_reason, udrl=_to_outcome(prompt))


def _encode_text_chunk(index: int, text: str, prompt: Prompt | None, _is_first: bool) -> dict[str, Any]:
    return {"text": text, **_encode_chunk_end(index, prompt)}


def _encode_chat_chunk(index: int, text: str, prompt: Prompt | None, is_first: bool) -> dict[str, Any]:
    role = {"role": "assistant"} if is_first else {}
    content = {"content": text} if text or is_first else {}
    return {"delta": {**role, **content}, **_encode_chunk_end(index, prompt)}


def _encode_chunk_end(index: int, prompt: Prompt | None) -> dict[str, Any]:
    fields: dict[str, Any] = {"index": index, "finish_reason": None, "logprobs": None}
    if prompt is not None:
        fields |= {"finish_reason": prompt.finish_reason, "udrl": _to_outcome(prompt).model_dump()}
    return fields
