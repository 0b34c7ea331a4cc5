"""The generate stage compared with the bare engine, and everything but the engine at a million rows.

``python -m benchmarks.generation [engine] [rows] [scoring] [--requests N] [--rows N ...] [recipe] [key=value ...]``

- ``engine``: tokens/s of the whole stage (Ray Data, ledger, inspection of every completion) and of vLLM only, on the same
  requests, settings and machine, in turns in one run. Both are timed while the engine is full: after the first requests that
  fill it are done, and before the last ones that empty it. The next column has the rate from the first request to the last.
- ``rows``: rows/s and peak memory of the driver with an engine that answers at once, at two sizes.
- ``scoring``: prompts/s of each scoring pass, against the rate at which the stage makes them.

Prints a table and, as its last line, JSON.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from udrl import command_line
from udrl import recipe as recipes
from udrl.recipe import Recipe
from udrl.text import text_table

PARTS = ("engine", "rows", "scoring")
HERE = str(Path(__file__).parents[1])


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="benchmarks.generation", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("words", nargs="*", help="parts to run (default: all), a recipe file, key=value overrides")
    parser.add_argument("--requests", type=int, default=2048, help="requests of the engine part")
    parser.add_argument("--turns", type=int, default=2, help="turns of bare engine and stage")
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000])
    arguments = parser.parse_args(argv)
    parts = [w for w in arguments.words if w in PARTS] or list(PARTS)
    files = [w for w in arguments.words if w.endswith(".yaml")]
    recipe = command_line.load(files[0] if files else "recipes/quickstart.yaml", [w for w in arguments.words if "=" in w])
    results: dict[str, Any] = {"machine": machine()}
    folder = tempfile.mkdtemp(prefix="udrl-benchmark-")
    try:
        if "engine" in parts:
            results |= engine_part(recipe, arguments.requests, arguments.turns, folder)
        if "scoring" in parts and "engine" in parts:
            results |= scoring_part(recipe, folder)
        if "rows" in parts:
            results |= rows_part(recipe, arguments.rows, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps(results))


def machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown processor")
    return f"{len(os.sched_getaffinity(0))} cores, {model}"


def child(*command: str, env: dict[str, str] | None = None) -> str:
    """Run a process of this project and return what it printed; its own lines go to a log that is shown if it fails."""
    with tempfile.TemporaryFile("w+") as log:
        done = subprocess.run(
            [sys.executable, *command],
            cwd=HERE,
            env=os.environ | (env or {}),
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            timeout=3600,  # a process that hangs must not hang the benchmark
        )
        if done.returncode:
            log.seek(0)
            raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}\n{log.read()[-4000:]}")
    return done.stdout


def engine_part(recipe: Recipe, n: int, turns: int, folder: str) -> dict[str, Any]:
    from udrl.generate.plan import steady_rate_of_points
    from udrl.generate.stage import prepare_generation
    from udrl.policies.policy import engine_environment, engine_kwargs

    per_intent = len(recipe.tasks) * recipe.teacher.samples
    values = {
        "storage": f"{folder}/run",
        "intents": recipe.intents.model_copy(update={"heldout": 0.0, "limit": -(-n // per_intent)}),
    }
    recipe = recipe.model_copy(update=values)
    prepared = prepare_generation(recipe)
    rows = [{"prompts": 1, **row} for shard in range(prepared.requests.shards) for row in prepared.requests.rows(shard)]
    bare = {
        "model": prepared.policy.path,
        "engine_kwargs": engine_kwargs(recipe.teacher.engine, recipe.teacher.placement),
        "sampling_params": prepared.policy.sampling_params(),
        "prompts": [prepared.policy.render(row)["prompt"] for row in rows],
    }
    Path(folder, "bare.json").write_text(json.dumps(bare))
    Path(folder, "recipe.yaml").write_text(recipes.dump(recipe))
    seats = recipe.teacher.engine.max_num_seqs
    rates: dict[str, list[float]] = {"bare": [], "stage": []}
    table: list[list[str]] = []
    for _ in range(turns):
        threads = engine_environment(recipe.teacher.placement)
        child("-m", "benchmarks.bare_engine", f"{folder}/bare.json", f"{folder}/out.json", env=threads)
        bare_run = json.loads(Path(folder, "out.json").read_text())
        bare_run["tokens"] = sum(tokens for _, _, tokens in bare_run["finished"])
        bare_run["steady"] = steady_rate_of_points(bare_run["finished"], seats)
        shutil.rmtree(prepared.ledger, ignore_errors=True)
        whole = json.loads(child("-m", "benchmarks.generation_stage", f"{folder}/recipe.yaml").splitlines()[-1])
        for name, result in (("bare", bare_run), ("stage", whole)):
            rates[name].append(result["steady"])
            whole_run = result["tokens"] / result["seconds"]
            table.append([name, f"{result['steady']:,.0f}", f"{whole_run:,.0f}", f"{result['tokens']:,}"])
    ratio = sum(rates["stage"]) / sum(rates["bare"])
    print(f"{len(rows):,} requests, {recipe.teacher.model}")
    print(text_table(["", "tokens/s", "whole run", "tokens"], table))
    print(f"ratio of the stage to the bare engine: {ratio:.3f}\n", flush=True)
    return {
        "bare_tokens_per_second": [round(r, 1) for r in rates["bare"]],
        "stage_tokens_per_second": [round(r, 1) for r in rates["stage"]],
        "ratio_to_bare_engine": round(ratio, 3),
        "stage": {k: v for k, v in whole.items() if k not in ("tokens", "seconds", "steady")},
    }


def scoring_part(recipe: Recipe, folder: str) -> dict[str, Any]:
    """Scores the ledger that the last turn of the engine part left."""
    lines = child("-m", "benchmarks.generation_stage", f"{folder}/recipe.yaml", "score").splitlines()
    scores: dict[str, Any] = json.loads(lines[-1])
    print(
        f"scoring: {scores['prompts']:,} prompts in {scores['seconds']:.1f} s, {scores['prompts_per_second']:,.0f} prompts/s,"
        f" {scores['texts_per_second']:,.0f} texts/s embedded; again with other weights: {scores['reweigh_seconds']:.1f} s\n",
        flush=True,
    )
    return {"scoring": scores}


def rows_part(recipe: Recipe, sizes: list[int], folder: str) -> dict[str, Any]:
    results = []
    for n in sizes:
        teacher = recipe.teacher.model_copy(update={"samples": 4, "shard_size": None})
        per_intent = len(recipe.tasks) * 4
        intents = recipe.intents.model_copy(update={"heldout": 0.0, "limit": -(-n // per_intent)})
        values = {"storage": f"{folder}/rows-{n}", "teacher": teacher, "intents": intents}
        Path(folder, "rows.yaml").write_text(recipes.dump(recipe.model_copy(update=values)))
        out = json.loads(child("-m", "benchmarks.generation_stage", f"{folder}/rows.yaml", "dummy").splitlines()[-1])
        shutil.rmtree(f"{folder}/rows-{n}", ignore_errors=True)
        results.append(out)
    growth = results[-1]["driver_mib"] / results[0]["driver_mib"] - 1
    hours = 52e6 / results[-1]["rows_per_second"] / 3600
    names = ("rows", "rows_per_second", "driver_mib", "files")
    print("the stage without its engine")
    print(text_table(["rows", "rows/s", "driver peak MiB", "files"], [[f"{out[n]:,.0f}" for n in names] for out in results], 0))
    print(f"driver's peak grows by {growth:+.1%}; 52M rows at that rate: {hours:.1f} hours on this machine\n")
    return {"rows": results, "driver_growth": round(growth, 3), "hours_for_52M": round(hours, 2)}


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main(sys.argv[1:])
