"""One training twice: left alone, and with its worker and then its driver killed. Do the losses agree?

``python -m benchmarks.training_kills --run URI [--picture FILE] [key=value ...]`` trains the student of
``recipes/quickstart.yaml`` on the run's episodes. The second training's worker is killed (SIGKILL) once its first checkpoint is
whole, its driver after the third, and the same command is given again. Prints how far the losses differ, as its last line in
JSON, and draws both.
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
from udrl.train import checkpoint

STEP = re.compile(r"train: ([\d,]+)/[\d,]+ steps")


class Run:
    """``jobs.train`` into a folder of its own."""

    def __init__(self, folder: str, overrides: list[str]) -> None:
        self.folder, self.log = Path(folder), Path(folder) / "driver.log"
        self.folder.mkdir()
        values = [f"storage={folder}/run", "train.checkpoint_every=40", "train.epochs=2", *overrides]
        self.command = [sys.executable, "-m", "jobs.train", f"{HERE}/recipes/quickstart.yaml", *values]
        self.driver: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.driver = subprocess.Popen(self.command, cwd=HERE, stderr=self.log.open("ab"), start_new_session=True)

    def checkpoints(self) -> int:
        """Steps of the newest whole checkpoint."""
        for runs in self.folder.glob("run/checkpoints/*"):
            if found := checkpoint.latest(str(runs)):
                return int(found.rsplit("-", 1)[1])
        return 0

    def until(self, step: int) -> None:
        assert self.driver
        pause = threading.Event()
        while self.checkpoints() < step:
            if self.driver.poll() is not None:
                raise SystemExit(f"ended before step {step}:\n{self.log.read_text()[-2000:]}")
            pause.wait(0.2)

    def step(self) -> int:
        """The last step that is known: from the log, which tells one in ten seconds, or from the newest checkpoint."""
        told = STEP.findall(self.log.read_text())
        return max(self.checkpoints(), int(told[-1].replace(",", "")) if told else 0)

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
        for process in family:  # its Ray notices by itself within a minute
            if process.is_running():
                process.kill()

    def finish(self) -> dict[str, Any]:
        assert self.driver
        if self.driver.wait():
            raise SystemExit(self.log.read_text()[-2000:])
        facts: dict[str, Any] = json.loads((self.folder / "run" / "student" / "training.json").read_text())
        return facts


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.training_kills", description=__doc__)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--run", default=f"{HERE}/runs/benchmark-training", help="storage of a run with episodes")
    parser.add_argument("--picture", default=f"{HERE}/docs/results/training-resume.png")
    arguments = parser.parse_args(argv)
    folder = tempfile.mkdtemp(prefix="udrl-kills-")
    overrides = [f"episodes_from={os.path.abspath(arguments.run)}", *arguments.overrides]
    try:
        whole, broken = Run(f"{folder}/whole", overrides), Run(f"{folder}/broken", overrides)
        whole.start()
        unbroken = whole.finish()["history"]
        kills = []
        broken.start()
        broken.until(40)
        broken.kill_worker()
        kills.append({"killed": "worker", "after": broken.step(), "from": broken.checkpoints()})
        broken.until(120)
        broken.kill_driver()
        kills.append({"killed": "driver", "after": broken.step(), "from": broken.checkpoints()})
        broken.start()
        killed = broken.finish()["history"]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    apart = [abs(a - b) / b for (_, a), (_, b) in zip(killed, unbroken, strict=True)]
    draw(unbroken, killed, kills, arguments.picture)
    for kill in kills:
        print(f"{kill['killed']:<8} killed after step {kill['after']:,} or later; on from step {kill['from']:,}")
    print(f"losses of {len(apart):,} steps differ by {max(apart):.2e} at most")
    print(json.dumps({"machine": machine(), "steps": len(apart), "kills": kills, "largest_relative_difference": max(apart)}))


def draw(whole: list[Any], broken: list[Any], kills: list[dict[str, Any]], path: str) -> None:
    """Both curves on top of each other."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    _, axes = pyplot.subplots(figsize=(8, 3.6), layout="constrained")
    axes.plot(*zip(*whole, strict=True), color="#9ecae1", linewidth=4, label="unbroken")
    axes.plot(*zip(*broken, strict=True), color="#d62728", linewidth=1, label="killed twice")
    for kill in kills:
        axes.axvspan(kill["from"], kill["after"], color="0.9")
        axes.axvline(kill["after"], color="0.5", linewidth=1)
        axes.annotate(
            f"{kill['killed']} killed,\non from {kill['from']}",
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
