"""Questions to a judge and its answers in resumable files, and the passes that answer new questions.

Equal texts are one question, and a question is asked once: a rerun asks only the questions without an answer. The folder's
name holds the fingerprint of everything an answer depends on, so another model or template never reuses an answer. Files of
questions are only ever added, and a file keeps its number, which names its shard in a ledger.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from udrl import cluster, models, storage
from udrl.context import StageContext
from udrl.evaluate.judges import gated
from udrl.evaluate.judges.controls import Pair
from udrl.hashing import fingerprint, stable_id
from udrl.policies.policy import Row
from udrl.recipe import Judge, RubricJudge
from udrl.run import EvaluationPaths, JudgePaths
from udrl.scoring import rubric
from udrl.tasks import Task

FILE_ROWS = 512  # questions of one file: the most that a kill loses of each replica
QUESTIONS = pa.schema(
    [
        ("episode_id", pa.int64()),
        ("intent_id", pa.int64()),
        ("intent", pa.string()),
        ("task", pa.string()),
        ("prompt", pa.string()),
        ("reason", pa.string()),  # always empty: the shared scoring pass skips rows that have one
    ]
)
SCORES = pa.schema([("episode_id", pa.int64()), ("score", pa.float32()), ("mass", pa.float32())])


class Answer(NamedTuple):
    score: float  # NaN if the judge failed
    mass: float  # share of the judge's probability on valid answers


def question(row: Row) -> Row:
    """Return a row of :data:`QUESTIONS`; equal texts have equal ids."""
    key = stable_id("judged", row["task"], row["intent"], row["prompt"], "")  # the last one keeps the ids of earlier versions
    return {"episode_id": key, **{name: row[name] for name in ("intent_id", "intent", "task", "prompt")}, "reason": ""}


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
    if open_files and judge.kind == "rubric":
        models.resolve(judge.model)  # a missing model is reported before Ray starts
        cluster.connect()
        config = RubricJudge(**{name: getattr(judge, name) for name in RubricJudge.model_fields})
        policy = rubric.rubric_policy(config, tasks, f"judge {judge.display_name}")
        read = rubric.relevance_reader(policy)
        rubric.judge_candidates(paths.questions, paths.scores, policy, read, column="score", context=context)
    elif open_files:
        _score_files(judge, paths, open_files)
    return _read_answers(paths)


def judge_paths(judge: Judge, evaluation: EvaluationPaths, tasks: Sequence[Task]) -> JudgePaths:
    """Return the judge's folder, which is named after everything that its answers depend on."""
    return evaluation.judge(judge.display_name, fingerprint(_fingerprint_inputs(judge, tasks)))


def add_questions(paths: JudgePaths, questions: Iterable[Row]) -> None:
    """Write the questions that no earlier file holds as further files."""
    files = _parts(paths.questions)
    existing = {i for uri in files for i in storage.read_table(uri, ["episode_id"])["episode_id"].to_pylist()}
    new = {row["episode_id"]: row for row in questions if row["episode_id"] not in existing}
    # The prompts of an intent are adjacent: a cached prefix is shared.
    ordered = sorted(new.values(), key=lambda row: (row["task"], row["intent"], row["prompt"]))
    for number, first in enumerate(range(0, len(ordered), FILE_ROWS), start=len(files)):
        table = pa.Table.from_pylist(ordered[first : first + FILE_ROWS], schema=QUESTIONS)
        storage.write_table(storage.join(paths.questions, f"part-{number:08d}.parquet"), table)


def _score_files(judge: Judge, paths: JudgePaths, files: Sequence[str]) -> None:
    """Write the scores of some files of questions by a judge that scores thousands of texts a second."""
    scorer = gated.GatedJudge(gated.embedding_relevance(judge.model) if judge.kind == "gated" else gated.coverage_relevance)
    for name in files:
        table = storage.read_table(storage.join(paths.questions, name), ["episode_id", "intent", "task", "prompt"])
        pairs = [Pair(row["intent"], row["task"], row["prompt"]) for row in table.to_pylist()]
        scores = scorer.score(pairs).astype(np.float32)
        scored = pa.table([table["episode_id"], scores, np.ones_like(scores)], schema=SCORES)
        storage.write_table(storage.join(paths.scores, name), scored)


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


def _fingerprint_inputs(judge: Judge, tasks: Sequence[Task]) -> dict[str, Any]:
    # The keys are part of existing runs' fingerprints.
    engine = {"dtype": judge.engine.dtype, "max_model_len": judge.engine.max_model_len, "style": judge.style}
    by_kind: dict[str, dict[str, Any]] = {
        "gated": {"version": gated.VERSION},
        "coverage": {"version": gated.VERSION},
        "rubric": {**engine, "rubric": rubric.RUBRIC, "tasks": rubric.task_inputs(tasks)},
    }
    model = {"model": judge.model, "revision": models.revision(judge.model, judge.revision)} if judge.kind != "coverage" else {}
    return {"kind": judge.kind, **model, "kwargs": judge.engine.kwargs, **by_kind[judge.kind]}
