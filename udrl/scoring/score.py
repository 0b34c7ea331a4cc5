"""Score completions: from the ledger to episodes and rejects, in three passes that generate nothing.

Each pass writes one file per shard:

1. ``filtered/``: parsed, rejected with a reason, deduplicated (:mod:`udrl.scoring.filtering`);
2. ``relevance/``: the relevance of each candidate to its intent, by an embedder or a judge;
3. ``episodes/`` and ``rejects/``: the other reward components and the weighted mean.

The manifest of each folder holds everything its rows depend on. A rerun therefore computes only the missing shards, a change
of weights repeats the third pass, and a change of embedder the second and third.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from udrl import cluster, models, storage
from udrl.context import DEFAULT_CONTEXT, StageContext
from udrl.episodes import EPISODES, REJECTS, Reason
from udrl.hashing import fingerprint
from udrl.policies.ledger import list_parts
from udrl.progress import Progress
from udrl.recipe import Placement, Rewards, RewardWeights
from udrl.run import Manifest, ScoringPaths
from udrl.scoring.filtering import RULES, filter_completions, filter_inputs, ledger_name, shard_file
from udrl.scoring.rewards import score_prompts
from udrl.tasks import Task
from udrl.watchdog import iterate_with_watchdog

RELEVANCE = pa.schema([("episode_id", pa.int64()), ("relevance", pa.float32())])


@dataclass(frozen=True)
class ScoringResult:
    """Counts of prompts: accepted ones, and rejected ones by reason. ``fingerprint`` identifies the scoring settings."""

    accepted: int
    reasons: dict[str, int]
    fingerprint: str

    @property
    def rejected(self) -> int:
        return sum(self.reasons.values())

    @property
    def total(self) -> int:
        return self.accepted + self.rejected


def score(
    ledger: str,
    paths: ScoringPaths,
    tasks: Sequence[Task],
    rewards: Rewards,
    label: str = "score",
    deduplicate: bool = True,
    earlier: Sequence[str] = (),
    context: StageContext = DEFAULT_CONTEXT,
) -> ScoringResult:
    """Score every shard of ``ledger`` into the folders of ``paths`` and count the outcomes of all requested prompts.

    ``deduplicate`` rejects prompts that occur earlier in this ledger or in the ``earlier`` folders of episodes.

    Raises:
        UserError: the placement asks for more than the cluster has, or an actor died that cannot be replaced.
        StalledError: a pass made no progress for ``context.watchdog_minutes``.
    """
    deduplication = rewards.deduplicate if deduplicate else None
    parts = list_parts(ledger)
    shards = list(parts)
    # The key "sifted" is part of existing runs' fingerprints.
    filtered = fingerprint(filter_inputs(ledger, parts, tasks, deduplication, earlier))
    relevance = Manifest.of({"rules": RULES, "sifted": filtered, **_relevance_inputs(rewards)})
    preferred = {task.name: task.format.prefer for task in tasks}
    scoring = fingerprint([relevance.inputs, rewards.weights.model_dump(), preferred])
    outcome = Manifest.of({"ledger": ledger_name(ledger), "sifted": filtered, "scoring": scoring})

    # Nothing reads `filtered` and `relevance` once this is true, so a finished run may lack them, as those made before
    # 2026-11-25 do: their first pass is in `sifted`.
    if not all(outcome.matches(folder) and not _missing(folder, shards) for folder in (paths.episodes, paths.rejects)):
        filter_completions(ledger, paths, tasks, deduplication, earlier, f"{label}: filter", context)
        relevance.claim(paths.relevance)
        _compute_relevance(paths, shards, tasks, rewards, f"{label}: relevance", context)
        outcome.claim(paths.episodes)
        outcome.claim(paths.rejects)
        unscored = sorted({*_missing(paths.episodes, shards), *_missing(paths.rejects, shards)})
        by_name = {task.name: task for task in tasks}
        write = partial(_write_outcomes, paths=paths, tasks=by_name, weights=rewards.weights, scorer=_scorer(rewards))
        _map_shards(write, unscored, f"{label}: rewards", context, num_cpus=1)
    return _count_outcomes(paths, scoring)


def _relevance_inputs(rewards: Rewards) -> dict[str, Any]:
    """Return the settings that decide relevance; placement and batch sizes do not."""
    if rewards.relevance == "embedding":
        return {"embedder": rewards.embedder, "revision": models.revision(rewards.embedder, None)}
    judge = rewards.judge
    return {
        "judge": judge.model,
        "revision": models.revision(judge.model, judge.revision),
        "style": judge.style,
        "dtype": judge.engine.dtype,
        "max_model_len": judge.engine.max_model_len,
    }


def _scorer(rewards: Rewards) -> str:
    """Return the name of the model that scores relevance."""
    return rewards.embedder if rewards.relevance == "embedding" else rewards.judge.model


def _missing(folder: str, shards: Sequence[int]) -> list[int]:
    """Return the shards that have no file in ``folder``."""
    present = set(storage.list_files(folder))
    return [shard for shard in shards if shard_file(shard) not in present]


def _compute_relevance(
    paths: ScoringPaths, shards: Sequence[int], tasks: Sequence[Task], rewards: Rewards, label: str, context: StageContext
) -> None:
    missing = _missing(paths.relevance, shards)
    if not missing:
        return
    if rewards.relevance == "judge":
        from udrl.scoring.rubric import judge_relevance

        judge_relevance(paths.filtered, paths.relevance, rewards.judge, list(tasks), context)
        return
    place = rewards.placement
    models.resolve(rewards.embedder)  # fails here in one line if the model is missing
    cluster.require_resources("rewards.placement", place.cpus * place.replicas, place.gpus * place.replicas)
    options: dict[str, Any] = {"num_cpus": place.cpus, "num_gpus": place.gpus or None, "concurrency": place.replicas}
    if place.accelerator:
        options["accelerator_type"] = place.accelerator
    arguments = {"paths": paths, "model": rewards.embedder, "batch_size": rewards.batch_size, "place": place}
    _map_shards(_EmbedShards, missing, label, context, fn_constructor_kwargs=arguments, **options)


def _map_shards(function: Callable[..., Any], shards: list[int], label: str, context: StageContext, **options: Any) -> None:
    """Map ``function`` over shards with Ray Data: it takes a batch of shard numbers and returns the rows of each."""
    if not shards:
        return
    import ray

    cluster.silence_ray_data()
    source = ray.data.from_items([{"shard": shard} for shard in shards], override_num_blocks=len(shards))
    dataset = source.map_batches(function, batch_size=1, **options)
    progress = Progress(label, len(shards), "shards")
    done, rows = 0, 0
    for batch in iterate_with_watchdog(dataset.iter_batches(batch_size=None), context.watchdog_minutes, label):
        done += len(batch["rows"])
        rows += int(np.sum(batch["rows"]))
        progress.update(done)
    progress.finish(done, f"{rows:,} prompts")


class _EmbedShards:
    """Ray Data actor that writes the relevance of whole shards.

    All prompts of an intent are in one shard, so that each intent is embedded once.
    """

    def __init__(self, paths: ScoringPaths, model: str, batch_size: int, place: Placement) -> None:
        from udrl.scoring.embedder import Embedder

        self.paths = paths
        # Ray sets OMP_NUM_THREADS to the actor's CPUs (1 by default), which would idle the other cores of the machine.
        threads = None if place.gpus else place.threads or max(1, cluster.cpu_count() // place.replicas)
        self.embedder = Embedder(model, batch_size, threads)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"rows": np.array([self._embed(shard_file(int(shard))) for shard in batch["shard"]])}

    def _embed(self, name: str) -> int:
        columns = ["episode_id", "intent", "prompt", "reason"]
        table = storage.read_table(storage.join(self.paths.filtered, name), columns)
        candidates = table.filter(pc.equal(table.column("reason"), ""))
        intents, prompts = (candidates.column(column).to_pylist() for column in ("intent", "prompt"))
        values = pa.array(self.embedder.relevance(intents, prompts), pa.float32())
        scored = pa.table([candidates.column("episode_id"), values], schema=RELEVANCE)
        storage.write_table(storage.join(self.paths.relevance, name), scored)
        return int(scored.num_rows)


def _write_outcomes(
    batch: dict[str, np.ndarray], paths: ScoringPaths, tasks: dict[str, Task], weights: RewardWeights, scorer: str
) -> dict[str, np.ndarray]:
    rows = []
    for shard in batch["shard"]:
        name = shard_file(int(shard))
        filtered = storage.read_table(storage.join(paths.filtered, name))
        relevance = storage.read_table(storage.join(paths.relevance, name))
        episodes, rejects = score_rows(filtered, relevance, tasks, weights, scorer)
        storage.write_table(storage.join(paths.episodes, name), episodes)
        storage.write_table(storage.join(paths.rejects, name), rejects)
        rows.append(filtered.num_rows)
    return {"rows": np.array(rows)}


def score_rows(
    filtered: pa.Table, relevance: pa.Table, tasks: dict[str, Task], weights: RewardWeights, scorer: str = ""
) -> tuple[pa.Table, pa.Table]:
    """Split filtered rows into :data:`EPISODES`, with reward components and reward, and :data:`REJECTS`.

    A candidate without a finite relevance, because ``scorer`` failed on it, is rejected as an engine error.
    """
    relevance_by_id = dict(zip(*(relevance.column(name).to_pylist() for name in ("episode_id", "relevance")), strict=True))
    accepted: list[dict[str, Any]] = []
    rejected: list[dict[str, Any]] = []
    for row in filtered.to_pylist():
        if not row["reason"] and not np.isfinite(relevance_by_id.get(row["episode_id"], np.nan)):
            row |= {"reason": str(Reason.ENGINE_ERROR), "detail": f"no relevance from {scorer}"}
        (rejected if row["reason"] else accepted).append(row)
    computed = score_prompts(
        [row["intent"] for row in accepted],
        [row["prompt"] for row in accepted],
        [tasks[row["task"]] for row in accepted],
        [row["command_words"] for row in accepted],
        [relevance_by_id[row["episode_id"]] for row in accepted],
        weights,
    )
    table = pa.Table.from_pylist(accepted, schema=filtered.schema)
    columns = [pa.array(computed[f.name], f.type) if f.name in computed else table.column(f.name) for f in EPISODES]
    rejects = pa.Table.from_pylist(rejected, schema=filtered.schema).select(REJECTS.names)
    return pa.table(columns, schema=EPISODES), rejects.cast(REJECTS)


def _count_outcomes(paths: ScoringPaths, fingerprint: str) -> ScoringResult:
    """Count episodes from file footers and rejects from their reasons."""
    accepted = sum(storage.map_files(_count_rows, storage.parquet_files(paths.episodes)))
    reasons: Counter[str] = Counter()
    for counts in storage.map_files(_count_reasons, storage.parquet_files(paths.rejects)):
        reasons.update(counts)
    return ScoringResult(accepted, dict(reasons), fingerprint)


def _count_rows(uri: str) -> int:
    return int(storage.read_table(uri, []).num_rows)


def _count_reasons(uri: str) -> dict[str, int]:
    counts = pc.value_counts(storage.read_table(uri, ["reason"]).column("reason"))
    return {entry["values"]: entry["counts"] for entry in counts.to_pylist()}
