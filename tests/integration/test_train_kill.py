"""Whatever is killed while a student is trained, the same command goes on from the last whole checkpoint with the losses of
a run that nothing happened to."""

import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from fakes.fake_episodes import fill_with_episodes
from killing import Killable, gone, wait

from udrl import storage
from udrl.train import checkpoint

TASKS = ["text_to_image", "image_search"]


class Training(Killable):
    """``jobs.train`` on made-up episodes; it writes a checkpoint every eight of its 27 steps."""

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

    def runs(self) -> str:
        (found,) = (self.run / "checkpoints").iterdir()
        return str(found)

    def steps(self) -> list[int]:
        """Of the complete checkpoints."""
        return [int(p.name[5:]) for p in sorted(Path(self.runs()).glob("step-*")) if checkpoint.is_complete(str(p))]

    def facts(self) -> dict[str, Any]:
        facts: dict[str, Any] = storage.read_json(str(self.run / "student" / "training.json"))
        return facts


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Training:
    whole = Training(tmp_path_factory.mktemp("unbroken"))
    fill_with_episodes(str(whole.run))
    whole.finish()
    return whole


@pytest.fixture
def training(unbroken: Training, tmp_path: Path) -> Iterator[Callable[..., Training]]:
    made: list[Training] = []

    def make(**train: Any) -> Training:
        made.append(Training(tmp_path / f"training{len(made)}", **train))
        # Its episodes, and its packed rows: they depend on neither workers nor kills.
        for name in ("episodes", "generate.json", "student_data"):
            source, target = unbroken.run / name, made[-1].run / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
        return made[-1]

    yield make
    for killed in made:
        killed.end()


def assert_same_losses(broken: Training, unbroken: Training, resumed_at: int) -> None:
    facts, whole = broken.facts(), unbroken.facts()
    if "zero_stage" not in broken.train or broken.train["zero_stage"] == 1:  # as the unbroken run has it
        assert facts["fingerprint"] == whole["fingerprint"]
    assert (facts["resumed_at"], whole["resumed_at"]) == (resumed_at, 0)
    assert [step for step, _ in facts["history"]] == [step for step, _ in whole["history"]]
    for (_, a), (_, b) in zip(whole["history"], facts["history"], strict=True):
        assert a == pytest.approx(b, rel=1e-3)
    assert all(checkpoint.is_complete(str(p)) for p in Path(broken.runs()).glob("step-*"))  # no debris


@pytest.mark.parametrize("stage", [1, *(pytest.param(n, marks=pytest.mark.study) for n in (0, 2, 3))])
def test_a_checkpoint_that_was_being_written_is_not_one(
    training: Callable[..., Training], unbroken: Training, stage: int
) -> None:
    """First the driver of two workers is killed while one of them writes, then the one worker that its job goes on with."""
    killed = training(workers=2, zero_stage=stage)
    killed.fault("before-hold-16")
    killed.start()
    killed.until(lambda: killed.struck("before-hold-16"))
    killed.kill()
    assert killed.steps() == [8]
    assert (Path(killed.runs()) / "step-00000016" / "state").exists()
    killed.train["workers"] = 1
    killed.fault("before-kill-24")
    killed.finish()
    assert killed.struck("before-kill-24")
    assert killed.facts()["workers"] == 1
    assert_same_losses(killed, unbroken, resumed_at=16)


@pytest.mark.parametrize("elastic", [pytest.param(False, marks=pytest.mark.study), True])
def test_a_lost_node_s_worker_is_replaced_or_done_without(
    training: Callable[..., Training], unbroken: Training, monkeypatch: pytest.MonkeyPatch, elastic: bool
) -> None:
    """Two workers on two nodes; one node goes. With a third node both go on, without it the one that is left does."""
    import ray
    from ray.cluster_utils import Cluster

    more = {"min_workers": 1} if elastic else {}
    killed = training(workers=2, placement_strategy="STRICT_SPREAD", threads=1, **more)
    killed.fault("after-hold-16")
    for name, value in killed.environment().items():
        monkeypatch.setenv(name, value)
    # Ray Train first waits for as many workers as before, since it has not yet heard of the loss.
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "10")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        nodes = [cluster.add_node(num_cpus=1) for _ in range(2 if elastic else 3)]
        cluster.wait_for_nodes()
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        killed.start()
        killed.until(lambda: killed.struck("after-hold-16") and killed.steps()[-1:] == [16])
        lost = next(node for node in nodes if trainers(node))
        victims = trainers(lost)
        cluster.remove_node(lost, allow_graceful=False)
        assert wait(lambda: all(map(gone, victims)))  # they notice a moment later; what is left of 27 steps takes no longer
        killed.release()
        killed.finish()
        assert killed.facts()["workers"] == (1 if elastic else 2)
        assert_same_losses(killed, unbroken, resumed_at=16)
    finally:
        killed.end()
        ray.shutdown()
        cluster.shutdown()


def trainers(node: Any) -> list[psutil.Process]:
    """The training workers on this node of the test's cluster."""
    raylets = [info.process.pid for info in node.all_processes["raylet"]]
    children = [child for pid in raylets for child in psutil.Process(pid).children(recursive=True)]
    return [child for child in children if "TrainWorker" in " ".join(child.cmdline())]
