"""The watchdog: ends a stage that makes no progress, and logs the state of the cluster."""

import logging
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterable
from typing import Any, TypeVar

from udrl import internals
from udrl.errors import StalledError
from udrl.progress import duration

log = logging.getLogger(__name__)

Item = TypeVar("Item")
POLL_SECONDS = 1.0  # seconds between looks at the clock


def iterate_with_watchdog(
    items: Iterable[Item], minutes: float, label: str, idle: Callable[[], None] | None = None
) -> Generator[Item, None, None]:
    """Yield ``items``; call ``idle`` about every second without a new one.

    Raises:
        StalledError: no item came for ``minutes``. The state of the cluster is logged before.
    """
    # (item, error, whether the source has ended)
    entries: queue.Queue[tuple[Any, BaseException | None, bool]] = queue.Queue(maxsize=1)
    closed = threading.Event()

    def put(*entry: Any) -> bool:
        """Return whether the reader is still there to take the entry."""
        while not closed.is_set():
            try:
                entries.put(entry, timeout=POLL_SECONDS)
                return True
            except queue.Full:
                continue
        return False

    def read_source() -> None:
        try:
            for item in items:
                if not put(item, None, False):
                    return  # leaving the loop ends the source
            put(None, None, True)
        except BaseException as error:
            put(None, error, True)

    # In a thread of its own, because nothing can interrupt a read of Ray's that never returns.
    threading.Thread(target=read_source, daemon=True, name=f"source of {label}").start()
    last_item = time.monotonic()
    try:
        while True:
            try:
                item, error, ended = entries.get(timeout=POLL_SECONDS)
            except queue.Empty:
                silence = time.monotonic() - last_item
                if silence > 60 * minutes:
                    log.warning("\n".join([f"{label}: no progress; state of the cluster:", *describe_cluster()]))
                    raise StalledError(
                        f"{label}: no progress for {duration(silence)} (watchdog_minutes={minutes:g}); finished work is kept,"
                        " run the same command again to resume"
                    ) from None
                if idle:
                    idle()
                continue
            if error:
                raise error
            if ended:
                return
            yield item
            last_item = time.monotonic()  # time that the reader spends on an item does not count
    finally:
        closed.set()


def describe_cluster() -> list[str]:
    """Return one line per node and operator, and the resources that are free."""
    import psutil
    import ray

    if not ray.is_initialized():
        return ["  Ray is not running"]
    lines = []
    for node in ray.nodes():
        resources = ", ".join(f"{n:g} {kind}" for kind, n in sorted(node["Resources"].items()) if kind in ("CPU", "GPU"))
        state = "alive" if node["Alive"] else "DEAD"
        lines.append(f"  node {node['NodeManagerAddress']}: {state}, {resources or 'no CPU and no GPU'}")
    free = ray.available_resources()
    lines.append(f"  free: {free.get('CPU', 0):g} CPU, {free.get('GPU', 0):g} GPU")
    memory = psutil.virtual_memory()
    lines.append(f"  memory of this node: {memory.used / 2**30:.1f} of {memory.total / 2**30:.1f} GiB used")
    return lines + _describe_operators()


def _describe_operators() -> list[str]:
    try:
        datasets = internals.running_datasets(timeout_s=5)
    except Exception as error:
        return [f"  Ray Data does not answer ({type(error).__name__})"]
    return [
        f"  {dataset} / {operator}: {state.get('progress', 0)} of {state.get('total', '?')} blocks,"
        f" {state.get('queued_blocks', 0)} queued, {state.get('state', '?')}"
        for dataset, operators in datasets.items()
        for operator, state in operators.items()
    ]
