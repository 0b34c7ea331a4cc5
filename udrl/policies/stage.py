"""The vLLM stage: requests in, raw completions out, through ``ray.data.llm``. Teacher, student, baselines and judges share it.

A Ray task makes the requests of a shard, an engine answers them, and the task that ends the pipeline writes them (see
``udrl.policies.ledger``); the driver receives only counts. A run that was killed continues with the missing requests.
"""

import json
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from udrl import cluster, internals, storage
from udrl.context import DEFAULT_CONTEXT, StageContext
from udrl.episodes import COMPLETIONS
from udrl.errors import UserError
from udrl.policies.ledger import AttemptJournal, count_rows, list_parts, part_name, read_ids
from udrl.policies.policy import Policy, Row, engine_environment, engine_kwargs, resource_bundles, revision_kwargs
from udrl.policies.requests import Requests
from udrl.policies.statistics import FIRST_TOKEN_EDGES, BlockReport, CompletionStatistics, EngineSeconds
from udrl.progress import Progress
from udrl.watchdog import iterate_with_watchdog

# CPUs that a bookkeeping task (making requests, writing files) claims: so few that it starts next to an engine on CPU.
BOOKKEEPING_CPUS = 0.1
# Columns that are the same for all requests of a policy; the writer adds them. A column named `model` must not reach Ray Data
# LLM at all: it would be taken for the name of a LoRA adapter.
POLICY_COLUMNS = ("policy", "model", "model_revision", "request_fingerprint")
ENGINE_COLUMNS = (
    "input_tokens",
    "cached_tokens",
    "output_tokens",
    "finish_reason",
    "completion",
    "error",
    "top_tokens",
    "top_logprobs",
)
REQUEST_COLUMNS = [name for name in COMPLETIONS.names if name not in POLICY_COLUMNS + ENGINE_COLUMNS]
MEASUREMENTS = ("shard", "started", "engine", "busy", "alive", "first_token_seconds")
UNWRITTEN_BLOCKS = 2  # per engine; when as many wait for their file, the engine gets no new shard
MIN_PROMPTS_TO_JUDGE = 256  # prompts; the share of rejects among fewer says little

# Maps a row of COMPLETIONS to (reject reason or "", detail) of each of its prompts.
Inspector = Callable[[Row], list[tuple[str, str]]]


def complete(
    policy: Policy,
    requests: Requests,
    ledger: str,
    label: str,
    *,
    inspect: Inspector | None = None,
    max_rejects: float = 1.0,
    context: StageContext = DEFAULT_CONTEXT,
) -> CompletionStatistics:
    """Write the completions of ``requests`` by ``policy`` to ``ledger``.

    The ledger is a folder of Parquet files of :data:`~udrl.episodes.COMPLETIONS`. Requests that have a row there are not
    completed again; if none is missing, no engine starts. ``inspect`` finds rejects as they are written: progress lines show
    the share of the others, and the run ends if more than ``max_rejects`` are rejected.

    Raises:
        UserError: the placement needs more than this machine has, the engine refuses every request, or too many prompts are
            rejected.
        StalledError: nothing was written for ``context.watchdog_minutes``.
    """
    rows_by_shard = count_rows(ledger)
    todo = [shard for shard in range(requests.shards) if rows_by_shard.get(shard, 0) < requests.shard_size(shard)]
    reused = sum(min(n, requests.shard_size(shard)) for shard, n in rows_by_shard.items() if shard < requests.shards)
    statistics = CompletionStatistics(reused=reused)
    if not todo:
        return statistics

    cluster.silence_ray_data()
    _require_placement(policy)
    partial = {shard for shard in todo if rows_by_shard.get(shard)}
    dataset = _build_dataset(policy, requests, todo, partial, ledger, inspect, context.engine_actor)

    start = time.monotonic()
    journal = AttemptJournal(ledger)
    bar = Progress(label, requests.total, "requests", start=reused)
    bar.update(reused, "starting the engine", force=True)
    first_started = math.inf

    def show_progress() -> None:
        if not statistics.rows:
            return bar.update(reused, "starting the engine")
        statistics.seconds = time.time() - first_started
        bar.update(reused + statistics.rows, _describe_rates(statistics, inspect is not None))

    batches = dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
    for batch in iterate_with_watchdog(batches, context.watchdog_minutes, label, idle=show_progress):
        for text in batch.column("report").to_pylist():
            report = BlockReport.model_validate_json(text)
            if report.engine_error and not reused + statistics.rows:
                raise UserError(f"{policy.name} {policy.model}: the engine refuses every request: {report.engine_error}")
            statistics.add(report)
            first_started = min(first_started, report.first_started)
        show_progress()
        journal.write(statistics)
        _end_if_mostly_rejects(statistics, max_rejects, policy)
    if statistics.rows:
        statistics.seconds = time.time() - first_started
    statistics.startup_seconds = time.monotonic() - start - statistics.seconds
    journal.write(statistics, ended=True)
    bar.finish(reused + statistics.rows, _describe_rates(statistics, inspect is not None))
    return statistics


