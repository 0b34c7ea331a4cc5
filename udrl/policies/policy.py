"""A policy: a model, how it is asked, and how its draws are made."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from udrl.recipe import Engine, Placement, Sampling

Row = dict[str, Any]


@dataclass(frozen=True)
class Policy:
    """Who writes: the teacher, a student of some round, a baseline.

    ``render`` turns a request row (the key columns of ``udrl.episodes.KEYS``) into what the engine takes: ``{"prompt":
    str}`` or ``{"tokenized_prompt": [...]}``. ``describe`` is the plain data that its
    behaviour depends on; together with model and sampling it makes the fingerprint.
    """

    name: str
    model: str
    path: str
    revision: str
    render: Callable[[Row], dict[str, Any]]
    sampling: Sampling
    engine: Engine
    placement: Placement
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    describe: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def fingerprint(self) -> str:
        """Template, sampling, model and revision in 16 hex digits: equal fingerprints draw from one distribution."""
        facts = [self.model, self.revision, self.sampling.model_dump(), self.engine.dtype, self.describe, self.stop]
        return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]

    def sampling_params(self) -> dict[str, Any]:
        """Keyword arguments of ``vllm.SamplingParams``."""
        params = draws(self.sampling)
        if self.stop:
            params["stop"] = list(self.stop)
        if self.stop_token_ids:
            params["stop_token_ids"] = list(self.stop_token_ids)
        return params


def draws(sampling: Sampling) -> dict[str, Any]:
    """vLLM's names for how draws are made; the server's completion requests take the same.

    What does nothing is left out: vLLM sorts the vocabulary every step for top_p and top_k, and counts all tokens for
    penalties.
    """
    neutral = {"top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0, "frequency_penalty": 0.0}
    return {name: value for name, value in sampling.model_dump().items() if neutral.get(name) != value}
