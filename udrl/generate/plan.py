"""Plan a generate stage before it runs (``dry_run=true``): requests, tokens, time and cost.

The rates behind the plan are measured on a few hundred real requests, or derived from a given speed.
"""

import dataclasses
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice, takewhile
from typing import Any

import pyarrow.fs as pafs

from udrl import cluster, storage
from udrl.context import StageContext
from udrl.generate.cost import cost_unit, hours_label
from udrl.generate.stage import PreparedGeneration, prepare_generation
from udrl.policies.policy import Policy, Row, resource_bundles, revision_kwargs
from udrl.policies.requests import Requests
from udrl.policies.stage import complete
from udrl.policies.statistics import CompletionStatistics
from udrl.progress import duration
from udrl.recipe import Recipe, Rewards, Teacher
from udrl.run import Basis, Figure, GenerationPlan, Run
from udrl.tasks import Task
from udrl.text import count_words, name_value_table

log = logging.getLogger(__name__)

# Least squares over files of 32 to 6,328 quickstart completions (20 tokens each, zstd): a file's footer and column headers;
# a row's ids, counts and intent; a token of English text. Within 3% of each of the files.
BYTES_PER_FILE, BYTES_PER_ROW, BYTES_PER_TOKEN = 7_300, 14.0, 1.4
TOKENS_PER_WORD = 1.4  # of English prompts, with their punctuation
ENGINE_STARTUP_SECONDS = 60.0  # if it was not measured
# Texts per second that one replica of the scoring pass embeds, if it was not measured. CPU: MiniLM in bf16 on two cores.
TEXTS_PER_SECOND = {"cpu": 500.0, "gpu": 5_000.0}


@dataclass(frozen=True)
class Rates:
    """Tokens of one request, and the speed (tokens per second) and start-up time of one replica."""

    input_tokens: Figure
    cached_tokens: Figure
    output_tokens: Figure
    tokens_per_second: Figure | None
    startup_seconds: Figure


def plan_generation(recipe: Recipe, engine_actor: type | None = None) -> GenerationPlan:
    """Plan the stage and write ``plan.json``, with which the finished job compares its time.

    Unless the recipe gives ``teacher.tokens_per_second``, one replica of the engine completes a few hundred requests, whose
    completions are deleted. ``engine_actor`` replaces the engine (see :class:`~udrl.context.StageContext`).

    Raises:
        UserError: as in :func:`~udrl.generate.stage.prepare_generation`; or the engine can't be placed.
    """
    prepared = prepare_generation(recipe, expand=False)
    log.info("plan: %s", prepared.describe())
    if recipe.intents.expand:
        log.info("plan: up to %s intents that intents.expand will add are not in it", f"{recipe.intents.expand.target:,}")
    teacher = recipe.teacher
    if teacher.tokens_per_second:
        rates = assumed_rates(prepared.policy, prepared.requests, prepared.tasks, teacher.tokens_per_second)
    else:
        rates = _calibrate(recipe, prepared, engine_actor)
    plan = estimate_plan(teacher, recipe.rewards, prepared.requests, prepared.n_prompts, prepared.n_intents, rates)
    plan = plan.model_copy(update={"ledger": prepared.manifest.fingerprint})
    plan.save(prepared.run.plan)
    return plan


def estimate_plan(
    teacher: Teacher,
    rewards: Rewards,
    requests: Requests,
    n_prompts: int,
    n_intents: int,
    rates: Rates,
    texts_per_second: float | None = None,
) -> GenerationPlan:
    """Return the expected cost of ``requests`` at ``rates``.

    The requests ask for ``n_prompts``; scoring embeds them and ``n_intents``, at ``texts_per_second`` (measured) per replica.
    """
    placement = teacher.placement
    output_tokens = rates.output_tokens.times(requests.total)
    n_bytes = BYTES_PER_FILE * requests.shards + BYTES_PER_ROW * requests.total + BYTES_PER_TOKEN * output_tokens.value
    unit, units_per_replica = cost_unit(placement, len(resource_bundles(teacher.engine, placement)))
    scoring = _scoring_seconds(rewards, n_prompts + n_intents, texts_per_second)
    generation = hours = dollars = None
    if rates.tokens_per_second:
        basis = _weakest(output_tokens.basis, rates.tokens_per_second.basis)
        seconds = output_tokens.value / rates.tokens_per_second.value / placement.replicas
        replica_hours = placement.replicas * (seconds + rates.startup_seconds.value) / 3600
        generation = Figure(value=seconds, basis=basis)
        hours = Figure(value=replica_hours * units_per_replica, basis=basis)
        if placement.dollars_per_hour is not None:
            price = placement.dollars_per_hour * replica_hours
            if scoring and rewards.placement.dollars_per_hour is not None:
                basis = _weakest(basis, scoring.basis)
                price += rewards.placement.dollars_per_hour * rewards.placement.replicas * scoring.value / 3600
            dollars = Figure(value=price, basis=basis)
    return GenerationPlan(
        requests=requests.total,
        prompts=n_prompts,
        files=requests.shards,
        bytes=Figure(value=n_bytes, basis=output_tokens.basis),
        input_tokens=rates.input_tokens.times(requests.total),
        cached_tokens=rates.cached_tokens.times(requests.total),
        output_tokens=output_tokens,
        startup_seconds=rates.startup_seconds,
        generation_seconds=generation,
        scoring_seconds=scoring,
        hours=hours,
        hours_unit=unit,
        dollars=dollars,
    )


