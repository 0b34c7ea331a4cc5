"""The vLLM stage: requests in, raw completions out, through ``ray.data.llm``. Teacher, student, baselines and judges share it.

A shard's rows are made inside a Ray task, pass the engine, and are written by the task that ends the pipeline (see
``udrl.policies.ledger``); the driver sees counts alone. A run that was killed goes on with what is missing.
"""

import datetime
import json
import math
import os
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from udrl import cluster, storage
from udrl.context import DEFAULT_CONTEXT, StageContext
from udrl.episodes import COMPLETIONS
from udrl.errors import UserError
from udrl.policies.engine_args import bundles, engine_kwargs, environment, pinned
from udrl.policies.ledger import Requests, ids_of, list_parts, part_name, rows_done
from udrl.policies.policy import Policy, Row
from udrl.policies.tally import FIRST_TOKEN_EDGES, Tally
from udrl.progress import Progress
from udrl.watchdog import watched

# Bookkeeping tasks (making requests, writing files) take a sliver of a core, so that they start beside a CPU engine.
SLIVER = 0.1
# Key columns that are the same for every request of a policy are added when the rows are written. A column named `model`
# must not reach Ray Data LLM at all: it would take it for the name of a LoRA adapter.
OF_POLICY = ("policy", "model", "model_revision", "request_fingerprint")
OF_ENGINE = (
    "input_tokens",
    "cached_tokens",
    "output_tokens",
    "finish_reason",
    "completion",
    "error",
    "top_tokens",
    "top_logprobs",
)
CARRIED = [name for name in COMPLETIONS.names if name not in OF_POLICY + OF_ENGINE]
MEASURED = ("shard", "began", "engine", "busy", "alive", "first_token_seconds")
BATCHES_OF_A_TASK = 4  # that Ray Data keeps running of one block (RAY_DATA_DEFAULT_ASYNC_BATCH_UDF_MAX_CONCURRENCY)
JUDGED_FROM = 256  # prompts; a share of fewer says little
JOURNAL_SECONDS = 30

# (row of COMPLETIONS) -> (reject reason or "", detail) of each prompt that it stands for.
Inspect = Callable[[Row], list[tuple[str, str]]]


def complete(
    policy: Policy,
    requests: Requests,
    out: str,
    what: str,
    *,
    inspect: Inspect | None = None,
    max_rejects: float = 1.0,
    context: StageContext = DEFAULT_CONTEXT,
) -> Tally:
    """Run ``requests`` through ``policy`` into Parquet files of :data:`~udrl.episodes.COMPLETIONS` under ``out``.

    Requests whose rows are already there are not paid for again; where nothing is missing no engine starts. ``inspect``
    finds rejects as they come: their share is shown, and above ``max_rejects`` the run ends. ``context`` may
    replace the engine, to measure or test everything else.

    Raises:
        UserError: the placement can't be had, the engine refuses every request, or too many prompts are rejected.
        StalledError: nothing was written for ``context.watchdog_minutes``.
    """
    done = rows_done(out)
    todo = [s for s in range(requests.shards) if done.get(s, 0) < requests.shard_size(s)]
    tally = Tally(reused=sum(min(n, requests.shard_size(s)) for s, n in done.items() if s < requests.shards))
    if not todo:
        return tally

    cluster.silence_ray_data()
    place = policy.placement
    needs = [sum(bundle[kind] for bundle in bundles(policy.engine, place)) * place.replicas for kind in ("CPU", "GPU")]
    cluster.require_resources(f"{policy.name}: placement", *needs)
    dataset = _dataset(policy, requests, todo, {s for s in todo if done.get(s)}, out, inspect, context.engine_actor)

    begun = time.monotonic()
    journal = _Journal(out)
    bar = Progress(what, requests.total, "requests", start=tally.reused)
    bar.update(tally.reused, "starting the engine", force=True)
    first = math.inf

    def show() -> None:
        if not tally.rows:
            return bar.update(tally.reused, "starting the engine")
        tally.seconds = time.time() - first
        bar.update(tally.reused + tally.rows, _note(tally, inspect is not None))

    batches = dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
    for batch in watched(batches, context.watchdog_minutes, what, idle=show):
        for text in batch.column("report").to_pylist():
            report = json.loads(text)
            if report["broken"] and not tally.reused + tally.rows:
                raise UserError(f"{policy.name} {policy.model}: the engine refuses every request: {report['broken']}")
            tally.add(report)
            first = min(first, report["began"])
        show()
        journal.write(tally)
        _stop_if_hopeless(tally, max_rejects, policy)
    if tally.rows:
        tally.seconds = time.time() - first
    tally.startup_seconds = time.monotonic() - begun - tally.seconds
    journal.write(tally, last=True)
    bar.finish(tally.reused + tally.rows, _note(tally, inspect is not None))
    return tally


