"""Training curves in TensorBoard always, and in MLflow and Weights & Biases if the recipe asks for them.

The libraries are used directly rather than through Ray's ``setup_mlflow`` and ``setup_wandb``: those start a new run each time
that the workers start, which would split the curve of a resumed training.
"""

import importlib.util
import logging
import os
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from udrl import storage
from udrl.errors import UserError
from udrl.recipe import Recipe
from udrl.run import Run

log = logging.getLogger(__name__)

RUN_IDS = "trackers.json"  # the trackers' ids of the run, by which a resumed training continues it
ENVIRONMENT_PREFIXES = {"mlflow": ("MLFLOW_", "DATABRICKS_"), "wandb": ("WANDB_",)}
MAX_FAILURES = 3  # consecutive failures after which a tracker is dropped
MLFLOW_METRICS, MLFLOW_PARAMS = 1000, 100  # most metrics and parameters in one request, by MLflow's limits


class Tracker(Protocol):
    """The interface of a tracker; every method may raise."""

    def scalars(self, step: int, values: dict[str, float]) -> None: ...
    def text(self, step: int, name: str, markdown: str) -> None: ...
    def flush(self) -> None: ...
    def close(self) -> None: ...


def require_trackers(trackers: Sequence[str]) -> None:
    """Check on the driver, before anything starts, that the trackers can be used.

    Raises:
        UserError: a tracker's package is not installed, or its environment has no address or key.
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


def tracker_environment(trackers: Sequence[str]) -> dict[str, str]:
    """Return the trackers' environment variables on the driver, which include keys, for worker 0.

    Send them as a Ray object: Ray Train's dashboard shows a run's ``worker_runtime_env`` and ``train_loop_config``.
    """
    prefixes = tuple(prefix for name in trackers for prefix in ENVIRONMENT_PREFIXES[name])
    return {name: value for name, value in os.environ.items() if prefixes and name.startswith(prefixes)}


class Trackers:
    """All trackers of one training. Only worker 0 creates it, after it has restored its checkpoint.

    A tracker that fails is logged once, and dropped after three consecutive failures; training continues.

    Args:
        run: URI of the run's storage.
        name: of the training; a resumed training has the same.
        step: step that the training resumes from. Points of later steps, from before the kill, are hidden or overwritten.
        environment: from :func:`tracker_environment` on the driver; variables of this process take precedence.
    """

    def __init__(
        self, recipe: Recipe, run: str, name: str, *, step: int = 0, environment: dict[str, str] | None = None
    ) -> None:
        for key, value in (environment or {}).items():
            os.environ.setdefault(key, value)
        ids_file = storage.join(Run(run).tensorboard(name), RUN_IDS)
        ids: dict[str, str] = storage.read_json(ids_file) if step and storage.exists(ids_file) else {}
        saved_ids = dict(ids)
        local_run = storage.open_filesystem(run)[1] if storage.is_local(run) else tempfile.mkdtemp(prefix="udrl-trackers-")
        constructors: dict[str, Callable[[], Tracker]] = {
            "tensorboard": lambda: _TensorBoard(local_run, run, name, step),
            "mlflow": lambda: _MLflow(recipe, name, ids),
            "wandb": lambda: _Wandb(recipe, local_run, run, name, ids),
        }
        self._trackers: dict[str, Tracker] = {}
        self._failures: dict[str, int] = {}
        self._logged: set[str] = set()
        for kind in ["tensorboard", *recipe.train.trackers]:
            try:
                self._trackers[kind] = constructors[kind]()
            except Exception as error:
                self._log_once(kind, error)
        if ids != saved_ids:
            storage.write_json(ids_file, ids)

    def scalars(self, step: int, values: dict[str, float | None]) -> None:
        """Add a point to each named curve; None adds no point. Points for a server are queued until :meth:`flush`."""
        points = {name: float(value) for name, value in values.items() if value is not None}
        self._call_each(lambda tracker: tracker.scalars(step, points))

    def text(self, step: int, name: str, markdown: str) -> None:
        """Add a text, such as samples."""
        self._call_each(lambda tracker: tracker.text(step, name, markdown))

    def flush(self) -> None:
        """Publish the queued points; called at each validation."""
        self._call_each(lambda tracker: tracker.flush())

    def close(self) -> None:
        """Flush and mark the runs as finished; not called by a training that will be resumed."""
        self.flush()
        self._call_each(lambda tracker: tracker.close())
        self._trackers = {}

    def _call_each(self, call: Callable[[Tracker], None]) -> None:
        for kind, tracker in list(self._trackers.items()):
            try:
                call(tracker)
                self._failures[kind] = 0
            except Exception as error:  # any failure of a tracker's library or server: the training is worth more
                self._log_once(kind, error)
                self._failures[kind] = self._failures.get(kind, 0) + 1
                if self._failures[kind] >= MAX_FAILURES:
                    del self._trackers[kind]

    def _log_once(self, kind: str, error: Exception) -> None:
        if kind not in self._logged:
            self._logged.add(kind)
            message = " ".join(str(error).split())[:300] or type(error).__name__
            log.warning("train: %s failed, training continues without it: %s", kind, message)


class _TensorBoard:
    """Event files by tensorboardX's synchronous writer: a flush of its ``SummaryWriter`` does not wait for its queue."""

    def __init__(self, local_run: str, run: str, name: str, step: int) -> None:
        from tensorboardX import summary
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        self.folder = Run(local_run).tensorboard(name)
        self.uri = None if storage.is_local(run) else Run(run).tensorboard(name)
        os.makedirs(self.folder, exist_ok=True)
        self.summary, self.event = summary, Event
        # TensorBoard reads the files in the order of their names, which end in the second and this suffix.
        self.writer = EventsWriter(os.path.join(self.folder, "events"), f".{step:08d}")
        # A session start makes the viewer drop the points of earlier files from this step on.
        start = SessionLog(status=SessionLog.START)
        self.writer.write_event(Event(wall_time=time.time(), step=step + 1, session_log=start))

    def scalars(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._write(step, self.summary.scalar(name, value))

    def text(self, step: int, name: str, markdown: str) -> None:
        self._write(step, self.summary.text(name, markdown))

    def _write(self, step: int, summary: Any) -> None:
        self.writer.write_event(self.event(wall_time=time.time(), step=step, summary=summary))

    def flush(self) -> None:
        self.writer.flush()
        if self.uri:
            storage.upload_folder(self.folder, self.uri)

    def close(self) -> None:
        self.writer.close()


class _MLflow:
    def __init__(self, recipe: Recipe, name: str, ids: dict[str, str]) -> None:
        # MLflow's defaults would block a step for many minutes if the server is gone.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self.metric, self.client = Metric, MlflowClient()
        self.queue: list[Any] = []
        if "mlflow" in ids:
            self.run = ids["mlflow"]
            self.client.update_run(self.run, status="RUNNING")
            return
        experiment = self.client.get_experiment_by_name(recipe.name)
        experiment_id = experiment.experiment_id if experiment else self.client.create_experiment(recipe.name)
        self.run = ids["mlflow"] = self.client.create_run(experiment_id, run_name=name).info.run_id
        params = [Param(key, str(value)) for key, value in _flatten(recipe.model_dump(mode="json")).items()]
        for start in range(0, len(params), MLFLOW_PARAMS):
            self.client.log_batch(self.run, params=params[start : start + MLFLOW_PARAMS])

    def scalars(self, step: int, values: dict[str, float]) -> None:
        now = int(time.time() * 1000)
        self.queue += [self.metric(name, value, now, step) for name, value in values.items()]

    def text(self, step: int, name: str, markdown: str) -> None:
        self.client.log_text(self.run, markdown, f"{name}/{step:08d}.md")

    def flush(self) -> None:
        while self.queue:
            self.client.log_batch(self.run, metrics=self.queue[:MLFLOW_METRICS])
            del self.queue[:MLFLOW_METRICS]

    def close(self) -> None:
        self.client.set_terminated(self.run)


class _Wandb:
    def __init__(self, recipe: Recipe, local_run: str, run: str, name: str, ids: dict[str, str]) -> None:
        import wandb

        ids.setdefault("wandb", uuid.uuid4().hex[:8])
        self.html = wandb.Html
        self.run = wandb.init(
            project=recipe.name,
            name=name,
            id=ids["wandb"],
            resume="allow",
            config=recipe.model_dump(mode="json"),
            dir=os.environ.get("WANDB_DIR", local_run),
            settings=wandb.Settings(console="off", init_timeout=60, silent=True),
        )
        # The default step must only rise; wandb would refuse the steps that a resumed training repeats.
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")
        self.folder = Run(local_run).wandb
        self.uri = Run(run).wandb if self.run.offline and not storage.is_local(run) else None

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self.run.log({**values, "step": step})

    def text(self, step: int, name: str, markdown: str) -> None:
        import html

        self.run.log({name: self.html(f"<pre>{html.escape(markdown)}</pre>"), "step": step})

    def flush(self) -> None:
        """Do nothing: wandb's own process sends continuously."""

    def close(self) -> None:
        self.run.finish()
        if self.uri:
            storage.upload_folder(self.folder, self.uri)


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return dotted keys: ``{"train": {"lr": 1}}`` -> ``{"train.lr": 1}``."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
