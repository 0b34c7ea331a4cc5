"""``dry_run=true``: what the generate stage would ask, write, take and cost, from a few real requests or a given speed."""

import dataclasses
import sys
from itertools import islice
from typing import Any

from udrl import cluster, storage
from udrl.context import StageContext
from udrl.generate import cost
from udrl.generate.prepare import Work, prepare
from udrl.policies.policy import Row
from udrl.policies.requests import Requests
from udrl.policies.stage import complete
from udrl.recipe import Recipe

PLAN = "plan.json"


def run(recipe: Recipe) -> list[str]:
    """The plan's lines. Writes ``plan.json`` beside the run's outputs, so that the finished job can be compared with it.

    Without ``teacher.tokens_per_second`` one replica of the engine is started and timed on a few hundred requests, whose
    completions are thrown away.

    Raises:
        UserError: what :func:`~udrl.generate.prepare.prepare` and the engine raise.
    """
    work = prepare(recipe, grow=False)
    teacher = recipe.teacher
    if teacher.tokens_per_second:
        rates = cost.assumed_rates(work.policy, work.requests, work.tasks, teacher.tokens_per_second)
    else:
        rates = _calibrate(recipe, work)
    plan = cost.plan(teacher, recipe.rewards, work.requests, work.prompts, work.n_train, rates)
    storage.write_json(storage.join(recipe.storage, PLAN), {"ledger": work.mark, **dataclasses.asdict(plan)})
    grown = recipe.intents.expand
    more = [f"intents.expand: up to {grown.target:,} more intents are not in this plan"] if grown else []
    return [work.says, *cost.describe_plan(plan), *more]


def compare(recipe: Recipe, mark: str, seconds: float) -> list[str]:
    """One line that holds the generation's time against the plan made for the same ledger, if there is one."""
    file = storage.join(recipe.storage, PLAN)
    plan: dict[str, Any] = storage.read_json(file) if storage.exists(file) else {}
    planned = (plan.get("generation_seconds") or {}).get("value")
    if plan.get("ledger") != mark or not planned or not seconds:
        return []
    took, off = cost.duration_fine(seconds), f"{seconds / planned - 1:+.0%}"
    return [f"  planned {cost.duration_fine(planned)} of generation, took {took} ({off})"]


def _calibrate(recipe: Recipe, work: Work) -> cost.Rates:
    teacher = recipe.teacher
    rows = sample(work.requests, cost.calibration_requests(teacher))
    print(f"dry run: timing the engine on {len(rows):,} of the requests", file=sys.stderr)
    one = dataclasses.replace(work.policy, placement=teacher.placement.model_copy(update={"replicas": 1}))
    ledger = storage.join(recipe.storage, "calibration")
    storage.remove(ledger)
    cluster.connect()
    requests = Requests.of_rows(rows, max(1, teacher.engine.max_num_seqs // 4))
    tally = complete(one, requests, ledger, "dry run", context=StageContext.of(recipe))
    rates = cost.measured_rates(tally, teacher, ledger)
    storage.remove(ledger)
    return rates


def sample(requests: Requests, n: int) -> list[Row]:
    """``n`` requests from all over: a run of neighbours from each of some shards, since neighbours share prefixes."""
    chosen = sorted({round(i * (requests.shards - 1) / 7) for i in range(8)})
    each = -(-n // len(chosen))
    return [row for shard in chosen for row in islice(requests.rows(shard), each)][:n]
