"""The evaluate stage: student, teacher and baselines write prompts for the same intents; judges and metrics compare them.

Completions go through the ledger and the scoring pass of generation, and judgments through files of their own, so that a
killed evaluation resumes.
"""

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa

from udrl import cluster, models, storage
from udrl.commands import CommandVocabulary
from udrl.context import StageContext
from udrl.evaluate.document import EvaluationDocument, Measurements, PolicyProfile
from udrl.evaluate.embedding_actor import EmbeddingActor
from udrl.evaluate.evaluated_intents import select_intents
from udrl.evaluate.evaluated_policies import gather_policies, takes_commands
from udrl.evaluate.evaluation_plan import plan_evaluation
from udrl.evaluate.judges.judging import ask_judges
from udrl.evaluate.metrics import compute as metrics
from udrl.evaluate.policy_outputs import policy_profile, write_outputs
from udrl.evaluate.report.write_report import short_table, write_report
from udrl.evaluate.speed import describe_environment, measure_speeds
from udrl.evaluate.trivial_baselines import trivial_baseline_outputs
from udrl.policies.student import fetch_student
from udrl.recipe import Recipe, dump
from udrl.run import EvaluationPaths, Run, TrainingSummary
from udrl.tasks import load_tasks

log = logging.getLogger(__name__)

NO_COMMANDS = "the student takes no commands"


@dataclass(frozen=True)
class EvaluationResult:
    document: EvaluationDocument
    paths: EvaluationPaths


def run(recipe: Recipe) -> EvaluationResult:
    """Evaluate the run's student and write the report.

    Raises:
        UserError: there is no student yet, the intents can't be used, or a model is missing.
    """
    tasks = load_tasks(recipe.tasks)
    run_paths = Run(recipe.storage)
    evaluation = run_paths.evaluation(recipe.evaluate.folder)
    storage.require_writable(recipe.storage)
    fetch_student(run_paths.student.folder)  # a missing student is the first thing to report
    intents, source = select_intents(recipe)
    policies, vocabulary = gather_policies(recipe, tasks, intents)
    for model in (recipe.rewards.embedder, *(judge.model for judge in recipe.evaluate.judges)):
        models.resolve(model)  # a missing model is reported now, not after all policies have written
    cluster.connect()
    if recipe.resume == "never":
        storage.remove(evaluation.work)
    context, timer = StageContext.of(recipe), PhaseTimer()

    environment = describe_environment()
    speeds = measure_speeds(policies, recipe.evaluate.latency_requests, evaluation, environment, context)
    log.info("\n".join(plan_evaluation(recipe, policies, speeds, evaluation, tasks)))
    timer.end_phase("timing")

    tables: list[pa.Table] = []
    profiles: dict[str, PolicyProfile] = {}
    for evaluated in policies:
        paths = evaluated.paths(evaluation)
        tables.append(write_outputs(evaluated, paths, recipe, tasks))
        profiles[evaluated.name] = policy_profile(evaluated, paths, speeds.get(evaluated.name))
        timer.end_phase(f"write: {evaluated.name}")

    embedder = EmbeddingActor(recipe.rewards, context)
    baselines = trivial_baseline_outputs(recipe, pa.concat_tables(tables), embedder.relevance)
    profiles |= {name: PolicyProfile(kind="trivial baseline") for name in dict.fromkeys(baselines["policy"].to_pylist())}
    embedder.release()  # a judge may need its resources
    timer.end_phase("trivial baselines")

    judged = ask_judges(recipe, tasks, pa.concat_tables([*tables, baselines]), evaluation)
    timer.end_phase("judges")

    measurements = metrics.compute(
        judged.outputs,
        tasks=tasks,
        judges=judged.judges,
        pairwise=judged.comparisons,
        training=_training_prompts(recipe),
        embed=embedder.embed,
        bootstrap=recipe.evaluate.bootstrap,
        seed=recipe.seed,
    )
    timer.end_phase("numbers")

    document = EvaluationDocument(
        **dict(explain_missing_commands(measurements, vocabulary)),
        name=recipe.name,
        source=source,
        policies=profiles,
        judges=judged.judges,
        losses=TrainingSummary.load(run_paths.student.training).history,
        commands=vocabulary,
        environment=environment,
        recipe=dump(recipe),
        seconds=timer.seconds,
    )
    write_report(evaluation, judged.outputs, document, judged.comparisons)
    return EvaluationResult(document, evaluation)


class PhaseTimer:
    """Seconds of each phase of the evaluation."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._start = time.monotonic()

    def end_phase(self, name: str) -> None:
        now = time.monotonic()
        self.seconds[name], self._start = now - self._start, now


def explain_missing_commands(measurements: Measurements, vocabulary: CommandVocabulary) -> Measurements:
    """If the student takes no commands, let the targets of control say so instead of "not measured"."""
    if takes_commands(vocabulary):
        return measurements
    targets = [
        target.model_copy(update={"measured": NO_COMMANDS}) if "commanded" in target.name else target
        for target in measurements.targets
    ]
    return measurements.model_copy(update={"targets": targets})


def _training_prompts(recipe: Recipe) -> Iterator[pa.Table] | None:
    """Task, prompt and policy of all episodes that the student may have seen: the teacher's and those of each round."""
    run_paths = Run(recipe.storage)
    rounds = [run_paths.round(int(name)).scoring for name in storage.list_folders(run_paths.all_rounds)]
    folders = [Run(recipe.episodes_storage()).scoring.episodes, *(scoring.episodes for scoring in rounds)]
    existing = [folder for folder in folders if storage.list_files(folder)]
    if not existing:
        return None
    return (table for folder in existing for table in storage.iter_tables(folder, ["task", "prompt", "policy"]))


def describe(result: EvaluationResult) -> str:
    """Return the lines that end the job: the short table and the paths of the report."""
    table, paths = short_table(result.document), result.paths
    return f"{table}\n\nreport: {paths.report_markdown}\n        {paths.report_html}"
