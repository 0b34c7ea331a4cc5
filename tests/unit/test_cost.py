"""Cost: the table that ends a job, and the plan of a dry run."""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from udrl import storage
from udrl.episodes import COMPLETIONS
from udrl.generate import plan
from udrl.generate.cost import compare_with_plan, describe_cost
from udrl.generate.plan import Rates, describe_plan, estimate_plan
from udrl.policies.ledger import part_name
from udrl.policies.requests import Requests
from udrl.policies.statistics import FIRST_TOKEN_EDGES, CompletionStatistics, EngineSeconds
from udrl.recipe import Engine, Placement, Rewards, RewardWeights, Teacher
from udrl.run import Basis, Figure, GenerationPlan

GPU = Placement(replicas=2, gpus=1, dollars_per_hour=1.5)


def statistics(**values: Any) -> CompletionStatistics:
    first = np.zeros(len(FIRST_TOKEN_EDGES) + 1, dtype=np.int64)
    first[np.searchsorted(FIRST_TOKEN_EDGES, 0.1)] = 90
    first[np.searchsorted(FIRST_TOKEN_EDGES, 2.0)] = 10
    base: dict[str, Any] = {
        "rows": 1000,
        "reused": 200,
        "prompts": 1000,
        "input_tokens": 200_000,
        "cached_tokens": 150_000,
        "output_tokens": 40_000,
        "engines": {"a": EngineSeconds(90.0, 100.0), "b": EngineSeconds(100.0, 100.0)},
        "first_token": first,
        "startup_seconds": 80.0,
        "seconds": 100.0,
    }
    return CompletionStatistics(**{**base, **values})


def cell(lines: list[str], name: str) -> str:
    (line,) = [line for line in lines if line.strip().startswith(name)]
    return line.strip().removeprefix(name).strip()


class TestCostTable:
    def test_it_shows_tokens_speed_and_utilization(self) -> None:
        lines = describe_cost(statistics(), GPU, accepted=800)
        assert cell(lines, "requests") == "1,000 made now, 200 reused"
        assert cell(lines, "prefix-cache hit rate") == "75.0% of the tokens in"
        assert cell(lines, "engines busy") == "95.0% of their time"
        assert cell(lines, "speed") == "400 tokens/s out, 8.00 episodes accepted/s"
        assert cell(lines, "time to first token").startswith("p50 0.1")
        assert "p95 2" in cell(lines, "time to first token")

    def test_gpu_hours_include_start_up_and_speed_counts_from_the_first_request(self) -> None:
        lines = describe_cost(statistics(), GPU, accepted=800)
        assert cell(lines, "GPU-hours") == "0.100"  # 2 replicas x 180 s
        assert cell(lines, "dollars").startswith("$0.15 at $1.5")
        assert float(cell(lines, "GPU-days per billion tokens out")) == pytest.approx(2 * 100 / 86400 / 40_000 * 1e9, abs=0.05)

    def test_a_replica_of_several_gpus_counts_them_all(self) -> None:
        assert cell(describe_cost(statistics(), GPU, 800, devices=4), "GPU-hours") == "0.400"

    def test_without_gpu_and_price_it_shows_engine_hours_and_no_dollars(self) -> None:
        lines = describe_cost(statistics(), Placement(), accepted=800)
        assert cell(lines, "engine-hours (no GPU)") == "0.050"
        assert not any("$" in line for line in lines)

    def test_a_finished_run_costs_nothing(self) -> None:
        assert describe_cost(CompletionStatistics(reused=7), GPU, 5) == ["cost: none, all 7 requests were completed before"]

    def test_missing_measurements_are_shown_as_such(self) -> None:
        blank = CompletionStatistics(rows=5, output_tokens=10, seconds=1.0)
        lines = describe_cost(blank, Placement(), 0)
        assert cell(lines, "time to first token") == "not measured"
        assert cell(lines, "engines busy") == "not measured"


