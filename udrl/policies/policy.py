"""A policy: a model, how it is asked, and how its draws are made."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from udrl.hashing import fingerprint
from udrl.recipe import Engine, Placement, Sampling

Row = dict[str, Any]


@dataclass(frozen=True)
class Policy:
    """Who writes: the teacher, a student of some round, a baseline.

    ``render`` turns a request row (the key columns of ``udrl.episodes.KEYS``) into what the engine takes: ``{"prompt":
    str}`` or ``{"tokenized_prompt": [...]}``, and where this row is drawn in its own way ``{"sampling": {...}}``, which
    goes over :meth:`sampling_params`. ``describe`` is the plain data that its behaviour depends on; together with model
    and sampling it makes the fingerprint. ``top_tokens`` asks for that many first tokens with their log-probabilities.
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
    top_tokens: int = 0

    def facts(self) -> dict[str, Any]:
        """What its draws depend on, as plain data: where two of these differ, the difference can be named."""
        sampling = self.sampling.model_dump()
        return {
            "model": self.model,
            "revision": self.revision,
            "dtype": self.engine.dtype,
            "sampling": sampling,
            "stop": list(self.stop),
            **self.describe,
        }

    @cached_property
    def fingerprint(self) -> str:
        """:meth:`facts` in 16 hex digits: equal fingerprints draw from one distribution."""
        return fingerprint(self.facts())

    def sampling_params(self) -> dict[str, Any]:
        """Keyword arguments of ``vllm.SamplingParams``."""
        params = draws(self.sampling)
        if self.stop:
            params["stop"] = list(self.stop)
        if self.stop_token_ids:
            params["stop_token_ids"] = list(self.stop_token_ids)
        if self.top_tokens:
            params["logprobs"] = self.top_tokens
        return params


def draws(sampling: Sampling) -> dict[str, Any]:
    """vLLM's names for how draws are made; the server takes the same.

    What does nothing is left out: vLLM sorts the vocabulary every step for top_p and top_k, and counts all tokens for
    penalties.
    """
    neutral = {"top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0, "frequency_penalty": 0.0}
    return {name: value for name, value in sampling.model_dump().items() if neutral.get(name) != value}
