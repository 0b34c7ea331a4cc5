"""Operations under load: rolling update, killed engine, shutdown. Every request is accounted for.

The tests build on one another, because starting engines takes most of the time; the last one deletes the application.
"""

import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import httpx
import psutil
import pytest
from fakes.tiny_student import TASKS

from serve import app
from serving.deployment import Deployment


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


def deploy_two_engines(deployment: Deployment) -> None:
    """Serve the second student with two engines."""
    overrides = ["serve.min_replicas=2", "serve.max_replicas=2", "serve.sampling.max_tokens=64"]
    deployment.deploy(str(deployment.students[1]), *overrides)


def test_a_rolling_update_under_load_fails_no_request(deployment: Deployment) -> None:
    """The update also adds an engine, for the tests that follow: the two new ones start at the same time."""
    with Load(deployment.url, 4) as load:
        load.wait_for_responses(20)
        load.keep(1)
        deploy_two_engines(deployment)
        wait_until("the new model answers", lambda: load.responses[-1][1].get("revision") == deployment.revisions[1])
        load.wait_for_responses(20)
    statuses = Counter(status for status, _, _ in load.responses)
    assert set(statuses) == {200}, [body for status, body, _ in load.responses if status != 200][:3]
    revisions = [body["revision"] for _, body, _ in load.responses]
    assert set(revisions) == set(deployment.revisions)
    # The engines overlap only while the old one completes its requests.
    assert set(revisions[-16:]) == {deployment.revisions[1]}
    print(f"rolling update under load: {dict(statuses)}, of {Counter(revisions)}")


@pytest.mark.parametrize("killed", ["replica", "model process"])
def test_a_killed_engine_fails_only_its_requests_in_flight_with_a_retryable_error(deployment: Deployment, killed: str) -> None:
    if deployment.n_running_engines() < 2:  # this test runs without the one before
        deploy_two_engines(deployment)
    wait_until("two engines", lambda: deployment.n_running_engines() == 2)
    clients = 6
    with Load(deployment.url, clients) as load:
        load.wait_for_responses(30)
        n_before = len(load.responses)
        victim = deployment.engine_state()["pid"]
        if killed != "replica":
            (victim,) = (child.pid for child in psutil.Process(victim).children() if "EngineCore" in " ".join(child.cmdline()))
        os.kill(victim, signal.SIGKILL)
        wait_until("the loss is noticed", lambda: deployment.n_running_engines() < 2)
        load.wait_for_responses(60)
        lost = [(body, retry) for status, body, retry in load.responses[n_before:] if status != 200]
        load.keep(1)
        wait_until("the engine is replaced", lambda: deployment.n_running_engines() == 2)
        load.wait_for_responses(20)
    assert {status for status, _, _ in load.responses} <= {200, 503}
    failed = [entry for entry in load.responses if entry[0] == 503]
    assert {body["error"]["type"] for _, body, _ in failed} <= {"engine_lost"}
    assert all(retry is not None for _, _, retry in failed)
    assert len(failed) <= clients, f"{len(failed)} failed; no client has more than one request in flight"
    assert len(failed) == len(lost)
    print(f"{killed} killed under load: {Counter(status for status, _, _ in load.responses)}")


def test_deleting_the_application_completes_requests_in_flight(deployment: Deployment) -> None:
    from ray import serve as ray_serve

    responses: list[httpx.Response] = []

    def send_request() -> None:
        body = {"intent": "a card", "task": "all", "n": 16, "temperature": 2.0}
        responses.append(httpx.post(f"{deployment.url}/v1/prompts", json=body, timeout=60))

    thread = threading.Thread(target=send_request)
    thread.start()
    wait_until("the engine writes", lambda: any(deployment.engine_state()["in_flight"] for _ in range(4)))
    ray_serve.delete(app.APPLICATION_NAME)
    thread.join(60)
    assert [response.status_code for response in responses] == [200]
    assert len(responses[0].json()["prompts"]) > 16
