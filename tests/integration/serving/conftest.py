"""One application for all tests of this package, because starting an engine takes most of the time."""

from collections.abc import Iterator

import pytest
from fakes.tiny_student import in_object_store

from serving.deployment import Deployment
from udrl import cluster


@pytest.fixture(scope="package")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """Serve the first student from an object store."""
    import ray
    from ray import serve as ray_serve

    deployment = Deployment(tmp_path_factory.mktemp("run"))
    with in_object_store(deployment.students[0]) as uri:
        cluster.connect(num_cpus=4)  # logical CPUs: during an update three engines run at the same time
        try:
            ray_serve.start(http_options={"host": "127.0.0.1", "port": deployment.port})
            # The recipe's context is 256 tokens, the student has 128 positions: the engine must use 128.
            deployment.deploy(uri)
            yield deployment
        finally:
            ray_serve.shutdown()
            ray.shutdown()
