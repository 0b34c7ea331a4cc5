"""Counts and times of one run of the vLLM stage, added up from the reports of its writers."""

from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from pydantic import BaseModel

# Bucket edges in seconds of the histogram of times to the first token, four per doubling: percentiles in constant memory.
FIRST_TOKEN_EDGES = np.geomspace(1e-3, 4096, 89)


class EngineSeconds(NamedTuple):
    """Seconds that an engine had at least one request, and seconds since it was ready."""

    busy: float
    alive: float


class BlockReport(BaseModel):
    """Counts of one block of completions.

    Its writer sends it to the driver as JSON; it is small for any size of block.
    """

    engine_error: str = ""  # why all requests of the block failed, if no request had succeeded before; nothing was written
    rows: int = 0
    prompts: int = 0
    accepted: int = 0
    reasons: dict[str, int] = {}
    examples: dict[str, str] = {}  # reject reason -> one rejected completion
    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    first_started: float = 0.0  # epoch seconds, start of the block's first request
    engines: dict[str, EngineSeconds] = {}  # engine -> its latest times
    first_token: dict[int, int] = {}  # bucket of FIRST_TOKEN_EDGES -> requests


@dataclass
class CompletionStatistics:
    """Counts and times of one run of the vLLM stage.

    ``seconds`` is from the start of the first request to the last file; the start-up of the engine comes before it.
    """

    rows: int = 0  # requests completed in this run
    reused: int = 0  # requests completed by earlier runs
    prompts: int = 0  # that the rows requested
    accepted: int = 0  # prompts, judged by their completion only: duplicates are found later
    reasons: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)  # reject reason -> one rejected completion
    input_tokens: int = 0
    cached_tokens: int = 0  # input tokens that were in the prefix cache
    output_tokens: int = 0
    engines: dict[str, EngineSeconds] = field(default_factory=dict)
    first_token: np.ndarray = field(default_factory=lambda: np.zeros(len(FIRST_TOKEN_EDGES) + 1, dtype=np.int64))
    startup_seconds: float = 0.0
    seconds: float = 0.0

    def add(self, report: BlockReport) -> None:
        """Add the counts of a block; of each engine the latest times stay."""
        self.rows += report.rows
        self.prompts += report.prompts
        self.accepted += report.accepted
        self.input_tokens += report.input_tokens
        self.cached_tokens += report.cached_tokens
        self.output_tokens += report.output_tokens
        self.reasons.update(report.reasons)
        self.examples = {**report.examples, **self.examples}
        for engine, seconds in report.engines.items():
            self.engines[engine] = max(seconds, self.engines.get(engine, seconds))
        for bucket, count in report.first_token.items():
            self.first_token[bucket] += count

    @property
    def tokens_per_second(self) -> float:
        return self.output_tokens / self.seconds if self.seconds > 0 else 0.0

    @property
    def accepted_share(self) -> float:
        return self.accepted / self.prompts if self.prompts else 0.0

    @property
    def busy_seconds(self) -> float:
        return sum(engine.busy for engine in self.engines.values())

    @property
    def busy_share(self) -> float:
        """Share of the engines' time in which they had at least one request."""
        alive = sum(engine.alive for engine in self.engines.values())
        return self.busy_seconds / alive if alive else 0.0

    @property
    def cached_share(self) -> float:
        """Prefix-cache hit rate: share of the input tokens that were not computed again."""
        return self.cached_tokens / self.input_tokens if self.input_tokens else 0.0

    def first_token_seconds(self, share: float) -> float:
        """Return a quantile of the seconds to the first token, ``share`` in 0..1.

        It is at most a fifth too large.
        """
        total = self.first_token.sum()
        if not total:
            return 0.0
        bucket = int(np.searchsorted(np.cumsum(self.first_token), share * total))
        return float(FIRST_TOKEN_EDGES[min(bucket, len(FIRST_TOKEN_EDGES) - 1)])
