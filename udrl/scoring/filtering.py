"""Filter completions: parse them, reject bad ones with a reason, deduplicate the rest. The first pass of scoring.

``filtered/part-<shard>.parquet`` gets one row per requested prompt. Ray tasks parse the shards in parallel. One actor
deduplicates them in the order of the shards, so that the result depends neither on parallelism nor on where a run was killed.
A resumed run adds the prompts of its finished shards to the actor's filters first.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from udrl import storage
from udrl.context import DEFAULT_CONTEXT, StageContext
from udrl.episodes import KEYS, Reason
from udrl.errors import UserError
from udrl.hashing import fingerprint, stable_id
from udrl.policies.ledger import list_parts, read_shard
from udrl.progress import Progress
from udrl.recipe import Deduplicate
from udrl.run import Manifest, ScoringPaths
from udrl.scoring import deduplication as dedup
from udrl.scoring.parsing import parse_row
from udrl.tasks import Task
from udrl.text import count_words
from udrl.watchdog import iterate_with_watchdog

log = logging.getLogger(__name__)
RULES = 2  # version; bump it when a pass's code changes its output, so that cached files are rebuilt
FILTERED = pa.schema(
    [
        *KEYS,
        ("completion", pa.string()),
        ("prompt", pa.string()),
        ("n_words", pa.int32()),
        ("reason", pa.string()),  # "" for a candidate
        ("detail", pa.string()),
    ]
)
_VERDICTS = {
    dedup.EXACT: (Reason.DUPLICATE, "same prompt as an earlier one"),
    dedup.NEAR: (Reason.NEAR_DUPLICATE, "nearly the same prompt as an earlier one"),
}
_SHARDS_IN_FLIGHT = 64  # shards; an upper bound on those in memory
_RESERVED_FROM = 2**28  # bytes; from this size on, Ray reserves the deduplicator's memory


def filter_completions(
    ledger: str,
    paths: ScoringPaths,
    tasks: Sequence[Task],
    deduplicate: Deduplicate | None,
    earlier: Sequence[str] = (),
    label: str = "filter",
    context: StageContext = DEFAULT_CONTEXT,
) -> None:
    """Filter every shard of ``ledger`` into ``paths.filtered``, as :data:`FILTERED`.

    If ``deduplicate`` is None, duplicates are kept. A prompt in the ``earlier`` folders of episodes counts as an earlier one.

    Raises:
        UserError: the deduplicating actor died; finished shards are kept.
        StalledError: no shard was finished for ``context.watchdog_minutes``.
    """
    parts = list_parts(ledger)
    Manifest.of(filter_inputs(ledger, parts, tasks, deduplicate, earlier)).claim(paths.filtered)
    present = set(storage.list_files(paths.filtered))
    missing = [shard for shard in parts if shard_file(shard) not in present]
    if missing:
        done, rows = len(parts) - len(missing), 0
        progress = Progress(label, len(parts), "shards", start=done)
        files = [uri for folder in earlier for uri in storage.parquet_files(folder)] if deduplicate else []
        deduplicator = start_deduplicator(ledger, parts, files, deduplicate) if deduplicate else None
        near = deduplicate.near if deduplicate else None
        steps = filter_shards(ledger, paths.filtered, parts, set(missing), list(tasks), deduplicator, near, files)
        for n in iterate_with_watchdog(steps, context.watchdog_minutes, label):
            if n is not None:
                done, rows = done + 1, rows + n
            progress.update(done)
        progress.finish(done, f"{rows:,} prompts")
    storage.remove(paths.sifted)  # the same rows, as a version before 2026-11-25 named them; nothing reads them any more


def shard_file(shard: int) -> str:
    return f"part-{shard:08d}.parquet"


def ledger_name(ledger: str) -> str:
    """Return the last part of a ledger's URI."""
    return ledger.rstrip("/").rsplit("/", 1)[-1]


