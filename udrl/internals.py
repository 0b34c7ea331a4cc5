"""Every private or undocumented name of Ray, vLLM and DeepSpeed that this project uses, each with its cause.

They were read in the versions of :data:`READ_IN`, which ``pyproject.toml`` pins. ``tests/unit/test_internals.py`` and
``tests/integration/test_overrides.py`` assert that each name exists there and that each override still takes effect. To
upgrade: install the new version, change :data:`READ_IN`, run those tests, and read the upstream code of each that fails.

Importing this module imports none of the three packages; its functions do.
"""

import functools
import json
import logging
import sys
import threading
from argparse import Namespace
from typing import Any

READ_IN = {"ray": "2.60.0", "vllm": "0.32.0", "deepspeed": "0.19.8"}

# ---- Ray

# Environment of the Ray processes of a node (src/ray/common/ray_config_def.h). cluster.yaml sets the first; the second is for
# engines on CPUs. Ray documents neither.
NODE_ENV = {
    # An engine that is killed leaves its core process behind, with the model in memory, unless the raylet ends its group.
    "RAY_process_group_cleanup_enabled": "true",
    # Ray gives its workers a low priority (nice 15); on two cores its own daemons then interrupt the engine.
    "RAY_worker_niceness": "0",
}

INIT_LOGGER = "ray._private.worker"
REPEATED_INIT = "ray.init() again"


def hide_repeated_init() -> None:
    """Drop Ray's remark that ``ray.init()`` was called twice; idempotent.

    ``ray.data.llm`` calls it in a connected driver, and Ray logs a line for that at level INFO (ray/_private/worker.py). A
    higher level of Ray's logger would hide its other records.
    """
    logging.getLogger(INIT_LOGGER).addFilter(_is_not_repeated_init)


def _is_not_repeated_init(record: logging.LogRecord) -> bool:
    return REPEATED_INIT not in record.getMessage()