def _require_placement(policy: Policy) -> None:
    """Check that a cluster of this process only has the CPUs and GPUs of all replicas.

    Raises:
        UserError: it has not.
    """
    bundles = resource_bundles(policy.engine, policy.placement)
    cpus, gpus = (sum(bundle[kind] for bundle in bundles) * policy.placement.replicas for kind in ("CPU", "GPU"))
    cluster.require_resources(f"{policy.name}: placement", cpus, gpus)


def _describe_rates(statistics: CompletionStatistics, inspected: bool) -> str:
    rate = f"{statistics.tokens_per_second:,.0f} tokens/s"
    if not inspected:
        return rate
    episodes = statistics.accepted / max(statistics.seconds, 1e-9)
    return f"{episodes:,.1f} episodes/s, {statistics.accepted_share:.0%} accepted, {rate}"


def _end_if_mostly_rejects(statistics: CompletionStatistics, max_rejects: float, policy: Policy) -> None:
    """End a run whose prompts are mostly rejected before it has paid for all of them."""
    rejected_share = 1 - statistics.accepted_share
    if statistics.prompts < MIN_PROMPTS_TO_JUDGE or rejected_share <= max_rejects:
        return
    reasons = statistics.reasons.most_common(4)
    counts = ", ".join(f"{reason} {count}" for reason, count in reasons)
    raise UserError(
        f"{policy.name} {policy.model}: {rejected_share:.0%} of the first {statistics.prompts:,} prompts are rejected,"
        f" more than max_rejects={max_rejects:g}: {counts}; for example {statistics.examples[reasons[0][0]]};"
        " mend the task file or the sampling, or raise teacher.max_rejects"
    )


# ---- the pipeline of Ray Data


def _build_dataset(
    policy: Policy,
    requests: Requests,
    todo: list[int],
    partial: set[int],
    ledger: str,
    inspect: Inspector | None,
    engine_actor: type | None,
) -> Any:
    import ray
    from ray.data.llm import build_processor

    if engine_actor is None:
        from udrl.policies.engine_actor import EngineActor

        engine_actor = EngineActor
    tasks = tasks_in_flight(policy, max(map(requests.shard_size, todo)))
    processor = build_processor(
        _processor_config(policy, tasks),
        preprocess=_EngineInput(policy),
        postprocess=_select_columns,
        preprocess_map_kwargs={"num_cpus": BOOKKEEPING_CPUS},
        postprocess_map_kwargs={"num_cpus": BOOKKEEPING_CPUS},
    )
    internals.replace_engine_actor(processor, engine_actor)
    shards = ray.data.range(len(todo), override_num_blocks=len(todo))
    dataset = shards.flat_map(_ShardRequests(requests, todo, partial, ledger), num_cpus=BOOKKEEPING_CPUS)
    writer = _Writer(policy, ledger, inspect)
    dataset = processor(dataset).map_batches(writer, batch_size=None, num_cpus=BOOKKEEPING_CPUS, batch_format="pyarrow")
    internals.limit_unwritten_blocks(dataset, UNWRITTEN_BLOCKS)
    return dataset


def tasks_in_flight(policy: Policy, shard_size: int) -> int:
    """Return the number of shards that one engine holds at a time.

    They keep it full while one of them ends. More would be lost with a killed engine.
    """
    rows = min(shard_size, internals.BATCHES_PER_TASK * policy.engine.batch_size)
    return 1 + math.ceil(1.125 * policy.engine.max_num_seqs / rows)


def _processor_config(policy: Policy, tasks: int) -> Any:
    from ray.data.llm import vLLMEngineProcessorConfig

    engine, place = policy.engine, policy.placement
    return vLLMEngineProcessorConfig(
        model_source=policy.path,
        engine_kwargs={**engine_kwargs(engine, place), **revision_kwargs(policy)},
        batch_size=engine.batch_size,
        concurrency=(place.replicas, place.replicas),  # a fixed pool: an autoscaled one starts one engine at a time
        max_concurrent_batches=tasks,
        max_tasks_in_flight_per_actor=tasks,
        accelerator_type=place.accelerator,
        placement_group_config={"bundles": resource_bundles(engine, place)},
        runtime_env={"env_vars": engine_environment(place)},
        log_engine_metrics=False,
        # Text and token ids need no stages of their own: the engine tokenizes and detokenizes as it goes.
        chat_template_stage=False,
        tokenize_stage=False,
        detokenize_stage=False,
    )


