"""Questions to a judge and its answers in resumable files, and the passes that answer new questions.

Equal texts are one question, and a question is asked once: a rerun asks only the questions without an answer. The folder's
name holds the fingerprint of everything an answer depends on, so another model or template never reuses an answer. Files of
questions are only ever added, and a file keeps its number, which names its shard in a ledger.
"""

import os
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from udrl import cluster, models, storage
from udrl.context import StageContext
from udrl.evaluate.judges import gated, pairwise
from udrl.evaluate.judges.controls import Pair
from udrl.evaluate.judges.likelihood import WITH_PROMPT, WITHOUT_PROMPT, LikelihoodJudge
from udrl.hashing import fingerprint, stable_id
from udrl.policies.policy import Row
from udrl.progress import Progress
from udrl.recipe import Judge, RubricJudge
from udrl.run import Document, EvaluationPaths, JudgePaths
from udrl.scoring import rubric
from udrl.scoring.embedder import Embedder
from udrl.tasks import Task
from udrl.watchdog import iterate_with_watchdog

MODEL_FREE = ("gated", "coverage")  # judges that score thousands of texts a second in the driver
FILE_ROWS = 512  # questions of one file: the most that a kill loses of each replica
QUESTIONS = pa.schema(
    [
        ("episode_id", pa.int64()),
        ("intent_id", pa.int64()),
        ("intent", pa.string()),
        ("task", pa.string()),
        ("prompt", pa.string()),
        ("other_prompt", pa.string()),  # the second prompt of a comparison; empty for a pointwise judge
        ("reason", pa.string()),  # always empty: the shared scoring pass skips rows that have one
    ]
)
SCORES = pa.schema([("episode_id", pa.int64()), ("score", pa.float32()), ("mass", pa.float32())])


class Answer(NamedTuple):
    score: float  # NaN if the judge failed
    mass: float  # share of the judge's probability on valid answers


class JudgeRate(Document):
    texts_per_second: float


def question(row: Row, prompt: str, other_prompt: str = "") -> Row:
    """Return a row of :data:`QUESTIONS`; equal texts have equal ids."""
    key = stable_id("judged", row["task"], row["intent"], prompt, other_prompt)
    keys = {name: row[name] for name in ("intent_id", "intent", "task")}
    return {"episode_id": key, **keys, "prompt": prompt, "other_prompt": other_prompt, "reason": ""}


def answer_questions(
    judge: Judge, questions: Sequence[Row], evaluation: EvaluationPaths, tasks: Sequence[Task], context: StageContext
) -> dict[int, Answer]:
    """Return the judge's answers by the ids of the questions; only questions without an answer are asked.

    Raises:
        UserError: the judge's model is missing or can't be placed.
        StalledError: the judge did not answer for ``context.watchdog_minutes``.
    """
    paths = judge_paths(judge, evaluation, tasks)
    add_questions(paths, questions)
    open_files = rubric.unjudged_files(paths.questions, paths.scores)
    if open_files:
        start = time.monotonic()
        if judge.kind in MODEL_FREE:
            scorer = _ScoreFiles(judge, paths)
            for name in open_files:
                scorer.score_file(name)
        elif judge.kind in ("likelihood", "embedding"):
            _connect(judge)
            _run_model_pass(judge, paths, open_files, context)
        else:
            _connect(judge)
            _run_engine_pass(judge, paths, tasks, context)
        rate = sum(_sizes(paths, open_files)) / (time.monotonic() - start)
        JudgeRate(texts_per_second=rate).save(paths.rate)
    return _read_answers(paths)


def _connect(judge: Judge) -> None:
    models.resolve(judge.model)  # a missing model is reported before Ray starts
    cluster.connect()


def judge_paths(judge: Judge, evaluation: EvaluationPaths, tasks: Sequence[Task]) -> JudgePaths:
    """Return the judge's folder, which is named after everything that its answers depend on."""
    return evaluation.judge(judge.display_name, fingerprint(_fingerprint_inputs(judge, tasks)))


