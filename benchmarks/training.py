"""The train stage against a bare PyTorch loop and Hugging Face's Trainer; its scaling, and its memory by ZeRO stage.

``python -m benchmarks.training [speed] [scaling] [memory] [gpu] [--run URI] [--steps N] [--quick] [key=value ...]``

- ``speed``: tokens/s of the stage; of a bare loop with the same model, rows and batch (bf16 in two ways; the faster one
  counts); and of Trainer on the same examples unpacked (padded to the longest of a batch, with and without grouping by
  length). Also the share of the time that each waits for its input.
- ``scaling``: two workers with half of the cores each, against one worker with half and with all of them.
- ``memory``: peak memory of each of two workers by ZeRO stage, with the speed.
- ``gpu``: 104M parameters in bf16 at context 1,024: stage and bare loop, and MFU against the rate of a matrix product.
  Skipped without a GPU.

All arms of a part run in turns, each in a process of its own with the same number of threads. Speeds count the tokens of
examples, without padding, over the steps after the warm-up. Overrides apply to ``recipes/quickstart.yaml``, whose student is
trained. The episodes are those of ``--run``. Without it the bundled teacher writes some once, into ``runs/benchmark-training``.

Prints tables and, as its last line, JSON.
"""

import argparse
import json
import shutil
import tempfile
from functools import partial
from typing import Any

from benchmarks.generation import HERE, child, machine
from benchmarks.training_arms import Bench, Data
from udrl import cluster, storage
from udrl.recipe import Recipe
from udrl.run import Run
from udrl.train.gpt2 import Shape

PARTS = ("speed", "scaling", "memory", "gpu")
EPISODES = f"{HERE}/runs/benchmark-training"
# About a thousand episodes, with four tasks and two samples: one or two minutes on two cores.
INTENTS = 150
# All parts in a few steps of a student too small to learn anything, on synthetic episodes.
QUICK = (
    *("student.depth=1", "student.width=64", "student.vocab_size=600", "student.context=192"),
    *("train.batch_tokens=768", "train.swapped_copies=0"),
)
ON_GPU = (
    *("student.depth=12", "student.width=768", "student.vocab_size=24000", "student.context=1024", "student.lowercase=false"),
    *("train.batch_tokens=65536", "train.swapped_copies=0", "train.gpus_per_worker=1", "train.precision=bf16"),
)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="benchmarks.training", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("words", nargs="*", help="parts to run (default, or 'all': all), key=value overrides")
    parser.add_argument("--run", help="storage of a run whose generate stage is finished")
    parser.add_argument("--steps", type=int, help="measured steps of an arm; default: 150")
    parser.add_argument(
        "--warmup", type=int, help="steps before those, a multiple of 10, which is how often losses are read; default: 20"
    )
    parser.add_argument("--repeats", type=int, help="turns; default: 2")
    parser.add_argument("--quick", action="store_true", help="smoke test: a tiny student, synthetic episodes, few steps")
    arguments = parser.parse_intermixed_args(argv)
    unknown = [w for w in arguments.words if w not in (*PARTS, "all") and "=" not in w]
    if unknown:
        parser.error(f"{unknown[0]}: not a part; use {', '.join(PARTS)} or all")
    parts = [p for p in PARTS if p in arguments.words] or list(PARTS)
    warmup = arguments.warmup or (2 if arguments.quick else 20)
    folder = tempfile.mkdtemp(prefix="udrl-benchmark-")
    bench = Bench(
        folder=folder,
        steps=warmup + (arguments.steps or (4 if arguments.quick else 150)),
        warmup=warmup,
        repeats=arguments.repeats or (1 if arguments.quick else 2),
        overrides=(*(QUICK if arguments.quick else ()), *(w for w in arguments.words if "=" in w)),
    )
    results: dict[str, Any] = {"machine": machine(), "steps": bench.steps - warmup, "repeats": bench.repeats}
    try:
        if set(parts) - {"gpu"}:
            run = arguments.run or (write_synthetic_run(bench, 400, 600) if arguments.quick else generate_episodes())
            recipe, data = bench.prepare(bench.recipe(require_episodes(run)))
            results["padding"] = round(data.padding, 4)
            if "speed" in parts:
                results["speed"] = speed_part(bench, recipe, data)
                results |= {name: results["speed"].pop(name) for name in ("ratio_to_bare_loop", "ratio_to_hf_trainer")}
            if "scaling" in parts:
                results["scaling"] = scaling_part(bench, recipe, data)
            if "memory" in parts:
                results["memory"] = memory_part(bench, recipe, data)
        if "gpu" in parts:
            results["gpu"] = gpu_part(bench)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps(results))


def speed_part(bench: Bench, recipe: Recipe, data: Data) -> dict[str, Any]:
    precisions = ("autocast", "master") if recipe.train.precision == "bf16" else ("fp32",)
    arms = {"stage": partial(bench.stage, recipe, data)}
    arms |= {f"bare loop, {precision}": partial(bench.bare, recipe, data, precision) for precision in precisions}
    arms |= {
        "hf trainer": partial(bench.trainer, recipe, data, grouped=False),
        "hf trainer, by length": partial(bench.trainer, recipe, data, grouped=True),
    }
    rates = bench.in_turns(arms)
    bare_loop = max((f"bare loop, {precision}" for precision in precisions), key=lambda name: rates[name]["tokens_per_second"])
    stage = rates["stage"]["tokens_per_second"]
    ratios = {
        "ratio_to_bare_loop": round(stage / rates[bare_loop]["tokens_per_second"], 3),
        "ratio_to_hf_trainer": round(stage / rates["hf trainer"]["tokens_per_second"], 3),
        "ratio_to_hf_trainer_by_length": round(stage / rates["hf trainer, by length"]["tokens_per_second"], 3),
    }
    print(
        f"speed of the stage relative to {bare_loop} (the faster one): {ratios['ratio_to_bare_loop']:.3f}; to Trainer:"
        f" {ratios['ratio_to_hf_trainer']:.3f}; to Trainer grouped by length: {ratios['ratio_to_hf_trainer_by_length']:.3f}\n"
    )
    return {"arms": rates, "bare_loop": bare_loop, **ratios}


