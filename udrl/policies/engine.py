"""The vLLM stage: requests in, raw completions out, through ``ray.data.llm``. Teacher, student and baselines share it.

Work is cut into shards, the unit of durable progress. A shard's rows are made inside a Ray task, pass the engine, and are
written as ``part-<shard>-<first id>-<rows>.parquet`` by the task that ends the pipeline; the driver sees counts alone.
What is done is read off the file names, so a run that was killed goes on with what is missing. A retried task may write
a row twice; readers take the first row of an id (:func:`completed_shard`).
"""

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from udrl import cluster, storage
from udrl.episodes import COMPLETIONS
from udrl.errors import UserError
from udrl.policies.policy import Policy, Row
from udrl.progress import Progress
from udrl.recipe import Engine, Placement

# Bookkeeping tasks (making requests, writing files) take a sliver of a core, so that they start beside a CPU engine.
SLIVER = 0.1
# Key columns that are the same for every request of a policy are added when the rows are written. A column named `model`
# must not reach Ray Data LLM at all: it would take it for the name of a LoRA adapter.
OF_POLICY = ("policy", "model", "model_revision", "request_fingerprint")
OF_ENGINE = ("input_tokens", "output_tokens", "finish_reason", "completion", "error")
CARRIED = [name for name in COMPLETIONS.names if name not in OF_POLICY + OF_ENGINE]


@dataclass(frozen=True)
class Requests:
    """A sharded set of requests. ``rows(shard)`` runs in a Ray task and yields rows with the key columns of an episode."""

    total: int
    shards: int
    rows: Callable[[int], Iterator[Row]]
    shard_size: Callable[[int], int]

    @classmethod
    def of_rows(cls, rows: list[Row], size: int) -> "Requests":
        """Requests from a list that fits in memory, such as an evaluation's."""
        pieces = [rows[i : i + size] for i in range(0, len(rows), size)]
        return cls(len(rows), len(pieces), lambda shard: iter(pieces[shard]), lambda shard: len(pieces[shard]))


@dataclass(frozen=True)
class Throughput:
    """What one run of the stage did. ``seconds`` runs from the first finished shard's start of generation to the end,
    so that engine start-up is told apart."""

    rows: int
    reused: int
    input_tokens: int
    output_tokens: int
    startup_seconds: float
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return self.output_tokens / self.seconds if self.seconds > 0 else 0.0


def complete(policy: Policy, requests: Requests, out: str, what: str) -> Throughput:
    """Run ``requests`` through ``policy`` into Parquet files of :data:`~udrl.episodes.COMPLETIONS` under ``out``.

    Requests whose rows are already there are not paid for again; where nothing is missing no engine starts.
    """
    done = _done(out)
    todo = [s for s in range(requests.shards) if done.get(s, 0) < requests.shard_size(s)]
    reused = sum(min(done.get(s, 0), requests.shard_size(s)) for s in range(requests.shards))
    if not todo:
        return Throughput(0, reused, 0, 0, 0.0, 0.0)

    import ray
    from ray.data.llm import build_processor

    cluster.quieten_data()
    place = policy.placement
    needs = [sum(bundle[kind] for bundle in bundles(policy.engine, place)) * place.replicas for kind in ("CPU", "GPU")]
    cluster.require(f"{policy.name}: placement", *needs)
    begun = time.monotonic()
    processor = build_processor(
        _config(policy),
        preprocess=_Render(policy),
        postprocess=_pick(policy.sampling.max_tokens, policy.engine.max_model_len),
        preprocess_map_kwargs={"num_cpus": SLIVER},
        postprocess_map_kwargs={"num_cpus": SLIVER},
    )
    shards = ray.data.range(len(todo), override_num_blocks=len(todo))
    dataset = shards.flat_map(_Expand(requests, todo, {s for s in todo if done.get(s)}, out), num_cpus=SLIVER)
    dataset = processor(dataset).map_batches(_Sink(policy, out), batch_size=None, num_cpus=SLIVER, batch_format="pyarrow")

    rows, tokens_in, tokens_out = 0, 0, 0
    first_began = None
    bar = Progress(what, requests.total, "prompts", start=reused)
    bar.update(reused, "starting the engine", force=True)
    for batch in dataset.iter_batches(batch_size=None):
        if batch["broken"].any() and not reused + rows:
            raise UserError(f"{policy.name} {policy.model}: the engine refuses every request: {max(batch['broken'])}")
        rows += int(np.sum(batch["rows"]))
        tokens_in += int(np.sum(batch["input_tokens"]))
        tokens_out += int(np.sum(batch["output_tokens"]))
        began = float(np.min(batch["began"]))
        first_began = began if first_began is None else min(first_began, began)
        bar.update(reused + rows, f"{tokens_out / max(time.time() - first_began, 1e-9):,.0f} tokens/s")
    seconds = time.time() - first_began if first_began else 0.0
    bar.finish(reused + rows, f"{tokens_out / max(seconds, 1e-9):,.0f} tokens/s once started")
    return Throughput(rows, reused, tokens_in, tokens_out, time.monotonic() - begun - seconds, seconds)


