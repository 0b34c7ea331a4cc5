"""Checkpoints of the training loop. Ray Train stores one only after every worker has reported it, so it is whole or absent."""

from typing import Any

TAG = "state"


def save(engine: Any, folder: str, step: int, history: list[tuple[int, float]]) -> None:
    """Write this worker's part: weights, optimizer and schedule by DeepSpeed, data position and RNG beside them."""
    import torch

    client = {"step": step, "history": history, "rng": torch.get_rng_state()}
    engine.save_checkpoint(folder, tag=TAG, client_state=client)


def load(engine: Any, checkpoint: Any) -> tuple[int, list[tuple[int, float]]]:
    """Restore all of it; return the step to go on from and the losses so far.

    The checkpoint is one of as many workers: the run's name covers ``train.workers``.
    """
    import torch

    with checkpoint.as_directory() as folder:
        # The file is our own run's; it holds optimizer objects, which weights-only loading refuses.
        path, client = engine.load_checkpoint(folder, tag=TAG)
        if path is None:
            raise RuntimeError(f"DeepSpeed found no checkpoint in {folder}")
    torch.set_rng_state(client["rng"].cpu())
    return client["step"], [tuple(pair) for pair in client["history"]]
