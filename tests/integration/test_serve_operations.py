"""Operations under load: rolling update, killed engine, shutdown. Every request is accounted for.

Real Ray Serve and real vLLM engines; the tests build on one another, because starting engines takes most of the time.
"""

import json
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from fakes.tiny_student import TASKS, export_tiny_student, find_free_port

from serve import app
from udrl import cluster

SETTINGS = {
    "require_keys": False,
    "redraft": {"rounds": 1},
    "sampling": {"max_tokens": 64},
    "engine": {"max_num_seqs": 8, "eager": True},
    "placement": {"cpus": 1, "threads": 1},
    "limits": {"concurrent": 1000, "per_minute": 1_000_000},
}


class Load:
    """Clients that send one request after another; records status, body and Retry-After of each response."""

    def __init__(self, url: str, clients: int) -> None:
        self.url, self.active = url, clients
        self.responses: list[tuple[int, Any, Any]] = []
        self.threads = [threading.Thread(target=self._run, args=[number]) for number in range(clients)]

    def _run(self, number: int) -> None:
        with httpx.Client(base_url=self.url, timeout=60) as http:
            while number < self.active:
                response = http.post("/v1/prompts", json={"intent": "a card", "task": TASKS[0], "n": 2})
                self.responses.append((response.status_code, response.json(), response.headers.get("retry-after")))

    def __enter__(self) -> "Load":
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.active = 0
        for thread in self.threads:
            thread.join(90)

    def keep(self, clients: int) -> None:
        """Let all other clients end; an engine that starts meanwhile has the cores for itself."""
        self.active = clients

    def wait_for_responses(self, n: int) -> None:
        """Wait for ``n`` further responses."""
        total = len(self.responses) + n
        wait_until("further responses", lambda: len(self.responses) >= total)


def wait_until(label: str, condition: Callable[[], bool], seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"timeout: {label}"
        time.sleep(0.05)


class Deployment:
    """An application that serves one of two students, which differ in their weights."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, find_free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.revisions = [export_tiny_student(folder / f"student-{seed}", seed) for seed in (0, 1)]
        text = {"name": "tiny", "storage": str(folder), "tasks": TASKS, "intents": {"limit": 9}, "serve": SETTINGS}
        (folder / "recipe.yaml").write_text(json.dumps(text))

    def deploy(self, student: int, engines: int = 1) -> None:
        """Start new engines; Ray Serve gives each deployment a new version, even if nothing has changed."""
        from ray import serve as ray_serve

        args = {"recipe": str(self.folder / "recipe.yaml"), "model": str(self.folder / f"student-{student}")}
        overrides = [f"serve.min_replicas={engines}", f"serve.max_replicas={engines}"]
        ray_serve.run(app.build({**args, "overrides": overrides}), name=app.APPLICATION_NAME)

    def n_running_engines(self) -> int:
        from ray import serve as ray_serve

        engine = ray_serve.status().applications[app.APPLICATION_NAME].deployments["StudentServer:tiny"]
        return engine.replica_states.get("RUNNING", 0)

    def engine_state(self) -> dict[str, Any]:
        state: dict[str, Any] = app.get_engine_handle("tiny").state.remote().result(timeout_s=60)
        return state


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    import ray
    from ray import serve as ray_serve

    deployment = Deployment(tmp_path_factory.mktemp("run"))
    cluster.connect(num_cpus=4)  # logical CPUs: two engines run at the same time
    try:
        ray_serve.start(http_options={"host": "127.0.0.1", "port": deployment.port})
        deployment.deploy(0)
        yield deployment
    finally:
        ray_serve.shutdown()
        ray.shutdown()


def test_a_rolling_update_under_load_fails_no_request(served: Deployment) -> None:
    """The update also adds an engine, for the tests that follow: the two new ones start at the same time."""
    with Load(served.url, 4) as load:
        load.wait_for_responses(20)
        load.keep(1)
        served.deploy(1, engines=2)
        wait_until("the new model answers", lambda: load.responses[-1][1].get("revision") == served.revisions[1])
        load.wait_for_responses(20)
    statuses = Counter(status for status, _, _ in load.responses)
    assert set(statuses) == {200}, [body for status, body, _ in load.responses if status != 200][:3]
    revisions = [body["revision"] for _, body, _ in load.responses]
    assert set(revisions) == set(served.revisions)
    # The engines overlap only while the old one completes its requests.
    assert set(revisions[-16:]) == {served.revisions[1]}
    print(f"rolling update under load: {dict(statuses)}, of {Counter(revisions)}")


@pytest.mark.parametrize("killed", ["replica", "model process"])
def test_a_killed_engine_fails_only_its_requests_in_flight_with_a_retryable_error(served: Deployment, killed: str) -> None:
    if served.n_running_engines() < 2:  # this test runs without the one before
        served.deploy(1, engines=2)
    wait_until("two engines", lambda: served.n_running_engines() == 2)
    clients = 6
    with Load(served.url, clients) as load:
        load.wait_for_responses(30)
        n_before = len(load.responses)
        victim = served.engine_state()["pid"]
        if killed != "replica":
            (victim,) = (child.pid for child in psutil.Process(victim).children() if "EngineCore" in " ".join(child.cmdline()))
        os.kill(victim, signal.SIGKILL)
        wait_until("the loss is noticed", lambda: served.n_running_engines() < 2)
        load.wait_for_responses(60)
        lost = [(body, retry) for status, body, retry in load.responses[n_before:] if status != 200]
        load.keep(1)
        wait_until("the engine is replaced", lambda: served.n_running_engines() == 2)
        load.wait_for_responses(20)
    assert {status for status, _, _ in load.responses} <= {200, 503}
    failed = [entry for entry in load.responses if entry[0] == 503]
    assert {body["error"]["type"] for _, body, _ in failed} <= {"engine_lost"}
    assert all(retry is not None for _, _, retry in failed)
    assert len(failed) <= clients, f"{len(failed)} failed; no client has more than one request in flight"
    assert len(failed) == len(lost)
    print(f"{killed} killed under load: {Counter(status for status, _, _ in load.responses)}")


def test_deleting_the_application_completes_requests_in_flight(served: Deployment) -> None:
    from ray import serve as ray_serve

    responses: list[httpx.Response] = []

    def send_request() -> None:
        body = {"intent": "a card", "task": "all", "n": 16, "temperature": 2.0}
        responses.append(httpx.post(f"{served.url}/v1/prompts", json=body, timeout=60))

    thread = threading.Thread(target=send_request)
    thread.start()
    wait_until("the engine writes", lambda: any(served.engine_state()["in_flight"] for _ in range(4)))
    ray_serve.delete(app.APPLICATION_NAME)
    thread.join(60)
    assert [response.status_code for response in responses] == [200]
    assert len(responses[0].json()["prompts"]) > 16
