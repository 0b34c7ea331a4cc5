"""Compare the losses of a training whose worker and driver are killed with those of an uninterrupted one.

``python -m benchmarks.training_kills --run URI [--picture FILE] [key=value ...]`` trains the student of
``recipes/quickstart.yaml`` on the run's episodes twice. The second training's worker is killed (SIGKILL) when its first
checkpoint is complete, and its driver after the third; then the same command is started again. Prints the largest difference
between the losses, as JSON in its last line, and plots both curves.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import psutil

from benchmarks.generation import HERE, machine
from udrl.run import Run, TrainingSummary
from udrl.train import checkpoint

Curve = list[tuple[int, float]]  # (step, training loss)
STEP = re.compile(r"train: ([\d,]+)/[\d,]+ steps")


class TrainingJob:
    """``jobs.train`` with a storage of its own."""

    def __init__(self, folder: str, overrides: list[str]) -> None:
        self.folder, self.log = Path(folder), Path(folder) / "driver.log"
        self.folder.mkdir()
        values = [f"storage={folder}/run", "train.checkpoint_every=40", "train.epochs=2", *overrides]
        self.command = [sys.executable, "-m", "jobs.train", f"{HERE}/recipes/quickstart.yaml", *values]
        self.driver: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.driver = subprocess.Popen(self.command, cwd=HERE, stderr=self.log.open("ab"), start_new_session=True)

    def checkpoint_step(self) -> int:
        """Return the step of the newest complete checkpoint; 0 if there is none."""
        for checkpoints in self.folder.glob("run/checkpoints/*"):
            if newest := checkpoint.latest(str(checkpoints)):
                return int(newest.rsplit("-", 1)[1])
        return 0

    def wait_for_checkpoint(self, step: int) -> None:
        assert self.driver
        pause = threading.Event()
        while self.checkpoint_step() < step:
            if self.driver.poll() is not None:
                raise SystemExit(f"ended before step {step}:\n{self.log.read_text()[-2000:]}")
            pause.wait(0.2)

    def step(self) -> int:
        """Return the last known step: from the log, which has a line every ten seconds, or of the newest checkpoint."""
        steps = STEP.findall(self.log.read_text())
        return max(self.checkpoint_step(), int(steps[-1].replace(",", "")) if steps else 0)

    def kill_worker(self) -> None:
        assert self.driver
        for process in psutil.Process(self.driver.pid).children(recursive=True):
            if "TrainWorker" in " ".join(process.cmdline()):
                process.kill()

    def kill_driver(self) -> None:
        assert self.driver
        family = psutil.Process(self.driver.pid).children(recursive=True)
        os.kill(self.driver.pid, signal.SIGKILL)
        self.driver.wait()
        for process in family:  # Ray would notice the loss only within a minute
            if process.is_running():
                process.kill()

    def finish(self) -> Curve:
        """Wait for the end; return the loss curve."""
        assert self.driver
        if self.driver.wait():
            raise SystemExit(self.log.read_text()[-2000:])
        return TrainingSummary.load(Run(f"{self.folder}/run").student.training).history


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.training_kills", description=__doc__)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--run", default=f"{HERE}/runs/benchmark-training", help="storage of a run with episodes")
    parser.add_argument("--picture", default=f"{HERE}/docs/results/training-resume.png")
    arguments = parser.parse_args(argv)
    folder = tempfile.mkdtemp(prefix="udrl-kills-")
    overrides = [f"episodes_from={os.path.abspath(arguments.run)}", *arguments.overrides]
    try:
        uninterrupted, killed = TrainingJob(f"{folder}/uninterrupted", overrides), TrainingJob(f"{folder}/killed", overrides)
        uninterrupted.start()
        expected = uninterrupted.finish()
        kills = []
        killed.start()
        killed.wait_for_checkpoint(40)
        killed.kill_worker()
        kills.append({"killed": "worker", "after": killed.step(), "from": killed.checkpoint_step()})
        killed.wait_for_checkpoint(120)
        killed.kill_driver()
        kills.append({"killed": "driver", "after": killed.step(), "from": killed.checkpoint_step()})
        killed.start()
        losses = killed.finish()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    differences = [abs(a - b) / b for (_, a), (_, b) in zip(losses, expected, strict=True)]
    plot(expected, losses, kills, arguments.picture)
    for kill in kills:
        print(f"{kill['killed']:<8} killed after step {kill['after']:,} or later; resumed from step {kill['from']:,}")
    print(f"losses of {len(differences):,} steps differ by at most {max(differences):.2e}")
    report = {"machine": machine(), "steps": len(losses), "kills": kills, "largest_relative_difference": max(differences)}
    print(json.dumps(report))


def plot(expected: Curve, losses: Curve, kills: list[dict[str, Any]], path: str) -> None:
    """Write a picture with both curves on top of each other, and the kills."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    _, axes = pyplot.subplots(figsize=(8, 3.6), layout="constrained")
    axes.plot(*zip(*expected, strict=True), color="#9ecae1", linewidth=4, label="uninterrupted")
    axes.plot(*zip(*losses, strict=True), color="#d62728", linewidth=1, label="killed twice")
    for kill in kills:
        axes.axvspan(kill["from"], kill["after"], color="0.9")
        axes.axvline(kill["after"], color="0.5", linewidth=1)
        axes.annotate(
            f"{kill['killed']} killed,\nresumed from {kill['from']}",
            (kill["after"], 0.97),
            xycoords=("data", "axes fraction"),
            xytext=(4, 0),
            textcoords="offset points",
            va="top",
            fontsize=8,
            color="0.3",
        )
    axes.set(xlabel="step", ylabel="training loss")
    axes.legend(frameon=False, loc="lower left")
    pyplot.savefig(path, dpi=120)


if __name__ == "__main__":
    main(sys.argv[1:])
