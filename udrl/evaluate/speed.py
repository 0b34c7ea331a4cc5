"""How fast each contender is on this machine, measured before the evaluation starts: one request at a time, then many.

The same bare vLLM with the settings of the recipe, one policy after another, each in a process of its own. From that the
evaluation tells how long it will take, and the report what a prompt costs.
"""

import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from udrl import cluster, storage
from udrl.context import StageContext
from udrl.errors import StalledError
from udrl.evaluate.evaluated_policies import EvaluatedPolicy
from udrl.hashing import fingerprint
from udrl.policies.policy import Policy, engine_environment, engine_kwargs, resource_bundles, revision_kwargs
from udrl.progress import duration

AT_ONCE = 64  # requests of the measurement of throughput
# Texts a second of a judge that was not timed yet: likelihood under the bundled 135M model on two CPU cores.
TEXTS_PER_SECOND = 25.0
# Around the engine, of one policy: starting the stages of Ray Data and the embedder, and scoring. Seen on two CPU cores.
AROUND = 25.0  # seconds
SCORED_PER_SECOND = 150.0  # prompts


class _Stopwatch:
    """A Ray actor with one bare engine."""

    def __init__(self, model: str, kwargs: dict[str, Any]) -> None:
        begun = time.perf_counter()
        from vllm import LLM

        self.engine = LLM(model=model, disable_log_stats=True, **kwargs)
        self.startup = time.perf_counter() - begun

    def measure(self, prompts: list[Any], params: dict[str, Any], one_by_one: int) -> dict[str, float]:
        import psutil
        from vllm import SamplingParams

        sampling = SamplingParams(**params)
        self.engine.generate(prompts[:1], sampling, use_tqdm=False)  # what is made at the first call is not a request's time
        latencies = []
        for prompt in prompts[1 : 1 + one_by_one]:
            begun = time.perf_counter()
            self.engine.generate([prompt], sampling, use_tqdm=False)
            latencies.append(time.perf_counter() - begun)
        begun = time.perf_counter()
        outputs = self.engine.generate(prompts, sampling, use_tqdm=False)
        seconds = time.perf_counter() - begun
        me = psutil.Process()
        memory = sum(p.memory_info().rss for p in (me, *me.children(recursive=True)))
        return {
            "latency_p50": float(np.quantile(latencies, 0.5)),
            "latency_p95": float(np.quantile(latencies, 0.95)),
            "prompts_per_second": len(prompts) / seconds,
            "tokens_per_second": sum(len(o.outputs[0].token_ids) for o in outputs) / seconds,
            "memory_mib": memory / 2**20,
            "startup_seconds": self.startup,
        }


def measure(
    contenders: Sequence[EvaluatedPolicy], requests: int, work: str, where: dict[str, Any], context: StageContext
) -> dict[str, dict[str, float]]:
    """Latency (seconds of one request alone, p50 and p95 of ``requests``), prompts/s and tokens/s of 64 requests given at once
    to one replica, host memory of the engine's process and start-up seconds, by policy.

    What was measured before is read from ``work``: with the same settings, on the same kind of machine (``where``).
    ``requests`` = 0 measures nothing.

    Raises:
        UserError: the placement can't be had.
        StalledError: an engine did not answer for ``context.watchdog_minutes``.
    """
    found: dict[str, dict[str, float]] = {}
    for contender in contenders:
        policy = contender.policy
        settings = [policy.fingerprint, engine_kwargs(policy.engine, policy.placement), policy.placement.model_dump(), where]
        file = storage.join(work, f"speed-{policy.name}-{fingerprint([*settings, requests])}.json")
        if storage.exists(file):
            found[policy.name] = storage.read_json(file)
        elif requests and contender.requests:
            print(f"evaluate: timing {policy.name} ({policy.model})", file=sys.stderr, flush=True)
            found[policy.name] = _measure(contender, requests, context)
            storage.write_json(file, found[policy.name])
    return found


