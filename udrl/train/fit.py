"""One training on the cluster: episodes -> packed rows -> Ray Train -> an exported student."""

import logging
import os
import sys
from dataclasses import dataclass
from typing import Any

from udrl import cluster, hashing, models, storage
from udrl.errors import UserError
from udrl.progress import duration
from udrl.recipe import Recipe, dump
from udrl.run import EpisodeSource, GenerateSummary, PackedDataPaths, PackedDataSummary, Run, StudentPaths, TrainingSummary
from udrl.tasks import load_tasks
from udrl.train import checkpoint, packed_data, tracking
from udrl.train.export import Lineage
from udrl.train.gpt2 import Shape
from udrl.train.progress_actor import TrainingProgress, show_progress, start_progress_actor
from udrl.train.schedule import TrainingPlan, deepspeed_config, read_deepspeed_config
from udrl.train.worker import WorkerJob, train_worker

log = logging.getLogger(__name__)

# Keys of train that do not change the student, only the placement, speed and safety of its training.
OPERATIONAL = (
    "workers",
    "min_workers",
    "placement_strategy",
    "cpus_per_worker",
    "accelerator",
    "threads",
    "micro_batch_rows",
    "checkpoint_every",
    "keep_checkpoints",
    "max_failures",
    "trackers",
    "sample_intents",
)

# (section, key, default) of keys that came after the first fingerprints. A default leaves the fingerprint as it was, so that
# students of earlier versions are found.
ADDED_KEYS = (("student", "vocabulary", "episodes"), ("student", "start", "random"), ("train", "row_tokens", None))


@dataclass(frozen=True)
class Training:
    """The inputs of one training, and the folder that it exports the student to."""

    sources: tuple[EpisodeSource, ...]
    target: str  # folder URI of the exported student
    origin: list[Any]  # fingerprint inputs of the episodes
    round: int = 0
    start: str | None = None  # folder URI of an exported student, whose weights the training starts from


def first_training(recipe: Recipe, target: str) -> Training:
    """Return the training of round 0: on the teacher's episodes, into the folder ``target``.

    Raises:
        UserError: there is no finished generate stage.
    """
    run = Run(recipe.episodes_storage())
    if not storage.exists(run.generate_summary):
        raise UserError(f"{run.storage}: no finished generate stage; run jobs.generate with this recipe first")
    summary = GenerateSummary.load(run.generate_summary)
    return Training(
        sources=(EpisodeSource(folder=run.scoring.episodes),),
        target=target,
        origin=[summary.ledger, summary.scoring, summary.accepted],
    )


def fit(recipe: Recipe, training: Training) -> TrainingSummary:
    """Train a student and export it; return its ``training.json``.

    If the target has a student of the same episodes and settings, that one is kept, except under ``resume: never``. A training
    that was killed resumes from its last checkpoint.

    Raises:
        UserError: settings or episodes are unusable, or another student is in the target under ``resume: always``.
    """
    tasks = [task.name for task in load_tasks(recipe.tasks)]
    Shape.of(recipe.student, recipe.train)
    storage.require_writable(recipe.storage)
    fingerprint = training_fingerprint(recipe, training)
    if recipe.resume != "never" and (finished := TrainingSummary.load_if_exists(StudentPaths(training.target).training)):
        if finished.fingerprint == fingerprint:
            log.info("train: %s is there already, a student of the same episodes and settings", training.target)
            return finished
        if recipe.resume == "always":
            raise UserError(
                f"{training.target}: a student of other settings or episodes is there; set resume=if_possible or resume=never"
                " to replace it"
            )
    tracking.require_trackers(recipe.train.trackers)
    run = Run(recipe.storage)
    storage.write_bytes(run.recipe, dump(recipe).encode())
    cluster.connect()
    data = run.packed_data(fingerprint)
    if recipe.resume == "never":
        storage.remove(data.folder)
    if not storage.exists(data.summary):
        packed_data.prepare_packed_data(recipe, training.sources, data, tasks, start=training.start)
    _run_workers(recipe, training, data, fingerprint)
    summary = TrainingSummary.load_if_exists(StudentPaths(training.target).training)
    if summary is None or summary.fingerprint != fingerprint:
        raise RuntimeError(f"training ended without an export in {training.target}")
    return summary


def training_fingerprint(recipe: Recipe, training: Training) -> str:
    """Return the fingerprint of the episodes, and of the recipe's sections that shape the student."""
    sections = recipe.model_dump(include={"seed", "tasks", "commands", "student", "train"})
    for name in OPERATIONAL:
        sections["train"].pop(name)
    for section, name, default in ADDED_KEYS:
        if sections[section][name] == default:
            sections[section].pop(name)
    if recipe.train.deepspeed:
        sections["train"]["deepspeed"] = read_deepspeed_config(recipe.train.deepspeed)
    if recipe.student.init:
        sections["student"]["revision"] = models.revision(recipe.student.init, None)
    keeps = [source.keep for source in training.sources]
    return hashing.fingerprint([training.origin, keeps, training.round, sections])


