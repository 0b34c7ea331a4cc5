"""Checkpoints of a training: complete or absent, and readable by any number of workers.

Each worker uploads its part and then a note that lists the part's files and their sizes. A checkpoint is complete when the
notes of all workers and all listed files are there; anything else was left behind by a kill. The checkpoint to resume from is
found by listing the folders, so no index can disagree with them.

Layout under ``checkpoints/<fingerprint>/``::

    step-00000500/state/...            DeepSpeed's files, each worker's own
    step-00000500/complete-00000.json  CompletionNote of a worker
    best/                              the bf16 weights with the lowest validation loss, then best.json (BestWeights)
"""

import glob
import math
import os
import re
import shutil
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from pydantic import Field

from udrl import internals, storage
from udrl.hashing import fingerprint_of_bytes
from udrl.run import Document

TAG = "state"
NOTE = "complete-{:05d}.json"
STEP_FOLDER = re.compile(r"step-(\d{8})")
BEST = "best"


class CompletionNote(Document):
    """A worker's note that its part of a checkpoint is uploaded."""

    world: int = Field(description="number of workers that write the checkpoint")
    files: dict[str, int] = Field(description="size in bytes by path within the checkpoint")


class BestWeights(Document):
    """``best.json``: written after the weights that it names."""

    step: int
    validation_loss: float
    file: str


class TrainingState(Document):
    """The training loop's own state, saved inside each checkpoint. The aliases are the keys of existing checkpoints."""

    step: int = Field(0, description="steps done; the next batch follows from it")
    history: list[tuple[int, float]] = Field(default_factory=list, description="(step, training loss)")
    best_validation_loss: float = Field(math.inf, alias="best")
    validation: dict[str, float | None] = Field(
        default_factory=dict, alias="seen", description="last validation: validation_loss and the length metrics"
    )


def step_folder(step: int) -> str:
    return f"step-{step:08d}"


class CheckpointSaver:
    """Writes checkpoints to local disk, and uploads them in a thread while training continues.

    Ray Train can do that too, but it keeps an index of its checkpoints that is not written atomically, and it does not remove
    the parts that a kill left behind.
    """

    def __init__(self, checkpoints: str, keep: int, rank: int, world_size: int) -> None:
        self.checkpoints, self.keep, self.rank, self.world_size = checkpoints, keep, rank, world_size
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.prefix = f"udrl-checkpoint-{fingerprint_of_bytes(checkpoints.encode())}-{rank}-"
        for leftover in glob.glob(os.path.join(tempfile.gettempdir(), f"{self.prefix}*")):  # of a killed worker
            shutil.rmtree(leftover, ignore_errors=True)
        self.pending: Future[None] | None = None

    def save(self, engine: Any, state: TrainingState) -> None:
        """Save the engine and ``state``; every worker calls it at the same step."""
        self.wait()  # one upload at a time: local disk then holds two checkpoints at most
        folder = tempfile.mkdtemp(prefix=self.prefix)
        _save_local(engine, folder, state)
        self.pending = self.pool.submit(self._upload, folder, storage.join(self.checkpoints, step_folder(state.step)))

    def wait(self) -> None:
        """Wait for the pending upload; raise its error if it failed."""
        if self.pending:
            self.pending.result()
            self.pending = None

    def _upload(self, folder: str, uri: str) -> None:
        try:
            upload(folder, uri, self.rank, self.world_size)
            if self.rank == 0:
                prune(self.checkpoints, self.keep)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _save_local(engine: Any, folder: str, state: TrainingState) -> None:
    """Write this worker's part: weights, optimizer and schedule by DeepSpeed, with ``state`` and the random state."""
    import torch

    client_state = {"facts": state.model_dump(by_alias=True), "rng": torch.get_rng_state()}
    if torch.cuda.is_available():
        client_state["cuda_rng"] = torch.cuda.get_rng_state()
    engine.save_checkpoint(folder, tag=TAG, client_state=client_state)


def upload(folder: str, uri: str, rank: int, world_size: int) -> None:
    """Upload this worker's part, then the note that makes it count."""
    sizes = {name: os.path.getsize(os.path.join(folder, name)) for name in _list_local_files(folder)}
    storage.upload_folder(folder, uri)
    CompletionNote(world=world_size, files=sizes).save(storage.join(uri, NOTE.format(rank)))


def is_complete(uri: str) -> bool:
    """Return whether every worker's note and every file that it lists, of the listed size, is there."""
    return world_size_of(uri) is not None


