"""Overrides of Ray's private classes take effect in a running Ray; tests/unit/test_internals.py looks at their names."""

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from ray import cloudpickle

from udrl import internals

# The classes below travel to Ray's workers, which can't import the tests.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

BLOCKS, PER_ACTOR, TASKS_IN_FLIGHT = 16, 2, 2


class Engine:
    """Make a file for each block that it starts."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        (self.folder / f"block-{batch['id'][0]}").touch()
        return batch


class BlockedWriter:
    """Wait until the engine has started every block, or for ``patience`` seconds; the first to end releases all others."""

    def __init__(self, folder: str, patience: float) -> None:
        self.folder, self.patience = Path(folder), patience

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        deadline = time.monotonic() + self.patience
        while not (self.folder / "released").exists():
            started = len(list(self.folder.glob("block-*")))
            if started == BLOCKS or time.monotonic() > deadline:
                (self.folder / f"started-{started}").touch()
                (self.folder / "released").touch()
            time.sleep(0.05)
        return batch


def count_blocks_started_before_the_first_is_written(folder: Path, patience: float, limited: bool) -> tuple[int, float]:
    """Return the number of blocks, and the seconds between the first one's start and the last one's."""
    import ray

    folder.mkdir()
    shards = ray.data.range(BLOCKS, override_num_blocks=BLOCKS)
    pool = ray.data.ActorPoolStrategy(size=1, max_tasks_in_flight_per_actor=TASKS_IN_FLIGHT)
    answers = shards.map_batches(Engine, fn_constructor_args=[str(folder)], batch_size=1, compute=pool, num_cpus=0.5)
    dataset = answers.map_batches(BlockedWriter(str(folder), patience), batch_size=None, num_cpus=0.1)
    if limited:
        internals.limit_unwritten_blocks(dataset, PER_ACTOR)
    assert sum(len(batch["id"]) for batch in dataset.iter_batches(batch_size=None)) == BLOCKS
    starts = [path.stat().st_mtime for path in folder.glob("block-*")]
    count = max(int(path.name.removeprefix("started-")) for path in folder.glob("started-*"))
    return count, max(starts) - min(starts)


@pytest.mark.usefixtures("local_ray")
def test_engines_are_held_back_while_their_blocks_wait_to_be_written(tmp_path: Path) -> None:
    count, seconds = count_blocks_started_before_the_first_is_written(tmp_path / "unlimited", 120, limited=False)
    assert count == BLOCKS
    patience = 3 + seconds
    started, _ = count_blocks_started_before_the_first_is_written(tmp_path / "limited", patience, limited=True)
    assert PER_ACTOR <= started <= PER_ACTOR + TASKS_IN_FLIGHT


def test_a_second_init_in_one_process_leaves_no_remark() -> None:
    """As in a driver: connect, then call ``ray.init()`` again as ``ray.data.llm`` does."""
    code = """
import logging
from udrl import cluster, internals
cluster.connect(num_cpus=1)
import ray
ray.init(ignore_reinit_error=True, logging_level=logging.INFO)
logging.getLogger(internals.INIT_LOGGER).info("still logged")
"""
    driver = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert "still logged" in driver.stderr
    assert internals.REPEATED_INIT not in driver.stderr
