"""Keeping the length: a draft that misses what was asked is written again, within bounds, and otherwise reported as missed.

A request for n prompts has n places. The first n drafts are made for one place each; a draft that is cut off, not distinct
or of another length leaves its place open, and a bounded number of further rounds fills open places with drafts that fit.
What is still open then gets the nearest of the drafts at hand, marked as missed. No draft is ever shortened. No Ray here.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol, TypedDict

from serve.api import MAX_SEED, RequestError
from udrl.commands import Command
from udrl.text import count_words

Miss = Literal["length", "cut", "duplicate", "empty"]


class Ask(TypedDict, total=False):
    """What the engine is asked: plain data, since it goes to another process. Left-out keys are the recipe's sampling."""

    intent: str
    task: str
    words: int
    reward: int
    n: int
    temperature: float
    top_p: float
    seed: int
    max_tokens: int


class Draft(TypedDict):
    text: str
    finish_reason: Literal["stop", "length"]


class SampleResult(TypedDict):
    """An engine's answer: drafts and what they cost."""

    drafts: list[Draft]
    prompt_tokens: int
    completion_tokens: int
    revision: str | None


class Refused(TypedDict):
    """An engine's answer instead of drafts: why, the key to mend, whether another try may go better."""

    refused: str
    param: str | None
    retry: bool


class Piece(TypedDict):
    """Text that draft ``index`` of a stream has grown by."""

    index: int
    text: str


class Engine(Protocol):
    """Who writes drafts. Both raise :class:`serve.api.RequestError` for what the client is to know."""

    async def draw(self, ask: Ask) -> SampleResult: ...

    def stream(self, ask: Ask) -> AsyncGenerator[list[Piece] | SampleResult, None]:
        """Pieces of all drafts as they grow; the last item is what :meth:`draw` would have returned."""
        ...


@dataclass(frozen=True)
class PromptSpec:
    """The prompts of one task: what the student is commanded, and what counts as kept.

    ``least`` and ``most`` are None where no length is asked. ``whole``: a draft cut off at the token limit is a miss; not so
    where the client set the limit. ``distinct``: no prompt twice, letter case and spaces aside.
    """

    command: Command
    n: int
    least: int | None = None
    most: int | None = None
    whole: bool = True
    distinct: bool = True

    def miss(self, words: int) -> int:
        """Words by which a length lies outside of what was asked; 0 where none was."""
        if self.least is None or self.most is None:
            return 0
        return max(self.least - words, words - self.most, 0)

    def first_come(self) -> "PromptSpec":
        """The same, but any draft will do: for a stream that can take nothing back."""
        return replace(self, whole=False, distinct=False)


@dataclass(frozen=True)
class Effort:
    """Bounds on writing again: ``rounds`` after the first, with ``samples`` drafts for each open place, ``most`` at once, and
    no longer than ``seconds``: what is at hand by then is better than a request that runs into its deadline."""

    rounds: int = 2
    samples: int = 4
    most: int = 16
    seconds: float = 15


@dataclass
class Cost:
    prompt_tokens: int = 0
    completion_tokens: int = 0
    drafts: int = 0
    revision: str | None = None

    def add(self, drawn: SampleResult) -> None:
        self.prompt_tokens += drawn["prompt_tokens"]
        self.completion_tokens += drawn["completion_tokens"]
        self.drafts += len(drawn["drafts"])
        self.revision = drawn["revision"]


@dataclass(frozen=True)
class Grown:
    """The first draft of place ``index`` has grown by ``text``."""

    index: int
    text: str


@dataclass(frozen=True)
class Redrafted:
    """The draft of place ``index`` is dropped; another is being written."""

    index: int
    words: int
    reason: Miss


@dataclass(frozen=True)
class Settled:
    """Place ``index`` is final."""

    index: int
    draft: Draft


Event = Grown | Redrafted | Settled