def prepare_cluster_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return what ``ray up`` makes of the content of a cluster file; for tests.

    ``ray up`` has no option that only validates.

    Raises:
        jsonschema.ValidationError: a key is unknown or has a wrong value.
    """
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared: dict[str, Any] = prepare_config(config)
    validate_config(prepared)
    return prepared


# ---- Ray Serve

# Environment of a node that serves (docs/results/serving-cpu.md has their effect). Ray Serve reads it on import, in each of its
# processes (ray/serve/_private/constants.py), so it must be set where Ray is started, as cluster.yaml does.
SERVE_ENV = {
    # A preset for many small requests: one event loop per replica, gRPC between replicas, logs written in blocks.
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    # Ray Serve evaluates this one before it applies the preset.
    "RAY_SERVE_PROXY_USE_GRPC": "1",
    # The preset opens one port per replica. Only HAProxy would connect to them.
    "RAY_SERVE_ENABLE_DIRECT_INGRESS": "0",
    # Seconds between runs of the controller's loop. The default of 0.1 took 4% of a core from an engine that had two.
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",
}


def use_own_event_loop(handle: Any) -> None:
    """Let a deployment handle be used without an event loop.

    :data:`SERVE_ENV` makes a handle share its caller's loop, and ``handle.options`` has no public argument for it. Serve
    returns the same handle for the same deployment, so it may be initialized already.
    """
    if not handle.is_initialized:
        handle._init(_run_router_in_separate_loop=True)


def serve_http_host() -> str | None:
    """Return the address that Ray Serve's HTTP proxies listen on.

    ``serve.status()`` does not report it.
    """
    from ray.serve.context import _get_global_client

    return _get_global_client().http_config.host


# ---- Ray Serve LLM


@functools.cache
def in_process_vllm_engine() -> type:
    """Return Ray's ``VLLMEngine``, with one CPU worker in the engine's process.

    Ray asks for a worker process there and ignores ``engine_kwargs`` (``VLLMEngineConfig.get_initialization_kwargs``). The two
    processes then wait for each other by spinning, on the cores that the model and the server need
    (docs/results/serving-cpu.md). ``LLMServer`` takes an engine class, but no public module has one to derive from.
    """
    from ray.llm._internal.serve.engines.vllm.vllm_engine import VLLMEngine

    class InProcessVLLMEngine(VLLMEngine):
        def _prepare_engine_config(self, callback_ctx: Any) -> Any:
            engine_args, frontend_args, config = super()._prepare_engine_config(callback_ctx)
            parallel = config.parallel_config
            if parallel.distributed_executor_backend == "mp" and parallel.world_size == 1:
                parallel.distributed_executor_backend = "uni"
            return engine_args, frontend_args, config

        @property
        def async_llm(self) -> Any:
            """Return vLLM's AsyncLLM.

            Ray's own methods encode each token as a chunk of JSON, only to parse it in the same process.
            """
            return self._engine_client

    return InProcessVLLMEngine


def set_model_folder(llm_config: Any, folder: str) -> None:
    """Let an ``LLMConfig`` load its model from a local folder.

    Ray's own download sets the same field (ray/llm/_internal/serve/utils/node_initialization_utils.py), but takes only some URI
    schemes, caches by model id, and only logs a failed download.
    """
    llm_config.get_engine_config().hf_model_id = folder


# ---- Ray Data


def limit_unwritten_blocks(dataset: Any, per_actor: int) -> None:
    """Hold back a dataset's actor pools while too many blocks wait behind them.

    A pool gets no block while ``per_actor`` blocks per running actor wait for the next operator. Ray's own backpressure counts
    bytes. Completions are so small that a slow storage would let hours of them pile up in memory, and they would be lost with
    the run. Ray Data has no public way to add a policy.
    """
    from ray.data._internal.execution.backpressure_policy import (
        ENABLED_BACKPRESSURE_POLICIES,
        ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY,
    )
    from ray.data._internal.execution.backpressure_policy.backpressure_policy import BackpressurePolicy
    from ray.data._internal.execution.operators.actor_pool_map_operator import ActorPoolMapOperator

    class UnwrittenBlocksPolicy(BackpressurePolicy):
        def can_add_input(self, op: Any) -> bool:
            if not isinstance(op, ActorPoolMapOperator) or not op.output_dependencies:
                return True
            (writer,) = op.output_dependencies
            unwritten = self._topology[writer].total_enqueued_input_blocks() + writer.num_active_tasks()
            return unwritten < per_actor * max(1, op.get_actor_info().running)

    policies = [*ENABLED_BACKPRESSURE_POLICIES, UnwrittenBlocksPolicy]
    dataset.context.set_config(ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY, policies)


def running_datasets(timeout_s: float) -> dict[str, dict[str, dict[str, Any]]]:
    """Return the state of each operator of each running dataset.

    It has ``progress``, ``total``, ``queued_blocks`` and ``state``. The public API has statistics only for the process that
    iterates over a dataset, and only once it has ended.

    Raises:
        ray.exceptions.GetTimeoutError: the statistics actor did not answer in time.
    """
    import ray
    from ray.data._internal.stats import get_or_create_stats_actor

    datasets = ray.get(get_or_create_stats_actor().get_datasets.remote(), timeout=timeout_s)
    return {name: state.get("operators", {}) for name, state in datasets.items() if state.get("state") == "RUNNING"}


def end_data_executors(timeout_s: float) -> None:
    """End the threads of Ray Data in this process; for tests.

    Call it before ``ray.shutdown()``. Ray Data waits two seconds for the thread of an abandoned execution. A slower one calls a
    Ray that has been shut down, and Ray then aborts the whole process without a message (GetCoreWorker in
    core_worker_process.cc).
    """
    from ray.data._internal.execution.streaming_executor import StreamingExecutor

    for thread in threading.enumerate():
        if isinstance(thread, StreamingExecutor):
            thread.shutdown(force=True)
            thread.join(timeout_s)
            assert not thread.is_alive(), f"{thread.name} is still alive after {timeout_s:g} s"


# Batches of one task that Ray Data passes to an asynchronous UDF at the same time
# (DEFAULT_ASYNC_BATCH_UDF_MAX_CONCURRENCY in ray/data/_internal/planner/plan_udf_map_op.py).
BATCHES_PER_TASK = 4

# ---- Ray Data LLM

# The column with a row's place in its batch, which a stage must return (StatefulStageUDF.IDX_IN_BATCH_COLUMN).
ROW_INDEX = "__idx_in_batch"
ENGINE_STAGE = "vLLMEngineStage"


def stage_class() -> Any:
    """Return the base class of Ray Data LLM's stages.

    Their ``udf`` gets a batch as rows and yields the rows' new columns. An actor that takes the engine's place in a processor
    must derive from it.
    """
    from ray.llm._internal.batch.stages.base import StatefulStageUDF

    return StatefulStageUDF


def engine_stage_class() -> Any:
    """Return Ray Data LLM's stage that owns a vLLM engine.

    Its ``udf`` drops vLLM's finish reason, cached tokens and times, and converts every token id and log-probability to a Python
    object. No public option keeps them.
    """
    from ray.llm._internal.batch.stages.vllm_engine_stage import vLLMEngineStageUDF

    return vLLMEngineStageUDF


def max_num_seqs(stage: Any) -> int:
    """Return how many sequences the engine of a stage runs at a time."""
    return int(stage.llm.get_scheduler_config().max_num_seqs)


async def generate_final_output(stage: Any, row: dict[str, Any]) -> Any:
    """Return vLLM's ``RequestOutput`` for a row, without partial outputs.

    The public way through the stage reads every partial output and returns a reduced copy of the last.
    """
    from vllm.sampling_params import RequestOutputKind

    # Ray Data LLM accepts them as a dictionary only; in a block they are text, since the rows of a block have one schema.
    row["sampling_params"] = json.loads(row["sampling_params"])
    request = await stage.llm._prepare_llm_request(row)
    request.params.output_kind = RequestOutputKind.FINAL_ONLY
    return await stage.llm._generate_async(request)


def fatal_engine_errors() -> tuple[type[Exception], ...]:
    """Return the errors after which a vLLM engine answers no request; none in a process that has not imported vLLM."""
    if "vllm" not in sys.modules:  # importing it takes eight seconds, and no engine can have raised one of them
        return ()
    from ray.llm._internal.common.errors import VLLM_FATAL_ERRORS

    return VLLM_FATAL_ERRORS


def replace_engine_actor(processor: Any, actor: type) -> None:
    """Let ``actor`` answer the requests of a Ray Data LLM processor.

    It is constructed with the arguments of the processor's own engine stage. ``build_processor`` can override a stage's keyword
    arguments, but not its class.
    """
    # A copy, because assigning `fn` would validate the stage again, which then lacks the placement that it has used up.
    processor.stages[ENGINE_STAGE] = processor.get_stage_by_name(ENGINE_STAGE).model_copy(update={"fn": actor})


# ---- Ray Train

# Ray Train's index of checkpoints (ray/train/v2/_internal/constants.py). It is not written atomically: after a crash Ray Train
# refuses to start with it, and has no option to ignore it.
CHECKPOINT_INDEX = "checkpoint_manager_snapshot.json"

# The class of the training workers, which is in the titles of their processes
# (ray/train/v2/_internal/execution/worker_group/worker.py).
TRAIN_WORKER = "RayTrainWorker"

# ---- DeepSpeed


def gather_zero3_weights(engine: Any) -> dict[str, Any]:
    """Return all weights in 16 bits on worker 0, nothing on the others.

    All workers must call it. The public ``save_16bit_model`` writes a file instead, and only if the user's DeepSpeed settings
    allow it.
    """
    return engine._zero3_consolidated_16bit_state_dict() or {}


def inner_optimizer(engine: Any) -> Any:
    """Return the PyTorch optimizer inside DeepSpeed's wrapper, if there is one."""
    return getattr(engine.optimizer, "optimizer", None)


def convert_to_universal(source: str, target: str) -> None:
    """Convert a checkpoint to DeepSpeed's universal form.

    Any number of workers can load it. DeepSpeed offers this as a command-line script; its ``main`` takes the parsed options.
    """
    from deepspeed.checkpoint import ds_to_universal

    ds_to_universal.main(
        Namespace(
            input_folder=source,
            output_folder=target,
            num_extract_workers=1,
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=True,
        )
    )
