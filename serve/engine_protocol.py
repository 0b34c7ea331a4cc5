"""Messages between the ingress and an engine replica, and the interface of an engine.

The messages cross process boundaries. This module imports neither Ray nor vLLM.
"""

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Literal, Protocol

from udrl.commands import Command


@dataclass(frozen=True)
class SamplingOptions:
    """A client's sampling parameters; None stands for the recipe's ``serve.sampling``."""

    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    max_tokens: int | None = None


@dataclass(frozen=True)
class SampleRequest:
    """A request for ``n`` drafts of one intent under one command."""

    intent: str
    command: Command
    n: int
    options: SamplingOptions = SamplingOptions()


@dataclass(frozen=True)
class Draft:
    """A text that the student wrote; ``length``: it was cut off at the token limit."""

    text: str
    finish_reason: Literal["stop", "length"]


@dataclass(frozen=True)
class SampleResult:
    """The drafts of one request and their cost. ``revision`` is the hash of the weights, if the export names one."""

    drafts: list[Draft]
    prompt_tokens: int
    completion_tokens: int
    revision: str | None


@dataclass(frozen=True)
class Refusal:
    """An engine's reason not to write drafts.

    ``param`` is the key of the request to correct; ``retryable``: the same request may succeed later.
    """

    message: str
    param: str | None
    retryable: bool


@dataclass(frozen=True)
class TextDelta:
    """Text that draft ``index`` has grown by."""

    index: int
    text: str


class SamplingEngine(Protocol):
    """An engine as the ingress sees it. Both methods raise :class:`serve.request_errors.RequestError`."""

    async def sample(self, request: SampleRequest) -> SampleResult: ...

    def stream(self, request: SampleRequest) -> AsyncGenerator[list[TextDelta] | SampleResult, None]:
        """Yield text deltas of all drafts as they grow and, as the last item, the result of :meth:`sample`."""
        ...
