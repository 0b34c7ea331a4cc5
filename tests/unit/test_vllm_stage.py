"""Parts of the vLLM stage that need no Ray: admission to the engine, statistics, the size of shards."""

import asyncio
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from udrl.generate.stage import default_shard_size
from udrl.hashing import differences
from udrl.policies.actor import BusyClock, Gate
from udrl.policies.ledger import Attempt, AttemptJournal, load_attempts
from udrl.policies.stage import tasks_in_flight
from udrl.policies.statistics import FIRST_TOKEN_EDGES, BlockReport, CompletionStatistics, EngineSeconds
from udrl.policies.teacher import teacher_policy
from udrl.recipe import Teacher

# ---- admission to the engine


@given(size=st.integers(1, 4), shards=st.lists(st.integers(0, 5), min_size=1, max_size=30))
def test_the_gate_admits_no_more_than_its_size_and_the_oldest_shard_first(size: int, shards: list[int]) -> None:
    admitted: list[int] = []

    async def main() -> None:
        gate, inside = Gate(size), 0
        go_on = asyncio.Event()

        async def request(shard: int) -> None:
            nonlocal inside
            await gate.enter(shard)
            inside += 1
            assert inside <= size
            admitted.append(shard)
            await go_on.wait()
            inside -= 1
            gate.leave()

        tasks = [asyncio.create_task(request(shard)) for shard in shards]
        await asyncio.sleep(0)  # now all wait at the gate, except the first, which are inside
        go_on.set()
        await asyncio.gather(*tasks)
        assert gate.free == size

    asyncio.run(main())
    waited = admitted[size:]
    assert sorted(admitted) == sorted(shards)
    assert waited == sorted(waited)


def test_a_request_cancelled_at_the_gate_passes_its_place_on() -> None:
    async def main() -> int:
        gate = Gate(1)
        await gate.enter(0)
        waiting = [asyncio.create_task(gate.enter(shard)) for shard in (1, 2)]
        await asyncio.sleep(0)
        waiting[0].cancel()
        gate.leave()
        await waiting[1]
        gate.leave()
        return gate.free

    assert asyncio.run(main()) == 1


def test_an_engine_is_busy_while_it_has_at_least_one_request(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 1.0, 2.0, 5.0, 6.0, 10.0, 10.0])
    monkeypatch.setattr("time.monotonic", lambda: next(now))
    clock = BusyClock()  # ready at 0
    for change in (+1, +1, -1, -1):  # at 1, 2, 5, 6
        clock.add_running(change)
    assert clock.read() == EngineSeconds(busy=5.0, alive=10.0)


def test_an_engine_holds_enough_shards_to_stay_full_and_few_more(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    engine = {"max_num_seqs": 256, "batch_size": 64}
    policy = teacher_policy(Teacher.model_validate({"model": str(tmp_path), "engine": engine}), [])
    assert tasks_in_flight(policy, 16384) == 3
    assert tasks_in_flight(policy, 64) == 6


@given(st.integers(1, 10**9))
def test_shards_keep_the_number_of_files_bounded(requests: int) -> None:
    size = default_shard_size(requests)
    assert 128 <= size <= 16384
    assert requests / size <= max(4096, requests / 16384)


# ---- statistics


def test_statistics_add_blocks_and_keep_the_latest_times_of_each_engine() -> None:
    statistics = CompletionStatistics()
    first = BlockReport(rows=2, prompts=4, accepted=3, reasons={"empty": 1}, examples={"empty": "first"})
    first.engines = {"a": EngineSeconds(1, 2)}
    later = BlockReport(rows=1, prompts=1, reasons={"empty": 1}, examples={"empty": "later"})
    later.engines = {"a": EngineSeconds(3, 4), "b": EngineSeconds(1, 4)}
    statistics.add(first)
    statistics.add(later)
    assert (statistics.rows, statistics.prompts, statistics.accepted) == (3, 5, 3)
    assert statistics.reasons == {"empty": 2}
    assert statistics.examples == {"empty": "first"}
    assert statistics.busy_seconds == 4
    assert statistics.busy_share == pytest.approx(4 / 8)
    assert statistics.accepted_share == pytest.approx(3 / 5)


def test_a_report_survives_its_way_to_the_driver_as_json() -> None:
    report = BlockReport(rows=2, engines={"a": EngineSeconds(1.5, 2)}, first_token={3: 1, 88: 1}, reasons={"empty": 1})
    assert BlockReport.model_validate_json(report.model_dump_json()) == report


@given(st.lists(st.floats(0.002, 1000), min_size=1, max_size=200), st.sampled_from([0.5, 0.95]))
def test_a_quantile_from_the_histogram_is_at_most_a_fifth_too_large(seconds: list[float], share: float) -> None:
    statistics = CompletionStatistics()
    statistics.add(BlockReport(first_token=Counter(int(b) for b in np.searchsorted(FIRST_TOKEN_EDGES, seconds))))
    exact = np.quantile(seconds, share, method="inverted_cdf")
    assert exact <= statistics.first_token_seconds(share) * (1 + 1e-9)
    assert statistics.first_token_seconds(share) <= 1.2 * exact


def test_the_journal_keeps_the_cost_of_a_run_that_does_not_end(tmp_path: Path) -> None:
    journal = AttemptJournal(str(tmp_path))
    journal.write(CompletionStatistics(rows=3, output_tokens=40, engines={"a": EngineSeconds(1.5, 2)}))
    journal.write(CompletionStatistics(rows=4))  # too soon after the first
    (attempt,) = load_attempts(str(tmp_path))
    assert (attempt.rows, attempt.output_tokens, attempt.busy_seconds, attempt.ended) == (3, 40, 1.5, False)
    journal.write(CompletionStatistics(rows=5), ended=True)
    assert [(a.rows, a.ended) for a in load_attempts(str(tmp_path))] == [(5, True)]


def test_a_journal_of_the_first_version_is_read() -> None:
    entry = """{"accepted": 141, "busy_seconds": 6.6, "cached_tokens": 33504, "ended": true, "input_tokens": 37992,
        "output_tokens": 2886, "prompts": 184, "rows": 184, "seconds": 39.7, "started": "2026-11-25T10:46:20+00:00"}"""
    assert Attempt.model_validate_json(entry).seconds == 39.7


# ---- differences between fingerprints' inputs


def test_a_difference_is_named_with_its_old_and_its_new_value() -> None:
    old = {"teacher": {"sampling": {"max_tokens": 24, "min_p": 0.1}, "tasks": [{"label": "A"}, {"label": "B"}]}}
    new = {"teacher": {"sampling": {"max_tokens": 20, "min_p": 0.1}, "tasks": [{"label": "A"}, {"label": "C"}]}, "x": 1}
    assert differences(old, new) == ["teacher.sampling.max_tokens: 24 -> 20", "teacher.tasks.1.label: B -> C", "x: None -> 1"]
    assert differences(old, old) == []
