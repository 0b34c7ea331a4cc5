"""The server against the same engine without it, and against FastAPI with transformers.

``python -m benchmarks.serving [speed] [variants] [--student FOLDER] [--repeats N] [--quick] [key=value ...]``

- ``speed``: clients that ask one request after another, 1, 8 and 64 at a time: p50, p95, p99, tokens/s, memory of an engine's
  processes, cold start; of our application over HTTP, of the same behind HAProxy, of vLLM's AsyncLLM alone (no HTTP, no Ray),
  and of a FastAPI server with transformers, one request at a time (what people write first) and with requests gathered into
  batches (fairer); these at 1 and 8 clients.
- ``variants``: AsyncLLM alone under other settings of the engine, to choose those of a recipe.

The student: 104M parameters (12 layers x 768, 24k pieces) with random weights, which never end a prompt, so that every request
writes its 40 tokens; or the one in ``--student``. Every arm has the machine to itself, in turns, ``--repeats`` times; the load
generator is a process of its own. What the server adds to a request is measured on requests of one token, where the
engine's own variation does not drown it. Overrides apply to the recipe's serve section: ``serve.placement.gpus=1`` on a GPU.

Prints tables and, as its last line, JSON.
"""

import argparse
import json
import os
import shutil
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.generation import child, machine
from benchmarks.serving_load import Phase

PARTS = ("speed", "variants")
TASKS = ["text_to_image", "image_search"]
# Limits that a benchmark's one client would run into are lifted; nothing else is.
LIFTED = ("serve.require_keys=false", "serve.limits.concurrent=1000", "serve.limits.per_minute=100000000", "serve.queue=1000")

# name -> overrides and environment. int8 and fp8 are vLLM's own quantisation of the weights while loading.
VARIANTS: dict[str, tuple[list[str], dict[str, str]]] = {
    "eager": (["serve.engine.eager=true"], {}),
    "torch.compile": (["serve.engine.eager=false"], {}),
    "eager, worker process": (["serve.engine.eager=true", "serve.engine.kwargs={distributed_executor_backend: mp}"], {}),
    "eager, no prefix caching": (["serve.engine.eager=true", "serve.engine.kwargs={enable_prefix_caching: false}"], {}),
    "eager, no async scheduling": (["serve.engine.eager=true", "serve.engine.kwargs={async_scheduling: false}"], {}),
    "eager, 1 thread": (["serve.engine.eager=true", "serve.placement.threads=1"], {}),
    "torch.compile, int8 weights": (
        ["serve.engine.eager=false", "serve.engine.kwargs={quantization: int8_per_channel_weight_only}"],
        {},
    ),
    "int8 weights": (["serve.engine.eager=true", "serve.engine.kwargs={quantization: int8_per_channel_weight_only}"], {}),
    "fp32": (["serve.engine.eager=true", "serve.engine.dtype=float32"], {}),
}


def phases(quick: bool, part: str = "speed") -> list[Phase]:
    if quick:
        return [Phase(f"{c}", c, 2 * c, 8, 60) for c in (1, 4)] + [Phase("short", 1, 10, 1, 60)]
    if part == "variants":
        return [Phase("1", 1, 12, 40, 60), Phase("8", 8, 48, 40, 60), Phase("64", 64, 192, 40, 60)]
    sizes = [Phase("1", 1, 24, 40, 120), Phase("8", 8, 96, 40, 120), Phase("64", 64, 448, 40, 180)]
    # One request at a time, each of 64 clients would wait for a minute.
    return sizes[:2] if part == "transformers" else [*sizes, Phase("short", 1, 200, 1, 60)]


