"""The generate stage: intents x tasks x samples -> completions -> episodes and rejects, and the card that describes them."""

import sys
from collections.abc import Sequence
from typing import Any

from udrl import cluster, storage
from udrl.context import StageContext
from udrl.episodes import Reason
from udrl.errors import UserError
from udrl.generate import dry_run
from udrl.generate.cost import describe_cost
from udrl.generate.dataset_card import write_card
from udrl.generate.prepare import Work, prepare
from udrl.hashing import differences
from udrl.licenses import describe_license
from udrl.policies.ledger import load_attempts
from udrl.policies.policy import Row, resource_bundles
from udrl.policies.stage import complete
from udrl.policies.statistics import CompletionStatistics
from udrl.progress import duration
from udrl.recipe import Recipe, dump
from udrl.run import Run
from udrl.scoring.parsing import reject_reasons
from udrl.scoring.score import ScoringResult, score
from udrl.tasks import Task

SUMMARY = "generate.json"
MEASURED = ("input_tokens", "output_tokens", "startup_seconds", "generation_seconds", "tokens_per_second", "cost")


def run(recipe: Recipe, engine_actor: type | None = None) -> dict[str, Any]:
    """Make the run's episodes; return the summary that is also written as ``generate.json``.

    The ledger of completions lies in a folder named after everything its rows depend on, so a changed recipe never mixes
    with old rows: ``resume: always`` stops and names the change, ``if_possible`` starts a ledger anew beside the old one,
    ``never`` deletes this recipe's rows first. ``engine_actor`` replaces the engine (see
    :class:`~udrl.context.StageContext`).

    Raises:
        UserError: intents, tasks, model or storage can't be used; settings changed under ``resume: always``; or too many
            completions are rejected.
        StalledError: nothing was written for ``recipe.watchdog_minutes``.
    """
    context = StageContext.of(recipe, engine_actor)
    if recipe.resume == "never":
        for name in ("intents", "expansion"):
            storage.remove(storage.join(recipe.storage, name))
    work = prepare(recipe)
    _resume(recipe, work)
    storage.write_bytes(storage.join(recipe.storage, "recipe.yaml"), dump(recipe).encode())
    storage.write_json(storage.join(work.ledger, "about.json"), work.facts)
    print(f"generate: {work.says}", file=sys.stderr)
    done_file = storage.join(recipe.storage, SUMMARY)
    before = storage.read_json(done_file) if storage.exists(done_file) else {}
    cluster.connect()
    done = complete(
        work.policy,
        work.requests,
        work.ledger,
        "generate",
        inspect=Inspect(work.tasks),
        max_rejects=recipe.teacher.max_rejects,
        context=context,
    )
    # The summary vouches for the episodes: it goes before scoring may clear them, and comes back when they are whole.
    storage.remove(done_file)
    scored = score(work.ledger, Run(recipe.storage).scoring, work.tasks, recipe.rewards, context=context)
    summary = _summary(recipe, work, scored, done)
    if summary["accepted"] + summary["rejected"] != summary["requested"]:
        raise RuntimeError(
            f"accounting: {summary['accepted']} accepted + {summary['rejected']} rejected"
            f" is not {summary['requested']} requested"
        )
    if not done.rows and before.get("ledger") == work.mark:
        summary |= {name: before[name] for name in MEASURED if name in before}  # nothing ran now: what was measured still holds
    storage.write_json(done_file, summary)
    write_card(recipe, summary, recipe.storage)
    return summary


class Inspect:
    """What the engine's last task asks of each completion: the reject reasons that it alone shows."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        self.tasks = {t.name: t for t in tasks}

    def __call__(self, row: Row) -> list[tuple[str, str]]:
        return reject_reasons(self.tasks[row["task"]], row)


def _resume(recipe: Recipe, work: Work) -> None:
    root = storage.join(recipe.storage, "completions")
    if recipe.resume == "never":
        for stale in (work.ledger, *Run(recipe.storage).scoring.scored):
            storage.remove(stale)
        return
    if storage.exists(work.ledger):
        return
    summary = storage.join(recipe.storage, SUMMARY)
    others = storage.list_folders(root)
    if not others:
        return
    latest = storage.read_json(summary)["ledger"] if storage.exists(summary) else others[-1]
    old = storage.join(root, latest)
    changed = "; ".join(differences(storage.read_json(storage.join(old, "about.json")), work.facts)[:5])
    if recipe.resume == "always":
        raise UserError(
            f"{recipe.storage}: its completions were made with other settings: {changed}; undo the change, or set"
            " resume=if_possible to start anew beside them"
        )
    print(f"generate: {changed}; starting anew, the old completions stay in {old}", file=sys.stderr)


def _summary(recipe: Recipe, work: Work, scored: ScoringResult, done: CompletionStatistics) -> dict[str, Any]:
    runs = load_attempts(work.ledger)
    return {
        "requested": work.prompts,
        "accepted": scored.accepted,
        "rejected": scored.rejected,
        "reasons": scored.reasons,
        "intents": work.folder.rsplit("/", 1)[-1],
        "intents_train": work.n_train,
        "intents_heldout": work.split.n_heldout,
        "intents_left_out": work.split.reject_reasons,
        "ledger": work.mark,
        "scoring": scored.fingerprint,
        "policy": work.policy.fingerprint,
        "model": recipe.teacher.model,
        "revision": work.policy.revision,
        "license": describe_license(recipe.teacher.model),
        "generated_now": done.rows,
        "reused": done.reused,
        "input_tokens": done.input_tokens,
        "output_tokens": done.output_tokens,
        "startup_seconds": round(done.startup_seconds, 1),
        "generation_seconds": round(done.seconds, 1),
        "tokens_per_second": round(done.tokens_per_second, 1),
        "cost": _cost(recipe, work, done, scored.accepted),
        "attempts": {
            "runs": len(runs),
            "unfinished": sum(not run.ended for run in runs),
            "engine_hours": round(sum(run.seconds for run in runs) * recipe.teacher.placement.replicas / 3600, 4),
        },
    }


def _cost(recipe: Recipe, work: Work, done: CompletionStatistics, accepted: int) -> list[str]:
    if not done.rows:
        return []
    place = recipe.teacher.placement
    lines = describe_cost(done, place, accepted, len(resource_bundles(recipe.teacher.engine, place)))
    # A run that went on where another was killed took a part of the planned time.
    return lines + ([] if done.reused else dry_run.compare(recipe, work.mark, done.seconds))


def describe(summary: dict[str, Any]) -> str:
    """The lines that end the job: what was asked, accepted and rejected by reason, and what it cost."""
    total = max(summary["requested"], 1)
    lines = [
        f"episodes: {summary['accepted']:,} accepted of {summary['requested']:,} ({100 * summary['accepted'] / total:.0f}%);"
        f" {summary['reused']:,} requests reused, {summary['generated_now']:,} made now"
        f" in {duration(summary['generation_seconds'])} at {summary['tokens_per_second']:,.0f} tokens/s"
    ]
    order = {str(reason): i for i, reason in enumerate(Reason)}
    for reason, n in sorted(summary["reasons"].items(), key=lambda pair: (-pair[1], order.get(pair[0], 99))):
        lines.append(f"  rejected, {reason:<16} {n:>12,} {100 * n / total:6.1f}%")
    for reason, n in sorted(summary["intents_left_out"].items()):
        lines.append(f"  intents left out, {reason}: {n:,}")
    return "\n".join([*lines, *summary["cost"]])
