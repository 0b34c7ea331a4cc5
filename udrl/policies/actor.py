"""The Ray actor that answers requests with the columns that the ledger and the cost table need; a subclass owns the engine."""

import abc
import asyncio
import heapq
import itertools
import os
import time
from collections.abc import AsyncIterator

from udrl import internals
from udrl.policies.policy import Row
from udrl.policies.statistics import EngineSeconds

EMPTY_ANSWER: Row = {
    "completion": "",
    "finish_reason": "error",
    "input_tokens": 0,
    "cached_tokens": 0,
    "output_tokens": 0,
    "first_token_seconds": 0.0,
    "top_tokens": [],
    "top_logprobs": [],
    "error": "",
}


class Gate:
    """Admit ``size`` requests to the engine at a time, oldest shard first.

    With a first-come semaphore, as Ray's own actor has it, all shards in flight advance together: the first is durable only
    when nearly all of them are complete, and a killed engine loses them all.
    """

    def __init__(self, size: int) -> None:
        self.free = size
        self._waiting: list[tuple[int, int, asyncio.Future[None]]] = []
        self._order = itertools.count()

    async def enter(self, shard: int) -> None:
        """Wait until this request is admitted; the caller must then call :meth:`leave`."""
        if self.free:
            self.free -= 1
            return
        admission = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (shard, next(self._order), admission))
        try:
            await admission
        except asyncio.CancelledError:
            if not admission.cancelled():  # admitted and cancelled in the same iteration of the event loop
                self.leave()
            raise

    def leave(self) -> None:
        """Pass the place on to the next request."""
        while self._waiting:
            *_, admission = heapq.heappop(self._waiting)
            if not admission.done():
                admission.set_result(None)
                return
        self.free += 1


class BusyClock:
    """Measure how long an engine has been busy, and how long it has been ready."""

    def __init__(self) -> None:
        self._ready = self._last_change = time.monotonic()
        self._busy = 0.0
        self._running = 0

    def add_running(self, change: int) -> None:
        """Note that ``change`` requests more, or fewer, are in the engine."""
        now = time.monotonic()
        if self._running:
            self._busy += now - self._last_change
        self._last_change = now
        self._running += change

    def read(self) -> EngineSeconds:
        self.add_running(0)
        return EngineSeconds(self._busy, time.monotonic() - self._ready)


class RequestActor:
    """A stage of Ray Data LLM that answers each row by :meth:`answer`.

    It is the base of the vLLM actor and of the actors that replace it. A subclass also derives from ``internals.stage_class()``
    and calls :meth:`prepare` when it is ready.
    """

    def prepare(self, capacity: int) -> None:
        """Start the clock, and admit ``capacity`` requests at a time."""
        self.gate, self.clock = Gate(capacity), BusyClock()
        self.engine = f"{os.uname().nodename}:{os.getpid()}:{time.time():.0f}"

    @abc.abstractmethod
    async def answer(self, row: Row) -> Row:
        """Return the columns of :data:`EMPTY_ANSWER` for one request."""

    async def udf(self, batch: list[Row]) -> AsyncIterator[Row]:
        """Yield answers in order of completion.

        A row that fails gets an ``error``, and the batch goes on.
        """
        for answer in asyncio.as_completed([asyncio.create_task(self._answer(row)) for row in batch]):
            yield await answer

    async def _answer(self, row: Row) -> Row:
        row_index = row[internals.ROW_INDEX]
        await self.gate.enter(row["shard"])
        self.clock.add_running(+1)
        started = time.time()
        try:
            answer = await self.answer(row)
        except internals.fatal_engine_errors():
            # The engine has died but its actor lives, so Ray would send all retries to it. Ray restarts an actor that exits
            # like this and sends its tasks again (ray-project/ray issue 59522).
            os._exit(1)
        except Exception as error:
            answer = {**EMPTY_ANSWER, "error": f"{type(error).__name__}: {error}"}
        finally:
            self.clock.add_running(-1)
            self.gate.leave()
        seconds = self.clock.read()
        return {
            **answer,
            internals.ROW_INDEX: row_index,
            "engine": self.engine,
            "busy": seconds.busy,
            "alive": seconds.alive,
            "started": started,
        }
