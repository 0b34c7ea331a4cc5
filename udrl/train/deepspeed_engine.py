"""DeepSpeed's engine around the network, at the state of the last complete checkpoint."""

import os
import shutil
import tempfile
from typing import Any

from udrl import internals
from udrl.hashing import fingerprint_of_bytes
from udrl.recipe import Train
from udrl.train import checkpoint
from udrl.train.checkpoint import TrainingState
from udrl.train.gpt2 import packed_loss
from udrl.train.schedule import TrainingPlan


def start_engine(
    network: Any, plan: TrainingPlan, settings: dict[str, Any], train: Train, *, lr: float, checkpoints: str, local_rank: int
) -> tuple[Any, TrainingState]:
    """Return the engine and the state of the training loop: of the newest complete checkpoint, else a new one.

    A collective: every worker calls it, inside ``torch.distributed``. A checkpoint of another number of workers is converted to
    DeepSpeed's universal form first. An optimizer or a scheduler in ``settings`` replaces ours.
    """
    import torch

    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    # One worker looks: an object store may list a new checkpoint to another worker a moment later.
    if rank == 0:
        # The previous workers' parts of the steps that are trained again must not mix with the new parts.
        checkpoint.remove_incomplete(checkpoints)
    newest = broadcast_from_rank_0(checkpoint.latest(checkpoints) if rank == 0 else None)
    # Stage 0 shards nothing, so its checkpoint does not depend on the number of workers.
    sharded = settings.get("zero_optimization", {}).get("stage", 0) > 0
    resharded = bool(newest) and sharded and checkpoint.world_size_of(newest) != world_size
    if resharded:
        settings = settings | {"checkpoint": settings.get("checkpoint", {}) | {"load_universal": True}}
    engine = _initialize(network, plan, settings, train, lr)
    if not newest:
        return engine, TrainingState()
    with tempfile.TemporaryDirectory() as folder:
        local = checkpoint.open_local(newest, folder)
        if resharded:
            return engine, _restore_resharded(engine, newest, local, local_rank, own_optimizer="optimizer" not in settings)
        return engine, checkpoint.restore(engine, local)


def _initialize(network: Any, plan: TrainingPlan, settings: dict[str, Any], train: Train, lr: float) -> Any:
    import deepspeed
    import torch

    groups = _parameter_groups(network, train.weight_decay)
    own_optimizer = "optimizer" not in settings
    engine, _, _, _ = deepspeed.initialize(
        model=_with_packed_loss(network),
        model_parameters=None if own_optimizer else groups,
        optimizer=_adamw(groups, lr) if own_optimizer else None,
        lr_scheduler=None if "scheduler" in settings else lambda o: torch.optim.lr_scheduler.LambdaLR(o, plan.lr_factor),
        config=settings,
        dist_init_required=False,
    )
    optimizer = internals.inner_optimizer(engine)
    if own_optimizer and isinstance(optimizer, torch.optim.AdamW):
        # Some of DeepSpeed's wrappers create the states by a step on zero gradients, which AdamW counts as its first.
        for state in optimizer.state.values():
            state["step"].zero_()
    return engine


def _restore_resharded(engine: Any, uri: str, local: str, local_rank: int, own_optimizer: bool) -> TrainingState:
    """Restore a checkpoint of another number of workers. The first worker of each node converts it for all of them."""
    import ray
    import torch

    node = ray.get_runtime_context().get_node_id()[:8]  # in the name, because two nodes may share a machine
    name = f"udrl-universal-{fingerprint_of_bytes(uri.encode())}-{node}-{os.getuid()}"
    converted = os.path.join(tempfile.gettempdir(), name)
    if local_rank == 0:
        checkpoint.convert_checkpoint(local, converted)
    torch.distributed.barrier()
    weight_decays = [group["weight_decay"] for group in engine.optimizer.param_groups]
    state = checkpoint.restore(engine, converted)
    if own_optimizer and engine.zero_optimization_stage() == 3:
        # DeepSpeed gives all groups the settings of the first one, and all states one shared step counter.
        for group, weight_decay in zip(engine.optimizer.param_groups, weight_decays, strict=True):
            group["weight_decay"] = weight_decay
        for optimizer_state in internals.inner_optimizer(engine).state.values():
            optimizer_state["step"] = optimizer_state["step"].clone()
    torch.distributed.barrier()  # all workers have read it
    shutil.rmtree(converted, ignore_errors=True)
    return state


def broadcast_from_rank_0(value: Any) -> Any:
    """Return rank 0's value on every worker."""
    import torch

    values = [value]
    torch.distributed.broadcast_object_list(values, src=0)
    return values[0]


def _parameter_groups(network: Any, weight_decay: float) -> list[dict[str, Any]]:
    """Return two groups: matrices decay, biases and layer norms do not."""
    matrices = [p for p in network.parameters() if p.ndim >= 2]
    vectors = [p for p in network.parameters() if p.ndim < 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def _adamw(groups: list[dict[str, Any]], lr: float) -> Any:
    """Return AdamW with the settings of GPT-3 (arXiv 2005.14165)."""
    import torch

    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=1e-8, fused=True)


def _with_packed_loss(network: Any) -> Any:
    """Return the network as a module that DeepSpeed calls with packed rows and that returns their loss."""
    import torch

    class Student(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, tokens: Any, positions: Any, targets: Any) -> Any:
            return packed_loss(self.network, tokens, positions, targets)

    return Student()