def filter_inputs(
    ledger: str,
    parts: Mapping[int, list[str]],
    tasks: Sequence[Task],
    deduplicate: Deduplicate | None,
    earlier: Sequence[str],
) -> dict[str, Any]:
    """Return everything that filtered rows depend on; ``parts`` are the ledger's files by shard."""
    rules = {t.name: [[e.model_dump() for e in t.examples], t.format.model_dump(exclude={"prefer"})] for t in tasks}
    return {
        "rules": RULES,
        "ledger": ledger_name(ledger),
        "files": fingerprint([[shard, names] for shard, names in parts.items()]),
        "tasks": fingerprint(rules),
        "deduplicate": deduplicate.model_dump() if deduplicate else None,
        "known": [_identify_episodes(folder) for folder in earlier] if deduplicate else [],  # an old key, as "sifted"
    }


def _identify_episodes(folder: str) -> str:
    """Return the fingerprint of the filtered rows that episodes were made from, wherever the folder is; else its URI."""
    manifest = Manifest.load_from(folder)
    return str((manifest.inputs if manifest else {}).get("sifted", folder))


def filter_shards(
    ledger: str,
    out: str,
    parts: Mapping[int, list[str]],
    missing: set[int],
    tasks: list[Task],
    deduplicator: Any,
    near: float | None,
    earlier: list[str],
) -> Iterator[int | None]:
    """Yield the number of rows of each shard when it is written, and None when earlier prompts were added to the filters.

    The ``deduplicator`` is that of :func:`start_deduplicator`, and is ended; None keeps duplicates.

    Raises:
        UserError: the deduplicator died.
    """
    import ray

    by_name = ray.put({t.name: t for t in tasks})
    parse = ray.remote(num_cpus=1, num_returns=2)(_parse_shard)
    read_keys = ray.remote(num_cpus=1)(_read_candidate_keys)
    write = ray.remote(num_cpus=0.1)(_write_shard)

    def steps() -> Iterator[tuple[Any, bool]]:
        # The actor sees earlier rounds first, then the shards in order. Finished shards only add their prompts; those behind
        # the last missing one can't influence it.
        files: list[tuple[str, int | None]] = [(uri, None) for uri in earlier]
        files += [(storage.join(out, shard_file(shard)), shard) for shard in parts if shard <= max(missing)]
        for order, (uri, shard) in enumerate(files):
            if shard is not None and shard in missing:
                table, keys = parse.remote(ledger, parts[shard], by_name, deduplicator is not None, near)
                verdicts = deduplicator.check_and_add.remote(order, keys) if deduplicator else None
                yield write.remote(table, verdicts, uri), True
            elif deduplicator:
                yield deduplicator.add_known.remote(order, read_keys.remote(uri, near)), False

    try:
        cpus = int(ray.cluster_resources().get("CPU", 1))
        yield from _run_calls(steps(), min(_SHARDS_IN_FLIGHT, 2 * max(cpus, 1)))
    except ray.exceptions.RayActorError as error:
        raise UserError(
            f"deduplication: the actor died ({' '.join(str(error).split())[:200]}); finished shards are kept, run the same"
            " command again"
        ) from error
    finally:
        if deduplicator:
            ray.kill(deduplicator)


def _run_calls(calls: Iterator[tuple[Any, bool]], in_flight: int) -> Iterator[int | None]:
    """Yield results of Ray calls as they finish, at most ``in_flight`` at a time; None for a call that does not count."""
    import ray

    running: dict[Any, bool] = {}
    more = True
    while more or running:
        while more and len(running) < in_flight:
            try:
                call, counts = next(calls)
                running[call] = counts
            except StopIteration:
                more = False
        if running:
            done, _ = ray.wait(list(running), num_returns=1)
            result = ray.get(done[0])
            yield result if running.pop(done[0]) else None


def start_deduplicator(ledger: str, parts: Mapping[int, list[str]], earlier: list[str], config: Deduplicate) -> Any:
    """Start the actor that holds the Bloom filters, sized for every prompt that the ledger can contain."""
    import ray

    files = [storage.join(ledger, name) for names in parts.values() for name in names]
    expected = sum(storage.map_files(count_prompts, files + earlier))
    size = dedup.filter_bytes(expected, config)
    log.info(
        f"deduplication: {size / 1e6:,.1f} MB of memory for {expected:,} prompts"
        f" ({dedup.megabytes_per_million(config):.0f} MB per million)"
    )
    # A restarted actor would start with empty filters and silently accept duplicates.
    options: dict[str, Any] = {"num_cpus": 0.1, "max_restarts": 0, "max_task_retries": 0}
    if size > _RESERVED_FROM:
        options["memory"] = size
    return ray.remote(**options)(dedup.BloomDeduplicator).remote(expected, config)


