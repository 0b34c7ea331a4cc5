"""A step of load on an autoscaled server, and more load than it takes.

``python -m benchmarks.serving_scale [--student FOLDER] [--clients N] [--quick] [key=value ...]``

- ``step``: from one client to ``--clients`` at once. Time from the step until Serve asks for another engine, until that one is
  warm, and until it has answered; p50 and p95 before, between and after.
- ``overload``: clients that do not wait for one another, several times what engines and queue take: how many are answered,
  how many are told to come back, and the p95 of those that are answered.

The load comes from threads of this process, on loopback, bounded in seconds. Prints a table and, as its last line, JSON.
"""

import argparse
import json
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.generation import machine
from benchmarks.serving import made_student, write_work
from benchmarks.serving_arms import free_port
from benchmarks.serving_load import intent, quantile, require_loopback

SECONDS = 240  # the longest that a part may take


class Clients:
    """Threads that ask one request after another, and when each was answered."""

    def __init__(self, url: str) -> None:
        require_loopback(url)
        self.url, self.ends = url, time.monotonic() + SECONDS
        self.answers: list[tuple[float, float, int]] = []  # when it ended, milliseconds, status
        self.stop = threading.Event()
        self.threads: list[threading.Thread] = []
        self.asked = 0

    def start(self, n: int) -> None:
        for _ in range(n):
            self.threads.append(threading.Thread(target=self._run))
            self.threads[-1].start()

    def end(self) -> None:
        self.stop.set()
        for thread in self.threads:
            thread.join(120)

    def _run(self) -> None:
        import httpx

        with httpx.Client(base_url=self.url, timeout=120) as http:
            while not self.stop.is_set() and time.monotonic() < self.ends:
                self.asked += 1
                body = {"model": "bench:text_to_image", "prompt": intent(self.asked), "max_tokens": 40}
                begun = time.monotonic()
                status = http.post("/v1/completions", json=body).status_code
                self.answers.append((time.monotonic(), (time.monotonic() - begun) * 1000, status))
                if status == 503:
                    time.sleep(0.2)  # less than Retry-After says: the server is to be pressed

    def between(self, begin: float, end: float) -> dict[str, Any]:
        """What was answered with 200 in this time."""
        mine = [ms for at, ms, status in self.answers if begin <= at < end and status == 200]
        if not mine:
            return {"requests": 0}
        figures = {"p50_ms": quantile(mine, 0.5), "p95_ms": quantile(mine, 0.95)}
        return {"requests": len(mine), **{name: round(value) for name, value in figures.items()}}


def until(what: str, true: Callable[[], bool]) -> float:
    """Wait; the time at which it became so.

    Raises:
        SystemExit: it did not within the bound.
    """
    ends = time.monotonic() + SECONDS
    while not true():
        if time.monotonic() > ends:
            raise SystemExit(f"never: {what}")
        time.sleep(0.05)
    return time.monotonic()


def step_part(url: str, clients: int, replicas: Callable[[], tuple[int, int]], calm: float) -> dict[str, Any]:
    load = Clients(url)
    try:
        load.start(1)
        begun = time.monotonic()
        until("a calm start", lambda: time.monotonic() > begun + calm)
        step = time.monotonic()
        load.start(clients - 1)
        asked = until("another engine is asked for", lambda: sum(replicas()) > 1)
        warm = until("it is warm", lambda: replicas()[0] > 1)
        seen = len(load.answers)
        until("load goes on", lambda: len(load.answers) > seen + 4 * clients)
        after = time.monotonic()
        until("and on", lambda: time.monotonic() > after + calm)
    finally:
        load.end()
    found = {
        "clients": clients,
        "asked_for_after_s": round(asked - step, 1),
        "serving_after_s": round(warm - step, 1),
        "before": load.between(begun, step),
        "between": load.between(step, warm),
        "after": load.between(after, time.monotonic()),
        "failed": sum(status != 200 for _, _, status in load.answers),
    }
    print(f"step to {clients} clients: another engine asked for after {asked - step:.1f} s, serving after {warm - step:.1f} s")
    for name in ("before", "between", "after"):
        print(f"  {name:<9}{found[name]}")
    return found


def overload_part(url: str, clients: int, seconds: float) -> dict[str, Any]:
    load = Clients(url)
    begun = time.monotonic()
    try:
        load.start(clients)
        until("its time", lambda: time.monotonic() > begun + seconds)
    finally:
        load.end()
    statuses = [status for _, _, status in load.answers]
    found = {
        "clients": clients,
        "told_to_come_back": statuses.count(503),
        "failed": sum(status not in (200, 503) for status in statuses),
        "answered": load.between(begun, time.monotonic()),
    }
    print(f"overload by {clients} clients: {found}")
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="benchmarks.serving_scale", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", help="key=value")
    parser.add_argument("--student", help="folder of an exported student; default: 104M parameters with random weights")
    parser.add_argument("--clients", type=int, default=24)
    parser.add_argument("--quick", action="store_true", help="a tiny student: does it run?")
    arguments = parser.parse_intermixed_args(argv)
    folder = tempfile.mkdtemp(prefix="udrl-benchmark-")

    from udrl import cluster

    cluster.ensure_auth_token()
    cluster.set_serve_env()
    import ray
    from ray import serve as ray_serve

    from serve import app

    try:
        size = (2, 128, 600) if arguments.quick else (12, 768, 24_000)
        student = arguments.student and os.path.abspath(arguments.student)
        student = student or made_student(os.path.join(folder, "student"), *size)
        settings = [
            "serve.placement.threads=1",
            "serve.engine.max_num_seqs=16",
            "serve.target_ongoing_requests=8",
            "serve.queue=32",
        ]
        with open(write_work(folder, student, [*settings, "serve.max_replicas=2", *arguments.overrides], False)) as file:
            work = json.load(file)
        port = free_port()
        cluster.connect(num_cpus=4)  # logical: two engines of one thread each stand beside one another
        ray_serve.start(http_options={"host": "127.0.0.1", "port": port})
        ray_serve.run(app.build({"recipe": work["recipe"], "overrides": work["overrides"], "model": student}), name=app.NAME)

        def replicas() -> tuple[int, int]:
            states = ray_serve.status().applications[app.NAME].deployments["StudentServer:bench"].replica_states
            return states.get("RUNNING", 0), states.get("STARTING", 0)

        url = f"http://127.0.0.1:{port}"
        found: dict[str, Any] = {"machine": machine(), "overrides": work["overrides"]}
        calm = 3 if arguments.quick else 15
        found["step"] = step_part(url, arguments.clients, replicas, calm)
        found["overload"] = overload_part(url, 8 * arguments.clients, 2 * calm)
        print(json.dumps(found))
    finally:
        if ray.is_initialized():
            ray_serve.shutdown()
            ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
