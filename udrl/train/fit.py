"""The train stage: episodes -> an exported student."""

import contextlib
import hashlib
import json
import os
import sys
import threading
import time
from dataclasses import dataclass
from typing import Any

from udrl import cluster, models, storage, watchdog
from udrl.errors import STALLED_EXIT_CODE, UserError
from udrl.progress import Progress, duration
from udrl.recipe import Recipe, dump
from udrl.run import EpisodeSource, PackedDataPaths, PackedDataSummary, Run, TrainingSummary
from udrl.tasks import load_tasks
from udrl.train import checkpoint, packed_data, tracking
from udrl.train import worker as loop
from udrl.train.export import TRAINING
from udrl.train.gpt2 import Shape
from udrl.train.schedule import Plan, deepspeed_config, read_deepspeed

# Settings of train that say where and how safely, not what: changing them neither retrains nor loses a checkpoint.
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


@dataclass(frozen=True)
class Training:
    """One training of a student. ``origin`` is what its episodes depend on, as plain data; ``start`` is the folder of an
    exported student to go on from."""

    sources: tuple[EpisodeSource, ...]
    target: str
    origin: list[Any]
    round: int = 0
    start: str | None = None


def run(recipe: Recipe) -> TrainingSummary:
    """Train the student of ``recipe`` on its run's episodes, into ``student/``; see :func:`fit`."""
    return fit(recipe, first_training(recipe, storage.join(recipe.storage, "student")))


def first_training(recipe: Recipe, target: str) -> Training:
    """The training of round 0: on the teacher's episodes.

    Raises:
        UserError: there is no finished generate stage.
    """
    run = recipe.episodes_storage()
    if not storage.exists(storage.join(run, "generate.json")):
        raise UserError(f"{run}: no finished generate stage; run jobs.generate with this recipe first")
    made = storage.read_json(storage.join(run, "generate.json"))
    origin = [made["ledger"], made["scoring"], made["accepted"]]
    return Training((EpisodeSource(folder=Run(run).scoring.episodes),), target, origin)


def fit(recipe: Recipe, training: Training) -> TrainingSummary:
    """Train a student and export it; return what its ``training.json`` says.

    Where a student of the same episodes and settings lies there already, it is kept (``resume: never`` trains anew). A
    run that was killed goes on from its last checkpoint.

    Raises:
        UserError: settings or episodes can't be used, or another student lies in the target under ``resume: always``.
    """
    tasks = [t.name for t in load_tasks(recipe.tasks)]
    Shape.of(recipe.student, recipe.train)
    storage.require_writable(recipe.storage)
    mark = training_fingerprint(recipe, training)
    target, finished = training.target, storage.join(training.target, TRAINING)
    if recipe.resume != "never" and storage.exists(finished):
        facts = TrainingSummary.load(finished)
        if facts.fingerprint == mark:
            print(f"train: a student of these episodes and settings is there already: {target}", file=sys.stderr)
            return facts
        if recipe.resume == "always":
            raise UserError(f"{target}: made with other settings or episodes; resume=if_possible or resume=never trains anew")
    tracking.check(recipe.train.trackers)
    storage.write_bytes(storage.join(recipe.storage, "recipe.yaml"), dump(recipe).encode())
    cluster.connect()
    data = Run(recipe.storage).packed_data(mark)
    if recipe.resume == "never":
        storage.remove(data.folder)
    if not storage.exists(data.summary):
        packed_data.prepare_packed_data(recipe, training.sources, data, tasks, start=training.start)
    _fit(recipe, training, data, mark)
    return TrainingSummary.load(finished)


def training_fingerprint(recipe: Recipe, training: Training) -> str:
    """What the student depends on: the episodes, and the recipe's sections that shape it."""
    sections = recipe.model_dump(include={"seed", "tasks", "commands", "student", "train"})
    for name in OPERATIONAL:
        sections["train"].pop(name)
    if recipe.train.deepspeed:
        sections["train"]["deepspeed"] = read_deepspeed(recipe.train.deepspeed)
    if recipe.student.init:
        sections["student"]["revision"] = models.revision(recipe.student.init, None)
    keeps = [source.keep for source in training.sources]
    facts = [training.origin, keeps, training.round, sections]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _fit(recipe: Recipe, training: Training, data: PackedDataPaths, mark: str) -> None:
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    place = recipe.train
    least = place.min_workers or place.workers
    cluster.require_resources("train", least * place.cpus_per_worker, least * place.gpus_per_worker)
    runs = storage.join(recipe.storage, "checkpoints", mark)
    if recipe.resume == "never":
        storage.remove(runs)
    checkpoint.sweep(runs)
    _show(recipe, data, runs)
    # Beside the driver: on another node it might be lost with it.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    board = ray.remote(num_cpus=0, scheduling_strategy=here)(ProgressActor).remote()
    made = storage.join(recipe.episodes_storage(), "generate.json")
    sent = recipe.model_dump(mode="json")
    # Ray Train's workers have another working folder.
    if place.deepspeed:
        sent["train"]["deepspeed"] = storage.absolute(place.deepspeed)
    if recipe.student.init and os.path.isdir(recipe.student.init):
        sent["student"]["init"] = os.path.abspath(recipe.student.init)
    job = loop.Job(
        recipe=sent,
        data=data.folder,
        runs=runs,
        export=training.target,
        fingerprint=mark,
        start=training.start,
        lineage={
            "recipe": recipe.model_dump(mode="json"),
            "generate": storage.read_json(made) if storage.exists(made) else {},
            "round": training.round,
        },
        board=board,
        variables=[ray.put(tracking.environment(place.trackers))],
    )
    trainer = TorchTrainer(
        loop.train_worker,
        train_loop_config={"job": job},
        torch_config=TorchConfig(backend="nccl" if place.gpus_per_worker else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=(place.min_workers, place.workers) if place.min_workers else place.workers,
            use_gpu=place.gpus_per_worker > 0,
            resources_per_worker=_resources(recipe),
            accelerator_type=place.accelerator,
            placement_strategy=place.placement_strategy,
        ),
        run_config=RunConfig(
            # Checkpoints are ours to find; Ray Train's own state of an earlier try must not be gone on with.
            name=mark,
            storage_path=storage.join(recipe.storage, "checkpoints"),
            failure_config=FailureConfig(max_failures=place.max_failures),
            worker_runtime_env={"env_vars": _environment()},
        ),
    )
    stop = threading.Event()
    watcher = threading.Thread(target=_watch, args=(board, stop, recipe.watchdog_minutes), daemon=True)
    watcher.start()
    try:
        trainer.fit()
    finally:
        stop.set()
        watcher.join()
    problem = ray.get(board.read.remote()).get("problem")
    if problem:
        raise UserError(f"train: {problem}")
    finished = storage.join(training.target, TRAINING)
    if not storage.exists(finished) or storage.read_json(finished)["fingerprint"] != mark:
        raise RuntimeError(f"training ended without an export in {training.target}")


