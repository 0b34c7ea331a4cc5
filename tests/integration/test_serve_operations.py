"""Operations under load: a new model takes over, an engine is killed, the application is taken down. Each request is counted.

Real Ray Serve and real vLLM engines; the steps build on one another, since starting engines is most of the time.
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
from students import TASKS, export_tiny_student, free_port

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
    """Clients that ask one request after another, and what each was answered with."""

    def __init__(self, url: str, clients: int) -> None:
        self.url = url
        self.answers: list[tuple[int, Any, Any]] = []
        self.stop = threading.Event()
        self.threads = [threading.Thread(target=self._run) for _ in range(clients)]

    def _run(self) -> None:
        with httpx.Client(base_url=self.url, timeout=60) as http:
            while not self.stop.is_set():
                answer = http.post("/v1/prompts", json={"intent": "a card", "task": TASKS[0], "n": 2})
                self.answers.append((answer.status_code, answer.json(), answer.headers.get("retry-after")))

    def __enter__(self) -> "Load":
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        for thread in self.threads:
            thread.join(90)

    def more(self, n: int) -> None:
        """Wait for ``n`` further answers."""
        wanted = len(self.answers) + n
        until("the load goes on", lambda: len(self.answers) >= wanted)


def until(what: str, true: Callable[[], Any], seconds: float = 240) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.05)
    return found


class Served:
    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.revisions = [export_tiny_student(folder / f"student-{seed}", seed) for seed in (0, 1)]
        text = {"name": "tiny", "storage": str(folder), "tasks": TASKS, "intents": {"limit": 9}, "serve": SETTINGS}
        (folder / "recipe.yaml").write_text(json.dumps(text))

    def deploy(self, student: int, *overrides: str) -> None:
        from ray import serve as ray_serve

        args = {"recipe": str(self.folder / "recipe.yaml"), "model": str(self.folder / f"student-{student}")}
        ray_serve.run(app.build({**args, "overrides": list(overrides)}), name=app.NAME)

    def running(self) -> int:
        from ray import serve as ray_serve

        engine = ray_serve.status().applications[app.NAME].deployments["StudentServer:tiny"]
        return engine.replica_states.get("RUNNING", 0)

    def engine_state(self) -> dict[str, Any]:
        found: dict[str, Any] = app.engine_handle("tiny").state.remote().result(timeout_s=60)
        return found


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    import ray
    from ray import serve as ray_serve

    made = Served(tmp_path_factory.mktemp("run"))
    cluster.connect(num_cpus=4)  # logical: two engines stand beside one another
    try:
        ray_serve.start(http_options={"host": "127.0.0.1", "port": made.port})
        made.deploy(0, "serve.max_replicas=1")
        yield made
    finally:
        ray_serve.shutdown()
        ray.shutdown()


def test_a_new_model_takes_over_under_load_and_no_request_fails(served: Served) -> None:
    with Load(served.url, 4) as load:
        load.more(20)
        served.deploy(1, "serve.max_replicas=1")
        until("the new model answers", lambda: load.answers[-1][1].get("revision") == served.revisions[1])
        load.more(20)
    statuses = Counter(status for status, _, _ in load.answers)
    assert set(statuses) == {200}, [body for status, body, _ in load.answers if status != 200][:3]
    revisions = [body["revision"] for _, body, _ in load.answers]
    assert set(revisions) == set(served.revisions)
    # The old engine ends what it has begun, so the two overlap for a moment only: never back once all clients have moved.
    assert set(revisions[-16:]) == {served.revisions[1]}
    print(f"rolling update under load: {dict(statuses)}, of {Counter(revisions)}")


@pytest.mark.parametrize("killed", ["replica", "the model's process within"])
def test_of_a_killed_engine_only_what_it_was_writing_fails_and_says_try_again(served: Served, killed: str) -> None:
    served.deploy(1, "serve.min_replicas=2")
    until("two engines", lambda: served.running() == 2)
    clients = 6
    with Load(served.url, clients) as load:
        load.more(30)
        before = len(load.answers)
        victim = served.engine_state()["pid"]
        if killed != "replica":
            (victim,) = (child.pid for child in psutil.Process(victim).children() if "EngineCore" in " ".join(child.cmdline()))
        os.kill(victim, signal.SIGKILL)
        load.more(60)
        lost = [(body, retry) for status, body, retry in load.answers[before:] if status != 200]
        until("another engine in its place", lambda: served.running() == 2)
        load.more(20)
    assert {status for status, _, _ in load.answers} <= {200, 503}
    failed = [entry for entry in load.answers if entry[0] == 503]
    assert {body["error"]["type"] for _, body, _ in failed} <= {"engine_lost"}
    assert all(retry is not None for _, _, retry in failed)
    assert len(failed) <= clients, f"{len(failed)} lost; no client can have had more than one at that engine"
    assert len(failed) == len(lost)
    print(f"{killed} killed under load: {Counter(status for status, _, _ in load.answers)}")


def test_taking_the_application_down_lets_requests_in_flight_end(served: Served) -> None:
    from ray import serve as ray_serve

    answers: list[httpx.Response] = []

    def ask() -> None:
        body = {"intent": "a card", "task": "all", "n": 16, "temperature": 2.0}
        answers.append(httpx.post(f"{served.url}/v1/prompts", json=body, timeout=60))

    thread = threading.Thread(target=ask)
    thread.start()
    until("it writes", lambda: any(served.engine_state()["writing"] for _ in range(4)))
    ray_serve.delete(app.NAME)
    thread.join(60)
    assert [answer.status_code for answer in answers] == [200]
    assert len(answers[0].json()["prompts"]) > 16
