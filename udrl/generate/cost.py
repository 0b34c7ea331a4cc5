"""What a generate stage cost, told when it ends, and what it would cost, told before it begins (``dry_run``)."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice, takewhile
from typing import Any, Literal

import pyarrow.fs as pafs

from udrl import storage
from udrl.policies.policy import Policy, resource_bundles, revision_kwargs
from udrl.policies.requests import Requests
from udrl.policies.statistics import CompletionStatistics
from udrl.progress import duration
from udrl.recipe import Placement, Rewards, Teacher
from udrl.tasks import Task

Basis = Literal["measured", "given", "assumed"]

# Least squares over files of 32 to 6,328 quickstart completions (20 tokens each, zstd): a file's footer and column headers;
# a row's ids, counts and intent; a token of English text. Within 3% of each of the files.
BYTES_PER_FILE, BYTES_PER_ROW, BYTES_PER_TOKEN = 7_300, 14.0, 1.4
TOKENS_PER_WORD = 1.4  # of English prompts, with their punctuation
ENGINE_START = 60.0  # seconds, where nothing was measured
# Texts embedded a second by one replica of the scoring pass, where nothing was measured. CPU: MiniLM in bf16 on two cores.
TEXTS_PER_SECOND = {"cpu": 500.0, "gpu": 5_000.0}


@dataclass(frozen=True)
class Figure:
    """A number and where it comes from."""

    value: float
    basis: Basis

    def times(self, factor: float) -> "Figure":
        return Figure(self.value * factor, self.basis)


@dataclass(frozen=True)
class Rates:
    """What one request takes (tokens), and what one replica does (tokens a second, seconds until it is ready)."""

    input_tokens: Figure
    cached_tokens: Figure
    output_tokens: Figure
    tokens_per_second: Figure | None
    startup_seconds: Figure


@dataclass(frozen=True)
class Plan:
    """What a run of the stage would take. Tokens are totals, times are seconds, ``hours`` are engine- or GPU-hours."""

    requests: int
    prompts: int
    files: int
    bytes: Figure
    input_tokens: Figure
    cached_tokens: Figure
    output_tokens: Figure
    startup_seconds: Figure
    generation_seconds: Figure | None
    scoring_seconds: Figure | None
    hours: Figure | None
    hours_unit: str
    dollars: Figure | None


def describe_cost(tally: CompletionStatistics, placement: Placement, accepted: int, devices: int = 1) -> list[str]:
    """The table that ends a job, as lines. ``accepted`` counts the run's episodes, ``devices`` the GPUs of a replica
    (``len(resource_bundles(engine, placement))``).

    Hours and money count the whole time that the replicas were held, start-up included; rates count from the first
    request on.
    """
    if not tally.rows:
        return [f"cost: none, all {tally.reused:,} requests were done before"]
    unit, per_replica = _unit(placement, devices)
    held = placement.replicas * (tally.startup_seconds + tally.seconds) / 3600
    days = per_replica * placement.replicas * tally.seconds / 86400
    seconds = max(tally.seconds, 1e-9)
    timed = bool(tally.first_token.sum())
    first = [duration_fine(tally.first_token_seconds(share)) for share in (0.5, 0.95)] if timed else []
    rows = [
        ("requests", f"{tally.rows:,} made now, {tally.reused:,} reused"),
        ("tokens in", f"{tally.input_tokens:,}"),
        ("prefix-cache hit rate", f"{tally.cached_share:.1%} of the tokens in"),
        ("tokens out", f"{tally.output_tokens:,}"),
        ("time to first token", f"p50 {first[0]}, p95 {first[1]}" if timed else "not measured"),
        ("engines busy", f"{tally.busy_share:.1%} of their time" if tally.engines else "not measured"),
        ("speed", f"{tally.output_tokens / seconds:,.0f} tokens/s out, {accepted / seconds:,.2f} episodes accepted/s"),
        ("time", f"{duration(tally.seconds)} after {duration(tally.startup_seconds)} of engine start-up"),
        (_hours_name(unit), f"{held * per_replica:,.3f}"),
        (f"{unit}-days per billion tokens out", f"{days / max(tally.output_tokens, 1) * 1e9:,.1f}"),
    ]
    if placement.dollars_per_hour is not None:
        money = held * placement.dollars_per_hour
        each = f", ${1e6 * money / accepted:,.2f} per million episodes" if accepted else ""
        rows.append(("dollars", f"${money:,.2f} at ${placement.dollars_per_hour:g} a replica's hour{each}"))
    return _table("cost of this run", rows)


def calibration_requests(teacher: Teacher) -> int:
    """How many requests to measure on: four times what one engine holds, so that it is full for half of them. In shards of
    a quarter of what it holds, :func:`steady_rate` has eight files to go by."""
    return 4 * teacher.engine.max_num_seqs


def steady_rate(ledger: str, seats: int) -> float | None:
    """Tokens a second while the engine was full, from the times at which a ledger's files were written; None where too few
    files were.

    An engine that holds ``seats`` requests fills during the first ``seats`` and empties during the last, at a fraction of
    its speed. Of a few hundred requests that is half the time, of a million nothing: so a calibration is measured between,
    from the file that completes the first ``seats`` rows to the last one before the final ``seats``.
    """
    fs, path = storage.open_filesystem(ledger)
    infos = fs.get_file_info(pafs.FileSelector(path, allow_not_found=True))
    parts = sorted((i for i in infos if i.base_name.startswith("part-")), key=lambda i: (i.mtime_ns, i.base_name))
    points = []
    for part in parts:
        tokens = storage.read_table(storage.join(ledger, part.base_name), ["output_tokens"]).column(0).to_pylist()
        points.append((part.mtime_ns / 1e9, len(tokens), sum(tokens)))
    return steady(points, seats)


def steady(points: Sequence[tuple[float, int, int]], seats: int) -> float | None:
    """:func:`steady_rate` of (time, requests finished, their tokens) in the order of time."""
    total, rows, window = sum(rows for _, rows, _ in points), 0, []
    for time, finished, tokens in points:
        rows += finished
        if seats <= rows <= total - seats:
            window.append((time, tokens))
    if len(window) < 3 or window[-1][0] <= window[0][0]:
        return None
    return sum(tokens for _, tokens in window[1:]) / (window[-1][0] - window[0][0])


def measured_rates(tally: CompletionStatistics, teacher: Teacher, ledger: str) -> Rates:
    """Rates of a calibration run by one replica: its tally and the ledger that it wrote."""
    rate = steady_rate(ledger, teacher.engine.max_num_seqs) or tally.tokens_per_second
    rows = max(tally.rows, 1)
    return Rates(
        Figure(tally.input_tokens / rows, "measured"),
        Figure(tally.cached_tokens / rows, "measured"),
        Figure(tally.output_tokens / rows, "measured"),
        Figure(rate, "measured"),
        Figure(tally.startup_seconds, "measured"),
    )


def assumed_rates(policy: Policy, requests: Requests, tasks: Sequence[Task], tokens_per_second: float | None) -> Rates:
    """Rates without an engine: tokens in from a sample of the rendered requests, tokens out from the tasks' own examples,
    ``tokens_per_second`` as given."""
    words = {t.name: sum(len(e.prompt.split()) for e in t.examples) / len(t.examples) for t in tasks}
    encode = _encoder(policy)
    total, cached, out, rows = 0.0, 0.0, 0.0, 0
    # As vLLM caches prefixes: whole blocks, and never the last token of a prompt.
    block = policy.engine.kwargs.get("block_size", 16 if policy.placement.gpus else 32)
    before: dict[str, list[int]] = {}
    for shard in sorted({0, requests.shards // 2, requests.shards - 1}):
        for row in ({"prompts": 1, **row} for row in islice(requests.rows(shard), 64)):
            ids = encode(policy.render(row))
            shared = sum(1 for _ in takewhile(lambda p: p[0] == p[1], zip(ids[:-1], before.get(row["task"], ()), strict=False)))
            before[row["task"]] = ids
            prompts = row["prompts"]
            json_tokens = 6 + 4 * prompts if prompts > 1 else 1
            total, cached, rows = total + len(ids), cached + shared // block * block, rows + 1
            out += prompts * TOKENS_PER_WORD * words[row["task"]] + json_tokens
    return Rates(
        Figure(total / rows, "measured"),
        Figure(cached / rows, "assumed"),
        Figure(out / rows, "assumed"),
        Figure(tokens_per_second, "given") if tokens_per_second else None,
        Figure(ENGINE_START, "assumed"),
    )


def plan(
    teacher: Teacher,
    rewards: Rewards,
    requests: Requests,
    prompts: int,
    intents: int,
    rates: Rates,
    texts_per_second: float | None = None,
) -> Plan:
    """What ``requests`` would take at ``rates``. ``prompts`` are those that they ask for, ``intents`` those that scoring
    embeds; ``texts_per_second`` is a measured speed of one replica of the scoring pass."""
    n, place = requests.total, teacher.placement
    out = rates.output_tokens.times(n)
    size = BYTES_PER_FILE * requests.shards + BYTES_PER_ROW * n + BYTES_PER_TOKEN * out.value
    devices = len(resource_bundles(teacher.engine, place))
    unit, per_replica = _unit(place, devices)
    generation = hours = dollars = scoring = None
    if rewards.relevance == "embedding":  # a judge generates too: its speed is another engine's
        kind = "gpu" if rewards.placement.gpus else "cpu"
        speed = Figure(texts_per_second, "measured") if texts_per_second else Figure(TEXTS_PER_SECOND[kind], "assumed")
        scoring = Figure((prompts + intents) / speed.value / rewards.placement.replicas, speed.basis)
    if rates.tokens_per_second:
        basis = _weakest(out.basis, rates.tokens_per_second.basis)
        generation = Figure(out.value / rates.tokens_per_second.value / place.replicas, basis)
        held = place.replicas * (generation.value + rates.startup_seconds.value) / 3600
        hours = Figure(held * per_replica, basis)
        if place.dollars_per_hour is not None:
            price = place.dollars_per_hour * held
            if scoring and rewards.placement.dollars_per_hour is not None:
                basis = _weakest(basis, scoring.basis)
                price += rewards.placement.dollars_per_hour * rewards.placement.replicas * scoring.value / 3600
            dollars = Figure(price, basis)
    return Plan(
        n,
        prompts,
        requests.shards,
        Figure(size, out.basis),
        rates.input_tokens.times(n),
        rates.cached_tokens.times(n),
        out,
        rates.startup_seconds,
        generation,
        scoring,
        hours,
        unit,
        dollars,
    )


def describe_plan(plan: Plan) -> list[str]:
    """The plan as lines; every number says whether it was counted, measured, given or assumed."""

    def seconds(figure: Figure | None, unknown: str) -> str:
        return f"{duration(figure.value)} ({figure.basis})" if figure else unknown

    rows = [
        ("requests", f"{plan.requests:,} for {plan.prompts:,} prompts (counted)"),
        ("tokens in", f"{plan.input_tokens.value:,.0f} ({plan.input_tokens.basis})"),
        ("of them cached", f"{plan.cached_tokens.value:,.0f} ({plan.cached_tokens.basis})"),
        ("tokens out", f"{plan.output_tokens.value:,.0f} ({plan.output_tokens.basis})"),
        ("ledger", f"{plan.files:,} files (counted), {_size(plan.bytes.value)} ({plan.bytes.basis})"),
        ("engine start-up", seconds(plan.startup_seconds, "")),
        ("generation", seconds(plan.generation_seconds, "unknown; give teacher.tokens_per_second")),
        ("scoring", seconds(plan.scoring_seconds, "not planned; one judge request for each prompt")),
    ]
    if plan.hours:
        rows.append((_hours_name(plan.hours_unit), f"{plan.hours.value:,.2f} ({plan.hours.basis})"))
    if plan.dollars:
        rows.append(("dollars", f"${plan.dollars.value:,.2f} ({plan.dollars.basis}, at the recipe's price)"))
    return _table("plan", rows)


def duration_fine(seconds: float) -> str:
    """Below ten seconds with two digits: ``0.21`` -> ``0.21s``."""
    return f"{seconds:.2g}s" if seconds < 10 else duration(seconds)


def _encoder(policy: Policy) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(policy.path, revision=revision_kwargs(policy).get("revision"))

    def encode(rendered: dict[str, Any]) -> list[int]:
        ids = rendered["tokenized_prompt"] if "tokenized_prompt" in rendered else tokenizer(rendered["prompt"])["input_ids"]
        return list(ids)

    return encode


def _unit(placement: Placement, devices: int) -> tuple[str, float]:
    """What is counted in hours, and how many of it a replica holds."""
    return ("GPU", placement.gpus * devices) if placement.gpus else ("engine", 1.0)


def _hours_name(unit: str) -> str:
    return "GPU-hours" if unit == "GPU" else "engine-hours (no GPU)"


def _weakest(*bases: Basis) -> Basis:
    order: tuple[Basis, ...] = ("assumed", "given", "measured")
    return min(bases, key=order.index)


def _size(n: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:,.0f} {unit}" if unit == "bytes" else f"{n:,.1f} {unit}"
        n /= 1000
    return f"{n:,.1f} TB"


def _table(title: str, rows: Sequence[tuple[str, str]]) -> list[str]:
    width = max(len(name) for name, _ in rows)
    return [f"{title}:", *(f"  {name:<{width}}  {value}" for name, value in rows)]