def _show(recipe: Recipe, data: PackedDataPaths, runs: str) -> None:
    """Say what is about to happen, and write DeepSpeed's settings beside the checkpoints."""
    summary, train, world = PackedDataSummary.load(data.summary), recipe.train, recipe.train.workers
    plan = Plan.of(recipe.student, train, summary.rows, summary.budget_rows, world)
    where = storage.join(runs, "deepspeed.json")
    storage.write_json(where, deepspeed_config(train, plan, world))
    print(
        f"train: {summary.episodes:,} episodes in {summary.rows:,} rows of {recipe.student.context} tokens"
        f" ({100 * summary.padding:.1f}% padding); {plan.steps:,} steps of {plan.rows:,} rows; DeepSpeed: {where}",
        file=sys.stderr,
    )


def _resources(recipe: Recipe) -> dict[str, float]:
    resources = {"CPU": recipe.train.cpus_per_worker}
    if recipe.train.gpus_per_worker:
        resources["GPU"] = recipe.train.gpus_per_worker
    return resources


def _environment() -> dict[str, str]:
    """DeepSpeed compiles its CPU op once into this folder; without it every run would compile again."""
    return {
        "TORCH_EXTENSIONS_DIR": os.environ.get("TORCH_EXTENSIONS_DIR", os.path.join(models.cache_folder(), "torch_extensions")),
        # torch calls ninja by name; it lies beside the interpreter, whose folder need not be on the PATH.
        "PATH": os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")]),
    }


class ProgressActor:
    """A Ray actor on which worker 0 posts its progress for the driver to show."""

    def __init__(self) -> None:
        self.latest: dict[str, Any] = {}

    def post(self, facts: dict[str, Any]) -> None:
        self.latest.update(facts)

    def read(self) -> dict[str, Any]:
        return self.latest


def _watch(board: Any, stop: threading.Event, minutes: float) -> None:
    """Show the board as a progress line until ``stop``; end the process where nothing moves for ``minutes``."""
    import ray

    bar: Progress | None = None
    resumed = None
    facts: dict[str, Any] = {}
    moved = time.monotonic()
    print("train: starting the workers", file=sys.stderr)
    while True:
        ended = stop.wait(1.0)
        before = facts
        with contextlib.suppress(Exception):  # a progress line must not end the job
            facts = ray.get(board.read.remote(), timeout=10)
        if facts != before:
            moved = time.monotonic()
        elif not ended and time.monotonic() - moved > 60 * minutes:
            _stall(time.monotonic() - moved, minutes)
        if "loss" in facts and (bar is None or facts["resumed_at"] != resumed):
            resumed = facts["resumed_at"]
            cluster.lower_priority_of_other_processes("RayTrainWorker")
            bar = Progress("train", facts["steps"], "steps", start=resumed)
        if bar:
            show = bar.finish if ended else bar.update
            show(facts["step"], note(facts))
        if ended:
            return


def note(facts: dict[str, Any]) -> str:
    """What the progress line says of a step."""
    valid, words = facts.get("validation_loss"), facts.get("length_error")
    text = f"loss {facts['loss']:.3f}"
    text += f" (validation {valid:.3f}{f', {words:.1f} words off' if words is not None else ''})" if valid else ""
    return f"{text}, {facts['tokens_per_second']:,.0f} tokens/s, MFU {100 * facts['mfu']:.0f}%"


def _stall(quiet: float, minutes: float) -> None:
    """End the process: the main thread waits inside Ray, which nothing else interrupts for sure."""
    print("\n".join(["train: what was going on", *watchdog.describe_cluster()]), file=sys.stderr)
    print(
        f"train: no progress for {duration(quiet)} (watchdog_minutes={minutes:g}); checkpoints are kept, run the same command"
        " again to resume",
        file=sys.stderr,
        flush=True,
    )
    os._exit(STALLED_EXIT_CODE)


def describe_training(summary: TrainingSummary) -> str:
    """Return the line that ends the job."""
    validation = f", validation {summary.validation_loss:.3f}" if summary.validation_loss else ""
    return (
        f"student: {summary.parameters / 1e6:.1f}M parameters, {summary.steps:,} steps in {duration(summary.seconds)}, "
        f"loss {summary.history[-1][1]:.3f}{validation}, {summary.tokens_per_second:,.0f} tokens/s"
    )