def _run_workers(recipe: Recipe, training: Training, data: PackedDataPaths, fingerprint: str) -> None:
    """Run Ray Train's workers to the export, and show their progress.

    Raises:
        UserError: the workers found a problem that the user must solve.
    """
    import ray

    min_workers = recipe.train.min_workers or recipe.train.workers
    cluster.require_resources("train", min_workers * recipe.train.cpus_per_worker, min_workers * recipe.train.gpus_per_worker)
    checkpoints = Run(recipe.storage).checkpoints(fingerprint)
    if recipe.resume == "never":
        storage.remove(checkpoints)
    checkpoint.remove_incomplete(checkpoints)
    _announce(recipe, data, checkpoints)
    progress_actor = start_progress_actor()
    job = WorkerJob(
        tasks=load_tasks(recipe.tasks),
        recipe=_with_absolute_paths(recipe),
        data=data,
        checkpoints=checkpoints,
        student=training.target,
        fingerprint=fingerprint,
        round=training.round,
        initial_student=training.start,
        lineage=Lineage(recipe, GenerateSummary.load_if_exists(Run(recipe.episodes_storage()).generate_summary)),
        progress_actor=progress_actor,
        tracker_environment=ray.put(tracking.tracker_environment(recipe.train.trackers)),
    )
    with show_progress(progress_actor, recipe.watchdog_minutes):
        _make_trainer(recipe, job).fit()
    progress: TrainingProgress | None = ray.get(progress_actor.read.remote())
    if progress and progress.problem:
        raise UserError(f"train: {progress.problem}")


def _announce(recipe: Recipe, data: PackedDataPaths, checkpoints: str) -> None:
    """Log the extent of the training, and write DeepSpeed's configuration next to the checkpoints."""
    summary, train, workers = PackedDataSummary.load(data.summary), recipe.train, recipe.train.workers
    plan = TrainingPlan.of(recipe.student, train, summary.rows, summary.budget_rows, workers)
    deepspeed_file = storage.join(checkpoints, "deepspeed.json")
    storage.write_json(deepspeed_file, deepspeed_config(train, plan, workers))
    log.info(
        f"train: {summary.episodes:,} episodes in {summary.rows:,} rows of {recipe.row_tokens()} tokens"
        f" ({summary.padding:.1%} padding); {plan.steps:,} steps of {plan.rows_per_step:,} rows; DeepSpeed: {deepspeed_file}"
    )


def _with_absolute_paths(recipe: Recipe) -> Recipe:
    """Return the recipe for Ray Train's workers, which have another working folder."""
    train, student = recipe.train, recipe.student
    if train.deepspeed:
        train = train.model_copy(update={"deepspeed": storage.absolute(train.deepspeed)})
    if student.init and os.path.isdir(student.init):
        student = student.model_copy(update={"init": os.path.abspath(student.init)})
    return recipe.model_copy(update={"train": train, "student": student})


def _make_trainer(recipe: Recipe, job: WorkerJob) -> Any:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    train = recipe.train
    resources = {"CPU": train.cpus_per_worker} | ({"GPU": train.gpus_per_worker} if train.gpus_per_worker else {})
    return TorchTrainer(
        train_worker,
        train_loop_config={"job": job},
        torch_config=TorchConfig(backend="nccl" if train.gpus_per_worker else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=(train.min_workers, train.workers) if train.min_workers else train.workers,
            use_gpu=train.gpus_per_worker > 0,
            resources_per_worker=resources,
            accelerator_type=train.accelerator,
            placement_strategy=train.placement_strategy,
        ),
        run_config=RunConfig(
            # Ray Train's own state goes next to our checkpoints; remove_incomplete deletes an earlier attempt's index.
            name=job.fingerprint,
            storage_path=Run(recipe.storage).all_checkpoints,
            failure_config=FailureConfig(max_failures=train.max_failures),
            worker_runtime_env={"env_vars": _worker_environment()},
        ),
    )


def _worker_environment() -> dict[str, str]:
    """Return the variables with which DeepSpeed compiles its CPU operator once rather than in every run."""
    return {
        "TORCH_EXTENSIONS_DIR": os.environ.get("TORCH_EXTENSIONS_DIR", os.path.join(models.cache_folder(), "torch_extensions")),
        # torch finds ninja by name. It is next to the interpreter, whose folder is not always on the PATH.
        "PATH": os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")]),
    }


def describe_training(summary: TrainingSummary) -> str:
    """Return the line that ends the job."""
    validation = f", validation {summary.validation_loss:.3f}" if summary.validation_loss else ""
    return (
        f"student: {summary.parameters / 1e6:.1f}M parameters, {summary.steps:,} steps in {duration(summary.seconds)}, "
        f"loss {summary.history[-1][1]:.3f}{validation}, {summary.tokens_per_second:,.0f} tokens/s"
    )