def shards_of(out: str) -> list[int]:
    """The shards that have rows under ``out``, in order."""
    return sorted(_done(out))


def completed_shard(out: str, shard: int) -> pa.Table:
    """The completions of one shard, each id once: a retried task may have written some rows twice."""
    tables = [storage.read_table(storage.join(out, name)) for name in _parts(out, shard)]
    table = pa.concat_tables(tables)
    first = {row_id: i for i, row_id in reversed(list(enumerate(table.column("episode_id").to_pylist())))}
    return table if len(first) == table.num_rows else table.take(sorted(first.values()))


def _name(shard: int, first_id: int, rows: int) -> str:
    return f"part-{shard:08d}-{first_id:016x}-{rows}.parquet"


def _parse(name: str) -> tuple[int, int]:
    """Shard and row count of a part's file name."""
    _, shard, _, rows = name.removesuffix(".parquet").split("-")
    return int(shard), int(rows)


def _parts(out: str, shard: int) -> list[str]:
    return [n for n in storage.list_files(out) if n.startswith(f"part-{shard:08d}-")]


def _done(out: str) -> dict[int, int]:
    """Rows that each shard has. Of a shard in several parts the ids are counted, since parts may overlap after a retry."""
    sizes: dict[int, list[int]] = {}
    for name in storage.list_files(out):
        if name.startswith("part-"):
            shard, rows = _parse(name)
            sizes.setdefault(shard, []).append(rows)
    return {s: parts[0] if len(parts) == 1 else completed_shard(out, s).num_rows for s, parts in sizes.items()}


def _config(policy: Policy) -> Any:
    """Ray Data LLM's processor config, the same code for CPU and GPU; the placement decides."""
    from ray.data.llm import vLLMEngineProcessorConfig

    engine, place = policy.engine, policy.placement
    return vLLMEngineProcessorConfig(
        model_source=policy.path,
        engine_kwargs={**engine_kwargs(engine, place), **pinned(policy), "disable_log_stats": True},
        batch_size=engine.batch_size,
        concurrency=(place.replicas, place.replicas),  # a fixed pool: autoscaled ones ramp one engine at a time
        max_concurrent_batches=engine.concurrent_batches,
        accelerator_type=place.accelerator,
        placement_group_config={"bundles": bundles(engine, place)},
        runtime_env={"env_vars": environment(place)},
        should_continue_on_error=True,
        log_engine_metrics=False,
        # Text and token ids need no stages of their own: the engine tokenises and detokenises as it goes.
        chat_template_stage=False,
        tokenize_stage=False,
        detokenize_stage=False,
    )


def engine_kwargs(engine: Engine, place: Placement) -> dict[str, Any]:
    """vLLM engine arguments shared by the batch stage and the server."""
    # vLLM's CPU default of 128 tokens a cache block leaves up to 127 tokens of a shared few-shot prefix to be computed for
    # every request; with 32 the bundled teacher wrote 26 prompts/s instead of 18. 16 is not supported.
    blocks = {} if place.gpus else {"block_size": 32}
    return {
        **blocks,
        "dtype": engine.dtype,
        "max_model_len": engine.max_model_len,
        "max_num_seqs": engine.max_num_seqs,
        "enforce_eager": engine.eager,
        "enable_prefix_caching": True,
        "trust_remote_code": False,
        **engine.kwargs,
    }


def pinned(policy: Policy) -> dict[str, str]:
    """The revision of a model from a hub, so that what is recorded is what is loaded."""
    on_hub = not os.path.isdir(policy.path)
    return {"revision": policy.revision, "tokenizer_revision": policy.revision} if on_hub else {}


