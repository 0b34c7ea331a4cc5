"""From the ledger to episodes and rejects, in three passes that pay for no generation. Each makes one whole file a shard:

1. ``sifted/``: parsed, rejected with a reason, deduplicated (:mod:`udrl.scoring.filtering`);
2. ``relevance/``: how relevant each candidate is to its intent, by an embedder or a judge;
3. ``episodes/`` and ``rejects/``: the other components, and the mix.

A folder is tied to all that its rows depend on (its ``about.json``), so a rerun makes what is missing, other weights run the
third pass alone, and another embedder the second and third.
"""

from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from udrl import cluster, models, storage
from udrl.context import DEFAULT_CONTEXT, StageContext
from udrl.episodes import COMPONENTS, EPISODES, REJECTS, Reason
from udrl.hashing import fingerprint
from udrl.policies.ledger import list_parts
from udrl.progress import Progress
from udrl.recipe import Placement, Rewards
from udrl.scoring import reward_components as components
from udrl.scoring.filtering import RULES, bind, part_name, per_file, sift
from udrl.tasks import Task
from udrl.watchdog import watched

RELEVANCE = pa.schema([("episode_id", pa.int64()), ("relevance", pa.float32())])


def score(
    ledger: str,
    root: str,
    tasks: Sequence[Task],
    config: Rewards,
    what: str = "score",
    deduplicate: bool = True,
    known: Sequence[str] = (),
    context: StageContext = DEFAULT_CONTEXT,
) -> Counter[str]:
    """Score every shard of ``ledger`` into ``sifted``, ``relevance``, ``episodes`` and ``rejects`` under ``root``.

    ``deduplicate`` rejects what was said before, in this ledger and in the folders of episodes in ``known``.

    Returns:
        The count of accepted prompts (key ``accepted``) and of each reject reason: together, all that were asked for.

    Raises:
        UserError: the placement asks for more than there is, or a part of the pass died that can't be replaced.
        StalledError: a pass was silent for ``context.watchdog_minutes``.
    """
    sifted, relevance, episodes, rejects = (storage.join(root, name) for name in ("sifted", "relevance", "episodes", "rejects"))
    kept = config.deduplicate if deduplicate else None
    origin = sift(ledger, sifted, tasks, kept, known, f"{what}: sift", context)
    shards = list(list_parts(ledger))

    judged = {"rules": RULES, "sifted": origin, **_relevance_facts(config)}
    bind(relevance, judged)
    if _missing(relevance, shards):
        if config.relevance == "judge":
            from udrl.scoring.rubric import judge_relevance

            judge_relevance(sifted, relevance, config.judge, list(tasks), context)
        else:
            _embed(sifted, relevance, _missing(relevance, shards), config, f"{what}: relevance", context)

    prefer = {t.name: t.format.prefer for t in tasks}
    facts = {"ledger": ledger.rstrip("/").rsplit("/", 1)[-1], "sifted": origin}
    facts["scoring"] = fingerprint([judged, config.weights.model_dump(), prefer])
    bind(episodes, facts)
    bind(rejects, facts)
    todo = sorted({*_missing(episodes, shards), *_missing(rejects, shards)})
    if todo:
        assemble = partial(
            _assemble, root=root, tasks={t.name: t for t in tasks}, weights=config.weights, model=_scorer(config)
        )
        _run(assemble, todo, f"{what}: rewards", context, num_cpus=1)
    return tally(episodes, rejects)


def tally(episodes: str, rejects: str) -> Counter[str]:
    """Rows accepted, and rejected by reason, from footers and one column."""
    counts: Counter[str] = Counter(accepted=sum(per_file(_rows, _parquet(episodes))))
    for reasons in per_file(_reasons, _parquet(rejects)):
        counts.update(reasons)
    return counts


def _parquet(folder: str) -> list[str]:
    return [storage.join(folder, name) for name in storage.list_files(folder) if name.endswith(".parquet")]


def _rows(uri: str) -> int:
    return int(storage.read_table(uri, []).num_rows)


def _reasons(uri: str) -> dict[str, int]:
    counted = pc.value_counts(storage.read_table(uri, ["reason"]).column("reason"))
    return {entry["values"]: entry["counts"] for entry in counted.to_pylist()}


def _missing(folder: str, shards: Sequence[int]) -> list[int]:
    have = set(storage.list_files(folder))
    return [shard for shard in shards if part_name(shard) not in have]


def _relevance_facts(config: Rewards) -> dict[str, Any]:
    """What relevance depends on; where and in which batches it is computed does not matter."""
    if config.relevance == "embedding":
        return {"embedder": config.embedder, "revision": models.revision(config.embedder, None)}
    judge = config.judge
    return {
        "judge": judge.model,
        "revision": models.revision(judge.model, judge.revision),
        "style": judge.style,
        "dtype": judge.engine.dtype,
        "max_model_len": judge.engine.max_model_len,
    }


def _scorer(config: Rewards) -> str:
    return config.embedder if config.relevance == "embedding" else config.judge.model


