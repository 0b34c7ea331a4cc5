"""After any kill during a training, the same command resumes from the last complete checkpoint with the losses of an
uninterrupted training."""

import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from fakes.fake_episodes import fill_with_episodes
from fakes.killable_job import NOTICE_LOST_NODES_AT_ONCE, Killable, gone, wait

from udrl.run import Run, TrainingSummary
from udrl.train import checkpoint

TASKS = ["text_to_image", "image_search"]


class KillableTraining(Killable):
    """``jobs.train`` on synthetic episodes; it has 27 steps and writes a checkpoint every eight."""

    def __init__(self, folder: Path, **train: Any) -> None:
        super().__init__(folder)
        self.run = folder / "run"
        self.train = {"precision": "fp32", "epochs": 3, "batch_tokens": 512, "checkpoint_every": 8, "sample_intents": 0} | train

    def command(self) -> list[str]:
        values = {
            "name": "kill",
            "storage": str(self.run),
            "tasks": TASKS,
            "intents": {"limit": 10},
            "student": {"depth": 1, "width": 128, "vocab_size": 500, "context": 64},
            "train": self.train,
        }
        path = self.folder / "kill.yaml"
        path.write_text(yaml.safe_dump(values))
        return [sys.executable, "-m", "jobs.train", str(path)]

    def checkpoints(self) -> Path:
        (folder,) = (self.run / "checkpoints").iterdir()
        return folder

    def complete_steps(self) -> list[int]:
        """Return the steps of the complete checkpoints."""
        return [int(p.name[5:]) for p in sorted(self.checkpoints().glob("step-*")) if checkpoint.is_complete(str(p))]

    def summary(self) -> TrainingSummary:
        return TrainingSummary.load(Run(str(self.run)).student.training)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> KillableTraining:
    training = KillableTraining(tmp_path_factory.mktemp("uninterrupted"))
    fill_with_episodes(str(training.run))
    training.finish()
    return training


@pytest.fixture
def make_training(uninterrupted: KillableTraining, tmp_path: Path) -> Iterator[Callable[..., KillableTraining]]:
    """A function that makes trainings with the episodes and packed rows of the uninterrupted one."""
    trainings: list[KillableTraining] = []

    def make(**train: Any) -> KillableTraining:
        training = KillableTraining(tmp_path / f"training{len(trainings)}", **train)
        trainings.append(training)
        # Packed rows depend on neither workers nor kills.
        for name in ("episodes", "generate.json", "student_data"):
            source, target = uninterrupted.run / name, training.run / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
        return training

    yield make
    for training in trainings:
        training.end()


def assert_same_losses(killed: KillableTraining, uninterrupted: KillableTraining, resumed_at: int) -> None:
    summary, expected = killed.summary(), uninterrupted.summary()
    if killed.train.get("zero_stage", 1) == 1:  # the uninterrupted training's stage
        assert summary.fingerprint == expected.fingerprint
    assert (summary.resumed_at, expected.resumed_at) == (resumed_at, 0)
    assert [step for step, _ in summary.history] == [step for step, _ in expected.history]
    for (_, a), (_, b) in zip(expected.history, summary.history, strict=True):
        assert a == pytest.approx(b, rel=1e-3)
    assert all(checkpoint.is_complete(str(p)) for p in killed.checkpoints().glob("step-*"))  # no incomplete ones are left


@pytest.mark.parametrize("stage", [1, *(pytest.param(n, marks=pytest.mark.study) for n in (0, 2, 3))])
def test_a_kill_during_the_upload_of_a_checkpoint_resumes_from_the_one_before(
    make_training: Callable[..., KillableTraining], uninterrupted: KillableTraining, stage: int
) -> None:
    """First the driver of two workers is killed while one of them uploads, then the only worker of the resumed job."""
    killed = make_training(workers=2, zero_stage=stage)
    killed.fault("before-hold-16")
    killed.start()
    killed.until(lambda: killed.struck("before-hold-16"))
    killed.kill()
    assert killed.complete_steps() == [8]
    assert (killed.checkpoints() / "step-00000016" / "state").exists()
    killed.train["workers"] = 1
    killed.fault("before-kill-24")
    killed.finish()
    assert killed.struck("before-kill-24")
    assert killed.summary().workers == 1
    assert_same_losses(killed, uninterrupted, resumed_at=16)


@pytest.mark.parametrize("elastic", [pytest.param(False, marks=pytest.mark.study), True])
def test_a_lost_node_s_worker_is_replaced_or_the_training_continues_without_it(
    make_training: Callable[..., KillableTraining],
    uninterrupted: KillableTraining,
    monkeypatch: pytest.MonkeyPatch,
    elastic: bool,
) -> None:
    """One of two nodes is removed. With a third node two workers continue; without it the remaining one does, if elastic."""
    import ray
    from ray.cluster_utils import Cluster

    more = {"min_workers": 1} if elastic else {}
    killed = make_training(workers=2, placement_strategy="STRICT_SPREAD", threads=1, **more)
    killed.fault("after-hold-16")
    for name, value in (killed.environment() | NOTICE_LOST_NODES_AT_ONCE).items():
        monkeypatch.setenv(name, value)
    # Ray Train first waits for the old number of workers, because it does not know of the loss yet.
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "10")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        nodes = [cluster.add_node(num_cpus=1) for _ in range(2 if elastic else 3)]
        cluster.wait_for_nodes()
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        killed.start()
        killed.until(lambda: killed.struck("after-hold-16") and killed.complete_steps()[-1:] == [16])
        lost = next(node for node in nodes if training_workers(node))
        workers = training_workers(lost)
        cluster.remove_node(lost, allow_graceful=False)
        assert wait(lambda: all(map(gone, workers)))  # a moment later, about the time of the remaining steps
        killed.release()
        killed.finish()
        assert killed.summary().workers == (1 if elastic else 2)
        assert_same_losses(killed, uninterrupted, resumed_at=16)
    finally:
        killed.end()
        ray.shutdown()
        cluster.shutdown()


def training_workers(node: Any) -> list[psutil.Process]:
    """Return the processes of the training workers on this node of the test's cluster."""
    raylets = [info.process.pid for info in node.all_processes["raylet"]]
    children = [child for pid in raylets for child in psutil.Process(pid).children(recursive=True)]
    return [child for child in children if "TrainWorker" in " ".join(child.cmdline())]