@dataclass
class Places:
    """The places of one task's prompts and the drafts that did not fit one."""

    wanted: PromptSpec
    filled: dict[int, Draft] = field(default_factory=dict)
    spare: list[Draft] = field(default_factory=list)
    _seen: set[str] = field(default_factory=set)

    def offer(self, draft: Draft, index: int) -> Miss | None:
        """Fill place ``index`` with ``draft``; or keep it as a spare one and say what it misses."""
        text = _folded(draft)
        miss: Miss | None = None
        if not text and (self.wanted.whole or draft["finish_reason"] == "stop"):
            miss = "empty"
        elif draft["finish_reason"] == "length" and self.wanted.whole:
            miss = "cut"
        elif self.wanted.miss(count_words(draft["text"])):
            miss = "length"
        elif self.wanted.distinct and text in self._seen:
            miss = "duplicate"
        if miss:
            self.spare.append(draft)
        else:
            self.filled[index] = draft
            self._seen.add(text)
        return miss

    def open(self) -> list[int]:
        return [index for index in range(self.wanted.n) if index not in self.filled]

    def settle(self) -> None:
        """Fill what is open with the nearest spare drafts: whole before cut, then by length. Some places may stay open."""

        def nearness(draft: Draft) -> tuple[bool, bool, int]:
            cut = draft["finish_reason"] == "length" and self.wanted.whole
            return not draft["text"], cut, self.wanted.miss(count_words(draft["text"]))

        spare = sorted(self.spare, key=nearness)
        for index in self.open():
            for draft in spare:
                if not self.wanted.distinct or (draft["text"] and _folded(draft) not in self._seen):
                    self.filled[index] = draft
                    self._seen.add(_folded(draft))
                    spare.remove(draft)
                    break


def _folded(draft: Draft) -> str:
    return " ".join(draft["text"].lower().split())


async def write(
    engine: Engine, ask: Ask, wanted: PromptSpec, effort: Effort, cost: Cost, *, live: bool
) -> AsyncGenerator[Event, None]:
    """Write the prompts of one task; ends when every place is settled or none can be.

    Args:
        ask: intent and sampling; the command and n come from ``wanted``.
        cost: is added to, so that it is right however the iteration ends.
        live: the first drafts come as they grow.

    Raises:
        RequestError: from the engine, if not one draft was made. Where writing again fails, misses are reported as such.
    """
    command = wanted.command
    ask = {**ask, "task": command.task, "words": command.words, "reward": command.reward, "n": wanted.n}
    places = Places(wanted)
    if live:
        first: SampleResult | None = None
        async with contextlib.aclosing(engine.stream(ask)) as stream:  # giving this up must reach the engine at once
            async for item in stream:
                if isinstance(item, dict):
                    first = item
                    break
                for piece in item:
                    yield Grown(piece["index"], piece["text"])
        if first is None:
            raise RequestError("the engine ended its stream early; try again", None, 503, "engine_lost", 1)
    else:
        first = await engine.draw(ask)
    cost.add(first)
    until = time.monotonic() + effort.seconds
    rounds = effort.rounds if ask.get("temperature") != 0 else 0  # greedy decoding writes the same again
    for index, draft in enumerate(first["drafts"]):
        if miss := places.offer(draft, index):
            if rounds:
                yield Redrafted(index, count_words(draft["text"]), miss)
        else:
            yield Settled(index, draft)
    for turn in range(1, rounds + 1):
        still = places.open()
        if not still:
            break
        more: Ask = {**ask, "n": min(len(still) * effort.samples, effort.most)}
        if "seed" in ask:
            more["seed"] = (ask["seed"] + 7919 * turn) % (MAX_SEED + 1)
        try:
            drawn = await asyncio.wait_for(engine.draw(more), max(until - time.monotonic(), 0))
        except (RequestError, TimeoutError):  # overload, a lost engine: what is at hand is better than nothing
            break
        cost.add(drawn)
        for draft in drawn["drafts"]:
            if not still:
                break
            if places.offer(draft, still[0]) is None:
                yield Settled(still.pop(0), draft)
    late = places.open()
    places.settle()
    for index in late:
        if index in places.filled:
            yield Settled(index, places.filled[index])