def _run(pass_: Any, todo: list[int], what: str, context: StageContext, **options: Any) -> None:
    """One Ray Data pass over shards: ``pass_`` takes a batch of one shard number and returns its count of rows."""
    import ray

    cluster.silence_ray_data()
    shards = ray.data.from_items([{"shard": shard} for shard in todo], override_num_blocks=len(todo))
    dataset = shards.map_batches(pass_, batch_size=1, **options)
    bar = Progress(what, len(todo), "shards")
    done, rows = 0, 0
    for batch in watched(dataset.iter_batches(batch_size=None), context.watchdog_minutes, what):
        done += len(batch["rows"])
        rows += int(np.sum(batch["rows"]))
        bar.update(done)
    bar.finish(done, f"{rows:,} prompts")


def _embed(sifted: str, out: str, todo: list[int], config: Rewards, what: str, context: StageContext) -> None:
    place = config.placement
    models.resolve(config.embedder)  # a missing model is told here, in one line
    cluster.require_resources("rewards.placement", place.cpus * place.replicas, place.gpus * place.replicas)
    options: dict[str, Any] = {"num_cpus": place.cpus, "num_gpus": place.gpus or None, "concurrency": place.replicas}
    if place.accelerator:
        options["accelerator_type"] = place.accelerator
    arguments = {"sifted": sifted, "out": out, "model": config.embedder, "batch_size": config.batch_size, "place": place}
    _run(_Relevance, todo, what, context, fn_constructor_kwargs=arguments, **options)


class _Relevance:
    """Ray Data actor: the relevance of whole shards. The prompts of an intent lie in one shard, so it is embedded once."""

    def __init__(self, sifted: str, out: str, model: str, batch_size: int, place: Placement) -> None:
        from udrl.scoring.embedder import Embedder

        self.sifted, self.out = sifted, out
        # Ray sets OMP_NUM_THREADS to the actor's CPUs, which would leave a model that has the machine to itself one core.
        threads = None if place.gpus else place.threads or max(1, cluster.cpu_count() // place.replicas)
        self.embedder = Embedder(model, batch_size, threads)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"rows": np.array([self._score(int(shard)) for shard in batch["shard"]])}

    def _score(self, shard: int) -> int:
        columns = ["episode_id", "intent", "prompt", "reason"]
        table = storage.read_table(storage.join(self.sifted, part_name(shard)), columns)
        table = table.filter(pc.equal(table.column("reason"), ""))
        values = self.embedder.relevance(table.column("intent").to_pylist(), table.column("prompt").to_pylist())
        scored = pa.table([table.column("episode_id"), pa.array(values, pa.float32())], schema=RELEVANCE)
        storage.write_table(storage.join(self.out, part_name(shard)), scored)
        return int(scored.num_rows)


def _assemble(
    batch: dict[str, np.ndarray], root: str, tasks: dict[str, Task], weights: Any, model: str
) -> dict[str, np.ndarray]:
    counts = []
    for shard in batch["shard"]:
        name = part_name(int(shard))
        sifted = storage.read_table(storage.join(root, "sifted", name))
        relevance = storage.read_table(storage.join(root, "relevance", name))
        good, bad = score_rows(sifted, relevance, tasks, weights, model)
        storage.write_table(storage.join(root, "episodes", name), good)
        storage.write_table(storage.join(root, "rejects", name), bad)
        counts.append(sifted.num_rows)
    return {"rows": np.array(counts)}


def score_rows(
    sifted: pa.Table, relevance: pa.Table, tasks: dict[str, Task], weights: Any, model: str = ""
) -> tuple[pa.Table, pa.Table]:
    """Split sifted rows into :data:`EPISODES`, with their components and reward, and :data:`REJECTS`.

    A candidate without a finite relevance (a judge that failed on it) is rejected as an engine's error of ``model``.
    """
    of_id = dict(zip(relevance.column("episode_id").to_pylist(), relevance.column("relevance").to_pylist(), strict=True))
    rows = sifted.to_pylist()
    good: list[dict[str, Any]] = []
    bad: list[dict[str, Any]] = []
    for row in rows:
        found = of_id.get(row["episode_id"])
        scored = found is not None and bool(np.isfinite(found))
        if not row["reason"] and not scored:
            row |= {"reason": str(Reason.ENGINE_ERROR), "detail": f"no relevance from {model}"}
        (bad if row["reason"] else good).append(row)
    values = {
        "relevance": [of_id[r["episode_id"]] for r in good],
        "novelty": [components.novelty(r["intent"], r["prompt"]) for r in good],
        "repetition": [components.repetition(r["prompt"]) for r in good],
        "format": [tasks[r["task"]].format_score(r["prompt"]) for r in good],
        "length": [components.length(r["n_words"], r["command_words"]) for r in good],
    }
    arrays = {c: np.asarray(values[c], dtype=np.float32) for c in COMPONENTS}
    columns = {**arrays, "reward": components.mix(arrays, weights)}
    kept = pa.Table.from_pylist(good, schema=sifted.schema)
    episodes = [pa.array(columns[f.name], f.type) if f.name in columns else kept.column(f.name) for f in EPISODES]
    rejects = pa.Table.from_pylist(bad, schema=sifted.schema).select(REJECTS.names)
    return pa.table(episodes, schema=EPISODES), rejects.cast(REJECTS)
