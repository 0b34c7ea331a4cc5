"""Private names of Ray, vLLM and DeepSpeed: they exist in the pinned versions, each override takes effect, and no other module
names one.

If a test here fails after an upgrade, read the upstream code that it names before you change the test.
"""

import ast
import importlib
import importlib.metadata
import inspect
import logging
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from udrl import cluster, internals

ROOT = Path(__file__).parents[2]

# ---- versions


def test_the_installed_versions_are_the_ones_that_the_names_were_read_in() -> None:
    distributions = importlib.metadata.packages_distributions()
    for package, version in internals.READ_IN.items():
        installed = {importlib.metadata.version(name).partition("+")[0] for name in distributions[package]}
        assert installed == {version}, package


def test_the_pinned_versions_are_the_ones_that_the_names_were_read_in() -> None:
    pins = (ROOT / "pyproject.toml").read_text()
    assert re.findall(r'"ray\[[^\]]*\]==([\d.]+)"', pins) == [internals.READ_IN["ray"]]
    assert re.findall(r'"deepspeed==([\d.]+)"', pins) == [internals.READ_IN["deepspeed"]]
    assert re.findall(r'"vllm(?:-cpu)?==([\d.]+)"', pins) == [internals.READ_IN["vllm"]] * 2


def test_importing_the_module_imports_none_of_the_packages() -> None:
    code = f"import sys, udrl.internals; print([name for name in {list(internals.READ_IN)} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


# ---- no other module names one

PRIVATE_MODULE = re.compile(r"\b(?:ray|vllm|deepspeed)(?:\.\w+)*\._\w+")
TORCH_AND_OS = {"os._exit", "torch._foreach_copy_"}  # private in name only, or not of these packages


def sources() -> list[Path]:
    files = [path for folder in ("udrl", "serve", "jobs", "benchmarks", "tests") for path in (ROOT / folder).rglob("*.py")]
    return [path for path in files if path not in (Path(__file__), Path(internals.__file__))]


def test_no_other_module_imports_or_spells_out_a_private_module() -> None:
    lines = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in sources()
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if PRIVATE_MODULE.search(line)
    ]
    assert lines == []


def private_names() -> set[str]:
    """Names with a leading underscore that internals.py reads from an object or passes to one."""
    tree = ast.parse(Path(internals.__file__).read_text())
    attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    keywords = {node.arg for node in ast.walk(tree) if isinstance(node, ast.keyword) and node.arg}
    return {name for name in attributes | keywords if name.startswith("_")}


def test_no_other_module_uses_a_private_attribute_that_is_used_here() -> None:
    names = private_names()
    assert {"_engine_client", "_prepare_engine_config", "_prepare_llm_request", "_generate_async"} <= names
    names -= {"_init"}  # too common a word; see the next test
    lines = [
        f"{path.relative_to(ROOT)}:{node.lineno}: {node.attr}"
        for path in sources()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in names
    ]
    assert lines == []


def test_the_library_reads_no_private_attribute_of_any_object_but_its_own() -> None:
    lines = [
        f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}"
        for path in sources()
        if "tests" not in path.parts
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
        and re.match(r"_[a-z]", node.attr)
        and node.attr not in ("_asdict", "_replace")  # public API of named tuples
        and ast.unparse(node.value) not in ("self", "cls", "super()")
        and ast.unparse(node) not in TORCH_AND_OS
        and not ast.unparse(node).startswith("torch.ops.")
    ]
    assert lines == []


# ---- Ray


def test_the_raylet_knows_the_variables_of_a_node() -> None:
    import ray

    raylet = (Path(ray.__file__).parent / "core/src/ray/raylet/raylet").read_bytes()
    for name in internals.NODE_ENV:
        assert name.removeprefix("RAY_").encode() in raylet, name


def test_rays_remark_on_a_second_init_is_hidden_and_other_records_are_not(caplog: pytest.LogCaptureFixture) -> None:
    import ray._private.worker as worker

    (message,) = re.findall(r'logger\.info\("(.*ray\.init\(\) again.*)"\)', inspect.getsource(worker.init))
    internals.hide_repeated_init()
    internals.hide_repeated_init()
    assert worker.logger.filters.count(internals._is_not_repeated_init) == 1
    caplog.set_level(logging.INFO, logger=worker.logger.name)
    worker.logger.addHandler(caplog.handler)  # Ray's loggers do not propagate
    try:
        worker.logger.info(message)
        worker.logger.info("another record")
    finally:
        worker.logger.removeHandler(caplog.handler)
    assert message not in caplog.messages
    assert "another record" in caplog.messages


def test_serve_reads_the_variables_of_a_serving_node() -> None:
    cluster.set_serve_env()  # tests/conftest.py did it before Ray was imported
    from ray.serve._private import constants

    assert constants.RAY_SERVE_THROUGHPUT_OPTIMIZED is True
    assert constants.RAY_SERVE_PROXY_USE_GRPC is True
    assert constants.RAY_SERVE_ENABLE_DIRECT_INGRESS is False
    assert constants.CONTROL_LOOP_INTERVAL_S == 0.5


