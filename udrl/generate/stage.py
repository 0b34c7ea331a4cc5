"""The generate stage: intents x tasks x samples -> completions -> episodes and rejects, and the card that describes them."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from udrl import cluster, models, storage
from udrl.context import StageContext
from udrl.episodes import Reason
from udrl.errors import UserError
from udrl.generate.cost import compare_with_plan, describe_cost
from udrl.generate.dataset_card import write_card
from udrl.generate.expand import expand_intents
from udrl.hashing import fingerprint
from udrl.intents import IntentSplit, split_intents
from udrl.models import describe_license
from udrl.policies.ledger import load_attempts
from udrl.policies.policy import Policy, Row, resource_bundles
from udrl.policies.requests import Requests, count_intents, intent_requests
from udrl.policies.stage import complete
from udrl.policies.statistics import CompletionStatistics
from udrl.policies.teacher import teacher_policy
from udrl.progress import duration
from udrl.recipe import Recipe, dump
from udrl.run import Attempts, GenerateSummary, GenerationPlan, Manifest, Run
from udrl.scoring.parsing import reject_reasons
from udrl.scoring.score import ScoringResult, score
from udrl.tasks import Task, load_tasks
from udrl.text import name_value_table

log = logging.getLogger(__name__)

MAX_DIFFERENCES = 5  # that an error or a log line names


def run(recipe: Recipe, engine_actor: type | None = None) -> GenerateSummary:
    """Make the run's episodes and return the summary that is also written as ``generate.json``.

    The ledger of completions is in a folder named after the fingerprint of everything its rows depend on, so a changed recipe
    never mixes with old rows: ``resume: always`` stops and names the change, ``if_possible`` starts another ledger next to the
    old one, ``never`` deletes this recipe's rows first. ``engine_actor`` replaces the engine (see
    :class:`~udrl.context.StageContext`).

    Raises:
        UserError: intents, tasks, model or storage can't be used; settings changed under ``resume: always``; or too many
            completions are rejected.
        StalledError: nothing was written for ``recipe.watchdog_minutes``.
    """
    context = StageContext.of(recipe, engine_actor)
    paths = Run(recipe.storage)
    if recipe.resume == "never":
        storage.remove(paths.all_intents)
        storage.remove(paths.expansions)
    prepared = prepare_generation(recipe)
    _apply_resume(recipe, prepared)
    storage.write_bytes(paths.recipe, dump(recipe).encode())
    prepared.manifest.save_to(prepared.ledger)
    log.info("generate: %s", prepared.describe())
    previous = GenerateSummary.load_if_exists(paths.generate_summary)
    cluster.connect()
    statistics = complete(
        prepared.policy,
        prepared.requests,
        prepared.ledger,
        "generate",
        inspect=RejectInspector(prepared.tasks),
        max_rejects=recipe.teacher.max_rejects,
        context=context,
    )
    # The summary states that the episodes are complete: it is removed before scoring may delete them, and written after.
    storage.remove(paths.generate_summary)
    scored = score(prepared.ledger, paths.scoring, prepared.tasks, recipe.rewards, context=context)
    if scored.total != prepared.n_prompts:
        raise RuntimeError(
            f"accounting: {scored.accepted} accepted + {scored.rejected} rejected is not {prepared.n_prompts} requested"
        )
    summary = _summarize(recipe, prepared, scored, statistics)
    if previous and not statistics.rows and previous.ledger == summary.ledger:
        summary = _copy_measurements(previous, summary)
    summary.save(paths.generate_summary)
    write_card(recipe, summary)
    return summary


# ---- requests


@dataclass(frozen=True)
class PreparedGeneration:
    """The requests of a recipe and their origin; ``manifest`` has everything that the ledger's rows depend on."""

    run: Run
    tasks: list[Task]
    policy: Policy
    requests: Requests
    samples: int  # prompts for each intent and task
    n_intents: int  # training intents, including those that the teacher added
    split: IntentSplit
    intents_fingerprint: str
    manifest: Manifest

    @property
    def ledger(self) -> str:
        return self.run.scoring.ledger(self.manifest.fingerprint)

    @property
    def n_prompts(self) -> int:
        return self.n_intents * len(self.tasks) * self.samples

    def describe(self) -> str:
        """Return one line with the sizes of the run."""
        return (
            f"{self.n_intents:,} intents x {len(self.tasks)} tasks x {self.samples} samples = {self.n_prompts:,} prompts by"
            f" {self.policy.model}, in {self.requests.shards:,} files; {self.split.n_heldout:,} intents held out"
        )