def _lower_own_priority() -> None:
    """Give a bookkeeping worker the priority that Ray gives to workers by default.

    An engine on CPU computes on every core, and each time that one of its threads is interrupted, the others wait for it.
    """
    os.setpriority(os.PRIO_PROCESS, 0, max(15, os.getpriority(os.PRIO_PROCESS, 0)))


class _ShardRequests:
    """Map a shard's number to those of its requests that have no completion."""

    def __init__(self, requests: Requests, todo: list[int], partial: set[int], ledger: str) -> None:
        self.requests, self.todo, self.partial, self.ledger = requests, todo, partial, ledger

    def __call__(self, row: Row) -> Iterator[Row]:
        _lower_own_priority()
        shard = self.todo[row["id"]]
        completed = read_ids(self.ledger, list_parts(self.ledger).get(shard, [])) if shard in self.partial else set()
        for request in self.requests.rows(shard):
            if request["episode_id"] not in completed:
                yield {"prompts": 1, **request, "shard": shard}


class _EngineInput:
    """Map a request to the engine's input.

    Sampling parameters are JSON, because they differ from row to row and all rows need one schema.
    """

    def __init__(self, policy: Policy) -> None:
        self.render, self.params = policy.render, policy.sampling_params()
        self.params_json = json.dumps(self.params)

    def __call__(self, row: Row) -> Row:
        rendered = self.render(row)
        overrides = rendered.pop("sampling", None)
        return {**rendered, "sampling_params": json.dumps({**self.params, **overrides}) if overrides else self.params_json}


def _select_columns(row: Row) -> Row:
    return {name: row[name] for name in (*REQUEST_COLUMNS, *ENGINE_COLUMNS, *MEASUREMENTS)}


class _Writer:
    """Write a block of completions, one file per shard; return its report."""

    def __init__(self, policy: Policy, ledger: str, inspect: Inspector | None) -> None:
        self.ledger, self.inspect = ledger, inspect
        self.policy_columns = {
            "policy": policy.name,
            "model": policy.model,
            "model_revision": policy.revision,
            "request_fingerprint": policy.fingerprint,
        }

    def __call__(self, block: pa.Table) -> pa.Table:
        _lower_own_priority()
        rows = [{**row, **self.policy_columns} for row in block.to_pylist()]
        # If no request has succeeded, the engine or its settings may be at fault, not the requests: the driver then ends the
        # job with the engine's message, and the requests stay open. Once one has succeeded, errors are the requests' own.
        report = _measure(rows)
        if rows and all(row["error"] for row in rows) and not list_parts(self.ledger):
            report.engine_error = rows[0]["error"]
        else:
            self._write(rows)
            self._inspect(rows, report)
        return pa.table({"report": [report.model_dump_json()]})

    def _write(self, rows: list[Row]) -> None:
        for shard in {row["shard"] for row in rows}:
            shard_rows = [{name: row[name] for name in COMPLETIONS.names} for row in rows if row["shard"] == shard]
            table = pa.Table.from_pylist(shard_rows, schema=COMPLETIONS)
            storage.write_table(storage.join(self.ledger, part_name(shard, table)), table)

    def _inspect(self, rows: list[Row], report: BlockReport) -> None:
        """Count accepted and rejected prompts."""
        if not self.inspect:
            return
        for row in rows:
            for reason, detail in self.inspect(row):
                if not reason:
                    report.accepted += 1
                    continue
                report.reasons[reason] = report.reasons.get(reason, 0) + 1
                example = f"{row['task']}, intent {row['intent'][:80]!r}: {row['completion'][:120]!r} ({detail[:80]})"
                report.examples.setdefault(reason, example)


def _measure(rows: list[Row]) -> BlockReport:
    """Count requests and tokens, and collect the times of the engines."""
    first_token_seconds = [row["first_token_seconds"] for row in rows if row["first_token_seconds"]]
    engines: dict[str, EngineSeconds] = {}
    for row in rows:
        seconds = EngineSeconds(row["busy"], row["alive"])
        engines[row["engine"]] = max(seconds, engines.get(row["engine"], seconds))
    return BlockReport(
        rows=len(rows),
        prompts=sum(row["prompts"] for row in rows),
        input_tokens=sum(row["input_tokens"] for row in rows),
        cached_tokens=sum(row["cached_tokens"] for row in rows),
        output_tokens=sum(row["output_tokens"] for row in rows),
        first_started=min((row["started"] for row in rows), default=time.time()),
        engines=engines,
        first_token=Counter(int(bucket) for bucket in np.searchsorted(FIRST_TOKEN_EDGES, first_token_seconds)),
    )
