"""``python -m benchmarks.generation_stage RECIPE [dummy|score]``: the generate stage's engine part in a process of its own.

Prints one JSON line; ``benchmarks.generation`` reads it.
"""

import json
import sys
import time
from typing import Any

from udrl import cluster, command_line, logs, recipe
from udrl.context import StageContext
from udrl.generate.plan import steady_rate
from udrl.generate.stage import PreparedGeneration, RejectInspector, prepare_generation
from udrl.policies.ledger import list_parts
from udrl.policies.stage import complete


def main(path: str, how: str = "vllm") -> None:
    config = command_line.load(path)
    prepared = prepare_generation(config)
    cluster.connect()
    if how == "score":
        print(json.dumps(score(config, prepared)))
        return
    actor = None
    if how == "dummy":
        from benchmarks.dummy_engine import DummyEngine

        actor = DummyEngine
    start = time.monotonic()
    statistics = complete(
        prepared.policy,
        prepared.requests,
        prepared.ledger,
        "benchmark",
        inspect=RejectInspector(prepared.tasks),
        context=StageContext(engine_actor=actor),
    )
    result: dict[str, Any] = {
        "tokens": statistics.output_tokens,
        "seconds": statistics.seconds,
        "steady": steady_rate(prepared.ledger, config.teacher.engine.max_num_seqs),
        "startup_seconds": round(statistics.startup_seconds, 1),
        "accepted_share": round(statistics.accepted_share, 3),
        "engines_busy": round(statistics.busy_share, 4),
        "prefix_cache_hits": round(statistics.cached_share, 4),
        "first_token_p50": round(statistics.first_token_seconds(0.5), 3),
        "first_token_p95": round(statistics.first_token_seconds(0.95), 3),
    }
    if how == "dummy":
        from benchmarks.generation import peak_mib

        result = {
            "rows": statistics.rows,
            "rows_per_second": round(statistics.rows / statistics.seconds, 1),
            "seconds": round(time.monotonic() - start, 1),
            "driver_mib": round(peak_mib(), 1),
            "files": sum(map(len, list_parts(prepared.ledger).values())),
        }
    print(json.dumps(result))


def score(config: recipe.Recipe, prepared: PreparedGeneration) -> dict[str, Any]:
    from udrl.scoring.score import score as score_ledger

    start = time.monotonic()
    scored = score_ledger(prepared.ledger, prepared.run.scoring, prepared.tasks, config.rewards)
    seconds = time.monotonic() - start
    other = config.rewards.model_copy(update={"weights": config.rewards.weights.model_copy(update={"novelty": 0.5})})
    start = time.monotonic()
    score_ledger(prepared.ledger, prepared.run.scoring, prepared.tasks, other)
    reweigh = time.monotonic() - start
    return {
        "prompts": scored.total,
        "accepted": scored.accepted,
        "seconds": round(seconds, 1),
        "prompts_per_second": round(scored.total / seconds, 1),
        "texts_per_second": round((scored.accepted + prepared.n_intents) / seconds, 1),
        "reweigh_seconds": round(reweigh, 1),
    }


if __name__ == "__main__":
    logs.configure()
    main(*sys.argv[1:])