def describe_plan(plan: GenerationPlan) -> str:
    """Return the plan as a table; each number is marked as counted, measured, given or assumed."""

    def seconds(figure: Figure | None, unknown: str = "") -> str:
        return f"{duration(figure.value)} ({figure.basis})" if figure else unknown

    rows = [
        ("requests", f"{plan.requests:,} for {plan.prompts:,} prompts (counted)"),
        ("tokens in", f"{plan.input_tokens.value:,.0f} ({plan.input_tokens.basis})"),
        ("of them cached", f"{plan.cached_tokens.value:,.0f} ({plan.cached_tokens.basis})"),
        ("tokens out", f"{plan.output_tokens.value:,.0f} ({plan.output_tokens.basis})"),
        ("ledger", f"{plan.files:,} files (counted), {_format_bytes(plan.bytes.value)} ({plan.bytes.basis})"),
        ("engine start-up", seconds(plan.startup_seconds)),
        ("generation", seconds(plan.generation_seconds, "unknown; give teacher.tokens_per_second")),
        ("scoring", seconds(plan.scoring_seconds, "not planned; one judge request for each prompt")),
    ]
    if plan.hours:
        rows.append((hours_label(plan.hours_unit), f"{plan.hours.value:,.2f} ({plan.hours.basis})"))
    if plan.dollars:
        rows.append(("dollars", f"${plan.dollars.value:,.2f} ({plan.dollars.basis}, at the recipe's price)"))
    return "\n".join(name_value_table("plan", rows))


def measured_rates(statistics: CompletionStatistics, teacher: Teacher, ledger: str) -> Rates:
    """Return the rates of a calibration run of one replica, from its statistics and its ledger."""
    rate = steady_rate(ledger, teacher.engine.max_num_seqs) or statistics.tokens_per_second
    rows = max(statistics.rows, 1)
    return Rates(
        input_tokens=Figure(value=statistics.input_tokens / rows, basis="measured"),
        cached_tokens=Figure(value=statistics.cached_tokens / rows, basis="measured"),
        output_tokens=Figure(value=statistics.output_tokens / rows, basis="measured"),
        tokens_per_second=Figure(value=rate, basis="measured"),
        startup_seconds=Figure(value=statistics.startup_seconds, basis="measured"),
    )


