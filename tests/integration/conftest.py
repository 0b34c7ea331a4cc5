"""A real local Ray for the integration tests, and a run with made-up episodes."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from fakes.fake_episodes import fill_with_episodes


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    """Start a cluster of this process only, with three CPUs: two training workers leave one for Ray Data."""
    import ray

    from udrl import cluster, internals

    cluster.connect(num_cpus=3)
    yield
    internals.end_data_executors(timeout_s=60)
    ray.shutdown()


@pytest.fixture
def run_with_episodes(tmp_path: Path) -> str:
    uri = str(tmp_path / "run")
    fill_with_episodes(uri)
    return uri
