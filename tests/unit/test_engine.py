"""The stage's parts without Ray: who is let in first, what is counted, what a stalled stage says, what a change is called."""

import asyncio
import itertools
import threading
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from udrl.errors import StalledError
from udrl.generate.prepare import shard_size
from udrl.hashing import differences
from udrl.policies.actor import Clock, Gate
from udrl.policies.stage import _tasks_in_flight
from udrl.policies.tally import Tally
from udrl.policies.teacher import teacher_policy
from udrl.recipe import Teacher
from udrl.watchdog import watched

# Letting requests in


@given(size=st.integers(1, 4), shards=st.lists(st.integers(0, 5), min_size=1, max_size=30))
def test_the_gate_lets_in_no_more_than_fit_and_the_oldest_shard_first(size: int, shards: list[int]) -> None:
    entered: list[int] = []

    async def main() -> None:
        gate, inside = Gate(size), 0
        step = asyncio.Event()

        async def request(shard: int) -> None:
            nonlocal inside
            await gate.enter(shard)
            inside += 1
            assert inside <= size
            entered.append(shard)
            await step.wait()
            inside -= 1
            gate.leave()

        tasks = [asyncio.create_task(request(shard)) for shard in shards]
        await asyncio.sleep(0)  # all stand at the gate, the first of them inside
        step.set()
        await asyncio.gather(*tasks)
        assert gate.free == size

    asyncio.run(main())
    waited = entered[size:]
    assert sorted(entered) == sorted(shards)
    assert waited == sorted(waited)


def test_a_request_that_is_cancelled_at_the_gate_gives_its_place_on() -> None:
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
    clock = Clock()  # ready at 0
    for change in (+1, +1, -1, -1):  # at 1, 2, 5, 6
        clock.change(change)
    assert clock.read() == (5.0, 10.0)


def test_an_engine_holds_shards_enough_to_stay_full_and_few_more(tmp_path: object) -> None:
    (tmp_path / "config.json").write_text("{}")  # type: ignore[operator]
    engine = {"max_num_seqs": 256, "batch_size": 64}
    policy = teacher_policy(Teacher.model_validate({"model": str(tmp_path), "engine": engine}), [])
    assert _tasks_in_flight(policy, 16384) == 3
    assert _tasks_in_flight(policy, 64) == 6


@given(st.integers(1, 10**9))
def test_shards_keep_the_number_of_files_bounded(requests: int) -> None:
    size = shard_size(requests)
    assert 128 <= size <= 16384
    assert requests / size <= max(4096, requests / 16384)


# Counting


def report(**more: object) -> dict[str, object]:
    empty = dict.fromkeys(("rows", "prompts", "accepted", "input_tokens", "cached_tokens", "output_tokens"), 0)
    return {**empty, "reasons": {}, "examples": {}, "engines": {}, "first_token": {}, **more}


def test_a_tally_adds_blocks_and_keeps_the_latest_of_each_engine() -> None:
    tally = Tally()
    tally.add(report(rows=2, prompts=4, accepted=3, reasons={"empty": 1}, examples={"empty": "first"}, engines={"a": [1, 2]}))
    tally.add(report(rows=1, prompts=1, reasons={"empty": 1}, examples={"empty": "later"}, engines={"a": [3, 4], "b": [1, 4]}))
    assert (tally.rows, tally.prompts, tally.accepted) == (3, 5, 3)
    assert tally.reasons == {"empty": 2}
    assert tally.examples == {"empty": "first"}
    assert tally.busy_share == pytest.approx(4 / 8)
    assert tally.accepted_share == pytest.approx(3 / 5)


@given(st.lists(st.floats(0.002, 1000), min_size=1, max_size=200), st.sampled_from([0.5, 0.95]))
def test_percentiles_from_the_histogram_are_right_to_a_fifth(seconds: list[float], share: float) -> None:
    from collections import Counter

    from udrl.policies.tally import FIRST_TOKEN_EDGES

    tally = Tally()
    buckets = Counter(str(b) for b in np.searchsorted(FIRST_TOKEN_EDGES, seconds))
    tally.add(report(first_token=buckets))
    exact = np.quantile(seconds, share, method="inverted_cdf")
    assert exact <= tally.first_token_seconds(share) * (1 + 1e-9)
    assert tally.first_token_seconds(share) <= 1.2 * exact


# The watchdog


def test_a_source_that_brings_things_is_read_to_its_end() -> None:
    assert list(watched(iter(range(5)), 1, "test")) == [0, 1, 2, 3, 4]


def test_an_error_of_the_source_is_the_readers() -> None:
    def source() -> Iterator[int]:
        yield 1
        raise KeyError("x")

    items = watched(source(), 1, "test")
    assert next(items) == 1
    with pytest.raises(KeyError):
        next(items)


def test_a_silent_source_is_given_up(capsys: pytest.CaptureFixture[str]) -> None:
    never = threading.Event()
    idle: list[int] = []

    def source() -> Iterator[int]:
        yield 1
        never.wait()

    items = watched(source(), 1.5 / 60, "test", idle=lambda: idle.append(1))
    assert next(items) == 1
    with pytest.raises(StalledError, match=r"test: no progress for .*run the same command again"):
        next(items)
    assert idle
    assert "what was going on" in capsys.readouterr().err
    never.set()


def test_a_reader_that_leaves_ends_the_source() -> None:
    ended = threading.Event()

    def source() -> Iterator[int]:
        try:
            yield from itertools.count()
        finally:
            ended.set()

    items = watched(source(), 1, "test")
    assert next(items) == 0
    items.close()
    assert ended.wait(20)


# Naming what changed


def test_a_change_is_named_with_its_old_and_its_new_value() -> None:
    old = {"teacher": {"sampling": {"max_tokens": 24, "min_p": 0.1}, "tasks": [{"label": "A"}, {"label": "B"}]}}
    new = {"teacher": {"sampling": {"max_tokens": 20, "min_p": 0.1}, "tasks": [{"label": "A"}, {"label": "C"}]}, "x": 1}
    assert differences(old, new) == ["teacher.sampling.max_tokens: 24 -> 20", "teacher.tasks.1.label: B -> C", "x: None -> 1"]
    assert differences(old, old) == []
