"""Live progress of a training: worker 0 posts it to a Ray actor, and the driver shows it and ends a training that stalls."""

import contextlib
import logging
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from udrl import cluster, internals, watchdog
from udrl.errors import STALLED_EXIT_CODE
from udrl.progress import Progress, duration

log = logging.getLogger(__name__)
DIAGNOSIS_SECONDS = 30  # seconds that a stalled training may take to describe the cluster before it exits


@dataclass(frozen=True)
class TrainingProgress:
    """Worker 0's newest figures. ``problem`` is an error that the user must solve; the training then ends without a student."""

    steps: int
    resumed_at: int
    step: int = 0
    loss: float | None = None
    tokens_per_second: float = 0.0
    mfu: float = 0.0
    validation_loss: float | None = None
    length_error: float | None = None
    coverage: float | None = None
    problem: str = ""

    def describe(self) -> str:
        """Return the progress line's note on the newest step."""
        validation = ""
        if self.validation_loss:
            words = f", {self.length_error:.1f} words off" if self.length_error is not None else ""
            named = f", {self.coverage:.0%} of subject words" if self.coverage is not None else ""
            validation = f" (validation {self.validation_loss:.3f}{words}{named})"
        speed = f"{self.tokens_per_second:,.0f} tokens/s, MFU {self.mfu:.0%}"
        return f"loss {self.loss:.3f}{validation}, {speed}"


class ProgressActor:
    """Ray actor that holds worker 0's newest progress for the driver."""

    def __init__(self) -> None:
        self.latest: TrainingProgress | None = None

    def post(self, progress: TrainingProgress) -> None:
        self.latest = progress

    def read(self) -> TrainingProgress | None:
        return self.latest


def start_progress_actor() -> Any:
    """Start the actor on the driver's node: it must not be lost with another one."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    driver_node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0, scheduling_strategy=driver_node)(ProgressActor).remote()


@contextlib.contextmanager
def show_progress(actor: Any, watchdog_minutes: float) -> Iterator[None]:
    """Show the actor's progress while the block runs; end the process if it does not change for ``watchdog_minutes``."""
    stop = threading.Event()
    thread = threading.Thread(target=_follow, args=(actor, stop, watchdog_minutes), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _follow(actor: Any, stop: threading.Event, watchdog_minutes: float) -> None:
    import ray

    bar: Progress | None = None
    progress: TrainingProgress | None = None
    resumed_at = -1
    last_change = time.monotonic()
    log.info("train: starting the workers")
    while True:
        stopped = stop.wait(1.0)
        previous = progress
        with contextlib.suppress(Exception):  # a failed read of the actor must not end the job
            progress = ray.get(actor.read.remote(), timeout=10)
        if progress != previous:
            last_change = time.monotonic()
        elif not stopped and time.monotonic() - last_change > 60 * watchdog_minutes:
            _exit_stalled(time.monotonic() - last_change, watchdog_minutes)
        if progress and progress.loss is not None:
            if bar is None or progress.resumed_at != resumed_at:  # a new group of workers counts its own speed
                resumed_at = progress.resumed_at
                cluster.lower_priority_of_other_processes(internals.TRAIN_WORKER)
                bar = Progress("train", progress.steps, "steps", start=resumed_at)
            show = bar.finish if stopped else bar.update
            show(progress.step, progress.describe())
        if stopped:
            return


def _exit_stalled(silent_seconds: float, watchdog_minutes: float) -> None:
    """End the process. The main thread waits inside Ray, and nothing else is certain to interrupt it."""
    # The exit must not depend on the diagnosis, which asks a Ray that may hang.
    threading.Timer(DIAGNOSIS_SECONDS, os._exit, [STALLED_EXIT_CODE]).start()
    log.error(
        "train: no progress for %s (watchdog_minutes=%g); checkpoints are kept, run the same command again to resume",
        duration(silent_seconds),
        watchdog_minutes,
    )
    try:
        log.error("\n".join(["train: state of the cluster", *watchdog.describe_cluster()]))
    finally:
        os._exit(STALLED_EXIT_CODE)
