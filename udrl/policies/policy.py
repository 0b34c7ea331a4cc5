"""A policy: a model, its requests and its sampling; and vLLM's arguments for it, in batches and in the server."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from udrl import cluster
from udrl.hashing import fingerprint
from udrl.recipe import Engine, Placement, Sampling

Row = dict[str, Any]  # a row of a table, or keyword arguments in one


@dataclass(frozen=True)
class Policy:
    """A model that writes prompts: the teacher, a student, a baseline; or a judge.

    ``render`` turns a request row (the key columns of ``udrl.episodes.KEYS``) into the engine's input: ``{"prompt": str}`` or
    ``{"tokenized_prompt": [...]}``, with ``{"sampling": {...}}`` if this row overrides :meth:`sampling_params`. ``describe`` is
    plain data on which the rendering depends; together with model and sampling it makes the fingerprint. ``top_tokens`` is the
    number of most probable first tokens to return with their log-probabilities.
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

    def fingerprint_inputs(self) -> dict[str, Any]:
        """Return everything on which the completions depend, as plain data."""
        return {
            "model": self.model,
            "revision": self.revision,
            "dtype": self.engine.dtype,
            "sampling": self.sampling.model_dump(),
            "stop": list(self.stop),
            **self.describe,
        }

    @cached_property
    def fingerprint(self) -> str:
        """Policies of equal fingerprints sample from the same distribution."""
        return fingerprint(self.fingerprint_inputs())

    def sampling_params(self) -> dict[str, Any]:
        """Return keyword arguments of ``vllm.SamplingParams``."""
        params = sampling_kwargs(self.sampling)
        if self.stop:
            params["stop"] = list(self.stop)
        if self.stop_token_ids:
            params["stop_token_ids"] = list(self.stop_token_ids)
        if self.top_tokens:
            params["logprobs"] = self.top_tokens
        return params


def sampling_kwargs(sampling: Sampling) -> dict[str, Any]:
    """Return the settings under vLLM's names, without those that have no effect.

    vLLM sorts the vocabulary in every step for top_p and top_k, and counts all tokens for penalties.
    """
    neutral = {"top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0, "frequency_penalty": 0.0}
    return {name: value for name, value in sampling.model_dump().items() if neutral.get(name) != value}


# ---- vLLM's engine arguments


def engine_kwargs(engine: Engine, place: Placement) -> dict[str, Any]:
    """Return vLLM's engine arguments, except the model."""
    # vLLM's CPU default of 128 tokens per cache block leaves up to 127 tokens of a shared few-shot prefix to compute for every
    # request; with 32 the bundled teacher wrote 26 prompts/s instead of 18. vLLM does not support 16.
    block_size = {} if place.gpus else {"block_size": 32}
    return {
        **block_size,
        "dtype": engine.dtype,
        "max_model_len": engine.max_model_len,
        "max_num_seqs": engine.max_num_seqs,
        "enforce_eager": engine.eager,
        "enable_prefix_caching": True,
        "trust_remote_code": False,
        # Sampling comes from the recipe only; a model's generation_config.json would fill in the settings that a request omits.
        "generation_config": "vllm",
        **engine.kwargs,
    }


def revision_kwargs(policy: Policy) -> dict[str, str]:
    """Return vLLM's arguments that pin a hub model to the recorded revision.

    Empty for a local folder.
    """
    is_local = os.path.isdir(policy.path)
    return {} if is_local else {"revision": policy.revision, "tokenizer_revision": policy.revision}


def resource_bundles(engine: Engine, place: Placement) -> list[dict[str, float]]:
    """Return the Ray resource bundles of one engine replica, one per device."""
    workers = engine.kwargs.get("tensor_parallel_size", 1) * engine.kwargs.get("pipeline_parallel_size", 1)
    return [{"CPU": place.cpus, "GPU": place.gpus} for _ in range(workers)]


def engine_environment(place: Placement) -> dict[str, str]:
    """Return the environment variables of an engine process.

    Empty on a GPU, where vLLM's defaults are right.
    """
    if place.gpus:
        return {}
    return {
        # Ray sets OMP_NUM_THREADS to the actor's CPU share, which would leave the engine one thread.
        "OMP_NUM_THREADS": str(place.threads or cluster.cpu_count()),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1"),
        # One process for engine and scheduler: on two cores a second one costs more than it hides.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
    }
