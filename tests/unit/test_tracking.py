"""Trackers: a resumed training continues its curves, remote storage, and failing trackers that do not end a training."""

import struct
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from fakes.tiny_student import in_object_store

from udrl import recipe, storage
from udrl.errors import UserError
from udrl.train import tracking


def a_recipe(folder: Path, *trackers: str) -> recipe.Recipe:
    values = {"name": "made-up", "storage": str(folder), "tasks": ["text_to_image"], "intents": {"limit": 3}}
    return recipe.from_values({**values, "train": {"trackers": list(trackers)}}, "test")


def events(folder: Path) -> list[Any]:
    """Return all events of TensorBoard's files, in the viewer's order."""
    from tensorboardX.proto.event_pb2 import Event

    parsed = []
    for file in sorted(folder.glob("events.*")):
        data, offset = file.read_bytes(), 0
        while offset < len(data):  # length, its checksum, the record, its checksum
            (size,) = struct.unpack_from("<Q", data, offset)
            parsed.append(Event.FromString(data[offset + 12 : offset + 12 + size]))
            offset += 16 + size
    return parsed


def curve(folder: Path, name: str) -> list[tuple[int, float]]:
    """Return the points that TensorBoard shows: a session that starts at a step hides older points from that step on."""
    points: list[tuple[int, float]] = []
    for event in events(folder):
        if event.session_log.status == 1:  # START
            points = [point for point in points if point[0] < event.step]
        points += [(event.step, v.simple_value) for v in event.summary.value if v.tag == name]
    return points


def test_a_resumed_training_continues_its_curve(tmp_path: Path) -> None:
    killed = tracking.Trackers(a_recipe(tmp_path), str(tmp_path), "abc")
    for step in range(1, 7):
        killed.scalars(step, {"loss": 1.0, "validation_loss": 2.0 if step == 4 else None})
    killed.flush()
    resumed = tracking.Trackers(a_recipe(tmp_path), str(tmp_path), "abc", step=4)
    for step in range(5, 9):
        resumed.scalars(step, {"loss": 3.0})
    resumed.text(8, "samples", "| a |")
    resumed.close()
    folder = tmp_path / "tensorboard" / "abc"
    assert curve(folder, "loss") == [(s, 1.0 if s <= 4 else 3.0) for s in range(1, 9)]
    assert curve(folder, "validation_loss") == [(4, 2.0)]
    texts = [v.tensor.string_val for e in events(folder) for v in e.summary.value if v.tag.startswith("samples")]
    assert texts == [[b"| a |"]]


def test_a_flush_uploads_the_files_to_remote_storage(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with in_object_store(tmp_path / "empty") as uri:
        trackers = tracking.Trackers(a_recipe(tmp_path), uri, "abc")
        trackers.scalars(1, {"loss": 1.0})
        folder = storage.join(uri, "tensorboard", "abc")
        assert not storage.exists(folder)
        trackers.flush()
        for name in storage.list_files(folder):
            (tmp_path / name).write_bytes(storage.read_bytes(storage.join(folder, name)))
        trackers.close()
    assert curve(tmp_path, "loss") == [(1, 1.0)]


def test_a_missing_package_or_address_is_an_error_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    tracking.require_trackers([])
    for name in ("MLFLOW_TRACKING_URI", "WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"mlflow is not installed; run: pip install 'udrl\[mlflow\]'"):
        tracking.require_trackers(["mlflow"])
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: object())
    with pytest.raises(UserError, match="MLFLOW_TRACKING_URI"):
        tracking.require_trackers(["mlflow"])
    with pytest.raises(UserError, match="WANDB_API_KEY or WANDB_MODE"):
        tracking.require_trackers(["wandb"])
    monkeypatch.setenv("WANDB_MODE", "offline")
    tracking.require_trackers(["wandb"])


def test_only_the_variables_of_configured_trackers_are_sent_to_the_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "k")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://there")
    assert tracking.tracker_environment([]) == {}
    assert tracking.tracker_environment(["wandb"])["WANDB_API_KEY"] == "k"
    assert "MLFLOW_TRACKING_URI" not in tracking.tracker_environment(["wandb"])


class Wandb:
    """A stand-in for the optional package: records the logged values, and fails while ``broken`` is set."""

    def __init__(self) -> None:
        self.logged: list[dict[str, Any]] = []
        self.ids: list[str] = []
        self.broken = False
        self.module = types.ModuleType("wandb")
        self.module.init = self.init  # type: ignore[attr-defined]
        self.module.Settings = dict  # type: ignore[attr-defined]
        self.module.Html = str  # type: ignore[attr-defined]
        self.offline = True

    def init(self, **settings: Any) -> "Wandb":
        self.ids.append(settings["id"])
        return self

    def define_metric(self, *names: str, **settings: str) -> None:
        pass

    def log(self, values: dict[str, Any]) -> None:
        if self.broken:
            raise ConnectionError("the server is\ngone")
        self.logged.append(values)

    def finish(self) -> None:
        pass


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Wandb:
    fake = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", fake.module)
    return fake


def test_a_failing_tracker_is_logged_once_and_dropped_after_three_consecutive_failures(
    tmp_path: Path, wandb: Wandb, capsys: pytest.CaptureFixture[str]
) -> None:
    trackers = tracking.Trackers(a_recipe(tmp_path, "wandb"), str(tmp_path), "abc")
    trackers.scalars(1, {"loss": 1.0})
    wandb.broken = True
    for step in (2, 3):
        trackers.scalars(step, {"loss": 1.0})
    wandb.broken = False  # a short failure: the tracker stays
    trackers.scalars(4, {"loss": 1.0})
    wandb.broken = True
    for step in (5, 6, 7):
        trackers.scalars(step, {"loss": 1.0})
    wandb.broken = False
    trackers.scalars(8, {"loss": 1.0})
    trackers.close()
    assert [row["step"] for row in wandb.logged] == [1, 4]
    assert capsys.readouterr().err.splitlines() == [
        "warning: train: wandb failed, training continues without it: the server is gone"
    ]
    assert len(curve(tmp_path / "tensorboard" / "abc", "loss")) == 8


def test_a_resumed_run_keeps_its_id_and_a_new_one_gets_its_own(tmp_path: Path, wandb: Wandb) -> None:
    for step in (0, 5, 0):
        tracking.Trackers(a_recipe(tmp_path, "wandb"), str(tmp_path), "abc", step=step)
    assert wandb.ids[0] == wandb.ids[1] != wandb.ids[2]


def test_mlflow_records_a_resumed_run_if_it_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    for step in (0, 2):
        trackers = tracking.Trackers(a_recipe(tmp_path, "mlflow"), str(tmp_path), "abc", step=step)
        for s in (step + 1, step + 2):
            trackers.scalars(s, {"loss": float(s)})
        trackers.text(step + 2, "samples", "| a |")
        trackers.close()
    run = storage.read_json(str(tmp_path / "tensorboard" / "abc" / tracking.RUN_IDS))["mlflow"]
    client = MlflowClient()
    assert [(m.step, m.value) for m in client.get_metric_history(run, "loss")] == [(s, float(s)) for s in (1, 2, 3, 4)]
    assert client.get_run(run).info.status == "FINISHED"
    assert client.get_run(run).data.params["train.zero_stage"] == "1"
