"""The parts of ``benchmarks.serving`` that need no server: statistics, load generator, loopback rule."""

import asyncio

import pytest

from benchmarks import serving
from benchmarks.serving_load import Phase, make_intent, quantile, require_loopback, run_phase, run_phases


def test_quantiles_are_observed_values() -> None:
    values = [float(n) for n in range(1, 101)]
    assert [quantile(values, share) for share in (0, 0.5, 0.95, 1)] == [1, 51, 96, 100]
    assert quantile([3.0], 0.99) == 3


@pytest.mark.parametrize("url", ["http://example.com", "http://10.0.0.1:80", "http://127.0.0.1.example.com"])
def test_only_loopback_addresses_are_loaded(url: str) -> None:
    with pytest.raises(SystemExit, match="loopback"):
        require_loopback(url)
    require_loopback("http://127.0.0.1:8000")


def test_a_phase_sends_all_its_requests_with_all_its_clients() -> None:
    n_running = max_running = 0
    intents: list[str] = []

    async def send(intent: str, max_tokens: int) -> int:
        nonlocal n_running, max_running
        n_running += 1
        max_running = max(max_running, n_running)
        intents.append(intent)
        await asyncio.sleep(0)
        n_running -= 1
        if intent == make_intent(102):
            raise RuntimeError("one request fails")
        return max_tokens

    result = asyncio.run(run_phase(Phase("x", 4, 20, 5, 60), send, 100))
    assert (result["requests"], result["failed"], max_running) == (19, 1, 4)
    assert result["tokens"] == 19 * 5  # no client's tokens are lost while others wait
    assert len(set(intents)) == 20
    assert intents[0] == make_intent(100)


def test_phases_share_no_intent() -> None:
    intents: list[str] = []

    async def send(intent: str, max_tokens: int) -> int:
        intents.append(intent)
        return max_tokens

    asyncio.run(run_phases([Phase("a", 1, 5, 1, 60), Phase("b", 3, 7, 1, 60)], send))
    assert len(intents) == len(set(intents)) == 3 + 5 + 7


def test_a_phase_ends_after_its_time_limit() -> None:
    async def send(intent: str, max_tokens: int) -> int:
        await asyncio.sleep(0.01)
        return max_tokens

    assert asyncio.run(run_phase(Phase("x", 1, 10_000, 1, 0.1), send, 0))["requests"] < 100


def test_arms_are_compared_by_the_medians_of_their_turns() -> None:
    def turn(p50: float, rate: float) -> dict[str, object]:
        return {"phases": {name: {"p50_ms": p50, "tokens_per_second": rate} for name in ("1", "8", "64", "short")}}

    turns = {"serve": [turn(10, 90), turn(12, 94), turn(11, 92)], "bare engine": [turn(8, 100)]}
    turns |= {"serve, HAProxy": [turn(9, 95)], "transformers": [turn(9, 23)], "transformers, batched": [turn(9, 46)]}
    comparison = serving.compare_arms(turns, quick=False)
    assert comparison["added_p50_ms"] == 3
    assert comparison["ratio_to_bare_engine"] == 0.92
    assert (comparison["added_p50_ms_haproxy"], comparison["ratio_to_bare_engine_haproxy"]) == (1, 0.95)
    assert comparison["ratio_to_transformers_server"] == 4
    assert comparison["ratio_to_batched_transformers_server"] == 2
