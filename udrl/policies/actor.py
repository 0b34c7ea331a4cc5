"""The engine inside its Ray actor: Ray Data LLM's vLLM stage, made to tell what the ledger and the cost table need.

Importing this module imports ray.llm; only the stage's builder and its workers do.
"""

import abc
import asyncio
import heapq
import itertools
import json
import os
import time
from collections.abc import AsyncIterator
from typing import Any

from ray.llm._internal.batch.stages.vllm_engine_stage import vLLMEngineStageUDF
from ray.llm._internal.common.errors import VLLM_FATAL_ERRORS

Row = dict[str, Any]


class Gate:
    """Lets ``size`` requests into the engine at a time, those of the oldest shard first.

    In turn, as Ray's own semaphore has it, all shards in flight advance together: the first one is durable only when all of
    them nearly are, and that much is lost with the engine.
    """

    def __init__(self, size: int) -> None:
        self.free = size
        self._waiting: list[tuple[int, int, asyncio.Future[None]]] = []
        self._order = itertools.count()

    async def enter(self, shard: int) -> None:
        if self.free:
            self.free -= 1
            return
        turn = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (shard, next(self._order), turn))
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():  # it was let in at the same moment
                self.leave()
            raise

    def leave(self) -> None:
        while self._waiting:
            *_, turn = heapq.heappop(self._waiting)
            if not turn.done():
                turn.set_result(None)
                return
        self.free += 1


class Clock:
    """Seconds that an engine had work, and seconds since it was ready."""

    def __init__(self) -> None:
        self.ready = self._since = time.monotonic()
        self._busy, self._running = 0.0, 0

    def change(self, by: int) -> None:
        now = time.monotonic()
        if self._running:
            self._busy += now - self._since
        self._since, self._running = now, self._running + by

    def read(self) -> tuple[float, float]:
        self.change(0)
        return self._busy, time.monotonic() - self.ready


class Answering:
    """A stage whose rows are answered one by one by ``answer``: what the vLLM actor and a dummy engine have in common."""

    def begin(self, capacity: int) -> None:
        self.gate, self.clock = Gate(capacity), Clock()
        self.engine = f"{os.uname().nodename}:{os.getpid()}:{time.time():.0f}"

    @abc.abstractmethod
    async def answer(self, row: Row) -> Row:
        """The columns of :data:`NOTHING` for one request."""

    async def udf(self, batch: list[Row]) -> AsyncIterator[Row]:
        """Answers in the order in which they come; a row that fails has its ``error`` and the batch goes on."""
        for answer in asyncio.as_completed([asyncio.create_task(self._answer(row)) for row in batch]):
            yield await answer

    async def _answer(self, row: Row) -> Row:
        place = row["__idx_in_batch"]
        await self.gate.enter(row["shard"])
        self.clock.change(+1)
        began = time.time()
        try:
            answer = await self.answer(row)
        except VLLM_FATAL_ERRORS:
            # The engine is gone but its actor lives: retries would come back here for ever. Ray restarts an actor that
            # exits like this and sends its tasks again (ray-project/ray issue 59522).
            os._exit(1)
        except Exception as error:
            answer = {**NOTHING, "error": f"{type(error).__name__}: {error}"}
        finally:
            self.clock.change(-1)
            self.gate.leave()
        busy, alive = self.clock.read()
        return {**answer, "__idx_in_batch": place, "engine": self.engine, "busy": busy, "alive": alive, "began": began}


NOTHING: Row = {
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


class EngineActor(Answering, vLLMEngineStageUDF):
    """Ray Data LLM's stage UDF, which drops vLLM's finish reason, cached tokens and times, and converts every token id and
    log-probability to Python objects. This one asks for final outputs alone, and keeps what is wanted."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        seqs = self.llm.get_scheduler_config().max_num_seqs
        self.begin(seqs + max(8, seqs // 8))  # a few wait in the engine, so that a free place is filled at once

    async def answer(self, row: Row) -> Row:
        from vllm.sampling_params import RequestOutputKind

        # As text, because rows of one block must have one schema and these differ from row to row.
        row["sampling_params"] = json.loads(row["sampling_params"])
        request = await self.llm._prepare_llm_request(row)
        request.params.output_kind = RequestOutputKind.FINAL_ONLY
        output = await self.llm._generate_async(request)
        written = output.outputs[0]
        top = sorted(written.logprobs[0].values(), key=lambda t: -t.logprob) if written.logprobs else []
        return {
            "completion": written.text,
            "finish_reason": written.finish_reason or "",
            "input_tokens": len(output.prompt_token_ids),
            "cached_tokens": output.num_cached_tokens or 0,
            "output_tokens": len(written.token_ids),
            "first_token_seconds": output.metrics.first_token_latency if output.metrics else 0.0,
            "top_tokens": [token.decoded_token or "" for token in top],
            "top_logprobs": [float(token.logprob) for token in top],
            "error": "",
        }
