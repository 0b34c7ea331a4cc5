"""Checkpoints of the training loop. Ray Train stores one only after every worker has reported it, so it is whole or absent."""

import os
from typing import Any

TAG = "state"


def save(engine: Any, folder: str, step: int, history: list[tuple[int, float]]) -> None:
    """Write this worker's part: weights, optimizer and schedule by DeepSpeed, data position and RNG beside them."""
    import torch

    client = {"step": step, "history": history, "rng": torch.get_rng_state()}
    engine.save_checkpoint(folder, tag=TAG, client_state=client)


def load(engine: Any, checkpoint: Any) -> tuple[int, list[tuple[int, float]]]:
    """Restore all of it; return the step to go on from and the losses so far.

    Raises:
        UserError: the checkpoint was written by another number of workers.
    """
    import torch

    from udrl.errors import UserError

    with checkpoint.as_directory() as folder:
        parts = [n for n in os.listdir(os.path.join(folder, TAG)) if "optim_states" in n]
        world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        if engine.zero_optimization_stage() > 0 and len(parts) not in (0, world):
            raise UserError(f"checkpoint of {len(parts)} workers can't be resumed on {world}; set train.workers={len(parts)}")
        # The file is our own run's; it holds optimizer objects, which weights-only loading refuses.
        path, client = engine.load_checkpoint(folder, tag=TAG)
        if path is None:
            raise RuntimeError(f"DeepSpeed found no checkpoint in {folder}")
    torch.set_rng_state(client["rng"].cpu())
    return client["step"], [tuple(pair) for pair in client["history"]]