def count_prompts(uri: str) -> int:
    """Return an upper bound on the prompts in a file of completions or episodes, from its Parquet footer."""
    fs, path = storage.open_filesystem(uri)
    with fs.open_input_file(path) as source:
        footer = pq.ParquetFile(source).metadata
    column = next((i for i, name in enumerate(footer.schema.names) if name == "prompts"), None)
    total = 0
    for i in range(footer.num_row_groups):
        group = footer.row_group(i)
        statistics = group.column(column).statistics if column is not None else None
        most = statistics.max if statistics is not None and statistics.has_min_max else 1
        total += group.num_rows * max(int(most or 1), 1)
    return total


def _parse_shard(
    ledger: str, names: list[str], tasks: dict[str, Task], with_keys: bool, near: float | None
) -> tuple[pa.Table, np.ndarray | None]:
    """Return the rows of one shard before deduplication, and the keys of its candidates."""
    # A ledger's rows are in the order in which an engine finished them, on which no result may depend.
    order = [(name, "ascending") for name in ("intent_id", "task", "variation", "episode_id")]
    completions = read_shard(ledger, names).sort_by(order).to_pylist()
    rows = [row for completion in completions for row in filter_row(tasks[completion["task"]], completion)]
    candidates = [(row["intent"], row["task"], row["prompt"]) for row in rows if not row["reason"]]
    keys = dedup.compute_keys(candidates, near) if with_keys else None
    return pa.Table.from_pylist(rows, schema=FILTERED), keys


def filter_row(task: Task, row: dict[str, Any]) -> list[dict[str, Any]]:
    """Return one :data:`FILTERED` row for each prompt that a request asked for.

    The tokens of a structured request are divided among its prompts, so that their sum stays the same.
    """
    results = parse_row(task, row)
    rows = []
    for j, result in enumerate(results):
        keys = {name: row[name] for name, _ in KEYS}
        if len(results) > 1:
            tokens = {n: _share(row[n] or 0, j, len(results)) for n in ("input_tokens", "output_tokens")}
            keys |= {"episode_id": stable_id(row["episode_id"], j), "variation": row["variation"] + j, **tokens}
        text = {"completion": result.completion, "prompt": result.prompt, "n_words": count_words(result.prompt)}
        rows.append({**keys, **text, "reason": result.reason, "detail": result.detail})
    return rows


def _share(total: int, j: int, n: int) -> int:
    """Return part ``j`` of ``total`` divided into ``n`` integers."""
    return total // n + (j < total % n)


def _read_candidate_keys(uri: str, near: float | None) -> np.ndarray:
    """Return the deduplication keys of the accepted prompts in a file of filtered rows or of episodes."""
    table = storage.read_table(uri)
    if "reason" in table.column_names:
        table = table.filter(pa.compute.equal(table.column("reason"), ""))
    columns = [table.column(name).to_pylist() for name in ("intent", "task", "prompt")]
    return dedup.compute_keys(list(zip(*columns, strict=True)), near)


def _write_shard(table: pa.Table, verdicts: np.ndarray | None, uri: str) -> int:
    """Write one shard with the deduplicator's verdicts on its candidates and return its number of rows."""
    if verdicts is not None and verdicts.any():
        reasons, details = table.column("reason").to_pylist(), table.column("detail").to_pylist()
        candidates = [i for i, reason in enumerate(reasons) if not reason]
        for i, verdict in zip(candidates, verdicts.tolist(), strict=True):
            if verdict != dedup.NEW:
                reasons[i], details[i] = _VERDICTS[verdict]
        for name, values in (("reason", reasons), ("detail", details)):
            table = table.set_column(FILTERED.get_field_index(name), name, pa.array(map(str, values), pa.string()))
    storage.write_table(uri, table)
    return int(table.num_rows)
