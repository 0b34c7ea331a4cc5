"""``python -m benchmarks.serving_arms serve|bare|transformers|batched WORK``: one arm of ``benchmarks.serving``.

Starts the server or engine, warms it up, runs the load of the work file and stops it. Prints JSON: ``phases``,
``cold_start_s`` (from the start of this process to the first response), ``memory_mib`` (PSS of the processes that hold the
model) and, for our server, ``other_mib`` (PSS of its other processes).
"""

import asyncio
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.serving_load import Phase, make_intent, run_phases

STARTED = time.time()


def main(arm: str, path: str) -> None:
    work = json.loads(Path(path).read_text(encoding="utf-8"))
    arms = {
        "serve": measure_serve,
        "bare": measure_bare_engine,
        "transformers": measure_transformers,
        "batched": measure_batched_transformers,
    }
    print(json.dumps(arms[arm](work, path)))


def measure_serve(work: dict[str, Any], path: str) -> dict[str, Any]:
    """Measure our application on a Ray that is started as in ``serve.app``."""
    from udrl import cluster

    cluster.ensure_auth_token()
    cluster.set_serve_env()
    import ray
    from ray import serve as ray_serve

    from serve import app

    port = free_port()
    cluster.connect()
    try:
        ray_serve.start(http_options={"host": "127.0.0.1", "port": port})
        args = {"recipe": work["recipe"], "overrides": work["overrides"], "model": work["student"]}
        ray_serve.run(app.build(args), name=app.APPLICATION_NAME)
        return measure_over_http(port, path, _serve_memory)
    finally:
        ray_serve.shutdown()
        ray.shutdown()


def _serve_memory() -> dict[str, float]:
    from serve import app

    state = app.get_engine_handle("bench").state.remote().result(timeout_s=60)
    engine = set(process_tree(state["pid"]))
    ray_roots = [pid for name in ("raylet", "gcs_server") for pid in descendants_named(name)]
    others = {pid for root in ray_roots for pid in process_tree(root)} - engine
    return {"memory_mib": sum(map(pss_mib, engine)), "other_mib": sum(map(pss_mib, others))}


def measure_bare_engine(work: dict[str, Any], _: str) -> dict[str, Any]:
    """Measure vLLM's AsyncLLM with the server's engine arguments, without HTTP and Ray."""
    from udrl import command_line
    from udrl.policies.policy import engine_environment, engine_kwargs, sampling_kwargs
    from udrl.policies.student import engine_for_student

    settings = command_line.load(work["recipe"], work["overrides"]).serve
    os.environ.update(engine_environment(settings.placement))

    from vllm import SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.async_llm import AsyncLLM

    from udrl import commands
    from udrl import tokenizer as tokenizers
    from udrl.commands import CommandVocabulary

    student = work["student"]
    positions = json.loads(Path(student, "config.json").read_text())["n_positions"]
    tokenizer, vocabulary = tokenizers.load_tokenizer(student), CommandVocabulary.load(student)
    command = vocabulary.default(next(iter(vocabulary.tasks)))
    end = tokenizers.control_ids(tokenizer, [commands.END])

    async def measure() -> dict[str, Any]:
        arguments = engine_kwargs(engine_for_student(settings.engine, positions), settings.placement)
        if not settings.placement.gpus:  # as internals.in_process_vllm_engine does
            arguments = {"distributed_executor_backend": "uni", **arguments}
        engine = AsyncLLM.from_engine_args(AsyncEngineArgs(model=student, **arguments))
        n_requests = 0

        async def send(intent: str, max_tokens: int) -> int:
            nonlocal n_requests
            n_requests += 1
            kwargs = {**sampling_kwargs(settings.sampling), "max_tokens": max_tokens, "stop_token_ids": end}
            params = SamplingParams(**kwargs, output_kind=RequestOutputKind.FINAL_ONLY)
            prompt: Any = {"prompt_token_ids": tokenizers.encode_request(tokenizer, vocabulary, intent, command)}
            n_tokens = 0
            async for output in engine.generate(prompt, params, str(n_requests)):
                n_tokens = len(output.outputs[0].token_ids)
            return n_tokens

        try:
            await send(make_intent(99_990), 1)
            cold_start = time.time() - STARTED
            results = await run_phases([Phase(**phase) for phase in work["phases"]], send)
            memory = sum(map(pss_mib, process_tree(os.getpid())))
            return {"phases": results, "cold_start_s": round(cold_start, 1), "memory_mib": memory}
        finally:
            engine.shutdown()

    return asyncio.run(measure())


def measure_transformers(work: dict[str, Any], path: str, batch_size: int = 1) -> dict[str, Any]:
    """Measure FastAPI with transformers, ``batch_size`` requests at a time."""
    import uvicorn

    from benchmarks.transformers_server import create_transformers_app

    port = free_port()
    app = create_transformers_app(work["student"], batch_size)
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        return measure_over_http(port, path, lambda: {"memory_mib": pss_mib(os.getpid())})
    finally:
        server.should_exit = True
        thread.join(20)


def measure_batched_transformers(work: dict[str, Any], path: str) -> dict[str, Any]:
    return measure_transformers(work, path, batch_size=32)


def measure_over_http(port: int, path: str, measure_memory: Callable[[], dict[str, float]]) -> dict[str, Any]:
    """Measure a server of this process under the load of another process."""
    import urllib.request

    url = f"http://127.0.0.1:{port}"
    body = json.dumps({"model": "bench:text_to_image", "prompt": make_intent(99_990), "max_tokens": 1}).encode()
    request = urllib.request.Request(f"{url}/v1/completions", body, {"Content-Type": "application/json"})
    urllib.request.urlopen(request, timeout=120).read()
    cold_start = time.time() - STARTED
    # The timeout is a safeguard: each phase has its own.
    process = subprocess.run(
        [sys.executable, "-m", "benchmarks.serving_load", url, path], stdout=subprocess.PIPE, text=True, timeout=600, check=True
    )
    results = json.loads(process.stdout.splitlines()[-1])
    return {"phases": results, "cold_start_s": round(cold_start, 1), **measure_memory()}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def parent_pids() -> dict[int, int]:
    """Return pid -> pid of the parent, for all processes."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int(folder.joinpath("stat").read_text().rpartition(")")[2].split()[1])
        except OSError:  # the process has ended
            continue
    return parents


def process_tree(root: int) -> Iterator[int]:
    """Yield a process and all of its descendants."""
    children: dict[int, list[int]] = {}
    for pid, parent in parent_pids().items():
        children.setdefault(parent, []).append(pid)
    stack = [root]
    while stack:
        pid = stack.pop()
        yield pid
        stack += children.get(pid, [])


def descendants_named(name: str) -> Iterator[int]:
    """Yield the descendants of this process whose program has this name."""
    for pid in process_tree(os.getpid()):
        try:
            if Path(f"/proc/{pid}/comm").read_text().strip() == name:
                yield pid
        except OSError:
            continue


def pss_mib(pid: int) -> float:
    """Return the proportional set size of a process in MiB, which divides shared memory among its users; 0 if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


if __name__ == "__main__":
    main(*sys.argv[1:])
