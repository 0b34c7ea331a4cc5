"""An engine that needs no model, behind the real HTTP application: for tests of what stands in front of the engine."""

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from typing import Any

import uvicorn
from fastapi import FastAPI

from serve import web
from serve.drafts import Ask, Draft, Piece, SampleResult
from serve.keys import KeyRing
from serve.prometheus import Meters
from serve.service import Service
from udrl.commands import ANY, CommandVocabulary, TaskCommands
from udrl.recipe import Serve

WORDS = ["amber", "birch", "cloud", "delta", "ember", "frost", "grove", "heron", "iris", "jade", "kelp", "lotus"]


def learnt(words: int) -> TaskCommands:
    return TaskCommands(
        edges=[0.3, 0.6],
        achieved_reward=[0.1, 0.4, 0.8],
        achieved_relevance=[0.1, 0.4, 0.8],
        counts=[5, 5, 5],
        words=[4, words, 20],
        default_words=words,
        default_reward=2,
    )


def vocabulary() -> CommandVocabulary:
    tasks = {"text_to_image": learnt(12), "image_search": learnt(5)}
    return CommandVocabulary(max_words=24, reward_bins=3, rank_within="task", tasks=tasks)


def draft(text: str, reason: Any = "stop") -> Draft:
    return Draft(text=text, finish_reason=reason)


def obedient(ask: Ask, call: int) -> list[Draft]:
    """Drafts of exactly the words commanded, 5 where none are; no two alike."""
    words = 5 if ask["words"] == ANY else ask["words"]
    return [draft(" ".join([*(WORDS * 3)[: words - 1], f"n{call}x{i}"])) for i in range(ask["n"])]


class FakeEngine:
    """Writes what ``say`` says; keeps what it was asked, and how many of its answers were given up.

    ``gate``: with one, a stream stops behind its first words, and a draw before its answer, until it is set.
    """

    def __init__(self, say: Callable[[Ask, int], list[Draft]] = obedient, gate: asyncio.Event | None = None) -> None:
        self.say, self.gate = say, gate
        self.asked: list[Ask] = []
        self.given_up = 0
        self.fails: Exception | None = None

    def _drawn(self, ask: Ask) -> SampleResult:
        self.asked.append(ask)
        if self.fails:
            raise self.fails
        drafts = self.say(ask, len(self.asked))
        tokens = sum(len(d["text"].split()) for d in drafts)
        return SampleResult(drafts=drafts, prompt_tokens=10, completion_tokens=tokens, revision="cafe")

    async def _wait(self) -> None:
        if self.gate:
            try:
                await self.gate.wait()
            except BaseException:
                self.given_up += 1
                raise

    async def draw(self, ask: Ask) -> SampleResult:
        await self._wait()
        return self._drawn(ask)

    async def stream(self, ask: Ask) -> AsyncGenerator[list[Piece] | SampleResult, None]:
        drawn = self._drawn(ask)
        ended = False
        try:
            words = [d["text"].split() for d in drawn["drafts"]]
            for place in range(max(len(w) for w in words)):
                pieces = [(i, ("" if place == 0 else " ") + w[place]) for i, w in enumerate(words) if place < len(w)]
                yield [Piece(index=i, text=text) for i, text in pieces]
                if place == 0 and self.gate:
                    await self.gate.wait()
            yield drawn
            ended = True
        finally:
            self.given_up += not ended


def settings(**changes: Any) -> Serve:
    return Serve(**{"require_keys": False, **changes})


def application(engine: FakeEngine, keys: KeyRing | None = None, ready: bool = True, **changes: Any) -> FastAPI:
    """The real application on ``engine``; ``changes`` go over the recipe's serve section."""

    async def is_ready() -> bool:
        return ready

    return web.create(Service(engine, "tiny", vocabulary(), settings(**changes), Meters()), keys, is_ready)


@contextlib.contextmanager
def listening(app: FastAPI) -> Iterator[str]:
    """``app`` behind a real socket on loopback, in a thread; its address."""
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
