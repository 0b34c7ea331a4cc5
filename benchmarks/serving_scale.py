"""An autoscaled server under a step of load and under overload.

``python -m benchmarks.serving_scale [--student FOLDER] [--clients N] [--quick] [key=value ...]``

- ``step``: from one client to ``--clients`` at once. Reports the time from the step until Serve requests another engine and
  until that engine is warm, and p50 and p95 before, between and after.
- ``overload``: several times more clients than the engines and the queue accept. Reports the numbers of answered and of
  rejected (503) requests, and p50 and p95 of the answered ones.

The load comes from threads of this process, on loopback, for a limited time. Prints a table and, as its last line, JSON.
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
from benchmarks.serving import export_random_student, write_work
from benchmarks.serving_arms import free_port
from benchmarks.serving_load import make_intent, quantile, require_loopback

TIMEOUT = 240  # seconds for each part


class ClientThreads:
    """Threads that send one request after another and record each response."""

    def __init__(self, url: str) -> None:
        require_loopback(url)
        self.url, self.deadline = url, time.monotonic() + TIMEOUT
        self.responses: list[tuple[float, float, int]] = []  # time of the response, milliseconds, status
        self.stop = threading.Event()
        self.threads: list[threading.Thread] = []
        self.n_requests = 0

    def start(self, n: int) -> None:
        for _ in range(n):
            self.threads.append(threading.Thread(target=self._run))
            self.threads[-1].start()

    def join(self) -> None:
        self.stop.set()
        for thread in self.threads:
            thread.join(120)

    def _run(self) -> None:
        import httpx

        with httpx.Client(base_url=self.url, timeout=120) as http:
            while not self.stop.is_set() and time.monotonic() < self.deadline:
                self.n_requests += 1
                body = {"model": "bench:text_to_image", "prompt": make_intent(self.n_requests), "max_tokens": 40}
                started = time.monotonic()
                status = http.post("/v1/completions", json=body).status_code
                self.responses.append((time.monotonic(), (time.monotonic() - started) * 1000, status))
                if status == 503:
                    time.sleep(0.2)  # less than Retry-After, to keep up the pressure

    def statistics(self, start: float, end: float) -> dict[str, Any]:
        """Return number and latencies of the successful responses between two times."""
        latencies = [ms for at, ms, status in self.responses if start <= at < end and status == 200]
        if not latencies:
            return {"requests": 0}
        quantiles = {"p50_ms": quantile(latencies, 0.5), "p95_ms": quantile(latencies, 0.95)}
        return {"requests": len(latencies), **{name: round(value) for name, value in quantiles.items()}}


def wait_until(label: str, condition: Callable[[], bool]) -> float:
    """Wait for a condition; return the time at which it became true.

    Raises:
        SystemExit: the timeout has passed.
    """
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit(f"timeout: {label}")
        time.sleep(0.05)
    return time.monotonic()


def measure_step(url: str, clients: int, count_replicas: Callable[[], tuple[int, int]], calm: float) -> dict[str, Any]:
    load = ClientThreads(url)
    try:
        load.start(1)
        started = time.monotonic()
        wait_until("end of the load of one client", lambda: time.monotonic() > started + calm)
        step = time.monotonic()
        load.start(clients - 1)
        requested = wait_until("request for another engine", lambda: sum(count_replicas()) > 1)
        warm = wait_until("warm-up of the other engine", lambda: count_replicas()[0] > 1)
        n_responses = len(load.responses)
        wait_until("further responses", lambda: len(load.responses) > n_responses + 4 * clients)
        all_started = time.monotonic()
        wait_until("end of the load of all clients", lambda: time.monotonic() > all_started + calm)
    finally:
        load.join()
    result = {
        "clients": clients,
        "requested_after_s": round(requested - step, 1),
        "serving_after_s": round(warm - step, 1),
        "before": load.statistics(started, step),
        "between": load.statistics(step, warm),
        "after": load.statistics(all_started, time.monotonic()),
        "failed": sum(status != 200 for _, _, status in load.responses),
    }
    print(
        f"step to {clients} clients: another engine was requested after {requested - step:.1f} s"
        f" and served after {warm - step:.1f} s"
    )
    for name in ("before", "between", "after"):
        print(f"  {name:<9}{result[name]}")
    return result


def measure_overload(url: str, clients: int, seconds: float) -> dict[str, Any]:
    load = ClientThreads(url)
    started = time.monotonic()
    try:
        load.start(clients)
        wait_until("end of the overload", lambda: time.monotonic() > started + seconds)
    finally:
        load.join()
    statuses = [status for _, _, status in load.responses]
    result = {
        "clients": clients,
        "rejected": statuses.count(503),
        "failed": sum(status not in (200, 503) for status in statuses),
        "answered": load.statistics(started, time.monotonic()),
    }
    print(f"overload by {clients} clients: {result}")
    return result


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="benchmarks.serving_scale", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", help="key=value")
    parser.add_argument("--student", help="folder of an exported student; default: 104M parameters with random weights")
    parser.add_argument("--clients", type=int, default=24)
    parser.add_argument("--quick", action="store_true", help="tiny student, to check the benchmark")
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
        student = student or export_random_student(os.path.join(folder, "student"), *size)
        settings = [
            "serve.placement.threads=1",
            "serve.engine.max_num_seqs=16",
            "serve.target_ongoing_requests=8",
            "serve.queue=32",
        ]
        with open(write_work(folder, student, [*settings, "serve.max_replicas=2", *arguments.overrides], False)) as file:
            work = json.load(file)
        port = free_port()
        cluster.connect(num_cpus=4)  # logical CPUs: two engines of one thread each run at the same time
        ray_serve.start(http_options={"host": "127.0.0.1", "port": port})
        args = {"recipe": work["recipe"], "overrides": work["overrides"], "model": student}
        ray_serve.run(app.build(args), name=app.APPLICATION_NAME)

        def count_replicas() -> tuple[int, int]:
            """Return the numbers of running and of starting engines."""
            states = ray_serve.status().applications[app.APPLICATION_NAME].deployments["StudentServer:bench"].replica_states
            return states.get("RUNNING", 0), states.get("STARTING", 0)

        url = f"http://127.0.0.1:{port}"
        result: dict[str, Any] = {"machine": machine(), "overrides": work["overrides"]}
        calm = 3 if arguments.quick else 15
        result["step"] = measure_step(url, arguments.clients, count_replicas, calm)
        result["overload"] = measure_overload(url, 8 * arguments.clients, 2 * calm)
        print(json.dumps(result))
    finally:
        if ray.is_initialized():
            ray_serve.shutdown()
            ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