def requests(total: int, shards: int) -> Requests:
    def rows(shard: int) -> Iterator[dict[str, Any]]:
        for i in range(total // shards):
            yield {"task": "image_search", "intent": f"a fox number {shard} {i // 2}"}

    return Requests(total, shards, rows, lambda _: total // shards)


def figure(value: float, basis: Basis = "measured") -> Figure:
    return Figure(value=value, basis=basis)


RATES = Rates(figure(200), figure(150), figure(20), figure(500), figure(30))


class TestPlannedTime:
    def test_a_finished_job_compares_its_time_with_the_plan_of_its_ledger(self) -> None:
        planned = estimate_plan(Teacher(), Rewards(), requests(1000, 10), 1000, 100, RATES)
        planned = planned.model_copy(update={"ledger": "abc"})
        assert compare_with_plan(planned, "abc", 50) == ["  planned 40s of generation, took 50s (+25%)"]
        assert compare_with_plan(planned, "other", 50) == []
        assert compare_with_plan(None, "abc", 50) == []

    def test_a_plan_survives_its_file(self, tmp_path: Path) -> None:
        planned = estimate_plan(Teacher(placement=GPU), Rewards(), requests(1000, 10), 1000, 100, RATES)
        planned.save(str(tmp_path / "plan.json"))
        assert GenerationPlan.load(str(tmp_path / "plan.json")) == planned


class TestPlan:
    def test_totals_follow_from_the_rates(self) -> None:
        teacher = Teacher(placement=GPU)
        planned = estimate_plan(teacher, Rewards(), requests(100_000, 100), 100_000, 12_500, RATES, texts_per_second=450)
        assert planned.output_tokens == figure(2_000_000, "measured")
        assert planned.generation_seconds == figure(2000, "measured")  # 2 replicas
        assert planned.scoring_seconds == figure(250, "measured")
        assert planned.hours is not None
        assert planned.hours.value == pytest.approx(2 * 2030 / 3600)
        assert planned.dollars is not None
        assert planned.dollars.value == pytest.approx(1.5 * 2 * 2030 / 3600)

    def test_a_number_has_the_weakest_basis_of_its_inputs(self) -> None:
        rates = replace(RATES, output_tokens=figure(20, "assumed"), tokens_per_second=figure(500, "given"))
        planned = estimate_plan(Teacher(placement=GPU), Rewards(), requests(1000, 10), 1000, 100, rates)
        assert planned.generation_seconds == figure(20, "assumed")
        assert planned.input_tokens.basis == "measured"

    def test_every_line_names_the_basis_of_its_numbers(self) -> None:
        planned = estimate_plan(Teacher(placement=GPU), Rewards(), requests(1000, 10), 1000, 100, RATES)
        lines = describe_plan(planned).splitlines()
        assert len(lines) == 11
        for line in lines[1:]:
            assert any(word in line for word in ("counted", "measured", "given", "assumed")), line

    def test_without_a_speed_the_plan_names_the_missing_key(self) -> None:
        rates = replace(RATES, tokens_per_second=None)
        planned = estimate_plan(Teacher(), Rewards(), requests(1000, 10), 1000, 100, rates)
        assert "teacher.tokens_per_second" in cell(describe_plan(planned).splitlines(), "generation")
        assert planned.hours is None

    def test_the_time_of_a_judge_is_not_guessed(self) -> None:
        planned = estimate_plan(Teacher(), Rewards(relevance="judge"), requests(1000, 10), 1000, 100, RATES)
        assert planned.scoring_seconds is None
        assert "judge" in cell(describe_plan(planned).splitlines(), "scoring")

    @given(st.integers(1, 10**7), st.integers(1, 64))
    def test_more_requests_never_cost_less(self, total: int, replicas: int) -> None:
        teacher = Teacher(placement=Placement(replicas=replicas, gpus=1, dollars_per_hour=2))
        small, large = (estimate_plan(teacher, Rewards(), requests(n, 1), n, n, RATES) for n in (total, total + 1))
        assert small.bytes.value < large.bytes.value
        assert small.dollars is not None
        assert large.dollars is not None
        assert small.dollars.value <= large.dollars.value


class TestSteadyRate:
    def ledger(self, folder: Path, ends: list[float], rows: int = 32, tokens: int = 20) -> str:
        """Write files of ``rows`` completions of ``tokens`` tokens each, with modification times ``ends`` (seconds)."""
        for shard, end in enumerate(ends):
            columns = {f.name: pa.nulls(rows, f.type) for f in COMPLETIONS}
            columns["output_tokens"] = pa.array([tokens] * rows, pa.int32())
            table = pa.table(columns, schema=COMPLETIONS)
            path = folder / part_name(shard, table)
            storage.write_table(str(path), table)
            os.utime(path, (1_000_000 + end, 1_000_000 + end))
        return str(folder)

    def test_it_is_the_speed_of_the_full_engine_without_filling_up_and_draining(self, tmp_path: Path) -> None:
        # Capacity 64: two files while it fills up slowly, four at one per second, two while it drains slowly.
        ledger = self.ledger(tmp_path, [10, 20, 21, 22, 23, 24, 34, 44])
        assert plan.steady_rate(ledger, capacity=64) == pytest.approx(32 * 20)

    def test_too_few_files_give_none(self, tmp_path: Path) -> None:
        assert plan.steady_rate(self.ledger(tmp_path, [10, 20, 21]), capacity=64) is None

    def test_an_absent_ledger_gives_none(self, tmp_path: Path) -> None:
        assert plan.steady_rate(str(tmp_path / "none"), capacity=64) is None

    def test_a_calibration_uses_it_or_else_the_rate_of_the_whole_run(self, tmp_path: Path) -> None:
        teacher = Teacher(engine=Engine(max_num_seqs=64))
        rates = plan.measured_rates(statistics(), teacher, self.ledger(tmp_path, [10, 20, 21, 22, 23, 24, 34, 44]))
        assert rates.tokens_per_second is not None
        assert rates.tokens_per_second.value == pytest.approx(640)
        assert (rates.input_tokens.value, rates.cached_tokens.value, rates.output_tokens.value) == (200, 150, 40)
        assert plan.measured_rates(statistics(), teacher, str(tmp_path / "none")).tokens_per_second == figure(400, "measured")


def test_the_bytes_of_a_real_ledger_are_within_a_fifth_of_the_plan(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    lexicon = ["".join(rng.choice(list("etaoinshrdlu"), rng.integers(2, 9))) for _ in range(3000)]
    weights = 1 / np.arange(1, 3001)
    size, rows = 0, 512
    for shard in range(2):
        table = []
        for i in range(rows):
            text = " ".join(rng.choice(lexicon, 14, p=weights / weights.sum()))
            row: dict[str, Any] = {f.name: {"string": "", "int32": 1, "int64": 1}.get(str(f.type), []) for f in COMPLETIONS}
            row |= {"episode_id": int(rng.integers(2**62)), "intent_id": i // 8, "intent": f"poster of {lexicon[i // 8]}"}
            table.append(row | {"completion": text, "output_tokens": 20, "input_tokens": 200 + i % 9})
        part = pa.Table.from_pylist(table, schema=COMPLETIONS)
        path = tmp_path / part_name(shard, part)
        storage.write_table(str(path), part)
        size += path.stat().st_size
    planned = estimate_plan(Teacher(), Rewards(weights=RewardWeights()), requests(2 * rows, 2), 2 * rows, 100, RATES)
    assert planned.bytes.value == pytest.approx(size, rel=0.2)


def test_without_a_calibration_the_teachers_tokenizer_counts_the_input_tokens() -> None:
    from udrl.policies.teacher import teacher_policy
    from udrl.tasks import load_tasks

    tasks = load_tasks(["image_search"])
    rates = plan.assumed_rates(teacher_policy(Teacher(), tasks), requests(1000, 10), tasks, tokens_per_second=600)
    assert rates.input_tokens.basis == "measured"
    assert 100 < rates.input_tokens.value < 300
    assert 0.5 < rates.cached_tokens.value / rates.input_tokens.value < 1  # the few-shot prefix is shared
    assert rates.output_tokens.basis == "assumed"
    assert 5 < rates.output_tokens.value < 20
    assert rates.tokens_per_second == figure(600, "given")
