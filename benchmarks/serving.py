"""Our server compared with the same engine without a server and with FastAPI and transformers.

``python -m benchmarks.serving [speed] [variants] [--student FOLDER] [--repeats N] [--quick] [key=value ...]``

- ``speed``: 1, 8 and 64 clients that send one request after another. Reports p50, p95, p99, tokens/s, memory of an engine's
  processes and cold start of our application over HTTP, of the same behind HAProxy, of vLLM's AsyncLLM without HTTP and Ray,
  and of a FastAPI server with transformers, without and with batching (1 and 8 clients).
- ``variants``: AsyncLLM under other engine settings, to choose those of a recipe.

The default student has 104M parameters (12 layers x 768, vocabulary 24k) with random weights, which never end a prompt, so that
every request generates its 40 tokens. Arms take turns, one at a time, ``--repeats`` times; the load generator is a process of
its own. The latency that the server adds is measured on requests of one token, because the engine's own
variation exceeds it on longer ones. Overrides apply to the recipe's serve section: ``serve.placement.gpus=1`` on a GPU.

Prints tables and, as its last line, JSON.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.generation import child, machine
from benchmarks.serving_load import Phase
from udrl.text import text_table

PARTS = ("speed", "variants")
TASKS = ["text_to_image", "image_search"]
# The benchmark has one key: its rate and concurrency limits and the queue must not interfere.
NO_LIMITS = (
    "serve.require_keys=false",
    "serve.limits.concurrent=1000",
    "serve.limits.per_minute=100000000",
    "serve.queue=1000",
)

# name -> overrides and environment. int8: vLLM quantizes the weights while loading.
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
    # Without batching, each of 64 clients would wait for a minute.
    return sizes[:2] if part == "transformers" else [*sizes, Phase("short", 1, 200, 1, 60)]


def export_random_student(folder: str, depth: int, width: int, vocab_size: int) -> str:
    """Export a GPT-2 with random weights as the train stage exports a student; return ``folder``."""
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
    pool = ["".join(rng.choice(SYLLABLES, rng.integers(2, 5))) for _ in range(2 * vocab_size)]
    texts = (" " + " ".join(rng.choice(pool, 12)) for _ in range(vocab_size))
    tokenizer = tokenizers.train_tokenizer(texts, vocabulary, vocab_size=vocab_size)
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
    """Write the instructions of an arm to a file; return its path."""
    recipe = Path(folder, "recipe.yaml")
    recipe.write_text(f"name: bench\nstorage: {folder}\ntasks: {TASKS}\nintents: {{limit: 9}}\n", encoding="utf-8")
    work = {
        "student": student,
        "recipe": str(recipe),
        "overrides": [*NO_LIMITS, "serve.sampling.max_tokens=40", "serve.max_replicas=1", *overrides],
        "phases": [phase.__dict__ for phase in phases(quick, part)],
    }
    path = Path(folder, f"work-{part}.json")
    path.write_text(json.dumps(work), encoding="utf-8")
    return str(path)


def run_arm(arm: str, work: str, env: dict[str, str]) -> dict[str, Any]:
    """Run one arm in a process of its own; return its results."""
    result: dict[str, Any] = json.loads(child("-m", "benchmarks.serving_arms", arm, work, env=env).splitlines()[-1])
    return result


HEADER = ["", "clients", "p50 ms", "p95", "p99", "tokens/s", "requests/s", "MiB", "start s"]


def table_rows(name: str, result: dict[str, Any]) -> list[list[str]]:
    """Return the rows of one turn, one per phase; memory and cold start are in the first."""
    rows = []
    for phase, row in result["phases"].items():
        latencies = [f"{row['p50_ms']:,.1f}", f"{row['p95_ms']:,.1f}", f"{row['p99_ms']:,.1f}"]
        rates = [f"{row['tokens_per_second']:,.0f}", f"{row['requests_per_second']:,.1f}"]
        rows.append([name, phase, *latencies, *rates, "", ""])
    rows[0][-2:] = [f"{result.get('memory_mib', 0):,.0f}", f"{result['cold_start_s']:.1f}"]
    return rows


def measure_speed(folder: str, student: str, overrides: Sequence[str], repeats: int, quick: bool) -> dict[str, Any]:
    work, transformers_work = (write_work(folder, student, overrides, quick, part) for part in ("speed", "transformers"))
    # name -> arm, its work, its environment, whether one turn suffices because no close ratio depends on it
    arms: dict[str, tuple[str, str, dict[str, str], bool]] = {
        "serve": ("serve", work, {}, False),
        "bare engine": ("bare", work, {}, False),
        "serve, HAProxy": ("serve", work, {"RAY_SERVE_ENABLE_HA_PROXY": "1"}, True),
        "transformers": ("transformers", transformers_work, {}, True),
        "transformers, batched": ("batched", transformers_work, {}, True),
    }
    rows: list[list[str]] = []
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in arms}
    for number in range(repeats):
        for name, (arm, arm_work, env, once) in arms.items():
            if not (once and number):
                turns[name].append(run_arm(arm, arm_work, env))
                rows += table_rows(name, turns[name][-1])
                print(f"{name}: turn {number + 1} is done", file=sys.stderr)
    print(text_table(HEADER, rows))
    return {"arms": turns, **compare_arms(turns, quick)}


def compare_arms(turns: dict[str, list[dict[str, Any]]], quick: bool) -> dict[str, Any]:
    """Return and print added latencies and ratios of rates, from the medians over the turns of each arm."""
    eight, most = ("4", "4") if quick else ("8", "64")

    def median(arm: str, phase: str, metric: str) -> float:
        return statistics.median(turn["phases"][phase][metric] for turn in turns[arm])

    rate = "tokens_per_second"
    comparison = {
        "added_p50_ms": median("serve", "short", "p50_ms") - median("bare engine", "short", "p50_ms"),
        "added_p50_ms_haproxy": median("serve, HAProxy", "short", "p50_ms") - median("bare engine", "short", "p50_ms"),
        "added_p50_ms_of_whole_requests": median("serve", "1", "p50_ms") - median("bare engine", "1", "p50_ms"),
        "ratio_to_bare_engine": median("serve", most, rate) / median("bare engine", most, rate),
        "ratio_to_bare_engine_haproxy": median("serve, HAProxy", most, rate) / median("bare engine", most, rate),
        "ratio_to_transformers_server": median("serve", eight, rate) / median("transformers", eight, rate),
        "ratio_to_batched_transformers_server": median("serve", eight, rate) / median("transformers, batched", eight, rate),
    }
    print(
        f"\nadded to p50, one client: {comparison['added_p50_ms']:.1f} ms (one token;"
        f" {comparison['added_p50_ms_haproxy']:.1f} behind HAProxy),"
        f" {comparison['added_p50_ms_of_whole_requests']:.1f} ms (whole requests)\n"
        f"tokens/s at {most}, to the bare engine: {comparison['ratio_to_bare_engine']:.3f}"
        f" ({comparison['ratio_to_bare_engine_haproxy']:.3f} behind HAProxy)\n"
        f"tokens/s at {eight}, to transformers: {comparison['ratio_to_transformers_server']:.2f};"
        f" batched: {comparison['ratio_to_batched_transformers_server']:.2f}"
    )
    return {name: round(value, 3) for name, value in comparison.items()}


def measure_variants(folder: str, student: str, overrides: Sequence[str], quick: bool) -> dict[str, Any]:
    rows: list[list[str]] = []
    results: dict[str, Any] = {}
    for name, (variant_overrides, env) in VARIANTS.items():
        work = write_work(folder, student, [*overrides, *variant_overrides], quick, "variants")
        try:
            results[name] = run_arm("bare", work, env)
        except SystemExit as error:  # a variant that does not start is a result
            results[name] = {"failed": str(error).strip().splitlines()[-1][:300]}
            print(f"{name}: failed: {results[name]['failed']}")
            continue
        rows += table_rows(name, results[name])
        print(f"{name}: done", file=sys.stderr)
    print(text_table(HEADER, rows))
    return results


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="benchmarks.serving", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("words", nargs="*", help="parts to run (default: speed), key=value overrides")
    parser.add_argument("--student", help="folder of an exported student; default: 104M parameters with random weights")
    parser.add_argument("--repeats", type=int, default=2, help="turns of each arm")
    parser.add_argument("--quick", action="store_true", help="tiny student and few requests, to check the benchmark")
    arguments = parser.parse_intermixed_args(argv)
    unknown = [w for w in arguments.words if w not in (*PARTS, "all") and "=" not in w]
    if unknown:
        parser.error(f"{unknown[0]}: unknown part; use one of {', '.join(PARTS)}, all")
    parts = [p for p in PARTS if p in arguments.words or "all" in arguments.words] or ["speed"]
    overrides = [w for w in arguments.words if "=" in w]
    folder = tempfile.mkdtemp(prefix="udrl-benchmark-")
    results: dict[str, Any] = {"machine": machine(), "repeats": arguments.repeats, "overrides": overrides}
    try:
        size = (2, 128, 600) if arguments.quick else (12, 768, 24_000)
        student = arguments.student and os.path.abspath(arguments.student)
        student = student or export_random_student(os.path.join(folder, "student"), *size)
        if "speed" in parts:
            repeats = 1 if arguments.quick else arguments.repeats
            results["speed"] = measure_speed(folder, student, overrides, repeats, arguments.quick)
            results |= {name: value for name, value in results["speed"].items() if name != "arms"}
        if "variants" in parts:
            results["variants"] = measure_variants(folder, student, overrides, arguments.quick)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