def test_the_preset_for_throughput_does_not_turn_grpc_on_by_itself() -> None:
    """Why :data:`internals.SERVE_ENV` has both: Serve evaluates the second before the first."""
    from ray.serve._private import constants

    source = inspect.getsource(constants)
    assert source.index("RAY_SERVE_PROXY_USE_GRPC =") < source.index("RAY_SERVE_THROUGHPUT_OPTIMIZED =")


def test_a_handle_is_initialized_once_with_a_router_of_its_own() -> None:
    from ray.serve.handle import DeploymentHandle

    calls: list[dict[str, Any]] = []
    handle = SimpleNamespace(is_initialized=False, _init=lambda **options: calls.append(options))
    internals.use_own_event_loop(handle)
    internals.use_own_event_loop(SimpleNamespace(is_initialized=True))
    assert calls == [{"_run_router_in_separate_loop": True}]
    assert callable(DeploymentHandle._init)
    assert isinstance(DeploymentHandle.is_initialized, property)
    from ray.serve._private.handle_options import InitHandleOptions

    assert InitHandleOptions.create(_run_router_in_separate_loop=True)._run_router_in_separate_loop is True


def test_serve_knows_the_host_of_its_proxies() -> None:
    from ray.serve import context
    from ray.serve.config import HTTPOptions

    assert callable(context._get_global_client)
    assert "host" in HTTPOptions.model_fields


def test_serve_reads_the_interval_of_metrics_from_a_deprecated_field_only() -> None:
    """Why ``serve/engine.py`` sets ``metrics_interval_s``; if this fails, use the variables instead."""
    import ray.serve

    folder = Path(ray.serve.__file__).parent / "_private"
    variable = "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S"
    assert [path.name for path in folder.rglob("*.py") if variable in path.read_text()] == ["constants.py"]
    assert "autoscaling_config.metrics_interval_s" in (folder / "replica.py").read_text()


# ---- Ray Serve LLM; tests/integration/serving/test_serve.py looks at the processes of a real engine


def test_ray_calls_the_override_of_its_engine_config_when_an_engine_starts() -> None:
    from ray.llm._internal.serve.engines.vllm.vllm_engine import VLLMEngine

    engine = internals.in_process_vllm_engine()
    assert issubclass(engine, VLLMEngine)
    assert engine._prepare_engine_config is not VLLMEngine._prepare_engine_config
    assert "self._prepare_engine_config(" in inspect.getsource(VLLMEngine.start)
    assert "self._engine_client = " in inspect.getsource(VLLMEngine.start)  # read by the property async_llm


@pytest.mark.parametrize(("backend", "workers", "expected"), [("mp", 1, "uni"), ("mp", 2, "mp"), ("ray", 1, "ray")])
def test_one_cpu_worker_runs_in_the_engines_process(
    monkeypatch: pytest.MonkeyPatch, backend: str, workers: int, expected: str
) -> None:
    from ray.llm._internal.serve.engines.vllm.vllm_engine import VLLMEngine

    parallel = SimpleNamespace(distributed_executor_backend=backend, world_size=workers)
    monkeypatch.setattr(
        VLLMEngine, "_prepare_engine_config", lambda *_: ("args", "frontend", SimpleNamespace(parallel_config=parallel))
    )
    engine = object.__new__(internals.in_process_vllm_engine())
    engine_args, frontend_args, config = engine._prepare_engine_config(None)
    assert (engine_args, frontend_args) == ("args", "frontend")
    assert config.parallel_config.distributed_executor_backend == expected


def test_ray_still_asks_for_a_worker_process_on_a_cpu() -> None:
    """Why the engine's class is overridden; if Ray stops asking, delete the override."""
    from ray.serve.llm import LLMConfig

    config = LLMConfig(
        model_loading_config={"model_id": "tiny"},
        placement_group_config={"bundles": [{"CPU": 1}]},
        engine_kwargs={"distributed_executor_backend": "uni"},
    )
    assert config.get_engine_config().get_initialization_kwargs()["distributed_executor_backend"] == "mp"


def test_a_model_folder_is_what_the_engine_loads() -> None:
    from ray.serve.llm import LLMConfig

    config = LLMConfig(model_loading_config={"model_id": "tiny"}, placement_group_config={"bundles": [{"CPU": 1}]})
    internals.set_model_folder(config, "/models/tiny")
    assert config.get_engine_config().get_initialization_kwargs()["model"] == "/models/tiny"


# ---- Ray Data; tests/integration/test_overrides.py runs a pipeline


def test_an_asynchronous_udf_gets_this_many_batches_of_a_task() -> None:
    from ray.data._internal.planner.plan_udf_map_op import DEFAULT_ASYNC_BATCH_UDF_MAX_CONCURRENCY

    assert internals.BATCHES_PER_TASK == DEFAULT_ASYNC_BATCH_UDF_MAX_CONCURRENCY


