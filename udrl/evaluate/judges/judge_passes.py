"""One pass of a judge over what it was not asked before: in Ray Data actors, or through the vLLM stage of the policies."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from udrl import cluster, models, storage
from udrl.context import StageContext
from udrl.evaluate.judges import judgments as store
from udrl.evaluate.judges import pairwise
from udrl.evaluate.judges.likelihood import WITH_PROMPT, WITHOUT_PROMPT, LikelihoodJudge
from udrl.hashing import fingerprint
from udrl.policies.policy import Row
from udrl.progress import Progress
from udrl.recipe import Judge, RubricJudge
from udrl.scoring import rubric
from udrl.tasks import Task
from udrl.watchdog import iterate_with_watchdog

RATE = "rate.json"


def answers(
    judge: Judge, questions: Sequence[Row], work: str, tasks: Sequence[Task], context: StageContext
) -> dict[int, store.Answer]:
    """The judge's answers to ``questions`` (rows of :data:`store.ASKED`) by their ids; only what is not known yet is asked.

    Raises:
        UserError: the judge's model can't be found or placed.
        StalledError: it was silent for ``context.watchdog_minutes``.
    """
    folder = folder_of(judge, work, tasks)
    store.add(folder, questions)
    todo = rubric.unjudged_files(store.asked(folder), store.scores(folder))
    if todo:
        models.resolve(judge.model)  # a missing model is told here, in one line
        cluster.connect()
        begun = time.monotonic()
        if judge.kind in ("likelihood", "embedding"):
            _pass(judge, folder, todo, context)
        else:
            _engine_pass(judge, folder, tasks, context)
        texts = sum(storage.read_table(storage.join(store.asked(folder), name), []).num_rows for name in todo)
        storage.write_json(storage.join(folder, RATE), {"texts_per_second": texts / (time.monotonic() - begun)})
    return store.answers(folder)


def folder_of(judge: Judge, work: str, tasks: Sequence[Task]) -> str:
    """Where the questions and answers of a judge lie, named after all that its answers depend on."""
    return storage.join(work, f"judge-{judge.display_name}-{fingerprint(_depends_on(judge, tasks))}")


def known(judge: Judge, work: str, tasks: Sequence[Task]) -> tuple[int, float | None]:
    """(texts that the judge has answered, texts a second as it last did, loading it included)."""
    folder = folder_of(judge, work, tasks)
    answered = sum(
        storage.read_table(storage.join(store.scores(folder), name), []).num_rows
        for name in storage.list_files(store.scores(folder))
        if name.startswith("part-")
    )
    file = storage.join(folder, RATE)
    return answered, storage.read_json(file)["texts_per_second"] if storage.exists(file) else None


def _depends_on(judge: Judge, tasks: Sequence[Task]) -> dict[str, Any]:
    engine = {"dtype": judge.engine.dtype, "max_model_len": judge.engine.max_model_len, "style": judge.style}
    of_kind: dict[str, dict[str, Any]] = {
        "likelihood": {"dtype": judge.engine.dtype, "template": [WITH_PROMPT, WITHOUT_PROMPT]},
        "embedding": {},
        "rubric": {**engine, "rubric": rubric.RUBRIC, "tasks": rubric.task_inputs(tasks)},
        "pairwise": {**engine, **pairwise.facts(tasks)},
    }
    model = {"model": judge.model, "revision": models.revision(judge.model, judge.revision)}
    return {"kind": judge.kind, **model, "kwargs": judge.engine.kwargs, **of_kind[judge.kind]}


def _engine_pass(judge: Judge, folder: str, tasks: Sequence[Task], context: StageContext) -> None:
    """Parts through the shared vLLM stage."""
    read: rubric.AnswerReader
    if judge.kind == "pairwise":
        policy, read, shown = pairwise.policy(judge, tasks), pairwise.preference, pairwise.SHOWN
    else:
        config = RubricJudge(**{name: getattr(judge, name) for name in RubricJudge.model_fields})
        policy, shown = rubric.rubric_policy(config, tasks, f"judge {judge.display_name}"), rubric.JUDGED_COLUMNS
        read = rubric.relevance_reader(policy)
    asked, scores = store.asked(folder), store.scores(folder)
    rubric.judge_candidates(asked, scores, policy, read, column="score", columns=shown, context=context)


def _pass(judge: Judge, folder: str, todo: list[str], context: StageContext) -> None:
    """Parts through a model in Ray Data actors."""
    import ray

    cluster.silence_ray_data()
    place = judge.placement
    cluster.require_resources(
        f"evaluate.judges: {judge.display_name}: placement", place.cpus * place.replicas, place.gpus * place.replicas
    )
    options: dict[str, Any] = {"num_cpus": place.cpus, "num_gpus": place.gpus or None, "concurrency": place.replicas}
    if place.accelerator:
        options["accelerator_type"] = place.accelerator
    parts = ray.data.from_items([{"part": name} for name in todo], override_num_blocks=len(todo))
    dataset = parts.map_batches(_Parts, batch_size=1, fn_constructor_kwargs={"judge": judge, "folder": folder}, **options)
    label = f"judge {judge.display_name}"
    sizes = [storage.read_table(storage.join(store.asked(folder), name), []).num_rows for name in todo]
    bar, done = Progress(label, sum(sizes), "pairs"), 0
    bar.update(0, "loading the model", force=True)
    for batch in iterate_with_watchdog(dataset.iter_batches(batch_size=None), context.watchdog_minutes, label):
        done += int(np.sum(batch["rows"]))
        bar.update(done)
    bar.finish(done)


class _Parts:
    """Ray Data actor: names of parts -> their files of scores."""

    def __init__(self, judge: Judge, folder: str) -> None:
        self.score, self.folder = scorer(judge), folder

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"rows": np.array([self._part(str(name)) for name in batch["part"]])}

    def _part(self, name: str) -> int:
        table = storage.read_table(storage.join(store.asked(self.folder), name), ["episode_id", "intent", "prompt"])
        values = self.score(table["intent"].to_pylist(), table["prompt"].to_pylist()).astype(np.float32)
        scored = pa.table([table["episode_id"], values, np.ones_like(values)], schema=store.SCORES)
        storage.write_table(storage.join(store.scores(self.folder), name), scored)
        return int(table.num_rows)


def scorer(judge: Judge) -> Callable[[list[str], list[str]], np.ndarray]:
    """The loaded model of a likelihood or embedding judge: (intents, prompts) -> scores of shape (pairs,)."""
    place, engine = judge.placement, judge.engine
    # Ray sets OMP_NUM_THREADS to the actor's CPUs, which would leave a model that has the machine to itself one core.
    threads = None if place.gpus else place.threads or max(1, cluster.cpu_count() // place.replicas)
    if judge.kind == "embedding":
        from udrl.evaluate.judges import embedding

        return embedding.load(judge.model, engine.batch_size, threads, judge.revision).relevance
    dtype = "auto" if engine.dtype == "bfloat16" else engine.dtype  # emulated bfloat16 is slow and no better than float32
    likelihood = LikelihoodJudge(models.resolve(judge.model), engine.batch_size, dtype, threads, judge.revision)
    return lambda intents, prompts: likelihood.score(prompts, intents)
