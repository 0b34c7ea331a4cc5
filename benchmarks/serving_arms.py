"""``python -m benchmarks.serving_arms serve|bare|transformers|batched WORK``: one arm of ``benchmarks.serving``.

Starts what is to be measured, warms it up, puts the load of the work file on it, stops it. Prints JSON: ``phases``,
``cold_start_s`` (from the start of this process to the first answer), ``memory_mib`` (PSS of the processes that hold the
model), and of the server ``other_mib`` (of all its other processes).
"""

import asyncio
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.serving_load import Phase, intent, run

STARTED = time.time()


def main(arm: str, path: str) -> None:
    work = json.loads(Path(path).read_text(encoding="utf-8"))
    found = {"serve": serve, "bare": bare, "transformers": plain, "batched": batched}[arm](work, path)
    print(json.dumps(found))


def serve(work: dict[str, Any], path: str) -> dict[str, Any]:
    """Our application, on a Ray started as ``serve.app`` does."""
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
        ray_serve.run(app.build(args), name=app.NAME)
        return over_http(port, path, _serve_memory)
    finally:
        ray_serve.shutdown()
        ray.shutdown()


def _serve_memory() -> dict[str, float]:
    from serve import app

    state = app.engine_handle("bench").state.remote().result(timeout_s=60)
    mine = set(tree(state["pid"]))
    rest = [pid for name in ("raylet", "gcs_server") for pid in named(name)]
    others = {pid for root in rest for pid in tree(root)} - mine
    return {"memory_mib": sum(map(pss_mib, mine)), "other_mib": sum(map(pss_mib, others))}


def bare(work: dict[str, Any], _: str) -> dict[str, Any]:
    """vLLM's AsyncLLM with the arguments that the server gives it: no HTTP, no Ray, no tokenizing."""
    from udrl import command_line
    from udrl.policies.engine_args import engine_kwargs, environment
    from udrl.policies.policy import draws
    from udrl.policies.student import fit

    wanted = command_line.load(work["recipe"], work["overrides"]).serve
    os.environ.update(environment(wanted.placement))

    from vllm import SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.async_llm import AsyncLLM

    from udrl import commands
    from udrl import tokenizer as tokenizers
    from udrl.commands import CommandVocabulary

    student = work["student"]
    positions = json.loads(Path(student, "config.json").read_text())["n_positions"]
    tokenizer, vocabulary = tokenizers.load(student), CommandVocabulary.load(student)
    command = vocabulary.default(next(iter(vocabulary.tasks)))
    end = tokenizers.control_ids(tokenizer, [commands.END])

    async def go() -> dict[str, Any]:
        arguments = engine_kwargs(fit(wanted.engine, positions), wanted.placement)
        if not wanted.placement.gpus:  # as serve.engine.StudentEngine does
            arguments = {"distributed_executor_backend": "uni", **arguments}
        engine = AsyncLLM.from_engine_args(AsyncEngineArgs(model=student, **arguments))
        asked = 0

        async def ask(text: str, limit: int) -> int:
            nonlocal asked
            asked += 1
            drawn = {**draws(wanted.sampling), "max_tokens": limit, "stop_token_ids": end}
            params = SamplingParams(**drawn, output_kind=RequestOutputKind.FINAL_ONLY)
            prompt: Any = {"prompt_token_ids": tokenizers.encode_request(tokenizer, vocabulary, text, command)}
            written = 0
            async for output in engine.generate(prompt, params, str(asked)):
                written = len(output.outputs[0].token_ids)
            return written

        try:
            await ask(intent(99_990), 1)
            cold = time.time() - STARTED
            found = await run([Phase(**phase) for phase in work["phases"]], ask)
            return {"phases": found, "cold_start_s": round(cold, 1), "memory_mib": sum(map(pss_mib, tree(os.getpid())))}
        finally:
            engine.shutdown()

    return asyncio.run(go())


def plain(work: dict[str, Any], path: str) -> dict[str, Any]:
    """FastAPI and transformers, one request at a time."""
    return _transformers(work, path, most=1)


def batched(work: dict[str, Any], path: str) -> dict[str, Any]:
    """The same, with the requests that wait gathered into one batch."""
    return _transformers(work, path, most=32)


def _transformers(work: dict[str, Any], path: str, most: int) -> dict[str, Any]:
    import uvicorn

    from benchmarks.transformers_server import create

    port = free_port()
    server = uvicorn.Server(uvicorn.Config(create(work["student"], most), host="127.0.0.1", port=port, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        return over_http(port, path, lambda: {"memory_mib": pss_mib(os.getpid())})
    finally:
        server.should_exit = True
        thread.join(20)


def over_http(port: int, path: str, memory: Any) -> dict[str, Any]:
    """Put the load on a server of this process's making, from a process of its own."""
    import urllib.request

    url = f"http://127.0.0.1:{port}"
    body = json.dumps({"model": "bench:text_to_image", "prompt": intent(99_990), "max_tokens": 1}).encode()
    request = urllib.request.Request(f"{url}/v1/completions", body, {"Content-Type": "application/json"})
    urllib.request.urlopen(request, timeout=120).read()
    cold = time.time() - STARTED
    # Bounded: each phase ends by itself, and the whole after ten minutes.
    made = subprocess.run(
        [sys.executable, "-m", "benchmarks.serving_load", url, path], stdout=subprocess.PIPE, text=True, timeout=600, check=True
    )
    return {"phases": json.loads(made.stdout.splitlines()[-1]), "cold_start_s": round(cold, 1), **memory()}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def parents() -> dict[int, int]:
    """pid -> pid of its parent, of all processes."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            found[int(folder.name)] = int(folder.joinpath("stat").read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has ended meanwhile
            continue
    return found


def tree(root: int) -> Iterator[int]:
    """A process and all of its descendants."""
    children: dict[int, list[int]] = {}
    for pid, parent in parents().items():
        children.setdefault(parent, []).append(pid)
    left = [root]
    while left:
        pid = left.pop()
        yield pid
        left += children.get(pid, [])


def named(name: str) -> Iterator[int]:
    """Descendants of this process whose program has this name."""
    for pid in tree(os.getpid()):
        try:
            if Path(f"/proc/{pid}/comm").read_text().strip() == name:
                yield pid
        except OSError:
            continue


def pss_mib(pid: int) -> float:
    """Memory of a process with what it shares divided among the sharers, in MiB; 0 if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


if __name__ == "__main__":
    main(*sys.argv[1:])
