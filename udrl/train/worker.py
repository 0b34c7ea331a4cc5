"""One training worker: a DeepSpeed engine over packed rows, inside Ray Train's ``TorchTrainer``.

The rows of a step are a slice of a permutation seeded by the epoch. They do not depend on the number of workers, and the step
number is all that a checkpoint needs to know of the data position.
"""

import dataclasses
import logging
import math
import resource
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from udrl import cluster, logs, storage, tokenizer
from udrl.commands import CommandVocabulary
from udrl.errors import UserError
from udrl.policies.student import fetch_student
from udrl.recipe import Recipe
from udrl.run import PackedDataPaths, PackedDataSummary, TrainingSummary, ValidationIntent, ValidationIntents, WorkerMemory
from udrl.tasks import Task
from udrl.train import checkpoint, deepspeed_engine, export, gpt2, monitor
from udrl.train.packed_data import load_packed_rows
from udrl.train.packing import PackedRows
from udrl.train.progress_actor import TrainingProgress
from udrl.train.schedule import TrainingPlan, deepspeed_config, rows_of_step
from udrl.train.tracking import Trackers

log = logging.getLogger(__name__)

LOSS_READ_STEPS = 10  # steps between reads of the loss: a read waits for the device
MAX_VALIDATION_ROWS = 256  # rows; bounds a validation to the time of a few steps
REPORT_SECONDS = 10  # seconds between reports to Ray Train, at least: its controller handles one every two seconds
MAX_HISTORY = 20_000  # points of the loss curve in a checkpoint; longer trainings keep every k-th
MAX_STEP_SECONDS = 1_000  # step times in training.json: the last ones


@dataclass(frozen=True)
class WorkerJob:
    """The job that the driver sends to every worker."""

    tasks: list[Task]
    recipe: Recipe  # local paths are absolute: Ray Train's workers have another working folder
    data: PackedDataPaths
    checkpoints: str  # folder URI
    student: str  # folder URI of the export
    fingerprint: str
    round: int
    initial_student: str | None  # folder URI of the exported student whose weights the training starts from
    lineage: export.Lineage
    progress_actor: Any  # handle of a ProgressActor
    tracker_environment: Any  # Ray object reference of tracking.tracker_environment, because its values are secret


def train_worker(config: dict[str, Any]) -> None:
    """Train from the last complete checkpoint to the export. ``config["job"]`` is a :class:`WorkerJob`."""
    logs.configure()
    _Worker(config["job"]).run()


@dataclass(frozen=True)
class _StepInput:
    """One worker's input of one optimizer step."""

    target_count: int  # over all workers, so that every target token has the same weight
    micro_batches: list[tuple[Any, Any, Any]]  # tensors: tokens, positions, targets


class _InputPipeline:
    """Prepares the input of the next step in a thread while the current step trains."""

    def __init__(self, rows: PackedRows, plan: TrainingPlan, seed: int, rank: int, world_size: int, pin_memory: bool) -> None:
        self.rows, self.plan, self.seed = rows, plan, seed
        self.rank, self.world_size, self.pin_memory = rank, world_size, pin_memory
        self.wait_seconds = 0.0

    def iterate(self, first_step: int) -> Iterator[_StepInput]:
        """Yield the input of each remaining step."""
        with ThreadPoolExecutor(1, thread_name_prefix="input") as pool:
            steps = range(first_step, self.plan.steps)
            pending = pool.submit(self._load, first_step) if steps else None
            for step in steps:
                start = time.perf_counter()
                assert pending
                step_input = pending.result()
                self.wait_seconds += time.perf_counter() - start
                pending = pool.submit(self._load, step + 1) if step + 1 < self.plan.steps else None
                yield step_input

    def _load(self, step: int) -> _StepInput:
        step_rows = rows_of_step(len(self.rows), self.plan.rows_per_step, step, self.seed)
        target_count = max(int(self.rows.target_counts[step_rows].sum()), 1)
        shares = self.plan.micro_batches(step_rows, self.rank, self.world_size)
        return _StepInput(target_count, [to_tensors(self.rows, share, self.pin_memory) for share in shares])


def to_tensors(rows: PackedRows, numbers: np.ndarray, pin_memory: bool) -> tuple[Any, Any, Any]:
    """Return tokens, positions and targets of the numbered rows, each (rows, row_tokens); one row without targets if empty."""
    import torch

    batch = rows.take(numbers if len(numbers) else np.array([0]))
    if not len(numbers):
        batch.targets[:] = False  # dummy forward pass: every rank must join the collectives
    tensors = [torch.from_numpy(array) for array in (batch.tokens, batch.positions, batch.targets)]
    if pin_memory:
        tensors = [tensor.pin_memory() for tensor in tensors]
    return tensors[0], tensors[1], tensors[2]