def scaling_part(bench: Bench, recipe: Recipe, data: Data) -> dict[str, Any]:
    cores = cluster.cpu_count()
    half, batch = max(1, cores // 2), Shape.of(recipe.student, recipe.train).batch_tokens
    one_half, one_all, two = f"1 worker x {half}", f"1 worker x {cores}", f"2 workers x {half}"
    rates = bench.in_turns(
        {
            one_half: partial(bench.stage, recipe, data, threads=half),
            one_all: partial(bench.stage, recipe, data, threads=cores),
            two: partial(bench.stage, recipe, data, workers=2, threads=half),
            f"{two}, twice the batch": partial(bench.stage, recipe, data, workers=2, threads=half, batch_tokens=2 * batch),
        },
    )
    speed = {name: arm["tokens_per_second"] for name, arm in rates.items()}
    ratios = {
        "two_workers_to_one_on_half_the_cores": round(speed[two] / speed[one_half], 3),
        "two_workers_to_one_on_all_cores": round(speed[two] / speed[one_all], 3),
        "twice_the_batch_to_one_on_half_the_cores": round(speed[f"{two}, twice the batch"] / speed[one_half], 3),
    }
    print("; ".join(f"{name.replace('_', ' ')}: {ratio:.2f}" for name, ratio in ratios.items()) + "\n")
    return {"arms": rates, **ratios}


def memory_part(bench: Bench, recipe: Recipe, data: Data) -> dict[str, Any]:
    half, gpus = max(1, cluster.cpu_count() // 2), int(gpu_count() >= 2)
    arms = {
        f"zero {z}": partial(bench.stage, recipe, data, workers=2, threads=half, zero_stage=z, gpus_per_worker=gpus)
        for z in range(4)
    }
    rates = bench.in_turns(arms)
    print("peak memory of each of two workers; 'host' includes the libraries that a worker imports\n")
    return rates


def gpu_part(bench: Bench) -> dict[str, Any] | None:
    if not gpu_count():
        print("gpu: skipped, because torch finds no GPU on this machine\n")
        return None
    recipe, data = bench.prepare(bench.recipe(write_synthetic_run(bench, 20_000, 60_000), *ON_GPU))
    bare_loops = {
        f"bare loop, {precision}": partial(bench.bare, recipe, data, precision) for precision in ("autocast", "master")
    }
    arms = {"stage": partial(bench.stage, recipe, data)} | bare_loops
    rates = bench.in_turns(arms)
    command = ["-m", "benchmarks.training_flops", f"{recipe.storage}/student", "--target-share", str(data.target_share)]
    command += ["--lengths", str(recipe.row_tokens()), str(data.example_length)]
    roofline = json.loads(child(*command).splitlines()[-1])
    speed = rates["stage"]["tokens_per_second"]
    full_attention, within_examples = (speed * flops for flops in roofline["flops_per_token"])
    ratio = speed / max(rates[name]["tokens_per_second"] for name in bare_loops)
    peak = roofline["matmul_flops_per_second"]
    print(
        f"{roofline['device']}: {full_attention / 1e12:.0f} TFLOP/s, MFU {full_attention / peak:.1%} of the {peak / 1e12:.0f}"
        f" TFLOP/s of a matrix product; with attention counted only within examples {within_examples / peak:.1%};"
        f" speed relative to the bare loop {ratio:.3f}\n"
    )
    mfu = {"mfu": round(full_attention / peak, 4), "mfu_within_examples": round(within_examples / peak, 4)}
    return {"arms": rates, **roofline, **mfu, "ratio_to_bare_loop": round(ratio, 3)}


def gpu_count() -> int:
    import torch

    return torch.cuda.device_count()


def write_synthetic_run(bench: Bench, n: int, distinct: int) -> str:
    """Write a run of ``n`` synthetic episodes of ``distinct`` words; return its storage."""
    from benchmarks.made_up import write_episodes

    run = f"{bench.folder}/synthetic-{n}"
    write_episodes(run, bench.recipe(run).tasks, n, distinct)
    return run


def generate_episodes() -> str:
    """Generate a small run with the bundled teacher, if it is absent; return its storage.

    A teacher's mix of lengths decides the cost of padding.
    """
    if not storage.exists(Run(EPISODES).generate_summary):
        print(f"generating episodes of {INTENTS} intents into {EPISODES}", flush=True)
        child("-m", "jobs.generate", "recipes/quickstart.yaml", f"storage={EPISODES}", f"intents.limit={INTENTS}")
    return EPISODES


def require_episodes(run: str) -> str:
    if not storage.exists(Run(run).generate_summary):
        raise SystemExit(f"--run: {run} has no finished generate stage; give the storage of a run that has one")
    return run


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
