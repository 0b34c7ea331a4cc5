"""The evaluate stage: student, teacher and baselines write prompts for the same intents; judges and metrics compare them.

Completions go through the ledger and the scoring pass of generation, and judgments through files of their own, so that a
killed evaluation resumes. The plan of the remaining work is printed first.
"""

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import pyarrow as pa

from udrl import cluster, models, storage
from udrl.commands import CommandVocabulary
from udrl.context import StageContext
from udrl.evaluate.document import EvaluationDocument, Measurements, PolicyProfile
from udrl.evaluate.evaluated_policies import EvaluatedPolicy, gather_policies, select_intents, takes_commands
from udrl.evaluate.judges.answers import MODEL_FREE, answered_texts, judge_paths, last_rate
from udrl.evaluate.judges.controls import CONTROL_KINDS
from udrl.evaluate.judges.judging import JUDGED_PROBES, MAX_TRUE_PAIRS, ask_judges, gold_pairs_for
from udrl.evaluate.metrics import compute as metrics
from udrl.evaluate.policy_outputs import policy_profile, trivial_baseline_outputs, write_outputs
from udrl.evaluate.report.write_report import short_table, write_report
from udrl.evaluate.speed import PolicySpeed, describe_environment, measure_speeds
from udrl.policies.ledger import count_rows
from udrl.policies.student import fetch_student
from udrl.progress import duration
from udrl.recipe import Judge, Recipe, dump
from udrl.run import EvaluationPaths, Run, TrainingSummary
from udrl.scoring.embedder import EmbeddingActor
from udrl.tasks import Task, load_tasks

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
        subject_words={intent.intent_id: intent.subject_words() for intent in intents},
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


# texts/s assumed of a judge that was never timed: likelihood under the bundled 135M model on two CPU cores
ASSUMED_TEXTS_PER_SECOND = 25.0
MODEL_FREE_TEXTS_PER_SECOND = 1500.0  # of the gated and coverage judges, measured on one CPU core
# seconds a policy takes outside its engine: starting Ray Data's stages and the embedder; measured on two CPU cores
OVERHEAD_SECONDS = 25.0
# prompts/s of scoring, measured on two CPU cores
SCORED_PER_SECOND = 150.0


class JudgeWork(NamedTuple):
    """The texts that a judge has left: an upper bound of texts, and texts/s of its last pass (None: unknown)."""

    name: str
    texts: int
    rate: float | None


def plan_evaluation(
    recipe: Recipe,
    policies: Sequence[EvaluatedPolicy],
    speeds: dict[str, PolicySpeed],
    evaluation: EvaluationPaths,
    tasks: Sequence[Task],
) -> list[str]:
    """Return the plan's lines: the requests of each policy and judge, and how long they take."""
    missing = {}
    for evaluated in policies:
        rows_by_shard = count_rows(evaluated.paths(evaluation).completions)
        missing[evaluated.name] = len(evaluated.requests) - sum(rows_by_shard.values())
    judges = []
    for judge in recipe.evaluate.judges:
        pointwise, pairwise = max_judged_texts(recipe, policies, tasks, judge)
        paths = judge_paths(judge, evaluation, tasks)
        answered = answered_texts(paths)
        # Rejected outputs are not judged, so fewer answers than the bound may be all: if no policy has anything left to
        # write, a judge that has answered before has nothing left either.
        is_open = any(missing.values()) or not answered
        bound = pairwise if judge.kind == "pairwise" else pointwise
        rate = last_rate(paths) or (MODEL_FREE_TEXTS_PER_SECOND if judge.kind in MODEL_FREE else None)
        judges.append(JudgeWork(judge.display_name, max(0, bound - answered) if is_open else 0, rate))
    return plan_lines(policies, missing, speeds, judges)


def max_judged_texts(
    recipe: Recipe, policies: Sequence[EvaluatedPolicy], tasks: Sequence[Task], judge: Judge
) -> tuple[int, int]:
    """Return how many texts the judge will see at most, if pointwise and if pairwise: outputs, trivial baselines, controls."""
    config = recipe.evaluate
    rows = sum(row["probe"] in JUDGED_PROBES for evaluated in policies for row in evaluated.requests)
    intents = len({row["intent_id"] for evaluated in policies for row in evaluated.requests})
    teacher = sum(len(evaluated.requests) for evaluated in policies if evaluated.kind == "teacher")
    echoes = intents * len(tasks) if "echo" in config.trivial_baselines else 0
    shuffled = teacher if "shuffled" in config.trivial_baselines else 0
    true = MAX_TRUE_PAIRS * len(tasks) + len(gold_pairs_for(judge, tasks))
    controls = true * len(CONTROL_KINDS)
    others = len(policies) - 1 + len(config.trivial_baselines)
    pairs = min(config.pairs, intents * config.samples) * len(tasks) * others
    return rows + echoes + shuffled + true + controls, 2 * (pairs + controls)


def plan_lines(
    policies: Sequence[EvaluatedPolicy],
    missing: dict[str, int],
    speeds: dict[str, PolicySpeed],
    judges: Sequence[JudgeWork],
) -> list[str]:
    """Return the plan as text; ``missing`` counts the requests of each policy that have no completion yet."""
    lines, total, is_complete = [], 0.0, True
    for evaluated in policies:
        name, n, speed = evaluated.name, missing[evaluated.name], speeds.get(evaluated.name)
        if not n:
            lines.append(f"{name}: all {len(evaluated.requests):,} prompts exist already")
        elif speed is None:
            is_complete = False
            lines.append(f"{name}: {n:,} prompts; speed not measured")
        else:
            writing = n / speed.prompts_per_second / evaluated.policy.placement.replicas
            seconds = speed.startup_seconds + writing + OVERHEAD_SECONDS + n / SCORED_PER_SECOND
            total += seconds
            lines.append(
                f"{name}: {n:,} prompts, about {duration(seconds)} (measured {speed.prompts_per_second:.1f} prompts/s)"
            )
    for judge in judges:
        if not judge.texts:
            lines.append(f"judge {judge.name}: all scores exist already")
            continue
        rate, basis = (judge.rate, "measured before") if judge.rate else (ASSUMED_TEXTS_PER_SECOND, "assumed")
        seconds = judge.texts / rate
        total += seconds
        lines.append(
            f"judge {judge.name}: at most {judge.texts:,} texts, about {duration(seconds)} ({basis} {rate:.0f} texts/s)"
        )
    if is_complete:
        summary = f"about {duration(total)} in total" if total else "nothing left to generate or judge"
    else:
        measured = f"about {duration(total)}, " if total else ""
        summary = f"{measured}not counting the policies whose speed was not measured"
    return [f"evaluate: {summary}", *(f"  {line}" for line in lines)]
