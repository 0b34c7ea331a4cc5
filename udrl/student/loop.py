"""What each training worker does: a DeepSpeed engine over packed rows, inside a ``TorchTrainer``.

The rows of a step are a slice of a permutation seeded by the epoch, so they do not depend on the worker count, and the
step number alone is the data position.
"""

import math
import os
import tempfile
import time
from functools import lru_cache
from typing import Any

import numpy as np

from udrl import cluster
from udrl.recipe import Recipe
from udrl.student import dataset, model, tokenizer
from udrl.student.checkpoint import load, save
from udrl.student.export import export
from udrl.student.packing import Rows


def train_worker(config: dict[str, Any]) -> None:
    """Run one worker. ``config`` has recipe (plain values), data and export URIs, fingerprint, and the progress board."""
    import deepspeed
    import ray.train
    import torch

    recipe = Recipe.model_validate(config["recipe"])
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    on_gpu = recipe.train.gpus_per_worker > 0
    if not on_gpu:
        # Ray's workers share the machine's cores; its own OMP_NUM_THREADS would be the actor's CPU share.
        torch.set_num_threads(recipe.train.threads or max(1, cluster.cpus() // context.get_local_world_size()))
    rows = dataset.load_rows(config["data"], "train")
    validation = dataset.load_rows(config["data"], "validation")
    words = tokenizer.load(tokenizer_folder(config["data"]))
    network = model.build(recipe.student, recipe.train, words, recipe.seed)
    plan = Plan.of(recipe, len(rows), world)

    student = _Student(network)
    settings = deepspeed_config(recipe, plan, world)
    engine, _, _, schedule = deepspeed.initialize(
        model=student,
        optimizer=_optimizer(network, recipe),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, plan.lr_factor),
        config=settings,
        dist_init_required=False,
    )
    del schedule  # DeepSpeed steps it
    history: list[tuple[int, float]] = []
    step = 0
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is not None:
        step, history = load(engine, checkpoint)
    board = config["board"] if rank == 0 else None
    begun, begun_step = time.monotonic(), step
    tokens_a_step = plan.rows * recipe.student.context
    while step < plan.steps:
        loss = _train_step(engine, rows, plan, step, rank, world, recipe.seed)
        step += 1
        history.append((step, loss))
        last = step == plan.steps
        if board is not None:
            speed = (step - begun_step) * tokens_a_step / (time.monotonic() - begun)
            board.post.remote(
                {"step": step, "steps": plan.steps, "loss": loss, "tokens_per_second": speed, "resumed_at": begun_step}
            )
        if step % recipe.train.checkpoint_every == 0 or last:
            metrics = {"step": step, "loss": loss, "validation_loss": _validate(engine, validation, plan.micro, rank, world)}
            with tempfile.TemporaryDirectory() as folder:
                save(engine, folder, step, history)
                ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))
            if board is not None:
                board.post.remote(metrics)
    training = {
        "steps": plan.steps,
        "rows_per_step": plan.rows,
        "seconds": time.monotonic() - begun,
        "tokens_per_second": (step - begun_step) * tokens_a_step / max(time.monotonic() - begun, 1e-9),
        "workers": world,
        "resumed_at": begun_step,
        "history": history,
        "validation_loss": _validate(engine, validation, plan.micro, rank, world),
        "fingerprint": config["fingerprint"],
        "shape": model.Shape.of(recipe.student, recipe.train).describe(),
        "deepspeed": settings,
    }
    export(engine, network, tokenizer_folder(config["data"]), config["export"], training, rank)


