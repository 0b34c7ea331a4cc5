"""The scoring pass: completions -> episodes and rejects. It reads the ledger and pays for no generation.

One shard at a time: its completions are parsed, the good ones embedded and scored, both sides written whole. A shard that
has both files is not scored again, unless tasks, embedder or weights changed.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from udrl import storage
from udrl.episodes import COMPONENTS, EPISODES, REJECTS, Reason, word_count
from udrl.policies.engine import completed_shard, shards_of
from udrl.policies.parsing import parse
from udrl.progress import Progress
from udrl.recipe import Rewards
from udrl.rewards import components
from udrl.rewards.relevance import Embedder
from udrl.tasks import Task

ABOUT = "about.json"


def score(
    ledger: str,
    episodes: str,
    rejects: str,
    tasks: Sequence[Task],
    config: Rewards,
    what: str = "score",
    deduplicate: bool = True,
) -> Counter[str]:
    """Score every shard of ``ledger``. ``deduplicate`` rejects a prompt that its intent and task already have.

    Returns:
        The count of accepted rows (key ``accepted``) and of each reject reason.
    """
    about = {"ledger": ledger.rsplit("/", 1)[-1], "scoring": _fingerprint(tasks, config)}
    fresh = storage.exists(storage.join(episodes, ABOUT)) and storage.read_json(storage.join(episodes, ABOUT)) == about
    if not fresh:
        storage.remove(episodes)
        storage.remove(rejects)
        storage.write_json(storage.join(episodes, ABOUT), about)
    shards = shards_of(ledger)
    have = set(storage.list_files(rejects)) if fresh else set()
    todo = [s for s in shards if _part(s) not in have]  # rejects are written second: where they are, both are

    import ray

    if todo:
        dataset = ray.data.range(len(todo), override_num_blocks=len(todo)).map_batches(
            _Scorer,
            fn_constructor_kwargs={
                "todo": todo,
                "ledger": ledger,
                "episodes": episodes,
                "rejects": rejects,
                "tasks": list(tasks),
                "config": config,
                "deduplicate": deduplicate,
            },
            batch_size=None,
            num_cpus=1,
            concurrency=1,
        )
        done, rows = 0, 0
        bar = Progress(what, len(todo), "shards")
        for batch in dataset.iter_batches(batch_size=None):
            done += len(batch["rows"])
            rows += int(np.sum(batch["rows"]))
            bar.update(done)
        bar.finish(done, f"{rows:,} completions")
    return tally(episodes, rejects)


def tally(episodes: str, rejects: str) -> Counter[str]:
    """Rows accepted, and rejected by reason, from the files."""
    counts: Counter[str] = Counter()
    for name in storage.list_files(episodes):
        if name.endswith(".parquet"):
            counts["accepted"] += storage.read_table(storage.join(episodes, name), ["episode_id"]).num_rows
    for name in storage.list_files(rejects):
        counts.update(storage.read_table(storage.join(rejects, name), ["reason"]).column("reason").to_pylist())
    return counts


def score_rows(
    rows: list[dict[str, Any]], tasks: dict[str, Task], embedder: Embedder, config: Rewards, deduplicate: bool
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Split completion rows into episode rows (scored) and reject rows."""
    good: list[dict[str, Any]] = []
    bad: list[dict[str, Any]] = []
    seen: set[tuple[str, str, str]] = set()
    for row in rows:
        prompt, reason, detail = parse(tasks[row["task"]], row["intent"], row["completion"], row["finish_reason"], row["error"])
        key = (row["intent"], row["task"], prompt.casefold())
        if reason is None and deduplicate and key in seen:
            reason = Reason.DUPLICATE
        if reason is not None:
            bad.append({**row, "reason": str(reason), "detail": detail})
            continue
        seen.add(key)
        good.append({**row, "prompt": prompt, "n_words": word_count(prompt)})
    values = {
        "relevance": embedder.relevance([r["intent"] for r in good], [r["prompt"] for r in good]),
        "novelty": [components.novelty(r["intent"], r["prompt"]) for r in good],
        "repetition": [components.repetition(r["prompt"]) for r in good],
        "format": [tasks[r["task"]].format_score(r["prompt"]) for r in good],
        "length": [components.length(r["n_words"], r["command_words"]) for r in good],
    }
    arrays = {c: np.asarray(values[c], dtype=np.float32) for c in COMPONENTS}
    rewards = components.mix(arrays, config.weights)
    for i, row in enumerate(good):
        row.update({c: float(arrays[c][i]) for c in COMPONENTS}, reward=float(rewards[i]))
    return good, bad


class _Scorer:
    """Ray Data actor: scores whole shards."""

    def __init__(
        self,
        todo: list[int],
        ledger: str,
        episodes: str,
        rejects: str,
        tasks: list[Task],
        config: Rewards,
        deduplicate: bool,
    ) -> None:
        self.deduplicate = deduplicate
        self.todo, self.ledger, self.episodes, self.rejects = todo, ledger, episodes, rejects
        self.tasks = {t.name: t for t in tasks}
        self.config = config
        self.embedder = Embedder(config.embedder, config.batch_size)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        counts = []
        for index in batch["id"]:
            shard = self.todo[index]
            rows = completed_shard(self.ledger, shard).to_pylist()
            good, bad = score_rows(rows, self.tasks, self.embedder, self.config, self.deduplicate)
            for folder, part, schema in ((self.episodes, good, EPISODES), (self.rejects, bad, REJECTS)):
                table = pa.Table.from_pylist([{n: r[n] for n in schema.names} for r in part], schema=schema)
                storage.write_table(storage.join(folder, _part(shard)), table)
            counts.append(len(rows))
        return {"rows": np.array(counts)}


def _part(shard: int) -> str:
    return f"part-{shard:08d}.parquet"


def _fingerprint(tasks: Sequence[Task], config: Rewards) -> str:
    facts = [config.model_dump(), [t.model_dump() for t in tasks]]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
