"""Connecting to a Ray cluster, or starting one on this machine."""

import contextlib
import logging
import os
import secrets
import sys
from typing import Any

from udrl import internals
from udrl.errors import UserError


def connect(**options: Any) -> None:
    """Join the cluster of ``RAY_ADDRESS``, or start one for this process only.

    ``ray job submit`` sets the variable. A bare ``ray.init()`` would attach to any cluster that an earlier program has left
    running on this machine.
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
        for name, value in internals.NODE_ENV.items():
            os.environ.setdefault(name, value)
    internals.hide_repeated_init()
    ray.init(
        address=address or "local",
        log_to_driver=verbose,  # workers log thousands of lines; Ray's session folder has them
        logging_level=logging.INFO if verbose else logging.WARNING,
        **options,
    )
    silence_ray_data()


def ensure_auth_token() -> None:
    """Turn on token authentication for a cluster on this machine.

    Only this user can read the file with the token. Ray reads RAY_AUTH_MODE and RAY_AUTH_TOKEN_PATH when it is imported. If it
    has been imported already, nothing changes: Ray then does the same by itself, with a warning.
    """
    if "RAY_AUTH_MODE" in os.environ or "RAY_ADDRESS" in os.environ or "ray" in sys.modules:
        return
    path = os.environ.get("RAY_AUTH_TOKEN_PATH", os.path.expanduser("~/.ray/auth_token"))
    if not os.path.exists(path):
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
    os.environ["RAY_AUTH_MODE"], os.environ["RAY_AUTH_TOKEN_PATH"] = "token", path


def set_serve_env() -> None:
    """Set the variables of :data:`udrl.internals.SERVE_ENV` that are not set.

    Call it before Ray is imported. It affects a cluster that this process starts. In a cluster that it joins, it affects only
    this process.
    """
    for name, value in internals.SERVE_ENV.items():
        os.environ.setdefault(name, value)


def silence_ray_data() -> None:
    """Turn off Ray Data's own progress bars, plan dumps and log lines."""
    from ray.data import DataContext

    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    if not os.environ.get("UDRL_VERBOSE"):
        for name in ("ray.data", "ray.llm", "vllm"):
            logging.getLogger(name).setLevel(logging.ERROR)
        # If this logger has a handler, ray.llm does not add a handler to the logger of each of its modules.
        logging.getLogger("ray.llm").addHandler(logging.NullHandler())


def require_resources(section: str, cpus: float, gpus: float) -> None:
    """Refuse a placement for which Ray would wait forever on this machine.

    A cluster that was joined may still grow, so nothing is checked there.

    Raises:
        UserError: naming the recipe's section.
    """
    import ray

    if os.environ.get("RAY_ADDRESS"):
        return
    resources = ray.cluster_resources()
    for unit, required, resource in (("CPUs", cpus, "CPU"), ("GPUs", gpus, "GPU")):
        available = resources.get(resource, 0)
        if required > available:
            raise UserError(f"{section}: needs {required:g} {unit}, this machine has {available:g}; lower it in the recipe")


def lower_priority_of_other_processes(name: str) -> None:
    """Lower the CPU priority of all Ray processes without ``name`` in the title.

    Nothing happens in a cluster that was joined. The training threads of a CPU wait for each other in every operation: with two
    threads on two cores, any other process that runs for a moment stops both.
    """
    import psutil

    if os.environ.get("RAY_ADDRESS"):
        return
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            # The raylet keeps its priority, because workers that it starts later inherit it.
            if process.name() != "raylet" and name not in " ".join(process.cmdline()):
                process.nice(15)


def cpu_count() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0))
