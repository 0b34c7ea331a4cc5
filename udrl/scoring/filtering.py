"""The first pass over a ledger: parse, reject with a reason, deduplicate. ``sifted/part-<shard>.parquet``, one row a prompt.

Parsing and signatures run in Ray tasks, shards side by side; what was said before is decided by one actor, shard after
shard in their order, so the outcome depends neither on parallelism nor on where a run was killed. A run that goes on feeds
the actor what the finished shards kept.
"""

import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
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
from udrl.scoring import deduplication as dedup
from udrl.scoring.parsing import parse_row
from udrl.tasks import Task
from udrl.text import count_words
from udrl.watchdog import watched

ABOUT = "about.json"
RULES = 2  # raise it where code changes what a pass makes of the same rows: what lies there is then made anew
SIFTED = pa.schema(
    [
        *KEYS,
        ("completion", pa.string()),
        ("prompt", pa.string()),
        ("n_words", pa.int32()),
        ("reason", pa.string()),  # "" for a candidate
        ("detail", pa.string()),
    ]
)
_VERDICTS = {dedup.EXACT: (Reason.DUPLICATE, "said before"), dedup.NEAR: (Reason.NEAR_DUPLICATE, "nearly said before")}
_SHARDS_AHEAD = 64  # shards in memory at a time, at most


def sift(
    ledger: str,
    out: str,
    tasks: Sequence[Task],
    deduplicate: Deduplicate | None,
    known: Sequence[str] = (),
    what: str = "sift",
    context: StageContext = DEFAULT_CONTEXT,
) -> str:
    """Sift every shard of ``ledger`` into ``out``, as :data:`SIFTED`; return the fingerprint of all that the rows depend on.

    ``deduplicate`` None keeps what was said before. ``known`` are folders of episodes whose prompts count as said.

    Raises:
        UserError: the actor that remembers what was said died; finished shards are kept.
        StalledError: nothing was done for ``context.watchdog_minutes``.
    """
    parts = list_parts(ledger)
    facts = _facts(ledger, parts, tasks, deduplicate, known)
    bind(out, facts)
    have = set(storage.list_files(out))
    todo = [shard for shard in parts if part_name(shard) not in have]
    if todo:
        bar = Progress(what, len(parts), "shards", start=len(parts) - len(todo))
        done, rows = len(parts) - len(todo), 0
        steps = _run(ledger, out, parts, set(todo), list(tasks), deduplicate, _episode_files(known) if deduplicate else [])
        for n in watched(steps, context.watchdog_minutes, what):
            if n is not None:
                done, rows = done + 1, rows + n
            bar.update(done)
        bar.finish(done, f"{rows:,} prompts")
    return str(facts["fingerprint"])


def part_name(shard: int) -> str:
    return f"part-{shard:08d}.parquet"


def bind(folder: str, facts: dict[str, Any]) -> None:
    """Tie a folder to what its rows depend on: where it holds rows made otherwise, it is cleared."""
    about = storage.join(folder, ABOUT)
    if storage.exists(about) and storage.read_json(about) == facts:
        return
    storage.remove(folder)
    storage.write_json(about, facts)


def _facts(
    ledger: str, parts: dict[int, list[str]], tasks: Sequence[Task], deduplicate: Deduplicate | None, known: Sequence[str]
) -> dict[str, Any]:
    rules = {t.name: [[e.model_dump() for e in t.examples], t.format.model_dump(exclude={"prefer"})] for t in tasks}
    facts = {
        "rules": RULES,
        "ledger": ledger.rstrip("/").rsplit("/", 1)[-1],
        "files": fingerprint([[shard, names] for shard, names in parts.items()]),
        "tasks": fingerprint(rules),
        "deduplicate": deduplicate.model_dump() if deduplicate else None,
        "known": [_name_of(uri) for uri in known] if deduplicate else [],
    }
    return {**facts, "fingerprint": fingerprint(facts)}


def _name_of(episodes: str) -> str:
    """What tells one folder of episodes from another: what it was sifted from, wherever it lies."""
    about = storage.join(episodes, ABOUT)
    return str((storage.read_json(about) if storage.exists(about) else {}).get("sifted", episodes))


def _episode_files(known: Sequence[str]) -> list[str]:
    return [storage.join(uri, n) for uri in known for n in storage.list_files(uri) if n.endswith(".parquet")]


def _run(
    ledger: str,
    out: str,
    parts: dict[int, list[str]],
    todo: set[int],
    tasks: list[Task],
    deduplicate: Deduplicate | None,
    known: list[str],
) -> Iterator[int | None]:
    """Yield the rows of each shard as it is written, and None for a step that only remembers."""
    import ray

    by_name = ray.put({t.name: t for t in tasks})
    near = deduplicate.near if deduplicate else None
    parse = ray.remote(num_cpus=1, num_returns=2)(_parse)
    kept = ray.remote(num_cpus=1)(_kept)
    write = ray.remote(num_cpus=0.1)(_write)
    said = _remember(ledger, parts, known, deduplicate) if deduplicate else None

    def steps() -> Iterator[tuple[Any, bool]]:
        # What was said in earlier rounds, then the shards in their order: those that are done are only remembered, and none
        # behind the last one that is not matters any more.
        files: list[tuple[str, int | None]] = [(uri, None) for uri in known]
        files += [(storage.join(out, part_name(shard)), shard) for shard in parts if shard <= max(todo)]
        for order, (uri, shard) in enumerate(files):
            if shard in todo and shard is not None:
                table, keys = parse.remote(ledger, parts[shard], by_name, deduplicate is not None, near)
                yield write.remote(table, said.check_and_add.remote(order, keys) if said else None, uri), True
            elif said:
                yield said.add_known.remote(order, kept.remote(uri, near)), False

    try:
        yield from _collect(steps(), min(_SHARDS_AHEAD, 2 * int(max(ray.cluster_resources().get("CPU", 1), 1))))
    except ray.exceptions.RayActorError as error:
        raise UserError(
            f"deduplication: the actor that remembers what was said died ({' '.join(str(error).split())[:200]});"
            " finished shards are kept, run the same command again"
        ) from error
    finally:
        if said:
            ray.kill(said)