def answered_texts(paths: JudgePaths) -> int:
    """Return how many questions the judge has answered."""
    return sum(storage.read_table(uri, []).num_rows for uri in _parts(paths.scores))


def last_rate(paths: JudgePaths) -> float | None:
    """Return the texts/s of the judge's last pass, loading the model included; None if there was none."""
    rate = JudgeRate.load_if_exists(paths.rate)
    return None if rate is None else rate.texts_per_second


def add_questions(paths: JudgePaths, questions: Iterable[Row]) -> None:
    """Write the questions that no earlier file holds as further files."""
    files = _parts(paths.questions)
    existing = {i for uri in files for i in storage.read_table(uri, ["episode_id"])["episode_id"].to_pylist()}
    new = {row["episode_id"]: row for row in questions if row["episode_id"] not in existing}
    # The prompts of an intent are adjacent: its own likelihood is then computed once, and a cached prefix is shared.
    ordered = sorted(new.values(), key=lambda row: (row["task"], row["intent"], row["prompt"], row["other_prompt"]))
    for number, first in enumerate(range(0, len(ordered), FILE_ROWS), start=len(files)):
        table = pa.Table.from_pylist(ordered[first : first + FILE_ROWS], schema=QUESTIONS)
        storage.write_table(storage.join(paths.questions, f"part-{number:08d}.parquet"), table)


def _read_answers(paths: JudgePaths) -> dict[int, Answer]:
    answers: dict[int, Answer] = {}
    for uri in _parts(paths.scores):
        table = storage.read_table(uri, SCORES.names)
        scores, masses = (table[name].to_numpy().astype(np.float64).tolist() for name in ("score", "mass"))
        answers.update(zip(table["episode_id"].to_pylist(), map(Answer, scores, masses), strict=True))
    return answers


def _parts(folder: str) -> list[str]:
    """URIs of the folder's files; an engine's ledger lies in a folder next to them."""
    return [storage.join(folder, name) for name in storage.list_files(folder) if name.startswith("part-")]


def _sizes(paths: JudgePaths, files: Sequence[str]) -> list[int]:
    return [storage.read_table(storage.join(paths.questions, name), []).num_rows for name in files]


def _fingerprint_inputs(judge: Judge, tasks: Sequence[Task]) -> dict[str, Any]:
    # The keys are part of existing runs' fingerprints.
    engine = {"dtype": judge.engine.dtype, "max_model_len": judge.engine.max_model_len, "style": judge.style}
    by_kind: dict[str, dict[str, Any]] = {
        "gated": {"version": gated.VERSION},
        "coverage": {"version": gated.VERSION},
        "likelihood": {"dtype": judge.engine.dtype, "template": [WITH_PROMPT, WITHOUT_PROMPT]},
        "embedding": {},
        "rubric": {**engine, "rubric": rubric.RUBRIC, "tasks": rubric.task_inputs(tasks)},
        "pairwise": {**engine, **pairwise.fingerprint_inputs(tasks)},
    }
    model = {"model": judge.model, "revision": models.revision(judge.model, judge.revision)} if judge.kind != "coverage" else {}
    return {"kind": judge.kind, **model, "kwargs": judge.engine.kwargs, **by_kind[judge.kind]}


# ---- passes


def _run_engine_pass(judge: Judge, paths: JudgePaths, tasks: Sequence[Task], context: StageContext) -> None:
    """Answer through the vLLM stage that the policies share."""
    read: rubric.AnswerReader
    if judge.kind == "pairwise":
        policy, read, columns = pairwise.pairwise_policy(judge, tasks), pairwise.preference, pairwise.SHOWN_COLUMNS
    else:
        config = RubricJudge(**{name: getattr(judge, name) for name in RubricJudge.model_fields})
        policy, columns = rubric.rubric_policy(config, tasks, f"judge {judge.display_name}"), rubric.JUDGED_COLUMNS
        read = rubric.relevance_reader(policy)
    rubric.judge_candidates(paths.questions, paths.scores, policy, read, column="score", columns=columns, context=context)