def bundles(engine: Engine, place: Placement) -> list[dict[str, float]]:
    """Resource bundles of one engine replica: one a device."""
    workers = engine.kwargs.get("tensor_parallel_size", 1) * engine.kwargs.get("pipeline_parallel_size", 1)
    return [{"CPU": place.cpus, "GPU": place.gpus} for _ in range(workers)]


def environment(place: Placement) -> dict[str, str]:
    """Environment of an engine process. On a GPU vLLM's own defaults stand."""
    if place.gpus:
        return {}
    return {
        # Ray sets OMP_NUM_THREADS to the actor's CPU share, which would leave the engine one thread.
        "OMP_NUM_THREADS": str(place.threads or cluster.cpus()),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1"),
        # One process for engine and scheduler: a second one costs more than it hides on two cores.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
    }


class _Expand:
    """Shard number -> its requests, without those that a part already holds."""

    def __init__(self, requests: Requests, todo: list[int], partial: set[int], out: str) -> None:
        self.requests, self.todo, self.partial, self.out = requests, todo, partial, out

    def __call__(self, row: Row) -> Iterator[Row]:
        shard = self.todo[row["id"]]
        have = self._have(shard) if shard in self.partial else set()
        for request in self.requests.rows(shard):
            if request["episode_id"] not in have:
                yield {**request, "shard": shard}

    def _have(self, shard: int) -> set[int]:
        tables = [storage.read_table(storage.join(self.out, n), ["episode_id"]) for n in _parts(self.out, shard)]
        return {i for table in tables for i in table.column("episode_id").to_pylist()}


class _Render:
    """Request row -> what the engine takes."""

    def __init__(self, policy: Policy) -> None:
        self.render, self.params = policy.render, policy.sampling_params()

    def __call__(self, row: Row) -> Row:
        return {**self.render(row), "sampling_params": self.params}


def _pick(max_tokens: int, max_model_len: int) -> Callable[[Row], Row]:
    def pick(row: Row) -> Row:
        used = row["num_generated_tokens"]
        cut = used >= max_tokens or row["num_input_tokens"] + used >= max_model_len
        return {
            **{name: row[name] for name in [*CARRIED, "shard"]},
            # Rows come here when their block is done; the slowest request of the first block began with the engine.
            "began": time.time() - row["time_taken_llm"],
            "input_tokens": row["num_input_tokens"],
            "output_tokens": used,
            # Ray Data LLM drops vLLM's finish reason; a completion that used all its tokens was cut.
            "finish_reason": "length" if cut else "stop",
            "completion": row["generated_text"],
        }

    return pick


class _Sink:
    """Writes a block of completions, one file a shard, and passes on counts."""

    def __init__(self, policy: Policy, out: str) -> None:
        self.out = out
        self.constants = {
            "policy": policy.name,
            "model": policy.model,
            "model_revision": policy.revision,
            "request_fingerprint": policy.fingerprint,
        }

    def __call__(self, block: pa.Table) -> pa.Table:
        rows = [self._completion(row) for row in block.to_pylist()]
        # Where nothing succeeds the engine or its settings may be at fault, not the requests: the driver then ends the job
        # with the engine's own words, and the requests stay open. Once something has succeeded, errors are the requests'.
        broken = bool(rows) and all(row["error"] for row in rows) and not _done(self.out)
        if not broken:
            for shard in {row["shard"] for row in rows}:
                mine = [row for row in rows if row["shard"] == shard]
                table = pa.Table.from_pylist([{n: r[n] for n in COMPLETIONS.names} for r in mine], schema=COMPLETIONS)
                storage.write_table(storage.join(self.out, _name(shard, mine[0]["episode_id"], len(mine))), table)
        return pa.table(
            {
                "rows": [len(rows)],
                "input_tokens": [sum(r["input_tokens"] for r in rows)],
                "output_tokens": [sum(r["output_tokens"] for r in rows)],
                "began": [min((r.get("began") or time.time() for r in rows), default=time.time())],
                "broken": [rows[0]["error"] if broken else ""],
            }
        )

    def _completion(self, row: Row) -> Row:
        # A failed row bypasses postprocess: it keeps its request columns and has the engine's error.
        defaults = {"input_tokens": 0, "output_tokens": 0, "finish_reason": "error", "completion": ""}
        filled = {name: nothing if row.get(name) is None else row[name] for name, nothing in defaults.items()}
        return {**row, **self.constants, **filled, "error": row.get("__inference_error__") or ""}