def _measure(contender: EvaluatedPolicy, requests: int, context: StageContext) -> dict[str, float]:
    import ray
    from ray.exceptions import GetTimeoutError

    policy, place = contender.policy, contender.policy.placement
    need = resource_bundles(policy.engine, place)
    cpus, gpus = sum(b["CPU"] for b in need), sum(b["GPU"] for b in need)
    cluster.require_resources(f"{policy.name}: placement", cpus, gpus)
    options: dict[str, Any] = {"num_cpus": cpus, "num_gpus": gpus, "runtime_env": {"env_vars": engine_environment(place)}}
    if place.accelerator:
        options["accelerator_type"] = place.accelerator
    kwargs = {**engine_kwargs(policy.engine, place), **revision_kwargs(policy)}
    actor = ray.remote(**options)(_Stopwatch).remote(policy.path, kwargs)
    # Spread over all requests, as they come: default commands and sweeps.
    step = max(1, len(contender.requests) // AT_ONCE)
    rows = (contender.requests[::step] * (1 + requests))[: max(AT_ONCE, 1 + requests)]
    try:
        asked = actor.measure.remote([_prompt(policy, row) for row in rows], policy.sampling_params(), requests)
        return ray.get(asked, timeout=60 * context.watchdog_minutes)
    except GetTimeoutError as error:
        raise StalledError(f"evaluate: timing {policy.name}: no answer for {context.watchdog_minutes:g} minutes") from error
    finally:
        ray.kill(actor)


def _prompt(policy: Policy, row: dict[str, Any]) -> Any:
    rendered = policy.render(row)
    ids = rendered.get("tokenized_prompt")
    return rendered["prompt"] if ids is None else {"prompt_token_ids": list(ids)}


def costs(contender: EvaluatedPolicy, prompts_per_second: float) -> dict[str, float]:
    """What 1,000 prompts of one replica take: seconds of all cores, or of all GPUs, that it may use, and dollars where its
    price is known."""
    place = contender.policy.placement
    seconds = 1000 / prompts_per_second
    if place.gpus:
        found = {"gpu_seconds_per_1000": seconds * sum(b["GPU"] for b in resource_bundles(contender.policy.engine, place))}
    else:
        found = {"core_seconds_per_1000": seconds * (place.threads or cluster.cpu_count())}
    if place.dollars_per_hour is not None:
        found["dollars_per_1000"] = seconds * place.dollars_per_hour / 3600
    return found


class Judging(NamedTuple):
    """What a judge has still to score at most, and the texts a second that it scored last, if it ever did."""

    name: str
    texts: int
    rate: float | None


def plan(
    contenders: Sequence[EvaluatedPolicy],
    missing: dict[str, int],
    speeds: dict[str, dict[str, float]],
    judging: Sequence[Judging],
) -> list[str]:
    """The lines that say, before it starts, what the evaluation will ask and how long it will take.

    ``missing``: requests of each policy that no earlier run has answered.
    """
    lines, total, unknown = [], 0.0, False
    for contender in contenders:
        name, n = contender.policy.name, missing[contender.policy.name]
        speed = speeds.get(name)
        if not n:
            lines.append(f"{name}: all {len(contender.requests):,} prompts are there already")
        elif speed:
            replicas = contender.policy.placement.replicas
            seconds = speed["startup_seconds"] + n / speed["prompts_per_second"] / replicas + AROUND + n / SCORED_PER_SECOND
            total += seconds
            lines.append(
                f"{name}: {n:,} prompts, about {duration(seconds)} (measured {speed['prompts_per_second']:.1f} prompts/s)"
            )
        else:
            unknown = True
            lines.append(f"{name}: {n:,} prompts, its speed was not measured")
    for name, texts, known in judging:
        if not texts:
            lines.append(f"judge {name}: all its scores are there already")
            continue
        rate = known or TEXTS_PER_SECOND
        total += texts / rate
        basis = "measured before" if known else "assumed"
        lines.append(f"judge {name}: at most {texts:,} texts, about {duration(texts / rate)} ({basis} {rate:.0f} texts/s)")
    known_part = f"about {duration(total)} in all" if total else "" if unknown else "nothing left to ask"
    said = ", ".join(part for part in (known_part, "without what was not measured" if unknown else "") if part)
    return [f"evaluate: {said}", *(f"  {line}" for line in lines)]
