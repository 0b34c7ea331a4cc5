"""Checkpoints of a training: complete or absent, readable by any number of workers.

Each worker writes its part and, after all of it lies in storage, a note that lists the part's files and their sizes. A
checkpoint counts as one when the notes of all its workers are there and their files with them; anything else is what a kill
left behind. Which checkpoint to go on from is found by looking at the folders alone, so no index can disagree with them.

Layout under ``checkpoints/<fingerprint>/``::

    step-00000500/state/...            DeepSpeed's files, each worker's own
    step-00000500/complete-00000.json  a worker's note
    best/                              the weights with the lowest validation loss, bf16, and best.json, written last
"""

import glob
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from udrl import internals, storage

TAG = "state"
NOTE = "complete-{:05d}.json"
STEP = re.compile(r"step-(\d{8})")
BEST = "best"


def name_of(step: int) -> str:
    return f"step-{step:08d}"


def save(engine: Any, folder: str, facts: dict[str, Any]) -> None:
    """Write this worker's part to a local folder: weights, optimizer and schedule by DeepSpeed; ``facts`` and the random
    state beside them."""
    import torch

    client = {"facts": facts, "rng": torch.get_rng_state()}
    if torch.cuda.is_available():
        client["cuda_rng"] = torch.cuda.get_rng_state()
    engine.save_checkpoint(folder, tag=TAG, client_state=client)


class Saver:
    """Writes checkpoints to local disk and lets a thread carry them to storage while training goes on.

    Ray Train can do that too, but keeps an index of its checkpoints that is not written atomically, and leaves behind what
    a kill cut off.
    """

    def __init__(self, runs: str, keep: int, rank: int, world: int) -> None:
        self.runs, self.keep, self.rank, self.world = runs, keep, rank, world
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.prefix = f"udrl-checkpoint-{hashlib.sha256(runs.encode()).hexdigest()[:16]}-{rank}-"
        for left in glob.glob(os.path.join(tempfile.gettempdir(), f"{self.prefix}*")):  # by a worker that was killed
            shutil.rmtree(left, ignore_errors=True)
        self.on_its_way: Future[None] | None = None

    def save(self, engine: Any, step: int, facts: dict[str, Any]) -> None:
        """Every worker calls it at the same step."""
        self.settle()  # one on its way at a time: local disk holds two at most
        folder = tempfile.mkdtemp(prefix=self.prefix)
        save(engine, folder, facts)
        self.on_its_way = self.pool.submit(self._carry, folder, storage.join(self.runs, name_of(step)))

    def settle(self) -> None:
        """Wait for the checkpoint on its way; raise what went wrong with it."""
        if self.on_its_way:
            self.on_its_way.result()
            self.on_its_way = None

    def _carry(self, folder: str, uri: str) -> None:
        try:
            upload(folder, uri, self.rank, self.world)
            if self.rank == 0:
                prune(self.runs, self.keep)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def upload(folder: str, uri: str, rank: int, world: int) -> None:
    """Copy this worker's part to storage, then the note that makes it count."""
    sizes = {name: os.path.getsize(os.path.join(folder, name)) for name in _local_files(folder)}
    storage.upload_folder(folder, uri)
    storage.write_json(storage.join(uri, NOTE.format(rank)), {"world": world, "files": sizes})


def is_complete(uri: str) -> bool:
    """Whether every worker's note is there, and every file that it lists has its size."""
    return world_of(uri) is not None


def world_of(uri: str) -> int | None:
    """How many workers wrote the checkpoint; None where it is not complete."""
    first = storage.join(uri, NOTE.format(0))
    if not storage.exists(first):
        return None
    world: int = storage.read_json(first)["world"]
    sizes = storage.file_sizes(uri)
    for rank in range(world):
        if NOTE.format(rank) not in sizes:
            return None
        note = storage.read_json(storage.join(uri, NOTE.format(rank)))
        if note["world"] != world or any(sizes.get(name) != size for name, size in note["files"].items()):
            return None
    return world


