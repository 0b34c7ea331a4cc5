"""``python -m benchmarks.serving_load URL WORK``: clients that ask one request after another, in a process of their own.

Asks ``POST /v1/completions`` of a server on loopback, and of no other; bounded in requests and in seconds. Prints JSON:
for each phase its latencies and rates.
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
    """``requests`` in all by ``concurrency`` clients, each of ``max_tokens``; ended after ``seconds`` in any case."""

    name: str
    concurrency: int
    requests: int
    max_tokens: int
    seconds: float


def quantile(values: list[float], share: float) -> float:
    """Nearest-rank quantile of ``values``, of which there is at least one."""
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]


def intent(number: int) -> str:
    """A short intent; no two numbers share a first word, so that no prefix is found in a cache."""
    return f"{number * 7919 % 99991} birthday card with dinosaurs and balloons"


async def measure(phase: Phase, ask: Callable[[str, int], Awaitable[int]], first: int) -> dict[str, Any]:
    """Run one phase.

    Args:
        ask: sends an intent with a limit of tokens and returns how many were written; raises for what went wrong.
        first: number of the first intent, so that phases share none.
    """
    latencies: list[float] = []
    tokens = failed = 0
    numbers = iter(range(first, first + phase.requests))
    ends = time.monotonic() + phase.seconds

    async def client() -> None:
        nonlocal tokens, failed
        for number in numbers:
            if time.monotonic() > ends:
                return
            begun = time.perf_counter()
            try:
                written = await ask(intent(number), phase.max_tokens)
            except Exception as error:
                failed += 1
                if failed == 1:
                    print(f"{phase.name}: {error!r}", file=sys.stderr)
                continue
            tokens += written  # not "tokens += await": what others add while this waits would be lost
            latencies.append((time.perf_counter() - begun) * 1000)

    begun = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(phase.concurrency)))
    seconds = time.perf_counter() - begun
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


async def run(phases: list[Phase], ask: Callable[[str, int], Awaitable[int]]) -> dict[str, Any]:
    """All phases after one that warms up, which is not reported."""
    most = max(phases, key=lambda phase: phase.concurrency)
    await measure(Phase("warm-up", most.concurrency, most.concurrency, most.max_tokens, most.seconds), ask, 0)
    found, first = {}, most.concurrency
    for phase in phases:
        found[phase.name] = await measure(phase, ask, first)
        first += phase.requests
    return found


def require_loopback(url: str) -> None:
    """Raises:
    SystemExit: ``url`` is not this machine's own.
    """
    if urlsplit(url).hostname not in ("127.0.0.1", "localhost", "::1"):
        raise SystemExit(f"{url}: load is only put on loopback")


async def over_http(url: str, phases: list[Phase]) -> dict[str, Any]:
    import aiohttp

    require_loopback(url)
    connector = aiohttp.TCPConnector(limit=max(phase.concurrency for phase in phases))
    async with aiohttp.ClientSession(url, connector=connector, timeout=aiohttp.ClientTimeout(120)) as session:

        async def ask(text: str, limit: int) -> int:
            body = {"model": "bench:text_to_image", "prompt": text, "max_tokens": limit}
            async with session.post("/v1/completions", json=body) as response:
                answer = await response.json()
                if response.status != 200:
                    raise RuntimeError(f"{response.status} {answer}")
                return int(answer["usage"]["completion_tokens"])

        return await run(phases, ask)


def main(url: str, work: str) -> None:
    with open(work, encoding="utf-8") as file:
        phases = [Phase(**phase) for phase in json.load(file)["phases"]]
    print(json.dumps(asyncio.run(over_http(url, phases))))


if __name__ == "__main__":
    main(*sys.argv[1:])