def prepare_generation(recipe: Recipe, expand: bool = True) -> PreparedGeneration:
    """Read or compose the intents and define the requests.

    No engine starts, unless the recipe has ``intents.expand`` and ``expand`` is true.

    Raises:
        UserError: intents, tasks, model or storage can't be used.
    """
    teacher, tasks = recipe.teacher, load_tasks(recipe.tasks)
    storage.require_writable(recipe.storage)
    policy = teacher_policy(teacher, tasks)
    models.resolve(recipe.rewards.embedder)  # fail now, not after the generation is paid for
    # Each source has its own folder, so that a run that is refused later has not touched the intents of another.
    paths = Run(recipe.storage)
    intents_fingerprint = fingerprint([recipe.intents.model_dump(), recipe.seed])
    intents = paths.intents(intents_fingerprint)
    split = split_intents(recipe.intents, recipe.seed, intents)
    train, expansion = intents.train, None
    if recipe.intents.expand and expand:
        expansion = expand_intents(recipe, intents)
        train = intents.train_expanded
    n_intents = count_intents(train)
    shard_size = teacher.shard_size or default_shard_size(n_intents * len(tasks) * teacher.samples)
    names = [task.name for task in tasks]
    # The keys are part of existing runs' fingerprints.
    inputs: dict[str, Any] = {
        "teacher": policy.fingerprint_inputs(),
        "intents": recipe.intents.model_dump(),
        "tasks": names,
        "samples": teacher.samples,
        "shard_size": shard_size,
        "seed": recipe.seed,
        "intents_digest": split.digest,
        **({"expanded": expansion.fingerprint} if expansion else {}),
    }
    return PreparedGeneration(
        run=paths,
        tasks=tasks,
        policy=policy,
        requests=intent_requests(policy, train, names, teacher.samples, shard_size, teacher.structured),
        samples=teacher.samples,
        n_intents=n_intents,
        split=split,
        intents_fingerprint=intents_fingerprint,
        manifest=Manifest.of(inputs),
    )


