"""Where a training's curves go: TensorBoard always, MLflow and Weights & Biases where the recipe asks for them.

The libraries are used directly rather than through Ray's ``setup_mlflow`` and ``setup_wandb``: those start a new run each time
that the workers start, and a resumed training would leave a piece of its curve in each.
"""

import importlib.util
import os
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from udrl import storage
from udrl.errors import UserError
from udrl.recipe import Recipe

FOLDER = "tensorboard"
IDS = "trackers.json"  # the runs that a resumed training goes on with
PREFIXES = {"mlflow": ("MLFLOW_", "DATABRICKS_"), "wandb": ("WANDB_",)}
TRIES = 3  # failures in a row after which a tracker is left alone
BATCH = 1000  # metrics that MLflow takes in one request; parameters, 100


class Tracker(Protocol):
    """What a tracker can do; any of it may raise."""

    def scalars(self, step: int, values: dict[str, float]) -> None: ...
    def text(self, step: int, name: str, markdown: str) -> None: ...
    def flush(self) -> None: ...
    def close(self) -> None: ...


def check(trackers: Sequence[str]) -> None:
    """To be called on the driver before anything starts.

    Raises:
        UserError: a tracker's package is missing, or its environment says neither where to nor with which key.
    """
    for name, package, variables, remedy in (
        ("mlflow", "mlflow", ["MLFLOW_TRACKING_URI"], "set it to your server, such as http://host:5000"),
        ("wandb", "wandb", ["WANDB_API_KEY", "WANDB_MODE"], "set your key, or WANDB_MODE=offline"),
    ):
        if name not in trackers:
            continue
        if importlib.util.find_spec(package) is None:
            raise UserError(f"train.trackers: {name} is not installed; run: pip install 'udrl[{name}]'")
        if not any(os.environ.get(variable) for variable in variables):
            raise UserError(f"train.trackers: {name} needs {' or '.join(variables)} in the environment; {remedy}")


def environment(trackers: Sequence[str]) -> dict[str, str]:
    """The trackers' own variables on the driver, keys among them, for worker 0.

    Hand it over as a Ray object. Ray Train shows a run's ``worker_runtime_env`` and ``train_loop_config`` in its dashboard.
    """
    prefixes = tuple(prefix for name in trackers for prefix in PREFIXES[name])
    return {name: value for name, value in os.environ.items() if prefixes and name.startswith(prefixes)}


class Trackers:
    """All trackers of one training. Worker 0 alone makes one, after it has loaded its checkpoint.

    A tracker that fails is told once on stderr and, after three failures in a row, left alone; training goes on.

    Args:
        run: URI of the run's storage; TensorBoard's files lie under ``tensorboard/<name>`` of it.
        name: of the training; a resumed one has the same.
        step: the step gone on from. What was written of later steps before a kill is hidden, or written again.
        variables: what :func:`environment` gave on the driver; those of this process win.
    """

    def __init__(self, recipe: Recipe, run: str, name: str, *, step: int = 0, variables: dict[str, str] | None = None) -> None:
        for key, value in (variables or {}).items():
            os.environ.setdefault(key, value)
        ids_file = storage.join(run, FOLDER, name, IDS)
        ids: dict[str, str] = storage.read_json(ids_file) if step and storage.exists(ids_file) else {}
        known = dict(ids)
        home = storage.open_filesystem(run)[1] if storage.is_local(run) else tempfile.mkdtemp(prefix="udrl-trackers-")
        makers: dict[str, Callable[[], Tracker]] = {
            "tensorboard": lambda: _TensorBoard(home, run, name, step),
            "mlflow": lambda: _MLflow(recipe, name, ids),
            "wandb": lambda: _Wandb(recipe, home, run, name, ids),
        }
        self._trackers: dict[str, Tracker] = {}
        self._failures: dict[str, int] = {}
        self._told: set[str] = set()
        for kind in ["tensorboard", *recipe.train.trackers]:
            try:
                self._trackers[kind] = makers[kind]()
            except Exception as error:
                self._tell(kind, error)
        if ids != known:
            storage.write_json(ids_file, ids)

    def scalars(self, step: int, values: dict[str, float | None]) -> None:
        """Add a point to each named curve; None is no point. Cheap: what goes over a network waits for :meth:`flush`."""
        points = {name: float(value) for name, value in values.items() if value is not None}
        self._each(lambda tracker: tracker.scalars(step, points))

    def text(self, step: int, name: str, markdown: str) -> None:
        """Add a text, such as samples."""
        self._each(lambda tracker: tracker.text(step, name, markdown))

    def flush(self) -> None:
        """Make what was added visible to others; call it at each validation."""
        self._each(lambda tracker: tracker.flush())

    def close(self) -> None:
        """Flush and mark the runs as finished. A training that will be resumed must not call it."""
        self.flush()
        self._each(lambda tracker: tracker.close())
        self._trackers = {}

    def _each(self, act: Callable[[Tracker], None]) -> None:
        for kind, tracker in list(self._trackers.items()):
            try:
                act(tracker)
                self._failures[kind] = 0
            except Exception as error:  # whatever a tracker's library or server does, the training is worth more
                self._tell(kind, error)
                self._failures[kind] = self._failures.get(kind, 0) + 1
                if self._failures[kind] >= TRIES:
                    del self._trackers[kind]

    def _tell(self, kind: str, error: Exception) -> None:
        if kind not in self._told:
            self._told.add(kind)
            line = " ".join(str(error).split())[:300] or type(error).__name__
            print(f"train: {kind} failed, training goes on without it: {line}", file=sys.stderr, flush=True)


