"""Every private name of Ray, vLLM and DeepSpeed that this project uses, each with its cause.

Libraries are imported inside the functions, so that importing this module costs nothing.
"""

from typing import Any

# ---- Ray Serve 2.60.0


def in_process_vllm_engine() -> type:
    """Return Ray's vLLM engine class, changed to run a CPU model in the engine's own process.

    On a CPU Ray asks vLLM for a worker process (``get_initialization_kwargs`` in
    ``ray/llm/_internal/serve/engines/vllm/vllm_models.py``). Engine and worker then wait for each other by spinning, on the
    cores that the model and the server need (docs/results/serving-cpu.md). ``LLMServer`` accepts another engine class but no
    other backend: Ray sets it after the user's engine arguments.
    """
    from ray.llm._internal.serve.engines.vllm.vllm_engine import VLLMEngine

    class InProcessVLLMEngine(VLLMEngine):
        def _prepare_engine_config(self, callback_ctx: Any) -> Any:
            arguments, frontend, config = super()._prepare_engine_config(callback_ctx)
            parallel = config.parallel_config
            if parallel.distributed_executor_backend == "mp" and parallel.world_size == 1:
                parallel.distributed_executor_backend = "uni"
            return arguments, frontend, config

        @property
        def async_llm(self) -> Any:
            """vLLM's AsyncLLM. Ray's own methods encode every token's chunk as JSON, only to parse it in the same process."""
            return self._engine_client

    return InProcessVLLMEngine


def serve_http_host() -> str | None:
    """Return the address that Ray Serve's HTTP proxies listen on; ``serve.status()`` does not report it."""
    from ray.serve.context import _get_global_client

    return _get_global_client().http_config.host


def use_own_event_loop(handle: Any) -> None:
    """Let a Ray Serve handle be used outside of an event loop.

    ``RAY_SERVE_THROUGHPUT_OPTIMIZED`` makes handles share their caller's loop, which a script does not have; ``handle.options``
    has no public argument for it. Serve caches handles, so the handle may be initialized already.
    """
    if not handle.is_initialized:
        handle._init(_run_router_in_separate_loop=True)
