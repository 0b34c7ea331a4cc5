"""Nothing hangs: a stage that brings nothing for minutes is ended, and says what was going on."""

import queue
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable
from typing import Any, TypeVar

from udrl.errors import StalledError
from udrl.progress import duration

Item = TypeVar("Item")
LOOK = 1.0  # seconds between looks at the clock


def watched(
    items: Iterable[Item], minutes: float, what: str, idle: Callable[[], None] | None = None
) -> Generator[Item, None, None]:
    """Yield ``items``; call ``idle`` every second in which none came.

    Raises:
        StalledError: no item came for ``minutes``. What the cluster was doing is told on stderr.
    """
    box: queue.Queue[tuple[Any, BaseException | None, bool]] = queue.Queue(maxsize=1)
    closed = threading.Event()

    def put(*entry: Any) -> bool:
        while not closed.is_set():
            try:
                box.put(entry, timeout=LOOK)
                return True
            except queue.Full:
                continue
        return False

    def pull() -> None:
        try:
            for item in items:
                if not put(item, None, False):
                    return  # the reader has gone; leaving the loop ends what makes the items
            put(None, None, True)
        except BaseException as error:
            put(None, error, True)

    # The source is read in a thread of its own: a read of Ray's that never returns can't be interrupted from outside.
    threading.Thread(target=pull, daemon=True, name=f"watched {what}").start()
    last = time.monotonic()
    try:
        while True:
            try:
                item, error, ended = box.get(timeout=LOOK)
            except queue.Empty:
                quiet = time.monotonic() - last
                if quiet > 60 * minutes:
                    print("\n".join([f"{what}: what was going on", *cluster_state()]), file=sys.stderr, flush=True)
                    raise StalledError(
                        f"{what}: no progress for {duration(quiet)} (watchdog_minutes={minutes:g}); what is done is kept,"
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
            last = time.monotonic()  # the reader's own work is not the source's silence
    finally:
        closed.set()


def cluster_state() -> list[str]:
    """What Ray knows of itself, a line each: nodes, free resources, memory, the operators of running datasets."""
    import ray

    if not ray.is_initialized():
        return ["  Ray is not running"]
    lines = []
    for node in ray.nodes():
        held = ", ".join(f"{n:g} {kind}" for kind, n in sorted(node["Resources"].items()) if kind in ("CPU", "GPU"))
        lines.append(f"  node {node['NodeManagerAddress']}: {'alive' if node['Alive'] else 'DEAD'}, {held or 'nothing'}")
    free = ray.available_resources()
    lines.append(f"  free: {free.get('CPU', 0):g} CPU, {free.get('GPU', 0):g} GPU")
    return lines + _memory() + _operators()


def _memory() -> list[str]:
    import psutil

    memory = psutil.virtual_memory()
    return [f"  memory of this node: {memory.used / 2**30:.1f} of {memory.total / 2**30:.1f} GiB used"]


def _operators() -> list[str]:
    """Operators of the datasets that run, from Ray Data's own statistics actor; nothing where it does not answer."""
    import ray
    from ray.data._internal.stats import get_or_create_stats_actor

    try:
        datasets = ray.get(get_or_create_stats_actor().get_datasets.remote(), timeout=5)
    except Exception as error:
        return [f"  Ray Data does not answer ({type(error).__name__})"]
    lines = []
    for name, facts in datasets.items():
        if facts.get("state") != "RUNNING":
            continue
        for operator, state in facts.get("operators", {}).items():
            lines.append(
                f"  {name} / {operator}: {state.get('progress', 0)} of {state.get('total', '?')} blocks,"
                f" {state.get('queued_blocks', 0)} queued, {state.get('state', '?')}"
            )
    return lines
