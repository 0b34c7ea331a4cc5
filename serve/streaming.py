"""Server-sent events: the response of a streamed request, its encoding and its description in the OpenAPI document."""

import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any

from fastapi.responses import Response, StreamingResponse

from serve.request_errors import RequestError, make_internal_error
from serve.service import TaskEvent

log = logging.getLogger(__name__)

HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}  # the latter stops nginx from buffering the stream


async def stream_response(
    events: AsyncGenerator[TaskEvent, None], encode: Callable[[AsyncIterator[TaskEvent]], AsyncIterator[str]]
) -> Response:
    """Return ``events``, encoded as server-sent events, as a streaming response.

    The first event is awaited here, so that an early failure has an HTTP status of its own. A later one becomes an
    ``error`` event.

    Raises:
        RequestError: the first event failed.
    """
    first = await anext(events, None)

    async def all_events() -> AsyncIterator[TaskEvent]:
        if first is not None:
            yield first
        async for event in events:
            yield event

    async def body() -> AsyncIterator[str]:
        try:
            async for line in encode(all_events()):
                yield line
        except RequestError as error:
            yield encode_event({"error": error.detail().model_dump()}, "error")
        except Exception:
            log.exception("a stream failed")
            yield encode_event({"error": make_internal_error().detail().model_dump()}, "error")
        finally:
            await events.aclose()  # cancels the generation if the client has disconnected

    return StreamingResponse(body(), media_type="text/event-stream", headers=HEADERS)


def encode_event(data: dict[str, Any], name: str | None = None) -> str:
    # json.dumps writes ASCII: some clients take U+2028 for the end of a line.
    return (f"event: {name}\n" if name else "") + f"data: {json.dumps(data)}\n\n"


def describe_stream(*names: str) -> dict[str, Any]:
    """Return the OpenAPI ``content`` of a stream of events with these names and JSON data."""
    properties = {"event": {"enum": [*names, "message"]}, "data": {"type": "string", "description": "JSON"}}
    return {"text/event-stream": {"itemSchema": {"type": "object", "required": ["data"], "properties": properties}}}
