"""An engine without a model, and the real HTTP application in front of it."""

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from typing import Any, Literal

import uvicorn
from fastapi import FastAPI

from serve import web
from serve.engine_protocol import Draft, SampleRequest, SampleResult, TextDelta
from serve.keys import KeyRing
from serve.service import PromptService
from udrl.commands import ANY, CommandVocabulary, TaskCommands
from udrl.recipe import Serve
from udrl.text import count_words

WORDS = ["amber", "birch", "cloud", "delta", "ember", "frost", "grove", "heron", "iris", "jade", "kelp", "lotus"]


def make_task_commands(default_words: int) -> TaskCommands:
    return TaskCommands(
        edges=[0.3, 0.6],
        achieved_reward=[0.1, 0.4, 0.8],
        achieved_relevance=[0.1, 0.4, 0.8],
        counts=[5, 5, 5],
        words=[4, default_words, 20],
        default_words=default_words,
        default_reward=2,
    )


def make_vocabulary() -> CommandVocabulary:
    tasks = {"text_to_image": make_task_commands(12), "image_search": make_task_commands(5)}
    return CommandVocabulary(max_words=24, reward_bins=3, rank_within="task", tasks=tasks)


def draft(text: str, finish_reason: Literal["stop", "length"] = "stop") -> Draft:
    return Draft(text, finish_reason)


def obedient_drafts(request: SampleRequest, call: int) -> list[Draft]:
    """Return distinct drafts of exactly the commanded length; of 5 words if no length is commanded."""
    words = 5 if request.command.words == ANY else request.command.words
    return [draft(" ".join([*(WORDS * 3)[: words - 1], f"n{call}x{i}"])) for i in range(request.n)]


class FakeEngine:
    """Returns the drafts of ``write(request, number of the call)``; records its requests and the number of aborted calls.

    ``gate``: if given, a stream waits for it after its first words, and :meth:`sample` before its result.
    ``error``: if set, every call raises it.
    """

    def __init__(
        self, write: Callable[[SampleRequest, int], list[Draft]] = obedient_drafts, gate: asyncio.Event | None = None
    ) -> None:
        self.write, self.gate = write, gate
        self.requests: list[SampleRequest] = []
        self.aborted = 0
        self.error: Exception | None = None

    def _result(self, request: SampleRequest) -> SampleResult:
        self.requests.append(request)
        if self.error:
            raise self.error
        drafts = self.write(request, len(self.requests))
        tokens = sum(count_words(draft.text) for draft in drafts)
        return SampleResult(drafts, prompt_tokens=10, completion_tokens=tokens, revision="cafe")

    async def sample(self, request: SampleRequest) -> SampleResult:
        if self.gate:
            try:
                await self.gate.wait()
            except BaseException:
                self.aborted += 1
                raise
        return self._result(request)

    async def stream(self, request: SampleRequest) -> AsyncGenerator[list[TextDelta] | SampleResult, None]:
        result = self._result(request)
        complete = False
        try:
            words = [draft.text.split() for draft in result.drafts]
            for i in range(max(len(w) for w in words)):
                yield [TextDelta(index, f"{' ' if i else ''}{w[i]}") for index, w in enumerate(words) if i < len(w)]
                if i == 0 and self.gate:
                    await self.gate.wait()
            yield result
            complete = True
        finally:
            self.aborted += not complete


class NoMetrics:
    """Metrics of a server without Ray: counts nothing."""

    def count_request(self, endpoint: str, key: str, status: int, seconds: float) -> None: ...

    def count_prompt(self, task: str, *, missed: bool, cut: bool) -> None: ...

    def count_redraft(self, task: str, reason: str) -> None: ...

    def count_tokens(self, prompt: int, completion: int) -> None: ...

    def count_cancelled(self) -> None: ...

    async def page(self) -> str:
        return ""


def make_application(engine: FakeEngine, keys: KeyRing | None = None, ready: bool = True, **settings: Any) -> FastAPI:
    """Return the real application on ``engine``; ``settings`` override the recipe's serve section."""

    async def is_ready() -> bool:
        return ready

    serve = Serve(**{"require_keys": False, **settings})
    return web.create_app(PromptService(engine, "tiny", make_vocabulary(), serve, NoMetrics()), keys, is_ready)


@contextlib.contextmanager
def serve_on_loopback(app: FastAPI) -> Iterator[str]:
    """Serve ``app`` on a real loopback socket, from a thread; yield its URL."""
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        deadline = time.monotonic() + 20
        while not server.started:
            assert thread.is_alive(), "uvicorn did not start"
            assert time.monotonic() < deadline
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