def latest(runs: str) -> str | None:
    """URI of the newest complete checkpoint under ``runs``."""
    for name in sorted(filter(STEP.fullmatch, storage.list_folders(runs)), reverse=True):
        if is_complete(storage.join(runs, name)):
            return storage.join(runs, name)
    return None


def sweep(runs: str) -> None:
    """Remove what kills left behind, and Ray Train's index of checkpoints: ours are found without it, and one that was cut
    off while it was written would refuse to start. To be called while no worker runs."""
    keep = latest(runs)
    for name in filter(STEP.fullmatch, storage.list_folders(runs)):
        uri = storage.join(runs, name)
        if uri != keep and not is_complete(uri):
            storage.remove(uri)
    storage.remove(storage.join(runs, internals.CHECKPOINT_INDEX))


def prune(runs: str, keep: int) -> None:
    """Remove all but the ``keep`` newest complete checkpoints; younger ones may still be on their way and stay."""
    complete = [n for n in sorted(filter(STEP.fullmatch, storage.list_folders(runs))) if is_complete(storage.join(runs, n))]
    for name in complete[:-keep]:
        storage.remove(storage.join(runs, name))


def fetch(uri: str, folder: str) -> str:
    """Local folder of a checkpoint; what lies on an object store is copied into ``folder``."""
    if storage.is_local(uri):
        return storage.open_filesystem(uri)[1]
    return storage.download_folder(uri, folder)


def universal(source: str, folder: str) -> str:
    """Convert the local checkpoint ``source`` to DeepSpeed's universal form in ``folder``, which any number of workers can
    load; return ``folder``."""
    shutil.rmtree(folder, ignore_errors=True)
    target = os.path.join(folder, TAG)
    os.makedirs(target)
    internals.convert_to_universal(os.path.join(source, TAG), target)
    return folder


def load(engine: Any, folder: str) -> dict[str, Any]:
    """Restore weights, optimizer, schedule and random state from a local checkpoint; return the facts beside them."""
    import torch

    # The file is our own run's; it holds optimizer objects, which weights-only loading refuses.
    path, client = engine.load_checkpoint(folder, tag=TAG)
    if path is None:
        raise RuntimeError(f"DeepSpeed found no checkpoint in {folder}")
    torch.set_rng_state(client["rng"].cpu())
    if "cuda_rng" in client and torch.cuda.is_available():
        torch.cuda.set_rng_state(client["cuda_rng"].cpu())
    facts: dict[str, Any] = client["facts"]
    return facts


def save_best(runs: str, weights: dict[str, Any], facts: dict[str, Any]) -> None:
    """Keep these weights as the best so far; ``facts`` (step, validation_loss) are written last and vouch for them."""
    from safetensors.torch import save_file

    uri = storage.join(runs, BEST)
    with tempfile.TemporaryDirectory() as folder:
        name = f"{name_of(facts['step'])}.safetensors"
        save_file(weights, os.path.join(folder, name))
        with open(os.path.join(folder, name), "rb") as source, storage.atomic_file(storage.join(uri, name)) as out:
            shutil.copyfileobj(source, out)
    storage.write_json(storage.join(uri, "best.json"), {**facts, "file": name})
    for old in storage.list_files(uri):
        if old.endswith(".safetensors") and old != name:
            storage.remove(storage.join(uri, old))


def load_best(runs: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Weights and facts that :func:`save_best` kept."""
    from safetensors.torch import load as parse

    facts: dict[str, Any] = storage.read_json(storage.join(runs, BEST, "best.json"))
    return parse(storage.read_bytes(storage.join(runs, BEST, facts["file"]))), facts


def _local_files(folder: str) -> Sequence[str]:
    found = [os.path.join(at, name) for at, _, names in os.walk(folder) for name in names]
    return sorted(os.path.relpath(path, folder) for path in found)
