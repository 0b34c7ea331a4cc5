"""``python -m benchmarks.serving_load URL WORK``: the load generator, a process of its own.

Clients send one ``POST /v1/completions`` after another to a server on loopback, limited in number and time. Prints JSON: the
latencies and rates of each phase.
"""

import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit


@dataclass(frozen=True)
class Phase:
    """``requests`` of ``max_tokens`` each, sent by ``concurrency`` clients; ends after ``seconds`` at the latest."""

    name: str
    concurrency: int
    requests: int
    max_tokens: int
    seconds: float


def quantile(values: list[float], share: float) -> float:
    """Return the nearest-rank quantile of ``values``, which must not be empty."""
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]


def make_intent(number: int) -> str:
    """Return a short intent with a first word of its own, so that the prefix cache never helps."""
    return f"{number * 7919 % 99991} birthday card with dinosaurs and balloons"


async def run_phase(phase: Phase, send: Callable[[str, int], Awaitable[int]], first: int) -> dict[str, Any]:
    """Run one phase and return its latencies and rates.

    Args:
        send: sends an intent with a token limit and returns the number of generated tokens; raises if the request failed.
        first: number of the first intent; phases must not share intents.
    """
    latencies: list[float] = []
    tokens = failed = 0
    numbers = iter(range(first, first + phase.requests))
    deadline = time.monotonic() + phase.seconds

    async def client() -> None:
        nonlocal tokens, failed
        for number in numbers:
            if time.monotonic() > deadline:
                return
            started = time.perf_counter()
            try:
                n_tokens = await send(make_intent(number), phase.max_tokens)
            except Exception as error:
                failed += 1
                if failed == 1:
                    print(f"{phase.name}: {error!r}", file=sys.stderr)
                continue
            tokens += n_tokens  # not "tokens += await ...", which would lose the additions of other clients during the wait
            latencies.append((time.perf_counter() - started) * 1000)

    started = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(phase.concurrency)))
    seconds = time.perf_counter() - started
    if not latencies:
        raise SystemExit(f"phase {phase.name}: no request was answered")
    return {
        "requests": len(latencies),
        "failed": failed,
        "tokens": tokens,
        "p50_ms": round(quantile(latencies, 0.5), 2),
        "p95_ms": round(quantile(latencies, 0.95), 2),
        "p99_ms": round(quantile(latencies, 0.99), 2),
        "tokens_per_second": round(tokens / seconds, 1),
        "requests_per_second": round(len(latencies) / seconds, 2),
    }


async def run_phases(phases: list[Phase], send: Callable[[str, int], Awaitable[int]]) -> dict[str, Any]:
    """Run all phases after a warm-up, which is not reported; return the results by phase."""
    widest = max(phases, key=lambda phase: phase.concurrency)
    await run_phase(Phase("warm-up", widest.concurrency, widest.concurrency, widest.max_tokens, widest.seconds), send, 0)
    results, first = {}, widest.concurrency
    for phase in phases:
        results[phase.name] = await run_phase(phase, send, first)
        first += phase.requests
    return results


def require_loopback(url: str) -> None:
    """Refuse to load a server on another machine.

    Raises:
        SystemExit: ``url`` is not a loopback address.
    """
    if urlsplit(url).hostname not in ("127.0.0.1", "localhost", "::1"):
        raise SystemExit(f"{url}: not a loopback address; the benchmark loads only this machine")


async def load_server(url: str, phases: list[Phase]) -> dict[str, Any]:
    import aiohttp

    require_loopback(url)
    connector = aiohttp.TCPConnector(limit=max(phase.concurrency for phase in phases))
    async with aiohttp.ClientSession(url, connector=connector, timeout=aiohttp.ClientTimeout(120)) as session:

        async def send(intent: str, max_tokens: int) -> int:
            body = {"model": "bench:text_to_image", "prompt": intent, "max_tokens": max_tokens}
            async with session.post("/v1/completions", json=body) as response:
                content = await response.json()
                if response.status != 200:
                    raise RuntimeError(f"{response.status} {content}")
                return int(content["usage"]["completion_tokens"])

        return await run_phases(phases, send)


def main(url: str, work: str) -> None:
    with open(work, encoding="utf-8") as file:
        phases = [Phase(**phase) for phase in json.load(file)["phases"]]
    print(json.dumps(asyncio.run(load_server(url, phases))))


if __name__ == "__main__":
    main(*sys.argv[1:])