def _run_model_pass(judge: Judge, paths: JudgePaths, files: list[str], context: StageContext) -> None:
    """Answer by a model in Ray Data actors."""
    import ray

    cluster.silence_ray_data()
    place = judge.placement
    cluster.require_resources(
        f"evaluate.judges: {judge.display_name}: placement", place.cpus * place.replicas, place.gpus * place.replicas
    )
    options: dict[str, Any] = {"num_cpus": place.cpus, "num_gpus": place.gpus or None, "concurrency": place.replicas}
    if place.accelerator:
        options["accelerator_type"] = place.accelerator
    dataset = ray.data.from_items([{"part": name} for name in files], override_num_blocks=len(files))
    dataset = dataset.map_batches(_ScoreFiles, batch_size=1, fn_constructor_kwargs={"judge": judge, "paths": paths}, **options)
    label, judged = f"judge {judge.display_name}", 0
    bar = Progress(label, sum(_sizes(paths, files)), "pairs")
    bar.update(0, "loading the model", force=True)
    for batch in iterate_with_watchdog(dataset.iter_batches(batch_size=None), context.watchdog_minutes, label):
        judged += int(np.sum(batch["rows"]))
        bar.update(judged)
    bar.finish(judged)


class _ScoreFiles:
    """Ray Data actor: names of question files -> their files of scores."""

    def __init__(self, judge: Judge, paths: JudgePaths) -> None:
        self.score, self.paths = _load_scorer(judge), paths

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"rows": np.array([self.score_file(str(name)) for name in batch["part"]])}

    def score_file(self, name: str) -> int:
        """Write the file of scores of one file of questions; return its number of rows."""
        table = storage.read_table(storage.join(self.paths.questions, name), ["episode_id", "intent", "task", "prompt"])
        pairs = [Pair(row["intent"], row["task"], row["prompt"]) for row in table.to_pylist()]
        scores = self.score(pairs).astype(np.float32)
        scored = pa.table([table["episode_id"], scores, np.ones_like(scores)], schema=SCORES)
        storage.write_table(storage.join(self.paths.scores, name), scored)
        return int(table.num_rows)


def _load_scorer(judge: Judge) -> Callable[[list[Pair]], np.ndarray]:
    """Load a judge that scores pairs: pairs -> scores of shape (pairs,)."""
    if judge.kind == "coverage":
        return gated.GatedJudge(gated.coverage_relevance).score
    if judge.kind == "gated":
        return gated.GatedJudge(gated.embedding_relevance(judge.model)).score
    place, engine = judge.placement, judge.engine
    # Ray sets OMP_NUM_THREADS to the actor's CPUs, which would leave one core to a model that has the machine to itself.
    threads = None if place.gpus else place.threads or max(1, cluster.cpu_count() // place.replicas)
    if judge.kind == "embedding":
        embedder = load_embedder(judge.model, engine.batch_size, threads, judge.revision)
        return lambda pairs: embedder.relevance([pair.intent for pair in pairs], [pair.prompt for pair in pairs])
    dtype = "auto" if engine.dtype == "bfloat16" else engine.dtype  # emulated bfloat16 is slow and no better than float32
    likelihood = LikelihoodJudge(models.resolve(judge.model), engine.batch_size, dtype, threads, judge.revision)
    return lambda pairs: likelihood.score([pair.prompt for pair in pairs], [pair.intent for pair in pairs])


def load_embedder(model: str, batch_size: int, threads: int | None = None, revision: str | None = None) -> Embedder:
    """Load a sentence-transformers model, or a causal language model whose last hidden states are averaged.

    The vectors of a language model all point in nearly the same direction: their cosines rank prompts, but a ratio of two
    means nothing.
    """
    path = models.resolve(model)
    if revision and not os.path.isdir(path):
        from huggingface_hub import snapshot_download

        path = snapshot_download(path, revision=revision)
    embedder = Embedder(path, batch_size, threads)
    tokenizer = embedder.model.tokenizer
    if tokenizer.pad_token is None:  # language models may have no padding token
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return embedder