class _Worker:
    """The training loop of one rank. Methods that other ranks must call at the same time are marked as collectives."""

    def __init__(self, job: WorkerJob) -> None:
        import ray.train

        self.job, self.recipe = job, job.recipe
        train, student = self.recipe.train, self.recipe.student
        context = ray.train.get_context()
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self.on_gpu = train.gpus_per_worker > 0
        self._set_threads(context.get_local_world_size())

        self.rows, self.validation_rows = load_packed_rows(job.data, "train"), load_packed_rows(job.data, "validation")
        self.data_summary = PackedDataSummary.load(job.data.summary)
        self.tokenizer_folder = storage.download_folder(job.data.tokenizer, tempfile.mkdtemp(prefix="udrl-tokenizer-"))
        self.tokenizer = tokenizer.load_tokenizer(self.tokenizer_folder)
        self.vocabulary = CommandVocabulary.load(self.tokenizer_folder)

        self.shape = gpt2.Shape.of(student, train)
        self.plan = TrainingPlan.of(student, train, len(self.rows), self.data_summary.budget_rows, self.world_size)
        self.input = _InputPipeline(self.rows, self.plan, self.recipe.seed, self.rank, self.world_size, pin_memory=self.on_gpu)
        initial_student = fetch_student(job.initial_student) if job.initial_student else None
        embeddings = job.data.embeddings if storage.exists(job.data.embeddings) else None
        self.network = gpt2.build_network(student, train, self.tokenizer, self.recipe.seed, initial_student, embeddings)
        self.deepspeed_settings = deepspeed_config(train, self.plan, self.world_size)
        self.engine, self.state = deepspeed_engine.start_engine(
            self.network,
            self.plan,
            self.deepspeed_settings,
            train,
            lr=self.shape.lr,
            checkpoints=job.checkpoints,
            local_rank=context.get_local_rank(),
        )
        self.resumed_at = self.state.step
        if not self.resumed_at:
            self._seed_dropout()
        self.saver = checkpoint.CheckpointSaver(job.checkpoints, train.keep_checkpoints, self.rank, self.world_size)
        self.trackers = self._open_trackers() if self.rank == 0 else None
        self.scorer = self._load_scorer() if self.rank == 0 else None
        self.max_tokens_per_second = self._measure_max_tokens_per_second()

        self.progress = TrainingProgress(
            steps=self.plan.steps,
            resumed_at=self.resumed_at,
            validation_loss=self.state.validation.get("validation_loss"),
            length_error=self.state.validation.get("length_error"),
            coverage=self.state.validation.get("coverage"),
        )
        self.unread_losses: list[Any] = []  # of the newest steps, still on the device
        self.step_seconds: list[float] = []
        self.last_read = self.last_report = -math.inf

    def run(self) -> None:
        """Train to the last step and export the student; end without one if the loss is not finite."""
        train = self.recipe.train
        start = self.last_read = time.monotonic()
        for step_input in self.input.iterate(self.state.step):
            self.unread_losses.append(self._train_step(step_input))
            self.state.step += 1
            validates = self._is_due(train.validate_every or train.checkpoint_every)
            saves = self._is_due(train.checkpoint_every)
            if (len(self.unread_losses) == LOSS_READ_STEPS or validates or saves) and not self._read_losses():
                return
            if validates:
                self._validate()
            if saves:
                self.saver.save(self.engine, self.state)
            if validates or saves:
                self.last_read = time.monotonic()  # validations and checkpoints do not count as time of a step
        self.saver.wait()
        self._export(time.monotonic() - start)
        if self.trackers:
            self.trackers.close()

    # ---- setup

    def _set_threads(self, workers_on_node: int) -> None:
        """Divide the node's cores among its workers; Ray sets OMP_NUM_THREADS to the actor's CPU share instead."""
        import torch

        if not self.on_gpu:
            torch.set_num_threads(self.recipe.train.threads or max(1, cluster.cpu_count() // workers_on_node))

    def _seed_dropout(self) -> None:
        """Give every worker masks of its own: all have built the network from the same seed. A checkpoint holds the state."""
        import torch

        torch.manual_seed(self.recipe.seed + 1 + self.rank)

    def _open_trackers(self) -> Trackers:
        import ray

        environment = ray.get(self.job.tracker_environment)
        return Trackers(self.recipe, self.recipe.storage, self.job.fingerprint, step=self.state.step, environment=environment)

    def _load_scorer(self) -> monitor.SampleScorer | None:
        """Return the scorer of samples; None if a judge scores relevance, or if this node can't load the embedder."""
        rewards = self.recipe.rewards
        if rewards.relevance != "embedding" or not self._sampled_intents():
            return None
        try:
            return monitor.SampleScorer(self.job.tasks, rewards)
        except (UserError, OSError) as error:
            log.warning("train: samples have no reward: %s", error)
            return None

    def _measure_max_tokens_per_second(self) -> float:
        """Return the speed of all workers if their devices did nothing but matrix products; a collective."""
        import torch

        dtype = next(self.engine.module.parameters()).dtype
        rate = torch.tensor(monitor.peak_flops_per_second(self.engine.device, dtype), device=self.engine.device)
        target_share = float(self.rows.target_counts.mean()) / self.rows.row_tokens
        flops_per_token = monitor.train_flops_per_token(self.network.config, self.rows.row_tokens, target_share)
        return float(self._sum_over_workers(rate)) / flops_per_token

    def _mfu(self, tokens_per_second: float) -> float:
        """Return model FLOPs utilization; at most 1, which a measured peak of a busy machine would exceed."""
        return min(1.0, tokens_per_second / self.max_tokens_per_second)

    @property
    def tokens_per_step(self) -> float:
        """Tokens of all workers in one step, without padding."""
        return self.plan.rows_per_step * self.rows.row_tokens * (1 - self.data_summary.padding)

    # ---- steps

    def _is_due(self, every: int) -> bool:
        return self.state.step % every == 0 or self.state.step == self.plan.steps

    def _train_step(self, step_input: _StepInput) -> Any:
        """Take one optimizer step; return this worker's part of the mean loss per target token, on the device."""
        import torch

        loss_sum = torch.zeros((), device=self.engine.device)
        for tensors in step_input.micro_batches:
            loss = self.engine(*(tensor.to(self.engine.device, non_blocking=True) for tensor in tensors))
            # DeepSpeed averages over workers and accumulation; this factor makes it a mean over target tokens.
            self.engine.backward(loss * (self.world_size * self.plan.accumulation / step_input.target_count))
            self.engine.step()
            loss_sum += loss.detach()
        return loss_sum / step_input.target_count

    def _read_losses(self) -> bool:
        """Read the losses of the newest steps, record and post them; return whether all are finite. A collective."""
        import torch

        n = len(self.unread_losses)
        losses = self._sum_over_workers(torch.stack(self.unread_losses)).tolist()
        points = list(zip(range(self.state.step - n + 1, self.state.step + 1), losses, strict=True))  # steps count from 1
        now = time.monotonic()
        seconds = now - self.last_read
        self.step_seconds += [seconds / n] * n
        self.unread_losses, self.last_read = [], now
        for step, loss in points:
            if not math.isfinite(loss):
                remedy = "lower train.lr, or set train.precision=fp32"
                self._post(problem=f"the loss is not finite at step {step}; {remedy}")
                return False
        every = max(1, self.plan.steps // MAX_HISTORY)
        self.state.history += [(step, loss) for step, loss in points if step % every == 0]
        tokens_per_second = n * self.tokens_per_step / seconds
        mfu = self._mfu(tokens_per_second)
        self._post(step=self.state.step, loss=losses[-1], tokens_per_second=tokens_per_second, mfu=mfu)
        if self.trackers:
            for step, loss in points:
                lr = self.shape.lr * self.plan.lr_factor(step - 1)
                self.trackers.scalars(step, {"train/loss": loss, "train/lr": lr})
            norm = self.engine.get_global_grad_norm()
            norm = None if norm is None else float(norm)
            self.trackers.scalars(
                self.state.step, {"train/grad_norm": norm, "tokens_per_second": tokens_per_second, "mfu": mfu}
            )
        return True

    def _sum_over_workers(self, tensor: Any) -> Any:
        import torch

        if self.world_size > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

    def _post(self, **changes: Any) -> None:
        """Update the progress that the driver shows."""
        if self.rank == 0:
            self.progress = dataclasses.replace(self.progress, **changes)
            self.job.progress_actor.post.remote(self.progress)

    # ---- validation

    def _validate(self) -> None:
        """Measure validation loss and length control, and keep the weights if they are the best so far; a collective."""
        import ray.train

        loss = self._validation_loss()
        observation = self._observe_samples()
        metrics = observation.metrics if observation else {}
        self.state.validation = {"validation_loss": loss, **metrics}
        if self.trackers:
            if observation:
                self.trackers.text(self.state.step, "samples", observation.markdown())
            self.trackers.scalars(
                self.state.step, {f"validation/{name}": value for name, value in self.state.validation.items()}
            )
            self.trackers.flush()
        if loss is not None and loss < self.state.best_validation_loss:
            self.state.best_validation_loss = loss
            weights = export.gather_weights(self.engine, self.network, self.rank)
            if self.rank == 0:
                checkpoint.save_best(self.job.checkpoints, weights, self.state.step, loss)
        self._post(validation_loss=loss, length_error=metrics.get("length_error"), coverage=metrics.get("coverage"))
        # Rank 0's clock decides for all ranks, because report() waits for every worker.
        if deepspeed_engine.broadcast_from_rank_0(time.monotonic() - self.last_report > REPORT_SECONDS):
            self.last_report = time.monotonic()
            ray.train.report({"step": self.state.step, **self.state.validation})

    def _validation_loss(self) -> float | None:
        """Return the mean loss per target token on validation rows spread evenly; None if there are none. A collective."""
        import torch

        rows = self.validation_rows
        if not len(rows):
            return None
        numbers = np.unique(np.linspace(0, len(rows) - 1, min(len(rows), MAX_VALIDATION_ROWS)).astype(np.int64))
        size = self.plan.micro_batch_rows * self.world_size
        self.engine.eval()
        loss_sum = torch.zeros((), device=self.engine.device)
        with torch.no_grad():
            # Every worker makes the same number of forward passes: ZeRO-3 gathers weights in each.
            for start in range(0, len(numbers), size):
                tensors = to_tensors(rows, numbers[start : start + size][self.rank :: self.world_size], self.on_gpu)
                loss_sum += self.engine(*(tensor.to(self.engine.device) for tensor in tensors))
        self.engine.train()
        return float(self._sum_over_workers(loss_sum)) / max(int(rows.target_counts[numbers].sum()), 1)

    def _observe_samples(self) -> monitor.Observation | None:
        """Let the student write for a few validation intents, and save the samples. Only ZeRO-3 needs all ranks for it."""
        intents = self._sampled_intents()
        synced = self.engine.zero_optimization_stage() == 3
        if not intents or (self.rank != 0 and not synced):
            return None
        observation = monitor.observe(
            self.network,
            self.tokenizer,
            self.vocabulary,
            intents,
            self.recipe.seed,
            self.recipe.serve.sampling.max_tokens,
            commanded=self.vocabulary.objective == "udrl",
            synced=synced,
            scorer=self.scorer,
        )
        if self.rank == 0:
            uri = storage.join(self.job.checkpoints, "samples", f"{checkpoint.step_folder(self.state.step)}.md")
            storage.write_bytes(uri, (observation.markdown() + "\n").encode())
        return observation

    def _sampled_intents(self) -> list[ValidationIntent]:
        """Return the first ``train.sample_intents`` validation intents of each task."""
        counts = dict.fromkeys(self.vocabulary.tasks, 0)
        sampled = []
        for row in ValidationIntents.load(self.job.data.validation_intents).intents:
            if counts[row.task] < self.recipe.train.sample_intents:
                counts[row.task] += 1
                sampled.append(row)
        return sampled

    # ---- export

    def _export(self, seconds: float) -> None:
        """Export the student and its summary; a collective."""
        summary = self._summarize(seconds)
        weights = export.gather_weights(self.engine, self.network, self.rank)
        if self.rank != 0:
            return
        if self.recipe.train.export == "best" and summary.best_validation_loss is not None:
            weights, best = checkpoint.load_best(self.job.checkpoints)
            summary.exported_step = best.step
        export.export_student(weights, self.network, self.tokenizer_folder, self.job.student, summary, self.job.lineage)

    def _summarize(self, seconds: float) -> TrainingSummary:
        # The median, because a shared machine or the upload of a checkpoint slows single steps.
        tokens_per_second = self.tokens_per_step / float(np.median(self.step_seconds)) if self.step_seconds else 0.0
        best = self.state.best_validation_loss
        validation = {name: value for name, value in self.state.validation.items() if value is not None}
        return TrainingSummary(
            fingerprint=self.job.fingerprint,
            round=self.job.round,
            objective=self.vocabulary.objective,
            steps=self.plan.steps,
            rows_per_step=self.plan.rows_per_step,
            seconds=seconds,
            tokens_per_second=tokens_per_second,
            mfu=self._mfu(tokens_per_second),
            step_seconds=self.step_seconds[-MAX_STEP_SECONDS:],
            input_share=self.input.wait_seconds / max(sum(self.step_seconds), 1e-9),
            memory=self._gather_memory(),
            workers=self.world_size,
            resumed_at=self.resumed_at,
            history=self.state.history,
            best_validation_loss=None if math.isinf(best) else best,
            validation_loss=validation.pop("validation_loss", None),
            validation=validation,
            shape=dataclasses.asdict(self.shape),
            data=self.data_summary,
            deepspeed=self.deepspeed_settings,
        )

    def _gather_memory(self) -> list[WorkerMemory]:
        """Return every worker's peak memory; a collective."""
        import ray.util
        import torch

        memory = WorkerMemory(
            address=ray.util.get_node_ip_address(),
            peak_rss_mib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            peak_gpu_mib=torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else 0.0,
        )
        gathered: list[Any] = [memory] * self.world_size
        if self.world_size > 1:
            torch.distributed.all_gather_object(gathered, memory)
        return gathered
