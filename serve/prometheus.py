"""Counters of the server and the Prometheus page that shows them.

Counters go through ``ray.util.metrics``: each process sends its counts to its node's agent, so they add up over replicas and
survive a replaced replica. ``/metrics`` merges the agents' pages of all nodes; Prometheus can also scrape the agents directly
(Ray lists them in ``/tmp/ray/prom_metrics_service_discovery.json``). Ray's report interval is 10 s.
"""

import asyncio
import urllib.request
from typing import Any, Protocol

PREFIXES = ("ray_udrl_", "ray_serve_", "ray_vllm")
LATENCY_BOUNDARIES = [0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30]  # seconds


class ServerMetrics(Protocol):
    """Counters of requests, prompts and tokens."""

    def count_request(self, endpoint: str, key: str, status: int, seconds: float) -> None: ...

    def count_prompt(self, task: str, *, missed: bool, cut: bool) -> None: ...

    def count_redraft(self, task: str, reason: str) -> None: ...

    def count_tokens(self, prompt: int, completion: int) -> None: ...

    def count_cancelled(self) -> None: ...

    async def page(self) -> str:
        """Return the metrics of all nodes in Prometheus' text format."""
        ...


class RayMetrics:
    """:class:`ServerMetrics` through Ray, which adds the prefix ``ray_`` to each name."""

    def __init__(self) -> None:
        from ray.util.metrics import Counter, Histogram

        def counter(name: str, description: str, *tags: str) -> Any:
            return Counter(f"udrl_serve_{name}", description=description, tag_keys=tags)

        self._requests = counter("requests_total", "Answered requests", "endpoint", "key", "status")
        self._seconds = Histogram(
            "udrl_serve_request_seconds",
            description="From the request's arrival to its last byte",
            boundaries=LATENCY_BOUNDARIES,
            tag_keys=("endpoint",),
        )
        self._prompts = counter("prompts_total", "Returned prompts", "task")
        self._misses = counter("command_misses_total", "Prompts that missed the requested length", "task")
        self._cut = counter("cut_total", "Prompts that were cut off at the token limit", "task")
        self._redrafts = counter("redrafts_total", "Drafts that were rejected and written again", "task", "reason")
        self._tokens = counter("tokens_total", "Tokens of all drafts", "kind")
        self._cancelled = counter("cancelled_total", "Generations that ended early: client disconnected, timeout, failure")

    def count_request(self, endpoint: str, key: str, status: int, seconds: float) -> None:
        self._requests.inc(1, {"endpoint": endpoint, "key": key, "status": str(status)})
        self._seconds.observe(seconds, {"endpoint": endpoint})

    def count_prompt(self, task: str, *, missed: bool, cut: bool) -> None:
        self._prompts.inc(1, {"task": task})
        if missed:
            self._misses.inc(1, {"task": task})
        if cut:
            self._cut.inc(1, {"task": task})

    def count_redraft(self, task: str, reason: str) -> None:
        self._redrafts.inc(1, {"task": task, "reason": reason})

    def count_tokens(self, prompt: int, completion: int) -> None:
        for kind, count in (("prompt", prompt), ("completion", completion)):
            if count:
                self._tokens.inc(count, {"kind": kind})

    def count_cancelled(self) -> None:
        self._cancelled.inc(1)

    async def page(self) -> str:
        return await asyncio.to_thread(_fetch_pages)


def _fetch_pages() -> str:
    import ray

    pages = []
    for node in ray.nodes():
        if node["Alive"] and node["MetricsExportPort"]:
            url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
            try:
                with urllib.request.urlopen(url, timeout=5) as page:
                    pages.append(page.read().decode())
            except OSError:  # the node is shutting down
                continue
    return merge_pages(pages)


def merge_pages(pages: list[str]) -> str:
    """Return one exposition page of the families about serving.

    The format allows each family's heading only once, before all of its samples.
    """
    headings: dict[str, list[str]] = {}
    samples: dict[str, list[str]] = {}
    for page in pages:
        family = ""
        for line in page.splitlines():
            if line.startswith("# "):
                _, keyword, family, *_ = line.split(maxsplit=3)
                family_headings = headings.setdefault(family, [])
                if not any(heading.split()[1] == keyword for heading in family_headings):
                    family_headings.append(line)
            elif line and family.startswith(PREFIXES):
                samples.setdefault(family, []).append(line)
    lines = [line for family, rows in samples.items() for line in (*headings[family], *rows)]
    return "\n".join(lines) + "\n"
