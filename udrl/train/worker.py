"""What each training worker does: a DeepSpeed engine over packed rows, inside a ``TorchTrainer``.

The rows of a step are a slice of a permutation seeded by the epoch, so they do not depend on the worker count, and the
step number alone is the data position.
"""

import math
import resource
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from udrl import cluster, storage, tokenizer
from udrl.commands import CommandVocabulary
from udrl.policies.student import fetch_student
from udrl.recipe import Recipe
from udrl.run import PackedDataPaths, PackedDataSummary, ValidationIntents
from udrl.train import checkpoint, export, flops, monitor
from udrl.train import deepspeed_engine as engines
from udrl.train import gpt2 as model
from udrl.train.packed_data import load_packed_rows
from udrl.train.packed_rows import PackedRows
from udrl.train.schedule import Plan, batch_rows, deepspeed_config
from udrl.train.tracking import Trackers

TOLD_EVERY = 10  # steps; reading a loss waits for the device
VALIDATION_ROWS = 256  # at most: a validation costs a few steps, however much is held out
REPORT_SECONDS = 10  # at least between reports to Ray Train: its controller takes one in two seconds, and the next waits
POINTS = 20_000  # of the loss curve that checkpoints carry; longer runs keep every k-th


@dataclass(frozen=True)
class Job:
    """What the driver hands to every worker; all of it plain but for ``board``, a Ray actor, and ``variables``."""

    recipe: dict[str, Any]
    data: str  # URI of the packed rows and the tokenizer
    runs: str  # URI of the checkpoints
    export: str  # URI of the finished student
    fingerprint: str
    start: str | None  # URI of an exported student to go on from
    lineage: dict[str, Any]
    board: Any
    variables: Any  # the trackers' environment, as a Ray object in a list


def train_worker(config: dict[str, Any]) -> None:
    """Run one worker of ``config["job"]``, a :class:`Job`: from the last complete checkpoint to the export."""
    _Worker(config["job"]).run()