def made_student(folder: str, depth: int, width: int, pieces: int) -> str:
    """A GPT-2 with random weights, exported as a student is. Returns ``folder``."""
    import numpy as np
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from benchmarks.made_up import SYLLABLES
    from udrl import commands
    from udrl import tokenizer as tokenizers
    from udrl.train.hindsight import count_episodes, fit_vocabulary

    rng = np.random.default_rng(0)
    columns = {"task": np.repeat(TASKS, 40), "intent_id": np.arange(80) // 4, "n_words": rng.integers(3, 40, 80)}
    columns |= {"reward": rng.random(80), "relevance": rng.random(80)}
    counts = count_episodes(columns, "task")
    vocabulary = fit_vocabulary(counts, TASKS, max_words=40, reward_bins=5, rank_within="task")
    pool = ["".join(rng.choice(SYLLABLES, rng.integers(2, 5))) for _ in range(2 * pieces)]
    texts = (" " + " ".join(rng.choice(pool, 12)) for _ in range(pieces))
    tokenizer = tokenizers.train(texts, vocabulary, vocab_size=pieces)
    end, pad = tokenizers.control_ids(tokenizer, [commands.END, commands.PAD])
    torch.manual_seed(0)
    shape = {"n_positions": 256, "n_embd": width, "n_layer": depth, "n_head": width // 64}
    config = GPT2Config(vocab_size=len(tokenizer), bos_token_id=end, eos_token_id=end, pad_token_id=pad, **shape)
    network = GPT2LMHeadModel(config).to(torch.bfloat16)
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    vocabulary.save(folder)
    print(f"student: {sum(p.numel() for p in network.parameters()) / 1e6:.0f}M parameters, random weights", flush=True)
    return folder


def write_work(folder: str, student: str, overrides: Sequence[str], quick: bool, part: str = "speed") -> str:
    """What an arm is to do, as a file."""
    recipe = Path(folder, "recipe.yaml")
    recipe.write_text(f"name: bench\nstorage: {folder}\ntasks: {TASKS}\nintents: {{limit: 9}}\n", encoding="utf-8")
    work = {
        "student": student,
        "recipe": str(recipe),
        "overrides": [*LIFTED, "serve.sampling.max_tokens=40", "serve.max_replicas=1", *overrides],
        "phases": [phase.__dict__ for phase in phases(quick, part)],
    }
    path = Path(folder, f"work-{part}.json")
    path.write_text(json.dumps(work), encoding="utf-8")
    return str(path)


def turn(arm: Sequence[str], work: str, env: dict[str, str] | None = None) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(child("-m", *arm, work, env=env).splitlines()[-1])
    return found


HEAD = f"{'':<30}{'at once':>8}{'p50 ms':>9}{'p95':>8}{'p99':>8}{'tokens/s':>10}{'requests/s':>12}{'MiB':>8}{'start s':>9}"


def show(name: str, found: dict[str, Any]) -> None:
    for phase, row in found["phases"].items():
        last = (
            f"{found.get('memory_mib', 0):>8,.0f}{found['cold_start_s']:>9.1f}" if phase == next(iter(found["phases"])) else ""
        )
        print(
            f"{name:<30}{phase:>8}{row['p50_ms']:>9,.1f}{row['p95_ms']:>8,.1f}{row['p99_ms']:>8,.1f}"
            f"{row['tokens_per_second']:>10,.0f}{row['requests_per_second']:>12,.1f}{last}",
            flush=True,
        )


def speed_part(folder: str, student: str, overrides: Sequence[str], repeats: int, quick: bool) -> dict[str, Any]:
    work, rivals = (write_work(folder, student, overrides, quick, part) for part in ("speed", "transformers"))
    # name -> arm, its work, its environment, and whether it is far from the ratios that matter, so that once is enough.
    arms: dict[str, tuple[str, str, dict[str, str], bool]] = {
        "serve": ("serve", work, {}, False),
        "bare engine": ("bare", work, {}, False),
        "serve, HAProxy": ("serve", work, {"RAY_SERVE_ENABLE_HA_PROXY": "1"}, True),
        "transformers": ("transformers", rivals, {}, True),
        "transformers, batched": ("batched", rivals, {}, True),
    }
    print(HEAD, flush=True)
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in arms}
    for number in range(repeats):
        for name, (arm, todo, env, once) in arms.items():
            if not (once and number):
                turns[name].append(turn(["benchmarks.serving_arms", arm], todo, env))
                show(name, turns[name][-1])
    return {"arms": turns, **ratios(turns, quick)}


def ratios(turns: dict[str, list[dict[str, Any]]], quick: bool) -> dict[str, Any]:
    """What the issue of speed comes down to; medians over the turns of each arm."""
    eight, most = ("4", "4") if quick else ("8", "64")

    def of(arm: str, phase: str, figure: str) -> float:
        return statistics.median(found["phases"][phase][figure] for found in turns[arm])

    rate = "tokens_per_second"
    found = {
        "added_p50_ms": of("serve", "short", "p50_ms") - of("bare engine", "short", "p50_ms"),
        "added_p50_ms_haproxy": of("serve, HAProxy", "short", "p50_ms") - of("bare engine", "short", "p50_ms"),
        "added_p50_ms_of_whole_requests": of("serve", "1", "p50_ms") - of("bare engine", "1", "p50_ms"),
        "ratio_to_bare_engine": of("serve", most, rate) / of("bare engine", most, rate),
        "ratio_to_bare_engine_haproxy": of("serve, HAProxy", most, rate) / of("bare engine", most, rate),
        "ratio_to_transformers_server": of("serve", eight, rate) / of("transformers", eight, rate),
        "ratio_to_batched_transformers_server": of("serve", eight, rate) / of("transformers, batched", eight, rate),
    }
    print(
        f"\nadded to p50, one client: {found['added_p50_ms']:.1f} ms (one token; {found['added_p50_ms_haproxy']:.1f} behind"
        f" HAProxy), {found['added_p50_ms_of_whole_requests']:.1f} ms (whole requests)\n"
        f"tokens/s at {most}, to the bare engine: {found['ratio_to_bare_engine']:.3f}"
        f" ({found['ratio_to_bare_engine_haproxy']:.3f} behind HAProxy)\n"
        f"tokens/s at {eight}, to transformers: {found['ratio_to_transformers_server']:.2f};"
        f" batched: {found['ratio_to_batched_transformers_server']:.2f}"
    )
    return {name: round(value, 3) for name, value in found.items()}


def variants_part(folder: str, student: str, overrides: Sequence[str], quick: bool) -> dict[str, Any]:
    print(HEAD, flush=True)
    found: dict[str, Any] = {}
    for name, (changes, env) in VARIANTS.items():
        work = write_work(folder, student, [*overrides, *changes], quick, "variants")
        try:
            found[name] = turn(["benchmarks.serving_arms", "bare"], work, env)
        except SystemExit as error:  # an engine that can't be had so is a finding
            found[name] = {"failed": str(error).strip().splitlines()[-1][:300]}
            print(f"{name:<30}failed: {found[name]['failed']}", flush=True)
            continue
        show(name, found[name])
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="benchmarks.serving", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("words", nargs="*", help="parts to run (default: speed), key=value overrides")
    parser.add_argument("--student", help="folder of an exported student; default: 104M parameters with random weights")
    parser.add_argument("--repeats", type=int, default=2, help="turns of each arm")
    parser.add_argument("--quick", action="store_true", help="a tiny student and few requests: does it run?")
    arguments = parser.parse_intermixed_args(argv)
    unknown = [w for w in arguments.words if w not in (*PARTS, "all") and "=" not in w]
    if unknown:
        parser.error(f"{unknown[0]}: no such part; there are {', '.join(PARTS)}, all")
    parts = [p for p in PARTS if p in arguments.words or "all" in arguments.words] or ["speed"]
    overrides = [w for w in arguments.words if "=" in w]
    folder = tempfile.mkdtemp(prefix="udrl-benchmark-")
    found: dict[str, Any] = {"machine": machine(), "repeats": arguments.repeats, "overrides": overrides}
    try:
        size = (2, 128, 600) if arguments.quick else (12, 768, 24_000)
        student = arguments.student and os.path.abspath(arguments.student)
        student = student or made_student(os.path.join(folder, "student"), *size)
        if "speed" in parts:
            repeats = 1 if arguments.quick else arguments.repeats
            found["speed"] = speed_part(folder, student, overrides, repeats, arguments.quick)
            found |= {name: value for name, value in found["speed"].items() if name != "arms"}
        if "variants" in parts:
            found["variants"] = variants_part(folder, student, overrides, arguments.quick)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
