"""vLLM's settings from a recipe, shared by the batch stage and the server."""

import os
from typing import Any

from udrl import cluster
from udrl.policies.policy import Policy
from udrl.recipe import Engine, Placement


def engine_kwargs(engine: Engine, place: Placement) -> dict[str, Any]:
    """vLLM engine arguments shared by the batch stage and the server."""
    # vLLM's CPU default of 128 tokens a cache block leaves up to 127 tokens of a shared few-shot prefix to be computed for
    # every request; with 32 the bundled teacher wrote 26 prompts/s instead of 18. 16 is not supported.
    blocks = {} if place.gpus else {"block_size": 32}
    return {
        **blocks,
        "dtype": engine.dtype,
        "max_model_len": engine.max_model_len,
        "max_num_seqs": engine.max_num_seqs,
        "enforce_eager": engine.eager,
        "enable_prefix_caching": True,
        "trust_remote_code": False,
        # The recipe says how to draw; a model's generation_config.json would fill in what a request leaves out.
        "generation_config": "vllm",
        **engine.kwargs,
    }


def pinned(policy: Policy) -> dict[str, str]:
    """The revision of a model from a hub, so that what is recorded is what is loaded."""
    on_hub = not os.path.isdir(policy.path)
    return {"revision": policy.revision, "tokenizer_revision": policy.revision} if on_hub else {}


def bundles(engine: Engine, place: Placement) -> list[dict[str, float]]:
    """Resource bundles of one engine replica: one a device."""
    workers = engine.kwargs.get("tensor_parallel_size", 1) * engine.kwargs.get("pipeline_parallel_size", 1)
    return [{"CPU": place.cpus, "GPU": place.gpus} for _ in range(workers)]


def environment(place: Placement) -> dict[str, str]:
    """Environment of an engine process. On a GPU vLLM's own defaults stand."""
    if place.gpus:
        return {}
    return {
        # Ray sets OMP_NUM_THREADS to the actor's CPU share, which would leave the engine one thread.
        "OMP_NUM_THREADS": str(place.threads or cluster.cpu_count()),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1"),
        # One process for engine and scheduler: a second one costs more than it hides on two cores.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
    }
