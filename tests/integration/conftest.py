"""A real local Ray for the integration tests, and a run with made-up episodes."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from fakes.episodes import fill_with_episodes


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    """A cluster of this process alone; three CPUs are declared so that two workers leave one for Ray Data."""
    import ray

    from udrl import cluster

    cluster.connect(num_cpus=3)
    yield
    _end_executors()
    ray.shutdown()


def _end_executors() -> None:
    """Ray Data waits two seconds for the thread of an execution that was given up. One that is slower calls a Ray that has been
    shut down, and then Ray ends this whole process (GetCoreWorker in core_worker_process.cc), tests and all, without a word."""
    from ray.data._internal.execution.streaming_executor import StreamingExecutor

    for thread in threading.enumerate():
        if isinstance(thread, StreamingExecutor):
            thread.shutdown(force=True)
            thread.join(60)
            assert not thread.is_alive(), f"{thread.name} does not end"


@pytest.fixture
def run_with_episodes(tmp_path: Path) -> str:
    uri = str(tmp_path / "run")
    fill_with_episodes(uri)
    return uri
