"""A real local Ray for the integration tests, and a run with made-up episodes."""

from pathlib import Path

import pytest
from fakes.fake_episodes import fill_with_episodes

IS_RUNNING = pytest.StashKey[bool]()


@pytest.fixture(scope="module")
def local_ray(request: pytest.FixtureRequest) -> None:
    """Start a cluster of this process only, with three CPUs: two training workers leave one for Ray Data.

    Modules that follow each other share it, because Ray and Ray Data start a dozen processes.
    """
    from udrl import cluster

    cluster.connect(num_cpus=3)
    request.config.stash[IS_RUNNING] = True


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """End the cluster of :func:`local_ray` before a module that does not begin with it."""
    is_last_of_module = nextitem is None or nextitem.path != item.path
    is_shared = nextitem is not None and "local_ray" in getattr(nextitem, "fixturenames", ())
    if is_last_of_module and not is_shared and item.config.stash.get(IS_RUNNING, False):
        import ray

        from udrl import internals

        internals.end_data_executors(timeout_s=60)
        ray.shutdown()
        item.config.stash[IS_RUNNING] = False


@pytest.fixture
def run_with_episodes(tmp_path: Path) -> str:
    uri = str(tmp_path / "run")
    fill_with_episodes(uri)
    return uri
