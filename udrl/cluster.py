"""Joining a Ray cluster, or starting one on this machine."""

import contextlib
import logging
import os
import secrets
import sys
from typing import Any

from udrl.errors import UserError

# What a node's Ray is started with. cluster.yaml sets the first; the second is for engines on CPUs.
NODE_ENV = {
    # An engine that is killed leaves its core process behind, with the model in memory, unless the raylet ends its group.
    "RAY_process_group_cleanup_enabled": "true",
    # Ray gives its workers a low priority (nice 15); on two cores its own daemons then interrupt the engine.
    "RAY_worker_niceness": "0",
}

# What a node that serves is started with (docs/results/serving-cpu.md has what they are worth). Ray Serve reads them when it is
# imported, in every process of its own: set them where Ray is started, as cluster.yaml does.
SERVE_ENV = {
    # Serve's set for many small requests: one event loop a replica, gRPC between replicas, logs written in blocks.
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    # Read before that set is made, so it must be said on its own (ray/serve/_private/constants.py).
    "RAY_SERVE_PROXY_USE_GRPC": "1",
    # The set has replicas listen on ports of their own. Without HAProxy in front nobody asks there.
    "RAY_SERVE_ENABLE_DIRECT_INGRESS": "0",
    # Ten looks a second, the default, took 4% of a core from an engine that had two.
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",
}


def set_serve_env() -> None:
    """Set :data:`SERVE_ENV`, but for what is set already; to be called before Ray is imported.

    Where a cluster is joined, that is for this process alone.
    """
    for name, value in SERVE_ENV.items():
        os.environ.setdefault(name, value)


def connect(**options: Any) -> None:
    """Join the cluster of ``RAY_ADDRESS`` (what ``ray job submit`` sets), else start one for this process alone.

    A bare ``ray.init()`` would attach to whatever cluster an earlier program left on this machine.
    """
    ensure_auth_token()
    import ray

    if ray.is_initialized():
        return
    address = os.environ.get("RAY_ADDRESS")
    verbose = bool(os.environ.get("UDRL_VERBOSE"))
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "INFO" if verbose else "ERROR")
    if not address:
        options.setdefault("include_dashboard", False)
        for name, value in NODE_ENV.items():
            os.environ.setdefault(name, value)
    # ray.data.llm calls ray.init() again, and Ray remarks on it.
    logging.getLogger("ray._private.worker").addFilter(lambda record: "ray.init() again" not in record.getMessage())
    ray.init(
        address=address or "local",
        log_to_driver=verbose,  # workers log thousands of lines; the logs lie in Ray's session folder
        logging_level=logging.INFO if verbose else logging.WARNING,
        **options,
    )
    silence_ray_data()


def require_resources(section: str, cpus: float, gpus: float) -> None:
    """Refuse what a cluster on this machine can never grant: Ray would wait for it without end.

    A cluster that was joined may still grow, so nothing is said there.

    Raises:
        UserError: naming the recipe's section.
    """
    import ray

    if os.environ.get("RAY_ADDRESS"):
        return
    there = ray.cluster_resources()
    for what, wanted, resource in (("CPUs", cpus, "CPU"), ("GPUs", gpus, "GPU")):
        if wanted > there.get(resource, 0):
            raise UserError(f"{section}: {wanted:g} {what} wanted, this machine has {there.get(resource, 0):g}")


def lower_priority_of_other_processes(name: str) -> None:
    """On a cluster of this process alone, let all of Ray's processes step back behind those whose title has ``name``.

    A CPU's training threads wait for each other at every operation: with two of them on two cores, whatever else runs for a
    moment stops both.
    """
    import psutil

    if os.environ.get("RAY_ADDRESS"):
        return
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            # The raylet keeps its place: workers that it starts later would inherit another.
            if process.name() != "raylet" and name not in " ".join(process.cmdline()):
                process.nice(15)


def ensure_auth_token() -> None:
    """Token authentication for a cluster on this machine: a token file of this user, made once, readable by nobody else.

    Ray reads these variables when it is imported; where that has happened already, its own default stands, which is the
    same with a warning.
    """
    if "RAY_AUTH_MODE" in os.environ or "RAY_ADDRESS" in os.environ or "ray" in sys.modules:
        return
    path = os.environ.get("RAY_AUTH_TOKEN_PATH", os.path.expanduser("~/.ray/auth_token"))
    if not os.path.exists(path):
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as out:
            out.write(secrets.token_hex(32))
    os.environ["RAY_AUTH_MODE"], os.environ["RAY_AUTH_TOKEN_PATH"] = "token", path


def silence_ray_data() -> None:
    """Our own progress lines stand in for Ray Data's bars and plan dumps."""
    from ray.data import DataContext

    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    if not os.environ.get("UDRL_VERBOSE"):
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        for name in ("ray.llm", "vllm"):
            logging.getLogger(name).setLevel(logging.ERROR)
        # With a handler of its own there, ray.llm does not give each of its modules a chatty one.
        logging.getLogger("ray.llm").addHandler(logging.NullHandler())


def cpu_count() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0))