def default_shard_size(requests: int) -> int:
    """Return the requests per file: at most about 4,096 files, each of which takes one engine minutes at most."""
    return min(max(-(-requests // 4096), 128), 16384)


class RejectInspector:
    """Find the reject reasons of a completion that show without its neighbors; the last task of the engine stage calls it."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        self.tasks = {task.name: task for task in tasks}

    def __call__(self, row: Row) -> list[tuple[str, str]]:
        return reject_reasons(self.tasks[row["task"]], row)


def _apply_resume(recipe: Recipe, prepared: PreparedGeneration) -> None:
    """Delete this recipe's rows, or compare the recipe with the latest ledger, as ``recipe.resume`` says."""
    scoring = prepared.run.scoring
    if recipe.resume == "never":
        for folder in (prepared.ledger, *scoring.scored):
            storage.remove(folder)
        return
    ledgers = storage.list_folders(scoring.ledgers)
    if not ledgers or prepared.manifest.fingerprint in ledgers:
        return
    summary = GenerateSummary.load_if_exists(prepared.run.generate_summary)
    latest = scoring.ledger(summary.ledger if summary else ledgers[-1])
    manifest = Manifest.load_from(latest)
    changes = manifest.differences(prepared.manifest) if manifest else [f"{latest} has no manifest"]
    text = "; ".join(changes[:MAX_DIFFERENCES])
    if recipe.resume == "always":
        raise UserError(
            f"{recipe.storage}: its completions were made with other settings: {text}; undo the change, or set"
            " resume=if_possible to start another ledger next to them"
        )
    log.warning("generate: %s; starting another ledger, the old completions stay in %s", text, latest)


# ---- summary


def describe(summary: GenerateSummary) -> str:
    """Return the lines that end the job: accepted and rejected prompts, rejects by reason, and the cost."""
    total = max(summary.requested or 0, 1)
    lines = [
        f"episodes: {summary.accepted:,} accepted of {summary.requested:,} ({100 * summary.accepted / total:.0f}%);"
        f" {summary.reused:,} requests reused, {summary.generated_now:,} made now"
        f" in {duration(summary.generation_seconds)} at {summary.tokens_per_second:,.0f} tokens/s"
    ]
    order = {str(reason): i for i, reason in enumerate(Reason)}
    reasons = sorted(summary.reasons.items(), key=lambda pair: (-pair[1], order.get(pair[0], 99)))
    if reasons:
        lines += name_value_table("rejected", [(reason, f"{n:,} ({100 * n / total:.1f}%)") for reason, n in reasons])
    if summary.intents_left_out:
        rows = [(reason, f"{n:,}") for reason, n in sorted(summary.intents_left_out.items())]
        lines += name_value_table("intents left out", rows)
    return "\n".join([*lines, *summary.cost])


def _summarize(
    recipe: Recipe, prepared: PreparedGeneration, scored: ScoringResult, statistics: CompletionStatistics
) -> GenerateSummary:
    placement = recipe.teacher.placement
    attempts = load_attempts(prepared.ledger)
    return GenerateSummary(
        requested=prepared.n_prompts,
        accepted=scored.accepted,
        rejected=scored.rejected,
        reasons=scored.reasons,
        intents=prepared.intents_fingerprint,
        intents_train=prepared.n_intents,
        intents_heldout=prepared.split.n_heldout,
        intents_left_out=prepared.split.reject_reasons,
        ledger=prepared.manifest.fingerprint,
        scoring=scored.fingerprint,
        policy=prepared.policy.fingerprint,
        model=recipe.teacher.model,
        revision=prepared.policy.revision,
        license=describe_license(recipe.teacher.model),
        generated_now=statistics.rows,
        reused=statistics.reused,
        input_tokens=statistics.input_tokens,
        output_tokens=statistics.output_tokens,
        startup_seconds=round(statistics.startup_seconds, 1),
        generation_seconds=round(statistics.seconds, 1),
        tokens_per_second=round(statistics.tokens_per_second, 1),
        cost=_cost_lines(recipe, prepared, scored.accepted, statistics),
        attempts=Attempts(
            runs=len(attempts),
            unfinished=sum(not attempt.ended for attempt in attempts),
            engine_hours=round(sum(attempt.seconds for attempt in attempts) * placement.replicas / 3600, 4),
        ),
    )


def _cost_lines(recipe: Recipe, prepared: PreparedGeneration, accepted: int, statistics: CompletionStatistics) -> list[str]:
    if not statistics.rows:
        return []
    placement = recipe.teacher.placement
    lines = describe_cost(statistics, placement, accepted, len(resource_bundles(recipe.teacher.engine, placement)))
    if statistics.reused:  # a resumed run took only a part of the planned time
        return lines
    plan = GenerationPlan.load_if_exists(prepared.run.plan)
    return lines + compare_with_plan(plan, prepared.manifest.fingerprint, statistics.seconds)


def _copy_measurements(previous: GenerateSummary, summary: GenerateSummary) -> GenerateSummary:
    """Return ``summary`` with the tokens, times and cost that were measured when the completions were made."""
    names = {"input_tokens", "output_tokens", "startup_seconds", "generation_seconds", "tokens_per_second", "cost"}
    return summary.model_copy(update=previous.model_dump(include=names))
