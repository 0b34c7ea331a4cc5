"""The parts of ``benchmarks.serving`` that need no server: what it counts, and whom it may load."""

import asyncio

import pytest

from benchmarks import serving
from benchmarks.serving_load import Phase, intent, measure, quantile, require_loopback, run


def test_quantiles_are_values_that_occurred() -> None:
    values = [float(n) for n in range(1, 101)]
    assert [quantile(values, share) for share in (0, 0.5, 0.95, 1)] == [1, 51, 96, 100]
    assert quantile([3.0], 0.99) == 3


@pytest.mark.parametrize("url", ["http://example.com", "http://10.0.0.1:80", "http://127.0.0.1.example.com"])
def test_load_is_put_on_loopback_alone(url: str) -> None:
    with pytest.raises(SystemExit, match="loopback"):
        require_loopback(url)
    require_loopback("http://127.0.0.1:8000")


def test_a_phase_asks_so_many_requests_by_so_many_clients() -> None:
    running = most = 0
    asked: list[str] = []

    async def ask(text: str, limit: int) -> int:
        nonlocal running, most
        running += 1
        most = max(most, running)
        asked.append(text)
        await asyncio.sleep(0)
        running -= 1
        if text == intent(102):
            raise RuntimeError("one fails")
        return limit

    found = asyncio.run(measure(Phase("x", 4, 20, 5, 60), ask, 100))
    assert (found["requests"], found["failed"], most) == (19, 1, 4)
    assert found["tokens"] == 19 * 5  # of all clients, though they wait for one another
    assert len(set(asked)) == 20
    assert asked[0] == intent(100)


def test_phases_share_no_intent() -> None:
    asked: list[str] = []

    async def ask(text: str, limit: int) -> int:
        asked.append(text)
        return limit

    asyncio.run(run([Phase("a", 1, 5, 1, 60), Phase("b", 3, 7, 1, 60)], ask))
    assert len(asked) == len(set(asked)) == 3 + 5 + 7


def test_a_phase_ends_in_time() -> None:
    async def ask(text: str, limit: int) -> int:
        await asyncio.sleep(0.01)
        return limit

    assert asyncio.run(measure(Phase("x", 1, 10_000, 1, 0.1), ask, 0))["requests"] < 100


def test_ratios_are_of_medians() -> None:
    def turn(p50: float, rate: float) -> dict[str, object]:
        return {"phases": {name: {"p50_ms": p50, "tokens_per_second": rate} for name in ("1", "8", "64", "short")}}

    turns = {"serve": [turn(10, 90), turn(12, 94), turn(11, 92)], "bare engine": [turn(8, 100)]}
    turns |= {"serve, HAProxy": [turn(9, 95)], "transformers": [turn(9, 23)], "transformers, batched": [turn(9, 46)]}
    found = serving.ratios(turns, quick=False)
    assert found["added_p50_ms"] == 3
    assert found["ratio_to_bare_engine"] == 0.92
    assert (found["added_p50_ms_haproxy"], found["ratio_to_bare_engine_haproxy"]) == (1, 0.95)
    assert found["ratio_to_transformers_server"] == 4
    assert found["ratio_to_batched_transformers_server"] == 2