def test_an_executor_of_ray_data_is_a_thread_that_can_be_shut_down() -> None:
    import threading

    from ray.data._internal.execution.streaming_executor import StreamingExecutor

    assert issubclass(StreamingExecutor, threading.Thread)
    assert "force" in inspect.signature(StreamingExecutor.shutdown).parameters


# ---- Ray Data LLM


def test_a_stage_finds_its_rows_by_the_index_column() -> None:
    assert internals.stage_class().IDX_IN_BATCH_COLUMN == internals.ROW_INDEX
    assert issubclass(internals.engine_stage_class(), internals.stage_class())


def test_the_engine_of_a_stage_has_the_methods_that_are_called() -> None:
    from ray.llm._internal.batch.stages import vllm_engine_stage

    wrapper = vllm_engine_stage.vLLMEngineWrapper
    for name in ("_prepare_llm_request", "_generate_async"):
        assert inspect.iscoroutinefunction(getattr(wrapper, name))
    assert callable(wrapper.get_scheduler_config)
    assert "self.llm = vLLMEngineWrapper(" in inspect.getsource(vllm_engine_stage.vLLMEngineStageUDF)
    assert "params" in vllm_engine_stage.vLLMEngineRequest.model_fields


def test_an_engine_that_has_died_is_a_fatal_error() -> None:
    from vllm.v1.engine.exceptions import EngineDeadError

    assert EngineDeadError in internals.fatal_engine_errors()


def test_the_engine_stage_of_a_processor_is_replaced_and_keeps_its_arguments(tmp_path: Path) -> None:
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig

    from benchmarks.dummy_engine import DummyEngine

    # A local folder: Ray would try for a while to read the configuration of a name from a hub.
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}')
    config = vLLMEngineProcessorConfig(
        model_source=str(tmp_path),
        engine_kwargs={"max_num_seqs": 7},
        placement_group_config={"bundles": [{"CPU": 1, "GPU": 0}]},
        chat_template_stage=False,
        tokenize_stage=False,
        detokenize_stage=False,
    )
    processor = build_processor(config)
    assert processor.list_stage_names() == [internals.ENGINE_STAGE]
    before = processor.get_stage_by_name(internals.ENGINE_STAGE)
    internals.replace_engine_actor(processor, DummyEngine)
    after = processor.get_stage_by_name(internals.ENGINE_STAGE)
    assert before.fn is internals.engine_stage_class()
    assert after.fn is DummyEngine
    assert after.fn_constructor_kwargs == before.fn_constructor_kwargs
    assert after.fn_constructor_kwargs["engine_kwargs"]["max_num_seqs"] == 7


# ---- Ray Train and DeepSpeed; tests/integration/test_export.py and test_train_kill.py gather and convert


def test_ray_trains_index_of_checkpoints_has_this_name() -> None:
    from ray.train.v2._internal.constants import CHECKPOINT_MANAGER_SNAPSHOT_FILENAME

    assert internals.CHECKPOINT_INDEX == CHECKPOINT_MANAGER_SNAPSHOT_FILENAME


def test_ray_trains_workers_have_this_name() -> None:
    from ray.train.v2._internal.execution.worker_group import worker

    assert hasattr(worker, internals.TRAIN_WORKER)


def test_deepspeed_gathers_weights_by_this_method() -> None:
    from deepspeed.runtime.engine import DeepSpeedEngine

    gather = inspect.signature(DeepSpeedEngine._zero3_consolidated_16bit_state_dict)
    assert all(p.default is not p.empty for name, p in gather.parameters.items() if name != "self")


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("deepspeed.runtime.bf16_optimizer", "BF16_Optimizer"),
        ("deepspeed.runtime.zero.stage_1_and_2", "DeepSpeedZeroOptimizer"),
        ("deepspeed.runtime.zero.stage3", "DeepSpeedZeroOptimizer_Stage3"),
    ],
)
def test_deepspeeds_wrappers_hold_the_optimizer_that_they_wrap(module: str, name: str) -> None:
    wrapper = getattr(importlib.import_module(module), name)
    assert "self.optimizer = init_optimizer" in inspect.getsource(wrapper.__init__)


def test_the_conversion_takes_all_options_of_deepspeeds_script(monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.checkpoint import ds_to_universal

    received: list[Any] = []
    monkeypatch.setattr(ds_to_universal, "main", received.append)
    internals.convert_to_universal("a", "b")
    monkeypatch.setattr(sys, "argv", ["ds_to_universal", "--input_folder", "a", "--output_folder", "b"])
    options = vars(ds_to_universal.parse_arguments())
    assert vars(received[0]).keys() == options.keys()
    assert (received[0].input_folder, received[0].output_folder) == ("a", "b")
