"""The train stage: episodes -> an exported student."""

import hashlib
import json
import os
import sys
import threading
from typing import Any

from udrl import cluster, storage
from udrl.errors import UserError
from udrl.progress import Progress, duration
from udrl.recipe import Recipe, dump
from udrl.student import dataset, loop
from udrl.student.export import TRAINING
from udrl.student.model import Shape
from udrl.tasks import load_tasks

# Settings of train that say where and how safely, not what: changing them neither retrains nor loses a checkpoint.
OPERATIONAL = ("cpus_per_worker", "accelerator", "threads", "keep_checkpoints", "max_failures")


def run(recipe: Recipe) -> dict[str, Any]:
    """Train the student of ``recipe`` on the run's episodes; return what ``student/training.json`` says.

    Where a student of the same episodes and settings lies there already, it is kept (``resume: never`` trains anew). A
    run that was killed goes on from its last checkpoint.
    """
    tasks = [t.name for t in load_tasks(recipe.tasks)]
    Shape.of(recipe.student, recipe.train)
    storage.require_writable(recipe.storage)
    episodes = storage.join(recipe.storage, "episodes")
    if not storage.exists(storage.join(recipe.storage, "generate.json")):
        raise UserError(f"{recipe.storage}: no finished generate stage; run jobs.generate with this recipe first")
    mark = fingerprint(recipe)
    target, finished = storage.join(recipe.storage, "student"), storage.join(recipe.storage, "student", TRAINING)
    if recipe.resume != "never" and storage.exists(finished):
        facts = storage.read_json(finished)
        if facts["fingerprint"] == mark:
            print(f"train: a student of these episodes and settings is there already: {target}", file=sys.stderr)
            return facts
        if recipe.resume == "always":
            raise UserError(f"{target}: made with other settings or episodes; resume=if_possible or resume=never trains anew")
    storage.write_bytes(storage.join(recipe.storage, "recipe.yaml"), dump(recipe).encode())
    cluster.connect()
    data = storage.join(recipe.storage, "student_data", mark)
    if recipe.resume == "never":
        storage.remove(data)
    if not storage.exists(storage.join(data, "done.json")):
        dataset.prepare(recipe, episodes, data, tasks)
        storage.write_json(storage.join(data, "done.json"), {})
    _fit(recipe, data, target, mark)
    return storage.read_json(finished)


def fingerprint(recipe: Recipe) -> str:
    """What the student depends on: the episodes, and the recipe's sections that shape it."""
    generated = storage.read_json(storage.join(recipe.storage, "generate.json"))
    sections = recipe.model_dump(include={"seed", "tasks", "commands", "student", "train"})
    for name in OPERATIONAL:
        sections["train"].pop(name)
    facts = [generated["ledger"], generated["scoring"], generated["accepted"], sections]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _fit(recipe: Recipe, data: str, target: str, mark: str) -> None:
    import ray
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    place = recipe.train
    cluster.require("train", place.workers * place.cpus_per_worker, place.workers * place.gpus_per_worker)
    board = ray.remote(num_cpus=0)(Board).remote()
    runs = storage.join(recipe.storage, "checkpoints")
    if recipe.resume == "never":
        storage.remove(storage.join(runs, mark))
    trainer = TorchTrainer(
        loop.train_worker,
        train_loop_config={
            "recipe": recipe.model_dump(mode="json"),
            "data": data,
            "export": target,
            "fingerprint": mark,
            "board": board,
        },
        torch_config=TorchConfig(backend="nccl" if place.gpus_per_worker else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=place.workers,
            use_gpu=place.gpus_per_worker > 0,
            resources_per_worker=_resources(recipe),
            accelerator_type=place.accelerator,
        ),
        run_config=RunConfig(
            # A name that stands for data and settings: a restarted driver finds its own checkpoints and no others.
            name=mark,
            storage_path=runs,
            failure_config=FailureConfig(max_failures=place.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=place.keep_checkpoints),
            worker_runtime_env={"env_vars": _environment()},
        ),
    )
    stop = threading.Event()
    watcher = threading.Thread(target=_watch, args=(board, stop), daemon=True)
    watcher.start()
    try:
        trainer.fit()
    finally:
        stop.set()
        watcher.join()
    if (
        not storage.exists(storage.join(target, TRAINING))
        or storage.read_json(storage.join(target, TRAINING))["fingerprint"] != mark
    ):
        raise RuntimeError(f"training ended without an export in {target}")


def _resources(recipe: Recipe) -> dict[str, float]:
    resources = {"CPU": recipe.train.cpus_per_worker}
    if recipe.train.gpus_per_worker:
        resources["GPU"] = recipe.train.gpus_per_worker
    return resources


def _environment() -> dict[str, str]:
    """DeepSpeed compiles its CPU op once into this folder; without it every run would compile again."""
    from udrl.models import cache_folder

    return {
        "TORCH_EXTENSIONS_DIR": os.environ.get("TORCH_EXTENSIONS_DIR", os.path.join(cache_folder(), "torch_extensions")),
        # torch calls ninja by name; it lies beside the interpreter, whose folder need not be on the PATH.
        "PATH": os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")]),
    }


class Board:
    """A Ray actor on which worker 0 posts its progress for the driver to show."""

    def __init__(self) -> None:
        self.latest: dict[str, Any] = {}

    def post(self, facts: dict[str, Any]) -> None:
        self.latest.update(facts)

    def read(self) -> dict[str, Any]:
        return self.latest


def _watch(board: Any, stop: threading.Event) -> None:
    """Show the board as a progress line until ``stop``."""
    import ray

    bar: Progress | None = None
    resumed = None
    facts: dict[str, Any] = {}
    print("train: starting the workers", file=sys.stderr)
    while True:
        ended = stop.wait(1.0)
        try:
            facts = ray.get(board.read.remote(), timeout=10)
        except Exception:  # a progress line must not end the job
            if ended:
                return
            continue
        if facts.get("steps") and (bar is None or facts["resumed_at"] != resumed):
            resumed = facts["resumed_at"]
            bar = Progress("train", facts["steps"], "steps", start=resumed)
        if bar:
            valid = facts.get("validation_loss")
            note = f"loss {facts['loss']:.3f}{f' (validation {valid:.3f})' if valid else ''}"
            note += f", {facts['tokens_per_second']:,.0f} tokens/s"
            if ended:
                bar.finish(facts["step"], note)
            else:
                bar.update(facts["step"], note)
        if ended:
            return


def describe(facts: dict[str, Any]) -> str:
    """The lines that end the job."""
    valid = facts["validation_loss"]
    return (
        f"student: {facts['parameters'] / 1e6:.1f}M parameters, {facts['steps']:,} steps in {duration(facts['seconds'])}, "
        f"loss {facts['history'][-1][1]:.3f}{f', validation {valid:.3f}' if valid else ''}, "
        f"{facts['tokens_per_second']:,.0f} tokens/s"
    )