def _collect(steps: Iterator[tuple[Any, bool]], ahead: int) -> Iterator[int | None]:
    """Results of Ray calls as they finish, with at most ``ahead`` under way; None where a call is not to be counted."""
    import ray

    running: dict[Any, bool] = {}
    more = True
    while more or running:
        while more and len(running) < ahead:
            try:
                call, counted = next(steps)
                running[call] = counted
            except StopIteration:
                more = False
        if running:
            done, _ = ray.wait(list(running), num_returns=1)
            result = ray.get(done[0])
            yield result if running.pop(done[0]) else None


def _remember(ledger: str, parts: dict[int, list[str]], known: list[str], config: Deduplicate) -> Any:
    """The actor that holds what was said, sized for all that the ledger can bring."""
    import ray

    files = [storage.join(ledger, name) for names in parts.values() for name in names]
    expected = sum(per_file(prompts_in, files + known))
    size = dedup.bytes_of(expected, config)
    print(
        f"deduplication: {size / 1e6:,.1f} MB of memory for {expected:,} prompts"
        f" ({dedup.megabytes_per_million(config):.0f} MB a million)",
        file=sys.stderr,
    )
    # Never restarted: a new actor would have forgotten all, and say so of nothing.
    options = {"num_cpus": 0.1, "max_restarts": 0, "max_task_retries": 0}
    if size > 2**28:
        options["memory"] = size
    return ray.remote(**options)(dedup.BloomDeduplicator).remote(expected, config)


def per_file(read: Any, uris: Sequence[str]) -> list[Any]:
    """``read`` of each file, in threads: what they wait for is storage."""
    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(read, uris))


def prompts_in(uri: str) -> int:
    """Prompts that a file of completions asked for, or a file of episodes holds; from its footer, at most too many."""
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


def _parse(
    ledger: str, names: list[str], tasks: dict[str, Task], sign: bool, near: float | None
) -> tuple[pa.Table, np.ndarray | None]:
    """The sifted rows of one shard before deduplication, and the keys of its candidates."""
    # The order of a ledger's rows is that in which an engine finished them: not one that an outcome may depend on.
    order = [(name, "ascending") for name in ("intent_id", "task", "variation", "episode_id")]
    rows = [r for row in read_shard(ledger, names).sort_by(order).to_pylist() for r in sift_row(tasks[row["task"]], row)]
    keys = dedup.keys([(r["intent"], r["task"], r["prompt"]) for r in rows if not r["reason"]], near) if sign else None
    return pa.Table.from_pylist(rows, schema=SIFTED), keys


def sift_row(task: Task, row: dict[str, Any]) -> list[dict[str, Any]]:
    """The sifted rows of one request: as many as it asked for prompts, whatever its completion brought.

    The tokens of a structured request are shared out among its prompts, so that sums hold.
    """
    results = parse_row(task, row)
    rows = []
    for j, parsed in enumerate(results):
        own = {name: row[name] for name, _ in KEYS}
        if len(results) > 1:
            tokens = {n: _share(row[n] or 0, j, len(results)) for n in ("input_tokens", "output_tokens")}
            own |= {"episode_id": stable_id(row["episode_id"], j), "variation": row["variation"] + j, **tokens}
        own |= {"completion": parsed.completion, "prompt": parsed.prompt, "n_words": count_words(parsed.prompt)}
        rows.append({**own, "reason": parsed.reason, "detail": parsed.detail})
    return rows


def _share(total: int, j: int, among: int) -> int:
    return total // among + (j < total % among)


def _kept(uri: str, near: float | None) -> np.ndarray:
    """The keys of the prompts that a sifted file, or a file of episodes, kept."""
    table = storage.read_table(uri)
    if "reason" in table.column_names:
        table = table.filter(pa.compute.equal(table.column("reason"), ""))
    columns = [table.column(name).to_pylist() for name in ("intent", "task", "prompt")]
    return dedup.keys(list(zip(*columns, strict=True)), near)


def _write(table: pa.Table, verdicts: np.ndarray | None, uri: str) -> int:
    """Write one shard, with the verdicts on its candidates; return its rows."""
    if verdicts is not None and verdicts.any():
        reasons, details = table.column("reason").to_pylist(), table.column("detail").to_pylist()
        candidates = [i for i, reason in enumerate(reasons) if not reason]
        for i, verdict in zip(candidates, verdicts.tolist(), strict=True):
            if verdict != dedup.NEW:
                reasons[i], details[i] = _VERDICTS[verdict]
        for name, values in (("reason", reasons), ("detail", details)):
            table = table.set_column(SIFTED.get_field_index(name), name, pa.array(map(str, values), pa.string()))
    storage.write_table(uri, table)
    return int(table.num_rows)
