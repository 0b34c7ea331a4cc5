"""The cost of a finished generate stage: the table that ends the job, and the comparison with its plan."""

from udrl.policies.statistics import CompletionStatistics
from udrl.progress import duration
from udrl.recipe import Placement
from udrl.run import GenerationPlan
from udrl.text import name_value_table


def describe_cost(statistics: CompletionStatistics, placement: Placement, accepted: int, devices: int = 1) -> list[str]:
    """Return the lines of the cost table.

    ``accepted`` counts the run's episodes, ``devices`` the GPUs of one replica. Hours and dollars count the whole time that
    the replicas were reserved, start-up included; rates count from the first request on.
    """
    if not statistics.rows:
        return [f"cost: none, all {statistics.reused:,} requests were completed before"]
    unit, units_per_replica = cost_unit(placement, devices)
    replica_hours = placement.replicas * (statistics.startup_seconds + statistics.seconds) / 3600
    unit_days = units_per_replica * placement.replicas * statistics.seconds / 86400
    seconds = max(statistics.seconds, 1e-9)
    rows = [
        ("requests", f"{statistics.rows:,} made now, {statistics.reused:,} reused"),
        ("tokens in", f"{statistics.input_tokens:,}"),
        ("prefix-cache hit rate", f"{statistics.cached_share:.1%} of the tokens in"),
        ("tokens out", f"{statistics.output_tokens:,}"),
        ("time to first token", _first_token_times(statistics)),
        ("engines busy", f"{statistics.busy_share:.1%} of their time" if statistics.engines else "not measured"),
        ("speed", f"{statistics.output_tokens / seconds:,.0f} tokens/s out, {accepted / seconds:,.2f} episodes accepted/s"),
        ("time", f"{duration(statistics.seconds)} after {duration(statistics.startup_seconds)} of engine start-up"),
        (hours_label(unit), f"{replica_hours * units_per_replica:,.3f}"),
        (f"{unit}-days per billion tokens out", f"{unit_days / max(statistics.output_tokens, 1) * 1e9:,.1f}"),
    ]
    if placement.dollars_per_hour is not None:
        dollars = replica_hours * placement.dollars_per_hour
        per_million = f", ${1e6 * dollars / accepted:,.2f} per million episodes" if accepted else ""
        rows.append(("dollars", f"${dollars:,.2f} at ${placement.dollars_per_hour:g} per replica-hour{per_million}"))
    return name_value_table("cost of this run", rows)


def compare_with_plan(plan: GenerationPlan | None, ledger: str, seconds: float) -> list[str]:
    """Return a line that compares the generation's time with its plan; no line if the plan is for another ledger."""
    if plan is None or plan.ledger != ledger or not plan.generation_seconds or not seconds:
        return []
    planned = plan.generation_seconds.value
    deviation = f"{seconds / planned - 1:+.0%}"
    return [f"  planned {format_seconds(planned)} of generation, took {format_seconds(seconds)} ({deviation})"]


def format_seconds(seconds: float) -> str:
    """Return a duration; below ten seconds with two digits: ``0.21`` -> ``0.21s``."""
    return f"{seconds:.2g}s" if seconds < 10 else duration(seconds)


def cost_unit(placement: Placement, devices: int) -> tuple[str, float]:
    """Return the unit in which hours are counted, and the number of units of one replica."""
    return ("GPU", placement.gpus * devices) if placement.gpus else ("engine", 1.0)


def hours_label(unit: str) -> str:
    """Return the label of the row that counts hours of ``unit``."""
    return "GPU-hours" if unit == "GPU" else "engine-hours (no GPU)"


def _first_token_times(statistics: CompletionStatistics) -> str:
    if not statistics.first_token.sum():
        return "not measured"
    p50, p95 = (format_seconds(statistics.first_token_seconds(share)) for share in (0.5, 0.95))
    return f"p50 {p50}, p95 {p95}"