def assumed_rates(policy: Policy, requests: Requests, tasks: Sequence[Task], tokens_per_second: float | None) -> Rates:
    """Return rates without an engine: tokens in from a sample of the requests, tokens out from the tasks' examples."""
    mean_words = {t.name: sum(count_words(e.prompt) for e in t.examples) / len(t.examples) for t in tasks}
    encode = _load_encoder(policy)
    n_input, n_cached, n_output, rows = 0.0, 0.0, 0.0, 0
    # vLLM caches whole blocks of a prefix, and never the last token of a prompt.
    block = policy.engine.kwargs.get("block_size", 16 if policy.placement.gpus else 32)
    previous: dict[str, list[int]] = {}  # token ids of the last request of each task
    for shard in sorted({0, requests.shards // 2, requests.shards - 1}):
        for row in ({"prompts": 1, **row} for row in islice(requests.rows(shard), 64)):
            ids, task, prompts = encode(policy.render(row)), row["task"], row["prompts"]
            pairs = zip(ids[:-1], previous.get(task, ()), strict=False)
            shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
            previous[task] = ids
            json_tokens = 6 + 4 * prompts if prompts > 1 else 1
            n_input += len(ids)
            n_cached += shared // block * block
            n_output += prompts * TOKENS_PER_WORD * mean_words[task] + json_tokens
            rows += 1
    return Rates(
        input_tokens=Figure(value=n_input / rows, basis="measured"),
        cached_tokens=Figure(value=n_cached / rows, basis="assumed"),
        output_tokens=Figure(value=n_output / rows, basis="assumed"),
        tokens_per_second=Figure(value=tokens_per_second, basis="given") if tokens_per_second else None,
        startup_seconds=Figure(value=ENGINE_STARTUP_SECONDS, basis="assumed"),
    )


def steady_rate(ledger: str, capacity: int) -> float | None:
    """Return the tokens per second while the engine was full, from the times of a ledger's files; None if they are too few.

    An engine that holds ``capacity`` requests fills up during the first ``capacity`` and drains during the last, at a fraction
    of its speed. For a few hundred requests that is half of the time, for a million it is negligible. So a calibration is
    measured in between: from the file that completes the first ``capacity`` rows to the last one before the final ``capacity``.
    """
    fs, path = storage.open_filesystem(ledger)
    infos = fs.get_file_info(pafs.FileSelector(path, allow_not_found=True))
    parts = sorted((i for i in infos if i.base_name.startswith("part-")), key=lambda i: (i.mtime_ns, i.base_name))
    points = []
    for part in parts:
        tokens = storage.read_table(storage.join(ledger, part.base_name), ["output_tokens"]).column(0).to_pylist()
        points.append((part.mtime_ns / 1e9, len(tokens), sum(tokens)))
    return steady_rate_of_points(points, capacity)


def steady_rate_of_points(points: Sequence[tuple[float, int, int]], capacity: int) -> float | None:
    """Return :func:`steady_rate` of (time, completed requests, their tokens), sorted by time."""
    total, rows, window = sum(rows for _, rows, _ in points), 0, []
    for time, completed, tokens in points:
        rows += completed
        if capacity <= rows <= total - capacity:
            window.append((time, tokens))
    if len(window) < 3 or window[-1][0] <= window[0][0]:
        return None
    return sum(tokens for _, tokens in window[1:]) / (window[-1][0] - window[0][0])


def _calibrate(recipe: Recipe, prepared: PreparedGeneration, engine_actor: type | None) -> Rates:
    """Complete a sample of the requests with one replica, and return its rates."""
    teacher, ledger = recipe.teacher, Run(recipe.storage).calibration
    # Four times the engine's capacity keep it full for half of them. Shards of a quarter of the capacity give the steady rate
    # eight files to measure between.
    rows = _sample(prepared.requests, 4 * teacher.engine.max_num_seqs)
    requests = Requests.of_rows(rows, max(1, teacher.engine.max_num_seqs // 4))
    log.info("plan: timing the engine on %s of the requests", f"{len(rows):,}")
    one_replica = teacher.placement.model_copy(update={"replicas": 1})
    policy = dataclasses.replace(prepared.policy, placement=one_replica)
    storage.remove(ledger)
    cluster.connect()
    statistics = complete(policy, requests, ledger, "plan", context=StageContext.of(recipe, engine_actor))
    rates = measured_rates(statistics, teacher, ledger)
    storage.remove(ledger)
    return rates


def _sample(requests: Requests, n: int) -> list[Row]:
    """Return ``n`` requests: runs of neighbors, which share prefixes, from up to eight shards spread over all."""
    shards = sorted({round(i * (requests.shards - 1) / 7) for i in range(8)})
    per_shard = -(-n // len(shards))
    return [row for shard in shards for row in islice(requests.rows(shard), per_shard)][:n]


def _scoring_seconds(rewards: Rewards, n_texts: int, texts_per_second: float | None) -> Figure | None:
    """Return the time of the scoring pass; None with a judge, whose engine has another speed."""
    if rewards.relevance != "embedding":
        return None
    device = "gpu" if rewards.placement.gpus else "cpu"
    rate, basis = (texts_per_second, "measured") if texts_per_second else (TEXTS_PER_SECOND[device], "assumed")
    return Figure(value=n_texts / rate / rewards.placement.replicas, basis=basis)


def _load_encoder(policy: Policy) -> Callable[[dict[str, Any]], list[int]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(policy.path, revision=revision_kwargs(policy).get("revision"))

    def encode(rendered: dict[str, Any]) -> list[int]:
        ids = rendered["tokenized_prompt"] if "tokenized_prompt" in rendered else tokenizer(rendered["prompt"])["input_ids"]
        return list(ids)

    return encode


def _weakest(*bases: Basis) -> Basis:
    order: tuple[Basis, ...] = ("assumed", "given", "measured")
    return min(bases, key=order.index)


def _format_bytes(n: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:,.0f} {unit}" if unit == "bytes" else f"{n:,.1f} {unit}"
        n /= 1000
    return f"{n:,.1f} TB"