def attempts(out: str) -> list[dict[str, Any]]:
    """What each run of the stage on this ledger did, the killed ones up to their last entry."""
    folder = storage.join(out, "attempts")
    return [storage.read_json(storage.join(folder, name)) for name in storage.list_files(folder)]


class _Journal:
    """This run's entry under ``attempts/``: what a killed run had cost stays known."""

    def __init__(self, out: str) -> None:
        self.started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        name = f"{self.started.replace(':', '')}-{uuid.uuid4().hex[:8]}.json"
        self.uri, self.written, self.begun = storage.join(out, "attempts", name), -math.inf, time.monotonic()

    def write(self, tally: Tally, last: bool = False) -> None:
        if not last and time.monotonic() - self.written < JOURNAL_SECONDS:
            return
        self.written = time.monotonic()
        names = ("rows", "prompts", "accepted", "input_tokens", "cached_tokens", "output_tokens")
        entry = {
            "started": self.started,
            **{name: getattr(tally, name) for name in names},
            "seconds": round(self.written - self.begun, 1),
            "busy_seconds": round(sum(busy for busy, _ in tally.engines.values()), 1),
            "ended": last,
        }
        storage.write_json(self.uri, entry)


def _note(tally: Tally, inspected: bool) -> str:
    seconds = max(tally.seconds, 1e-9)
    accepted = f"{tally.accepted / seconds:,.1f} episodes/s, {tally.accepted_share:.0%} accepted, " if inspected else ""
    return f"{accepted}{tally.tokens_per_second:,.0f} tokens/s"


def _stop_if_hopeless(tally: Tally, max_rejects: float, policy: Policy) -> None:
    """End a run that mostly makes rejects, before it has paid for all of them."""
    if tally.prompts < JUDGED_FROM or 1 - tally.accepted_share <= max_rejects:
        return
    (reason, n), *_ = tally.reasons.most_common(1)
    others = ", ".join(f"{name} {count}" for name, count in tally.reasons.most_common(4)[1:])
    raise UserError(
        f"{policy.name} {policy.model}: {1 - tally.accepted_share:.0%} of the first {tally.prompts:,} prompts are rejected,"
        f" more than max_rejects={max_rejects:g}: {reason} {n}{', ' + others if others else ''}; for example"
        f" {tally.examples[reason]}; mend the task file or the sampling, or raise teacher.max_rejects"
    )


def _dataset(
    policy: Policy,
    requests: Requests,
    todo: list[int],
    partial: set[int],
    out: str,
    inspect: Inspect | None,
    actor: type | None,
) -> Any:
    import ray
    from ray.data.llm import build_processor

    from udrl.policies import backpressure

    tasks = _tasks_in_flight(policy, max(map(requests.shard_size, todo)))
    processor = build_processor(
        _config(policy, tasks),
        preprocess=_Render(policy),
        postprocess=_pick,
        preprocess_map_kwargs={"num_cpus": SLIVER},
        postprocess_map_kwargs={"num_cpus": SLIVER},
    )
    if actor is None:
        from udrl.policies.actor import EngineActor

        actor = EngineActor
    # A copy, because assigning `fn` would run the stage's validator again, which then finds its placement gone.
    name = "vLLMEngineStage"
    processor.stages[name] = processor.get_stage_by_name(name).model_copy(update={"fn": actor})
    shards = ray.data.range(len(todo), override_num_blocks=len(todo))
    dataset = shards.flat_map(_Expand(requests, todo, partial, out), num_cpus=SLIVER)
    sink = _Sink(policy, out, inspect)
    dataset = processor(dataset).map_batches(sink, batch_size=None, num_cpus=SLIVER, batch_format="pyarrow")
    backpressure.apply(dataset)
    return dataset


def _tasks_in_flight(policy: Policy, shard: int) -> int:
    """Shards that one engine holds: enough to keep it full while one ends, and no more, since they are lost with it."""
    rows = min(shard, BATCHES_OF_A_TASK * policy.engine.batch_size)
    return 1 + math.ceil(1.125 * policy.engine.max_num_seqs / rows)


def _config(policy: Policy, tasks: int) -> Any:
    """Ray Data LLM's processor config, the same code for CPU and GPU; the placement decides."""
    from ray.data.llm import vLLMEngineProcessorConfig

    engine, place = policy.engine, policy.placement
    return vLLMEngineProcessorConfig(
        model_source=policy.path,
        engine_kwargs={**engine_kwargs(engine, place), **pinned(policy)},
        batch_size=engine.batch_size,
        concurrency=(place.replicas, place.replicas),  # a fixed pool: autoscaled ones ramp one engine at a time
        max_concurrent_batches=tasks,
        max_tasks_in_flight_per_actor=tasks,
        accelerator_type=place.accelerator,
        placement_group_config={"bundles": bundles(engine, place)},
        runtime_env={"env_vars": environment(place)},
        log_engine_metrics=False,
        # Text and token ids need no stages of their own: the engine tokenises and detokenises as it goes.
        chat_template_stage=False,
        tokenize_stage=False,
        detokenize_stage=False,
    )