class _Worker:
    def __init__(self, job: Job) -> None:
        import ray.train
        import torch

        self.job, self.recipe = job, Recipe.model_validate(job.recipe)
        context = ray.train.get_context()
        self.rank, self.world = context.get_world_rank(), context.get_world_size()
        self.local_rank = context.get_local_rank()
        if not self.recipe.train.gpus_per_worker:
            # Ray's workers share the machine's cores; its own OMP_NUM_THREADS would be the actor's CPU share.
            torch.set_num_threads(self.recipe.train.threads or max(1, cluster.cpu_count() // context.get_local_world_size()))
        data = PackedDataPaths(job.data)
        self.rows, self.validation = load_packed_rows(data, "train"), load_packed_rows(data, "validation")
        self.data_summary = PackedDataSummary.load(data.summary)
        self.folder = tokenizer_folder(data)
        self.words, self.vocabulary = tokenizer.load(self.folder), CommandVocabulary.load(self.folder)
        train, student = self.recipe.train, self.recipe.student
        self.plan = Plan.of(student, train, len(self.rows), self.data_summary.budget_rows, self.world)
        start = fetch_student(job.start) if job.start else None
        self.network = model.build(student, train, self.words, self.recipe.seed, start=start)
        self.history: list[tuple[int, float]] = []
        self.step = self.resumed_at = 0
        self.best = math.inf
        self.seen: dict[str, Any] = {}  # what the last validation showed
        self.settings = deepspeed_config(train, self.plan, self.world)
        self.engine, facts = engines.start(
            self.network, self.plan, self.settings, train, lr=self._lr(), runs=job.runs, local_rank=self.local_rank
        )
        if facts:
            self.step = self.resumed_at = facts["step"]
            self.history = [tuple(point) for point in facts["history"]]
            self.best, self.seen = facts["best"], facts["seen"]
        self.saver = checkpoint.Saver(job.runs, train.keep_checkpoints, self.rank, self.world)
        self.seconds: list[float] = []
        self.input_seconds = 0.0
        self.reported = -math.inf

    def run(self) -> None:
        every = max(1, self.plan.steps // POINTS)
        train = self.recipe.train
        trackers = self._trackers()
        speed = self._ceiling()
        begun = told = time.monotonic()
        waiting: list[tuple[int, Any]] = []
        for batch in self._batches():
            waiting.append((self.step, self._learn(batch)))
            self.step += 1
            last = self.step == self.plan.steps
            validate = self.step % (train.validate_every or train.checkpoint_every) == 0 or last
            save = self.step % train.checkpoint_every == 0 or last
            if len(waiting) == TOLD_EVERY or validate or save:
                losses = self._read(waiting)
                now = time.monotonic()
                self.seconds += [(now - told) / len(waiting)] * len(waiting)
                rate = len(waiting) * self.tokens_a_step / (now - told)
                waiting, told = [], now
                if not all(math.isfinite(loss) for _, loss in losses):
                    bad = next(step for step, loss in losses if not math.isfinite(loss))
                    self._post(problem=f"the loss is not finite at step {bad}; lower train.lr, or set train.precision=fp32")
                    return
                self.history += [(step, loss) for step, loss in losses if step % every == 0]
                self._post(step=self.step, loss=losses[-1][1], tokens_per_second=rate, mfu=rate / speed)
                if trackers:
                    for step, loss in losses:
                        trackers.scalars(step, {"train/loss": loss, "train/lr": self._lr() * self.plan.lr_factor(step - 1)})
                    norm = self.engine.get_global_grad_norm()
                    norm = None if norm is None else float(norm)
                    trackers.scalars(self.step, {"train/grad_norm": norm, "tokens_per_second": rate, "mfu": rate / speed})
            if validate:
                self._observe(trackers)
            if save:
                facts = {"step": self.step, "history": self.history, "best": self.best, "seen": self.seen}
                self.saver.save(self.engine, self.step, facts)
            if validate or save:
                told = time.monotonic()
        self.saver.settle()
        self._export(time.monotonic() - begun, speed)
        if trackers:
            trackers.close()

    # ---- start

    def _lr(self) -> float:
        return model.Shape.of(self.recipe.student, self.recipe.train).lr

    def _trackers(self) -> Trackers | None:
        import ray

        if self.rank != 0:
            return None
        variables = ray.get(self.job.variables[0])
        return Trackers(self.recipe, self.recipe.storage, self.job.fingerprint, step=self.step, variables=variables)

    def _ceiling(self) -> float:
        """Tokens a second that all workers would reach at what their devices do in a matrix product."""
        import torch

        dtype = next(self.engine.module.parameters()).dtype
        mine = torch.tensor(flops.ceiling(self.engine.device, dtype), device=self.engine.device)
        share = float(self.rows.target_counts.mean()) / self.rows.context
        self.tokens_a_step = self.plan.rows * self.rows.context * (1 - self.data_summary.padding)
        per_token = flops.train_flops_per_token(self.network.config, self.rows.context, share)
        return float(self._summed(mine)) / per_token

    # ---- steps

    def _batches(self) -> Iterator[tuple[int, list[Any]]]:
        """What each step left needs: the count of targets over all workers, and this worker's passes as tensors. The next
        step's are made while one is learnt."""
        with ThreadPoolExecutor(1, thread_name_prefix="input") as pool:
            steps = range(self.step, self.plan.steps)
            coming = pool.submit(self._make, steps[0]) if steps else None
            for step in steps:
                begun = time.perf_counter()
                assert coming
                batch = coming.result()
                self.input_seconds += time.perf_counter() - begun
                coming = pool.submit(self._make, step + 1) if step + 1 < self.plan.steps else None
                yield batch

    def _make(self, step: int) -> tuple[int, list[Any]]:
        chosen = batch_rows(len(self.rows), self.plan.rows, step, self.recipe.seed)
        # Over all workers, so that every target token weighs the same wherever it is trained.
        total = max(int(self.rows.target_counts[chosen].sum()), 1)
        return total, [self._tensors(self.rows, part) for part in self.plan.share_of(chosen, self.rank, self.world)]

    def _tensors(self, rows: PackedRows, part: np.ndarray) -> tuple[Any, Any, Any]:
        import torch

        batch = rows.take(part if len(part) else np.array([0]))
        if not len(part):
            batch.targets[:] = False  # a pass for company: other workers have rows left
        tensors = [torch.from_numpy(array) for array in (batch.tokens, batch.positions, batch.targets)]
        if self.recipe.train.gpus_per_worker:
            tensors = [tensor.pin_memory() for tensor in tensors]
        return tensors[0], tensors[1], tensors[2]

    def _learn(self, batch: tuple[int, list[Any]]) -> Any:
        """One optimizer step; returns this worker's part of the mean loss a target token, still on the device."""
        import torch

        total, passes = batch
        summed = torch.zeros((), device=self.engine.device)
        for tensors in passes:
            loss = self.engine(*(tensor.to(self.engine.device, non_blocking=True) for tensor in tensors))
            # DeepSpeed averages over workers and accumulation; undo both, for a mean over target tokens.
            self.engine.backward(loss * (self.world * self.plan.accumulation / total))
            self.engine.step()
            summed += loss.detach()
        return summed / total

    def _read(self, waiting: list[tuple[int, Any]]) -> list[tuple[int, float]]:
        """(step counted from 1, mean loss over all workers) of each step."""
        import torch

        losses = self._summed(torch.stack([loss for _, loss in waiting])).tolist()
        return [(step + 1, loss) for (step, _), loss in zip(waiting, losses, strict=True)]

    def _summed(self, value: Any) -> Any:
        import torch

        if self.world > 1:
            torch.distributed.all_reduce(value)
        return value

    # ---- validation, checkpoints, export

    def _observe(self, trackers: Trackers | None) -> None:
        """Validation loss; samples and how well lengths are kept; and the best weights so far, kept apart."""
        import ray.train

        self.seen = {"validation_loss": self._validation_loss()}
        held = self._held()
        synced = self.engine.zero_optimization_stage() == 3
        if held and (synced or self.rank == 0):
            observation = monitor.observe(
                self.network,
                self.words,
                self.vocabulary,
                held,
                self.recipe.seed,
                self.recipe.serve.sampling.max_tokens,
                commanded=self.vocabulary.objective == "udrl",
                synced=synced,
            )
            self.seen |= observation.metrics
            if self.rank == 0:
                uri = storage.join(self.job.runs, "samples", f"{checkpoint.name_of(self.step)}.md")
                storage.write_bytes(uri, (observation.markdown() + "\n").encode())
            if trackers:
                trackers.text(self.step, "samples", observation.markdown())
        if trackers:
            trackers.scalars(self.step, {f"validation/{name}": value for name, value in self.seen.items()})
            trackers.flush()
        loss = self.seen["validation_loss"]
        if loss is not None and loss < self.best:
            self.best = loss
            weights = export.weights(self.engine, self.network, self.rank)
            if self.rank == 0:
                checkpoint.save_best(self.job.runs, weights, {"step": self.step, "validation_loss": loss})
        self._post(**self.seen)
        # Worker 0's clock decides for all: report() waits for every worker.
        if engines.from_first(time.monotonic() - self.reported > REPORT_SECONDS):
            self.reported = time.monotonic()
            ray.train.report({"step": self.step, **self.seen})

    def _held(self) -> list[dict[str, Any]]:
        """The first intents of each task that are written out."""
        held, taken = [], dict.fromkeys(self.vocabulary.tasks, 0)
        for row in ValidationIntents.load(PackedDataPaths(self.job.data).validation_intents).intents:
            if taken[row.task] < self.recipe.train.sample_intents:
                taken[row.task] += 1
                held.append({"task": row.task, "intent": row.intent})
        return held

    def _validation_loss(self) -> float | None:
        """Mean loss a target token on validation rows spread over all of them; None where there are none."""
        import torch

        rows = self.validation
        if not len(rows):
            return None
        chosen = np.unique(np.linspace(0, len(rows) - 1, min(len(rows), VALIDATION_ROWS)).astype(np.int64))
        size = self.plan.micro * self.world
        self.engine.eval()
        summed = torch.zeros((), device=self.engine.device)
        with torch.no_grad():
            # Every worker makes as many forward passes: ZeRO 3 gathers weights in each.
            for start in range(0, len(chosen), size):
                tensors = self._tensors(rows, chosen[start : start + size][self.rank :: self.world])
                summed += self.engine(*(tensor.to(self.engine.device) for tensor in tensors))
        self.engine.train()
        return float(self._summed(summed)) / max(int(rows.target_counts[chosen].sum()), 1)

    def _post(self, **facts: Any) -> None:
        if self.rank == 0:
            self.job.board.post.remote({"steps": self.plan.steps, "resumed_at": self.resumed_at, **facts})

    def _export(self, seconds: float, ceiling: float) -> None:
        import ray.util
        import torch

        # The median step: a machine shared with others, or a checkpoint's writing, weighs on the mean.
        rate = self.tokens_a_step / float(np.median(self.seconds)) if self.seconds else 0.0
        peaks: list[Any] = [None] * self.world
        gpu = torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else 0.0
        mine = {
            "address": ray.util.get_node_ip_address(),
            "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            "peak_gpu_mib": gpu,
        }
        if self.world > 1:
            torch.distributed.all_gather_object(peaks, mine)
        else:
            peaks = [mine]
        training = {
            "round": self.job.lineage.get("round", 0),
            "objective": self.vocabulary.objective,
            "steps": self.plan.steps,
            "rows_per_step": self.plan.rows,
            "seconds": seconds,
            "tokens_per_second": rate,
            "mfu": rate / ceiling,
            "step_seconds": self.seconds[-1000:],
            "input_share": self.input_seconds / max(sum(self.seconds), 1e-9),
            "memory": peaks,
            "workers": self.world,
            "resumed_at": self.resumed_at,
            "history": self.history,
            "best_validation_loss": None if math.isinf(self.best) else self.best,
            **self.seen,
            "fingerprint": self.job.fingerprint,
            "shape": model.Shape.of(self.recipe.student, self.recipe.train).describe(),
            "data": self.data_summary.model_dump(mode="json"),
            "deepspeed": self.settings,
        }
        weights = export.weights(self.engine, self.network, self.rank)
        if self.rank != 0:
            return
        if self.recipe.train.export == "best" and not math.isinf(self.best):
            weights, facts = checkpoint.load_best(self.job.runs)
            training["exported_step"] = facts["step"]
        export.export(weights, self.network, self.folder, self.job.export, training, self.job.lineage)


def tokenizer_folder(data: PackedDataPaths) -> str:
    """Local copy of the run's tokenizer folder."""
    return storage.download_folder(data.tokenizer, tempfile.mkdtemp(prefix="udrl-tokenizer-"))