class _TensorBoard:
    """Event files by tensorboardX's synchronous writer: the flush of its ``SummaryWriter`` leaves behind what is queued."""

    def __init__(self, home: str, run: str, name: str, step: int) -> None:
        from tensorboardX import summary
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        self.folder = os.path.join(home, FOLDER, name)
        self.uri = None if storage.is_local(run) else storage.join(run, FOLDER, name)
        os.makedirs(self.folder, exist_ok=True)
        self.summary, self.event = summary, Event
        # Files are told apart, and read in order, by name: the second, then the suffix.
        self.writer = EventsWriter(os.path.join(self.folder, "events"), f".{step:08d}")
        # The viewer drops points from this step on that earlier files hold.
        start = SessionLog(status=SessionLog.START)
        self.writer.write_event(Event(wall_time=time.time(), step=step + 1, session_log=start))

    def scalars(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._write(step, self.summary.scalar(name, value))

    def text(self, step: int, name: str, markdown: str) -> None:
        self._write(step, self.summary.text(name, markdown))

    def _write(self, step: int, made: Any) -> None:
        self.writer.write_event(self.event(wall_time=time.time(), step=step, summary=made))

    def flush(self) -> None:
        self.writer.flush()
        if self.uri:
            storage.upload_folder(self.folder, self.uri)

    def close(self) -> None:
        self.writer.close()


class _MLflow:
    def __init__(self, recipe: Recipe, name: str, ids: dict[str, str]) -> None:
        # Its own defaults would hold a step for many minutes where the server is gone.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self.metric, self.client = Metric, MlflowClient()
        self.waiting: list[Any] = []
        if "mlflow" in ids:
            self.run = ids["mlflow"]
            self.client.update_run(self.run, status="RUNNING")
            return
        experiment = self.client.get_experiment_by_name(recipe.name)
        number = experiment.experiment_id if experiment else self.client.create_experiment(recipe.name)
        self.run = ids["mlflow"] = self.client.create_run(number, run_name=name).info.run_id
        params = [Param(key, str(value)) for key, value in _flat(recipe.model_dump(mode="json")).items()]
        for start in range(0, len(params), BATCH // 10):
            self.client.log_batch(self.run, params=params[start : start + BATCH // 10])

    def scalars(self, step: int, values: dict[str, float]) -> None:
        now = int(time.time() * 1000)
        self.waiting += [self.metric(name, value, now, step) for name, value in values.items()]

    def text(self, step: int, name: str, markdown: str) -> None:
        self.client.log_text(self.run, markdown, f"{name}/{step:08d}.md")

    def flush(self) -> None:
        while self.waiting:
            self.client.log_batch(self.run, metrics=self.waiting[:BATCH])
            del self.waiting[:BATCH]

    def close(self) -> None:
        self.client.set_terminated(self.run)


class _Wandb:
    def __init__(self, recipe: Recipe, home: str, run: str, name: str, ids: dict[str, str]) -> None:
        import wandb

        ids.setdefault("wandb", uuid.uuid4().hex[:8])
        self.html = wandb.Html
        self.run = wandb.init(
            project=recipe.name,
            name=name,
            id=ids["wandb"],
            resume="allow",
            config=recipe.model_dump(mode="json"),
            dir=os.environ.get("WANDB_DIR", home),
            settings=wandb.Settings(console="off", init_timeout=60, silent=True),
        )
        # Its own step only rises and would refuse what a resumed training writes again.
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")
        self.folder = os.path.join(home, "wandb")
        self.uri = storage.join(run, "wandb") if self.run.offline and not storage.is_local(run) else None

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self.run.log({**values, "step": step})

    def text(self, step: int, name: str, markdown: str) -> None:
        import html

        self.run.log({name: self.html(f"<pre>{html.escape(markdown)}</pre>"), "step": step})

    def flush(self) -> None:
        """Its own process sends as it goes."""

    def close(self) -> None:
        self.run.finish()
        if self.uri:
            storage.upload_folder(self.folder, self.uri)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"train": {"lr": 1}}`` -> ``{"train.lr": 1}``."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
