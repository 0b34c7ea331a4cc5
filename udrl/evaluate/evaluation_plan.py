"""The plan of an evaluation: the requests left to generate and to judge, and how long it will take."""

from collections.abc import Sequence
from typing import NamedTuple

from udrl.evaluate.evaluated_policies import EvaluatedPolicy
from udrl.evaluate.judges.answers import answered_texts, judge_paths, last_rate
from udrl.evaluate.judges.judging import JUDGED_PROBES, MAX_TRUE_PAIRS
from udrl.evaluate.judges.validation import CONTROL_KINDS
from udrl.evaluate.speed import PolicySpeed
from udrl.policies.ledger import count_rows
from udrl.progress import duration
from udrl.recipe import Recipe
from udrl.run import EvaluationPaths
from udrl.tasks import Task

# texts/s assumed of a judge that was never timed: likelihood under the bundled 135M model on two CPU cores
ASSUMED_TEXTS_PER_SECOND = 25.0
# seconds a policy takes outside its engine: starting Ray Data's stages and the embedder; measured on two CPU cores
OVERHEAD_SECONDS = 25.0
# prompts/s of scoring, measured on two CPU cores
SCORED_PER_SECOND = 150.0


class JudgeWork(NamedTuple):
    """The texts that a judge has left: an upper bound of texts, and texts/s of its last pass (None: it never ran)."""

    name: str
    texts: int
    rate: float | None


def plan_evaluation(
    recipe: Recipe,
    policies: Sequence[EvaluatedPolicy],
    speeds: dict[str, PolicySpeed],
    evaluation: EvaluationPaths,
    tasks: Sequence[Task],
) -> list[str]:
    """Return the plan's lines: the requests of each policy and judge, and how long they take."""
    missing = {}
    for evaluated in policies:
        rows_by_shard = count_rows(evaluated.paths(evaluation).completions)
        missing[evaluated.name] = len(evaluated.requests) - sum(rows_by_shard.values())
    pointwise, pairwise = max_judged_texts(recipe, policies, len(tasks))
    judges = []
    for judge in recipe.evaluate.judges:
        paths = judge_paths(judge, evaluation, tasks)
        answered = answered_texts(paths)
        # Rejected outputs are not judged, so fewer answers than the bound may be all: if no policy has anything left to
        # write, a judge that has answered before has nothing left either.
        is_open = any(missing.values()) or not answered
        bound = pairwise if judge.kind == "pairwise" else pointwise
        judges.append(JudgeWork(judge.display_name, max(0, bound - answered) if is_open else 0, last_rate(paths)))
    return plan_lines(policies, missing, speeds, judges)


def max_judged_texts(recipe: Recipe, policies: Sequence[EvaluatedPolicy], tasks: int) -> tuple[int, int]:
    """Return how many texts a pointwise and a pairwise judge will see at most: outputs, trivial baselines, controls."""
    config = recipe.evaluate
    rows = sum(row["probe"] in JUDGED_PROBES for evaluated in policies for row in evaluated.requests)
    intents = len({row["intent_id"] for evaluated in policies for row in evaluated.requests})
    teacher = sum(len(evaluated.requests) for evaluated in policies if evaluated.kind == "teacher")
    echoes = intents * tasks if "echo" in config.trivial_baselines else 0
    shuffled = teacher if "shuffled" in config.trivial_baselines else 0
    controls = MAX_TRUE_PAIRS * len(CONTROL_KINDS) * tasks
    others = len(policies) - 1 + len(config.trivial_baselines)
    pairs = min(config.pairs, intents * config.samples) * tasks * others
    return rows + echoes + shuffled + controls, 2 * (pairs + controls)


def plan_lines(
    policies: Sequence[EvaluatedPolicy],
    missing: dict[str, int],
    speeds: dict[str, PolicySpeed],
    judges: Sequence[JudgeWork],
) -> list[str]:
    """Return the plan as text; ``missing`` counts the requests of each policy that have no completion yet."""
    lines, total, is_complete = [], 0.0, True
    for evaluated in policies:
        name, n, speed = evaluated.name, missing[evaluated.name], speeds.get(evaluated.name)
        if not n:
            lines.append(f"{name}: all {len(evaluated.requests):,} prompts exist already")
        elif speed is None:
            is_complete = False
            lines.append(f"{name}: {n:,} prompts; speed not measured")
        else:
            writing = n / speed.prompts_per_second / evaluated.policy.placement.replicas
            seconds = speed.startup_seconds + writing + OVERHEAD_SECONDS + n / SCORED_PER_SECOND
            total += seconds
            lines.append(
                f"{name}: {n:,} prompts, about {duration(seconds)} (measured {speed.prompts_per_second:.1f} prompts/s)"
            )
    for judge in judges:
        if not judge.texts:
            lines.append(f"judge {judge.name}: all scores exist already")
            continue
        rate, basis = (judge.rate, "measured before") if judge.rate else (ASSUMED_TEXTS_PER_SECOND, "assumed")
        seconds = judge.texts / rate
        total += seconds
        lines.append(
            f"judge {judge.name}: at most {judge.texts:,} texts, about {duration(seconds)} ({basis} {rate:.0f} texts/s)"
        )
    if is_complete:
        summary = f"about {duration(total)} in total" if total else "nothing left to generate or judge"
    else:
        measured = f"about {duration(total)}, " if total else ""
        summary = f"{measured}not counting the policies whose speed was not measured"
    return [f"evaluate: {summary}", *(f"  {line}" for line in lines)]
