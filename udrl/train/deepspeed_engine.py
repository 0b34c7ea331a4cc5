"""DeepSpeed's engine around the network, where the last complete checkpoint left it."""

import hashlib
import os
import shutil
import tempfile
from typing import Any

from udrl import internals
from udrl.recipe import Train
from udrl.train import checkpoint
from udrl.train.gpt2 import packed_loss
from udrl.train.schedule import Plan


def start(
    network: Any, plan: Plan, settings: dict[str, Any], train: Train, *, lr: float, runs: str, local_rank: int
) -> tuple[Any, dict[str, Any]]:
    """The engine, and the facts of the checkpoint that it goes on from (empty where there is none).

    Every worker calls it, inside ``torch.distributed``. A checkpoint of another number of workers is converted to
    DeepSpeed's universal form first. ``settings`` with an optimizer or a schedule of their own take their place.
    """
    import deepspeed
    import ray
    import torch

    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    # One worker looks: storage may show a checkpoint to the next a moment later.
    if rank == 0:
        checkpoint.sweep(runs)  # of the workers before these: the same steps are written again, and no old part may join in
    found = from_first(checkpoint.latest(runs) if rank == 0 else None)
    # Stage 0 shards nothing: its checkpoint is the same whoever wrote it.
    sharded = settings.get("zero_optimization", {}).get("stage", 0) > 0
    other = bool(found) and sharded and checkpoint.world_of(found) != world
    if other:
        settings = settings | {"checkpoint": settings.get("checkpoint", {}) | {"load_universal": True}}
    groups = parameter_groups(network, train.weight_decay)
    engine, _, _, _ = deepspeed.initialize(
        model=_Student(network),
        model_parameters=groups if "optimizer" in settings else None,
        optimizer=None if "optimizer" in settings else optimizer(groups, lr),
        lr_scheduler=None if "scheduler" in settings else lambda o: torch.optim.lr_scheduler.LambdaLR(o, plan.lr_factor),
        config=settings,
        dist_init_required=False,
    )
    inner = internals.inner_optimizer(engine)
    if isinstance(inner, torch.optim.AdamW) and "optimizer" not in settings:
        # Some of DeepSpeed's wrappers make the states by a step on zero gradients, which AdamW counts as its first.
        for state in inner.state.values():
            state["step"].zero_()
    if not found:
        return engine, {}
    with tempfile.TemporaryDirectory() as folder:
        local = checkpoint.fetch(found, folder)
        if other:
            node = ray.get_runtime_context().get_node_id()[:8]  # nodes may share a machine
            name = f"udrl-universal-{hashlib.sha256(found.encode()).hexdigest()[:16]}-{node}-{os.getuid()}"
            shared = os.path.join(tempfile.gettempdir(), name)
            if local_rank == 0:  # for all workers of the node
                checkpoint.universal(local, shared)
            torch.distributed.barrier()
            local = shared
        decays = [group["weight_decay"] for group in engine.optimizer.param_groups] if other else []
        facts = checkpoint.load(engine, local)
        if other:
            if engine.zero_optimization_stage() == 3 and "optimizer" not in settings:
                # DeepSpeed gives all groups the first one's settings, and all states one counter of steps.
                for group, decay in zip(engine.optimizer.param_groups, decays, strict=True):
                    group["weight_decay"] = decay
                for state in inner.state.values():
                    state["step"] = state["step"].clone()
            torch.distributed.barrier()  # all have read it
            shutil.rmtree(local, ignore_errors=True)
        return engine, facts


def from_first(value: Any) -> Any:
    """Worker 0's value, on every worker."""
    import torch

    box = [value]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def parameter_groups(network: Any, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay, biases and layer norms do not."""
    matrices = [p for p in network.parameters() if p.ndim >= 2]
    rest = [p for p in network.parameters() if p.ndim < 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]


def optimizer(groups: list[dict[str, Any]], lr: float) -> Any:
    """AdamW as GPT-3's (arXiv 2005.14165)."""
    import torch

    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=1e-8, fused=True)


def _Student(network: Any) -> Any:
    import torch

    class Student(torch.nn.Module):
        """The network as DeepSpeed sees it: rows in, loss out."""

        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, tokens: Any, positions: Any, targets: Any) -> Any:
            return packed_loss(self.network, tokens, positions, targets)

    return Student()
