"""What the server counts, and one page of it for Prometheus.

Counters go through ``ray.util.metrics``: each process hands its counts to its node's agent, so they add up over replicas and
outlive one that is replaced. ``/metrics`` gathers the agents' pages of all nodes, which Prometheus could also scrape by itself
(Ray lists them in ``/tmp/ray/prom_metrics_service_discovery.json``). Counts arrive there within Ray's report interval, 10 s.
"""

import asyncio
import urllib.request
from typing import Any

PREFIXES = ("ray_udrl_", "ray_serve_", "ray_vllm")
SECONDS = [0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30]


class Meters:
    """Counts nothing: for a server without Ray."""

    def request(self, endpoint: str, key: str, status: int, seconds: float) -> None: ...

    def prompt(self, task: str, *, missed: bool, cut: bool) -> None: ...

    def redrafted(self, task: str, reason: str) -> None: ...

    def tokens(self, prompt: int, completion: int) -> None: ...

    def cancelled(self) -> None: ...

    async def page(self) -> str:
        return ""


class RayMeters(Meters):
    """Counts through Ray. The names get the prefix ``ray_``."""

    def __init__(self) -> None:
        from ray.util.metrics import Counter, Histogram

        def counter(name: str, description: str, *tags: str) -> Any:
            return Counter(f"udrl_serve_{name}", description=description, tag_keys=tags)

        self._requests = counter("requests_total", "Requests answered", "endpoint", "key", "status")
        self._seconds = Histogram(
            "udrl_serve_request_seconds",
            description="From the request's arrival to its last byte",
            boundaries=SECONDS,
            tag_keys=("endpoint",),
        )
        self._prompts = counter("prompts_total", "Prompts answered with", "task")
        self._misses = counter("command_misses_total", "Prompts that missed the asked length", "task")
        self._cut = counter("cut_total", "Prompts that ended at the token limit", "task")
        self._redrafts = counter("redrafts_total", "Drafts dropped and written again", "task", "reason")
        self._tokens = counter("tokens_total", "Tokens of all drafts", "kind")
        self._cancelled = counter("cancelled_total", "Generations ended before their answer: client gone, timeout, failure")

    def request(self, endpoint: str, key: str, status: int, seconds: float) -> None:
        self._requests.inc(1, {"endpoint": endpoint, "key": key, "status": str(status)})
        self._seconds.observe(seconds, {"endpoint": endpoint})

    def prompt(self, task: str, *, missed: bool, cut: bool) -> None:
        self._prompts.inc(1, {"task": task})
        if missed:
            self._misses.inc(1, {"task": task})
        if cut:
            self._cut.inc(1, {"task": task})

    def redrafted(self, task: str, reason: str) -> None:
        self._redrafts.inc(1, {"task": task, "reason": reason})

    def tokens(self, prompt: int, completion: int) -> None:
        for kind, count in (("prompt", prompt), ("completion", completion)):
            if count:
                self._tokens.inc(count, {"kind": kind})

    def cancelled(self) -> None:
        self._cancelled.inc(1)

    async def page(self) -> str:
        return await asyncio.to_thread(_gather)


def _gather() -> str:
    import ray

    pages = []
    for node in ray.nodes():
        if node["Alive"] and node["MetricsExportPort"]:
            url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
            try:
                with urllib.request.urlopen(url, timeout=5) as page:
                    pages.append(page.read().decode())
            except OSError:  # a node that is just going away
                continue
    return merged(pages)


def merged(pages: list[str]) -> str:
    """One exposition page of the families that concern serving; a family's heading stands once, before all of its samples."""
    headings: dict[str, list[str]] = {}
    samples: dict[str, list[str]] = {}
    for page in pages:
        family, mine = "", []
        for line in page.splitlines():
            if line.startswith("# "):
                words = line.split(maxsplit=3)
                if words[2] != family:
                    family, mine = words[2], headings.setdefault(words[2], [])
                if line.split()[1] not in [known.split()[1] for known in mine]:
                    mine.append(line)
            elif line and family.startswith(PREFIXES):
                samples.setdefault(family, []).append(line)
    lines = [line for family, rows in samples.items() for line in (*headings[family], *rows)]
    return "\n".join(lines) + "\n"
