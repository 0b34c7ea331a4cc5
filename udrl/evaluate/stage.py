"""The evaluate stage: student, teacher and baselines write prompts for the same intents; judges and metrics compare them.

Completions go through the ledger and the scoring pass of generation, and judgments through files of their own, so that a
killed evaluation resumes. The plan of the remaining work is printed first.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa

from udrl import cluster, models, storage
from udrl.context import StageContext
from udrl.evaluate.document import EvaluationDocument, PolicyProfile
from udrl.evaluate.evaluated_policies import EvaluatedPolicy, gather_policies, select_intents
from udrl.evaluate.judges.judging import ask_judges
from udrl.evaluate.metrics import compute as metrics
from udrl.evaluate.policy_outputs import policy_profile, trivial_baseline_outputs, write_outputs
from udrl.evaluate.report.write_report import verdict_lines, write_report
from udrl.evaluate.speed import PolicySpeed, describe_environment, measure_speeds
from udrl.policies.ledger import count_rows
from udrl.policies.student import fetch_student
from udrl.progress import duration
from udrl.recipe import Recipe, dump
from udrl.run import EvaluationPaths, Run
from udrl.scoring.embedder import EmbeddingActor
from udrl.tasks import load_tasks

log = logging.getLogger(__name__)

# seconds a policy takes outside its engine: starting Ray Data's stages and the embedder; measured on two CPU cores
OVERHEAD_SECONDS = 25.0
# prompts/s of scoring, measured on two CPU cores
SCORED_PER_SECOND = 150.0


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
    policies = gather_policies(recipe, tasks, intents)
    for model in (recipe.rewards.embedder, *(judge.model for judge in recipe.evaluate.judges)):
        models.resolve(model)  # a missing model is reported now, not after all policies have written
    cluster.connect()
    if recipe.resume == "never":
        storage.remove(evaluation.work)
    context, environment = StageContext.of(recipe), describe_environment()
    speeds = measure_speeds(policies, recipe.evaluate.latency_requests, evaluation, environment, context)
    log.info("\n".join(plan_lines(policies, count_missing(policies, evaluation), speeds)))

    tables = [write_outputs(evaluated, evaluated.paths(evaluation), recipe, tasks) for evaluated in policies]
    profiles = {evaluated.name: policy_profile(evaluated, speeds.get(evaluated.name)) for evaluated in policies}
    embedder = EmbeddingActor(recipe.rewards, context)
    baselines = trivial_baseline_outputs(recipe, pa.concat_tables(tables), embedder.relevance)
    profiles |= {name: PolicyProfile(kind="trivial baseline") for name in dict.fromkeys(baselines["policy"].to_pylist())}
    embedder.release()  # a judge may need its resources
    judged = ask_judges(recipe, tasks, pa.concat_tables([*tables, baselines]), evaluation)
    measurements = metrics.compute(
        judged.outputs,
        judges=judged.judges,
        training=_training_prompts(recipe),
        embed=embedder.embed,
        subject_words={intent.intent_id: intent.subject_words() for intent in intents},
        bootstrap=recipe.evaluate.bootstrap,
        seed=recipe.seed,
    )
    document = EvaluationDocument(
        **dict(measurements),
        name=recipe.name,
        source=source,
        policies=profiles,
        judges=judged.judges,
        environment=environment,
        recipe=dump(recipe),
    )
    write_report(evaluation, judged.outputs, document)
    return EvaluationResult(document, evaluation)


def _training_prompts(recipe: Recipe) -> Iterator[pa.Table] | None:
    """Prompts of all episodes that the student may have seen: the teacher's and those of each round."""
    run_paths = Run(recipe.storage)
    rounds = [run_paths.round(int(name)).scoring for name in storage.list_folders(run_paths.all_rounds)]
    folders = [Run(recipe.episodes_storage()).scoring.episodes, *(scoring.episodes for scoring in rounds)]
    existing = [folder for folder in folders if storage.list_files(folder)]
    if not existing:
        return None
    return (table for folder in existing for table in storage.iter_tables(folder, ["prompt"]))


def describe(result: EvaluationResult) -> str:
    """Return the lines that end the job: the verdicts and the paths of the report."""
    paths = result.paths
    return f"{verdict_lines(result.document)}\n\nreport: {paths.report_markdown}\n        {paths.report_html}"


def count_missing(policies: Sequence[EvaluatedPolicy], evaluation: EvaluationPaths) -> dict[str, int]:
    """Return how many requests of each policy have no completion yet."""
    completed = {evaluated.name: count_rows(evaluated.paths(evaluation).completions) for evaluated in policies}
    return {evaluated.name: len(evaluated.requests) - sum(completed[evaluated.name].values()) for evaluated in policies}


def plan_lines(policies: Sequence[EvaluatedPolicy], missing: Mapping[str, int], speeds: Mapping[str, PolicySpeed]) -> list[str]:
    """Return the plan as text: the missing requests of each policy, and how long they take."""
    if not any(missing.values()):
        return ["evaluate: nothing left to write"]
    lines = []
    for evaluated in policies:
        name, n, speed = evaluated.name, missing[evaluated.name], speeds.get(evaluated.name)
        if not n:
            lines.append(f"  {name}: all {len(evaluated.requests):,} prompts exist already")
        elif speed is None:
            lines.append(f"  {name}: {n:,} prompts; speed not measured")
        else:
            writing = n / speed.prompts_per_second / evaluated.policy.placement.replicas
            seconds = speed.startup_seconds + writing + OVERHEAD_SECONDS + n / SCORED_PER_SECOND
            lines.append(
                f"  {name}: {n:,} prompts, about {duration(seconds)} (measured {speed.prompts_per_second:.1f} prompts/s)"
            )
    return ["evaluate: to write", *lines]