def world_size_of(uri: str) -> int | None:
    """Return the number of workers that wrote the checkpoint; None if it is not complete."""
    first = CompletionNote.load_if_exists(storage.join(uri, NOTE.format(0)))
    if first is None:
        return None
    sizes = storage.file_sizes(uri)
    for rank in range(first.world):
        if NOTE.format(rank) not in sizes:
            return None
        note = CompletionNote.load(storage.join(uri, NOTE.format(rank)))
        if note.world != first.world or any(sizes.get(name) != size for name, size in note.files.items()):
            return None
    return first.world


def latest(checkpoints: str) -> str | None:
    """Return the URI of the newest complete checkpoint."""
    for name in reversed(_list_steps(checkpoints)):
        if is_complete(storage.join(checkpoints, name)):
            return storage.join(checkpoints, name)
    return None


def remove_incomplete(checkpoints: str) -> None:
    """Remove the parts that kills left behind, and Ray Train's index, which a kill may have cut off.

    Call it only while no worker runs.
    """
    newest = latest(checkpoints)
    for name in _list_steps(checkpoints):
        uri = storage.join(checkpoints, name)
        if uri != newest and not is_complete(uri):
            storage.remove(uri)
    storage.remove(storage.join(checkpoints, internals.CHECKPOINT_INDEX))


def prune(checkpoints: str, keep: int) -> None:
    """Remove all but the ``keep`` newest complete checkpoints; incomplete ones may still be uploading and stay."""
    complete = [name for name in _list_steps(checkpoints) if is_complete(storage.join(checkpoints, name))]
    for name in complete[:-keep]:
        storage.remove(storage.join(checkpoints, name))


def open_local(uri: str, folder: str) -> str:
    """Return the local folder of a checkpoint; one in an object store is copied into ``folder``."""
    if storage.is_local(uri):
        return storage.open_filesystem(uri)[1]
    return storage.download_folder(uri, folder)


def convert_checkpoint(source: str, folder: str) -> None:
    """Write the local checkpoint ``source`` to ``folder`` in a form that any number of workers can load."""
    shutil.rmtree(folder, ignore_errors=True)
    target = os.path.join(folder, TAG)
    os.makedirs(target)
    internals.convert_to_universal(os.path.join(source, TAG), target)


def restore(engine: Any, folder: str) -> TrainingState:
    """Restore weights, optimizer, schedule and random state from a local checkpoint; return the loop's state."""
    import torch

    # DeepSpeed unpickles the file: it holds optimizer objects, and only this run writes it.
    path, client_state = engine.load_checkpoint(folder, tag=TAG)
    if path is None:
        raise RuntimeError(f"DeepSpeed found no checkpoint in {folder}")
    torch.set_rng_state(client_state["rng"].cpu())
    if "cuda_rng" in client_state and torch.cuda.is_available():
        torch.cuda.set_rng_state(client_state["cuda_rng"].cpu())
    return TrainingState.model_validate(client_state["facts"])


def save_best(checkpoints: str, weights: dict[str, Any], step: int, validation_loss: float) -> None:
    """Replace the best weights; their ``best.json`` is written after them, so a kill leaves the old ones valid."""
    from safetensors.torch import save_file

    uri = storage.join(checkpoints, BEST)
    file = f"{step_folder(step)}.safetensors"
    with tempfile.TemporaryDirectory() as folder:
        save_file(weights, os.path.join(folder, file))
        with open(os.path.join(folder, file), "rb") as source, storage.atomic_file(storage.join(uri, file)) as out:
            shutil.copyfileobj(source, out)
    BestWeights(step=step, validation_loss=validation_loss, file=file).save(storage.join(uri, "best.json"))
    for name in storage.list_files(uri):
        if name.endswith(".safetensors") and name != file:
            storage.remove(storage.join(uri, name))


def load_best(checkpoints: str) -> tuple[dict[str, Any], BestWeights]:
    """Return the weights that :func:`save_best` kept, and their description."""
    from safetensors.torch import load

    best = BestWeights.load(storage.join(checkpoints, BEST, "best.json"))
    return load(storage.read_bytes(storage.join(checkpoints, BEST, best.file))), best


def _list_steps(checkpoints: str) -> list[str]:
    """Return the names of the checkpoints' folders, complete or not, oldest first."""
    return sorted(filter(STEP_FOLDER.fullmatch, storage.list_folders(checkpoints)))


def _list_local_files(folder: str) -> list[str]:
    paths = [os.path.join(parent, name) for parent, _, names in os.walk(folder) for name in names]
    return sorted(os.path.relpath(path, folder) for path in paths)