def _step_back() -> None:
    """Give a bookkeeping worker the priority that Ray gives to workers by default: an engine on CPU computes on every core, and
    each time that one of its threads is interrupted the others wait for it."""
    os.setpriority(os.PRIO_PROCESS, 0, max(15, os.getpriority(os.PRIO_PROCESS, 0)))


class _Expand:
    """Shard number -> its requests, without those that a file already holds."""

    def __init__(self, requests: Requests, todo: list[int], partial: set[int], out: str) -> None:
        self.requests, self.todo, self.partial, self.out = requests, todo, partial, out

    def __call__(self, row: Row) -> Iterator[Row]:
        _step_back()
        shard = self.todo[row["id"]]
        have = ids_of(self.out, list_parts(self.out).get(shard, [])) if shard in self.partial else set()
        for request in self.requests.rows(shard):
            if request["episode_id"] not in have:
                yield {"prompts": 1, **request, "shard": shard}


class _Render:
    """Request row -> what the engine takes."""

    def __init__(self, policy: Policy) -> None:
        self.render, self.params = policy.render, policy.sampling_params()
        self.text = json.dumps(self.params)

    def __call__(self, row: Row) -> Row:
        rendered = self.render(row)
        own = rendered.pop("sampling", None)
        return {**rendered, "sampling_params": json.dumps({**self.params, **own}) if own else self.text}


def _pick(row: Row) -> Row:
    return {name: row[name] for name in (*CARRIED, *OF_ENGINE, *MEASURED)}


class _Sink:
    """Writes a block of completions, one file a shard, and passes on counts."""

    def __init__(self, policy: Policy, out: str, inspect: Inspect | None) -> None:
        self.out, self.inspect = out, inspect
        self.constants = {
            "policy": policy.name,
            "model": policy.model,
            "model_revision": policy.revision,
            "request_fingerprint": policy.fingerprint,
        }

    def __call__(self, block: pa.Table) -> pa.Table:
        _step_back()
        rows = [{**row, **self.constants} for row in block.to_pylist()]
        # Where nothing succeeds the engine or its settings may be at fault, not the requests: the driver then ends the job
        # with the engine's own words, and the requests stay open. Once something has succeeded, errors are the requests'.
        broken = bool(rows) and all(row["error"] for row in rows) and not list_parts(self.out)
        if not broken:
            for shard in {row["shard"] for row in rows}:
                mine = [row for row in rows if row["shard"] == shard]
                table = pa.Table.from_pylist([{n: r[n] for n in COMPLETIONS.names} for r in mine], schema=COMPLETIONS)
                storage.write_table(storage.join(self.out, part_name(shard, table)), table)
        return pa.table({"report": [json.dumps(self._report(rows, broken))]})

    def _report(self, rows: list[Row], broken: bool) -> dict[str, Any]:
        """Counts of one block, small whatever the block's size."""
        reasons: Counter[str] = Counter()
        examples: dict[str, str] = {}
        if self.inspect and not broken:
            for row in rows:
                for reason, detail in self.inspect(row):
                    reasons[reason] += 1
                    if reason:
                        said = f"{row['task']}, intent {row['intent'][:80]!r}: {row['completion'][:120]!r} ({detail[:80]})"
                        examples.setdefault(reason, said)
        accepted = reasons.pop("", 0)
        buckets = np.searchsorted(FIRST_TOKEN_EDGES, [r["first_token_seconds"] for r in rows if r["first_token_seconds"]])
        engines: dict[str, tuple[float, float]] = {}
        for row in rows:
            engines[row["engine"]] = max((row["busy"], row["alive"]), engines.get(row["engine"], (0.0, 0.0)))
        return {
            "broken": rows[0]["error"] if broken else "",
            "rows": len(rows),
            "prompts": sum(r["prompts"] for r in rows),
            "accepted": accepted,
            "reasons": reasons,
            "examples": examples,
            "input_tokens": sum(r["input_tokens"] for r in rows),
            "cached_tokens": sum(r["cached_tokens"] for r in rows),
            "output_tokens": sum(r["output_tokens"] for r in rows),
            "began": min((r["began"] for r in rows), default=time.time()),
            "engines": engines,
            "first_token": Counter(str(b) for b in buckets),
        }