class Plan:
    """How many steps, of how many rows, at which learning rate."""

    def __init__(self, steps: int, rows: int, micro: int, accumulation: int, warmup: int) -> None:
        self.steps, self.rows, self.micro, self.accumulation, self.warmup = steps, rows, micro, accumulation, warmup

    @classmethod
    def of(cls, recipe: Recipe, n_rows: int, world: int) -> "Plan":
        """Rows a step follow ``train.batch_tokens``, cut to the data and to a multiple of the workers."""
        wanted = max(world, min(recipe.train.batch_tokens // recipe.student.context, n_rows))
        share = max(1, wanted // world)
        micro = min(recipe.train.micro_batch_rows or share, share)
        accumulation = max(1, share // micro)
        rows = micro * accumulation * world
        steps = max(1, math.ceil(recipe.train.epochs * n_rows / rows))
        return cls(steps, rows, micro, accumulation, math.ceil(recipe.train.warmup * steps))

    def lr_factor(self, step: int) -> float:
        """Linear warm-up, then a cosine to a tenth."""
        if step < self.warmup:
            return (step + 1) / max(1, self.warmup)
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return 0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, done)))


def deepspeed_config(recipe: Recipe, plan: Plan, world: int) -> dict[str, Any]:
    """DeepSpeed's JSON, from the recipe."""
    return {
        "train_micro_batch_size_per_gpu": plan.micro,
        "gradient_accumulation_steps": plan.accumulation,
        "train_batch_size": plan.rows,
        "gradient_clipping": recipe.train.clip,
        "bf16": {"enabled": recipe.train.precision == "bf16"},
        "zero_optimization": {"stage": recipe.train.zero_stage},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }


def batch_rows(n_rows: int, size: int, step: int, seed: int) -> np.ndarray:
    """Indices of the rows of one step, int64 of shape (size,): epochs are permutations laid end to end."""
    start = step * size
    out = np.empty(size, dtype=np.int64)
    filled = 0
    while filled < size:
        epoch, offset = divmod(start + filled, n_rows)
        take = min(size - filled, n_rows - offset)
        out[filled : filled + take] = _order(n_rows, epoch, seed)[offset : offset + take]
        filled += take
    return out


@lru_cache(maxsize=2)
def _order(n_rows: int, epoch: int, seed: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(n_rows)


def tokenizer_folder(data: str) -> str:
    """Local copy of the run's tokenizer folder."""
    from udrl import storage

    return storage.download_folder(
        storage.join(data, "tokenizer"), os.path.join(tempfile.gettempdir(), "udrl-tokenizer-" + str(os.getpid()))
    )


def _train_step(engine: Any, rows: Rows, plan: Plan, step: int, rank: int, world: int, seed: int) -> float:
    """One optimizer step; returns the mean loss a target token over all workers."""
    import torch

    chosen = batch_rows(len(rows), plan.rows, step, seed)
    # The count over all workers, so that every target token weighs the same wherever it is trained.
    total = max(int(rows.targets[chosen][:, 1:].sum()), 1)
    mine = chosen[rank::world]
    summed = torch.zeros((), device=engine.device)
    for i in range(plan.accumulation):
        part = mine[i * plan.micro : (i + 1) * plan.micro]
        loss = engine(*_tensors(rows, part, engine.device))
        # DeepSpeed averages over workers and accumulation; undo both, for a mean over target tokens.
        engine.backward(loss * (world * plan.accumulation / total))
        engine.step()
        summed += loss.detach()
    return float(_sum_over_workers(summed, world)) / total


def _validate(engine: Any, rows: Rows, micro: int, rank: int, world: int) -> float | None:
    """Mean loss a target token on the validation rows; None where there are none."""
    import torch

    if not len(rows):
        return None
    engine.eval()
    summed = torch.zeros((), device=engine.device)
    # Every worker runs as many forward passes: ZeRO 3 gathers weights in each.
    passes = math.ceil(len(rows) / (micro * world))
    with torch.no_grad():
        for i in range(passes):
            part = np.arange(len(rows))[(i * world + rank) * micro : (i * world + rank + 1) * micro]
            keep = part if len(part) else np.array([0])
            loss = engine(*_tensors(rows, keep, engine.device))
            summed += loss.detach() if len(part) else 0
    engine.train()
    return float(_sum_over_workers(summed, world)) / max(int(rows.targets[:, 1:].sum()), 1)


def _tensors(rows: Rows, part: np.ndarray, device: Any) -> tuple[Any, Any, Any]:
    import torch

    return (
        torch.from_numpy(rows.tokens[part].astype(np.int64)).to(device),
        torch.from_numpy(rows.positions[part].astype(np.int64)).to(device),
        torch.from_numpy(rows.targets[part]).to(device),
    )


def _sum_over_workers(value: Any, world: int) -> Any:
    import torch

    if world > 1:
        torch.distributed.all_reduce(value)
    return value


def _optimizer(network: Any, recipe: Recipe) -> Any:
    """AdamW; matrices decay, biases and layer norms do not."""
    import torch

    matrices = [p for p in network.parameters() if p.ndim >= 2]
    rest = [p for p in network.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": recipe.train.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        groups, lr=model.Shape.of(recipe.student, recipe.train).lr, betas=(0.9, 0.95), eps=1e-8, fused=True
    )


def _Student(network: Any) -> Any:
    import torch

    class Student(torch.nn.Module):
        """The network as DeepSpeed sees it: rows in, loss out."""

        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, tokens: Any, positions: Any, targets: Any) -> Any:
            return model.packed_loss(self.network, tokens, positions, targets)

    return Student()
