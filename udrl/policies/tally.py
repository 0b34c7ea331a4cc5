"""What one run of the vLLM stage did, counted as its files are written."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

# Edges of the histogram of seconds to the first token, four a doubling: percentiles without keeping a number a request.
FIRST_TOKEN_EDGES = np.geomspace(1e-3, 4096, 89)


@dataclass
class Tally:
    """Counts of one run. ``seconds`` runs from the first request's start to the last file, so that engine start-up is told
    apart; ``busy`` and ``alive`` are seconds an engine had work, and seconds since it was ready."""

    rows: int = 0  # requests completed now
    reused: int = 0  # requests found done
    prompts: int = 0  # that the rows asked for
    accepted: int = 0  # of the prompts, as far as one completion alone tells (duplicates are found later)
    reasons: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)  # one rejected completion for each reason
    input_tokens: int = 0
    cached_tokens: int = 0  # of the input, found in the prefix cache
    output_tokens: int = 0
    engines: dict[str, tuple[float, float]] = field(default_factory=dict)  # engine -> (busy, alive)
    first_token: np.ndarray = field(default_factory=lambda: np.zeros(len(FIRST_TOKEN_EDGES) + 1, dtype=np.int64))
    startup_seconds: float = 0.0
    seconds: float = 0.0

    def add(self, report: dict[str, Any]) -> None:
        """Add what one written block reports (see ``engine._Sink``)."""
        for name in ("rows", "prompts", "accepted", "input_tokens", "cached_tokens", "output_tokens"):
            setattr(self, name, getattr(self, name) + report[name])
        self.reasons.update(report["reasons"])
        self.examples = {**report["examples"], **self.examples}
        for engine, (busy, alive) in report["engines"].items():
            self.engines[engine] = max((busy, alive), self.engines.get(engine, (0.0, 0.0)))
        for bucket, n in report["first_token"].items():
            self.first_token[int(bucket)] += n

    @property
    def tokens_per_second(self) -> float:
        return self.output_tokens / self.seconds if self.seconds > 0 else 0.0

    @property
    def accepted_share(self) -> float:
        return self.accepted / self.prompts if self.prompts else 0.0

    @property
    def busy_share(self) -> float:
        """Share of the engines' time in which they had at least one request."""
        alive = sum(alive for _, alive in self.engines.values())
        return sum(busy for busy, _ in self.engines.values()) / alive if alive else 0.0

    @property
    def cached_share(self) -> float:
        """Prefix-cache hit rate: share of the input tokens that were not computed again."""
        return self.cached_tokens / self.input_tokens if self.input_tokens else 0.0

    def first_token_seconds(self, share: float) -> float:
        """Seconds to the first token that ``share`` (0 to 1) of the requests stayed below, to about a fifth."""
        total = self.first_token.sum()
        if not total:
            return 0.0
        bucket = int(np.searchsorted(np.cumsum(self.first_token), share * total))
        return float(FIRST_TOKEN_EDGES[min(bucket, len(FIRST_TOKEN_EDGES) - 1)])
