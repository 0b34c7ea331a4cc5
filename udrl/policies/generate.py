"""The generate stage: intents x tasks x samples -> completions -> episodes and rejects."""

import hashlib
import json
import sys
from typing import Any

from udrl import cluster, intents, models, storage
from udrl.errors import UserError
from udrl.policies.engine import Throughput, complete
from udrl.policies.score import score
from udrl.policies.teacher import intent_requests, teacher_policy
from udrl.progress import duration
from udrl.recipe import Recipe, dump
from udrl.tasks import load_tasks

SUMMARY = "generate.json"
MEASURED = ("input_tokens", "output_tokens", "startup_seconds", "generation_seconds", "tokens_per_second")


def run(recipe: Recipe) -> dict[str, Any]:
    """Make the run's episodes; return the summary that is also written as ``generate.json``.

    The ledger of completions lies in a folder named after everything its rows depend on, so a changed recipe never mixes
    with old rows: ``resume: if_possible`` starts a ledger anew beside the old one, ``always`` stops and names the change,
    ``never`` deletes this recipe's rows first.

    Raises:
        UserError: intents, tasks, model or storage can't be used; or ``resume: always`` and something changed.
    """
    tasks = load_tasks(recipe.tasks)
    storage.require_writable(recipe.storage)
    policy = teacher_policy(recipe.teacher, tasks)
    models.resolve(recipe.rewards.embedder)  # found out now, not after the generation is paid for
    # Beside other sources' intents, not over them: a run that is refused below must not have touched the old one.
    folder = storage.join(recipe.storage, "intents", _mark([recipe.intents.model_dump(), recipe.seed]))
    split = intents.prepare(recipe.intents, recipe.seed, folder)
    facts = {
        "policy": policy.fingerprint,
        "intents": recipe.intents.model_dump(),
        "tasks": [t.name for t in tasks],
        "samples": recipe.teacher.samples,
        "shard_size": recipe.teacher.shard_size,
        "seed": recipe.seed,
        "digest": split.digest,
    }
    mark = _mark(facts)
    ledger = storage.join(recipe.storage, "completions", mark)
    _resume(recipe, ledger, facts, mark)
    storage.write_bytes(storage.join(recipe.storage, "recipe.yaml"), dump(recipe).encode())
    storage.write_json(storage.join(ledger, "about.json"), facts)

    requests = intent_requests(
        policy,
        storage.join(folder, "train.parquet"),
        [t.name for t in tasks],
        recipe.teacher.samples,
        recipe.teacher.shard_size,
    )
    print(
        f"generate: {split.n_train:,} intents x {len(tasks)} tasks x {recipe.teacher.samples} samples = {requests.total:,}"
        f" prompts by {recipe.teacher.model}; {split.n_heldout:,} intents held out",
        file=sys.stderr,
    )
    done_file = storage.join(recipe.storage, SUMMARY)
    cluster.connect()
    before = storage.read_json(done_file) if storage.exists(done_file) else {}
    done = complete(policy, requests, ledger, "generate")
    # The summary vouches for the episodes: it goes before scoring may clear them, and comes back when they are whole.
    storage.remove(done_file)
    counts = score(
        ledger, storage.join(recipe.storage, "episodes"), storage.join(recipe.storage, "rejects"), tasks, recipe.rewards
    )
    summary = _summary(recipe, mark, requests.total, dict(counts), done, policy.fingerprint)
    summary |= {"intents": folder.rsplit("/", 1)[-1], "licence": models.licence(recipe.teacher.model)}
    if summary["accepted"] + summary["rejected"] != summary["requested"]:
        raise RuntimeError(
            f"accounting: {summary['accepted']} accepted + {summary['rejected']} rejected"
            f" is not {summary['requested']} requested"
        )
    if not done.rows and before.get("ledger") == mark:
        summary |= {name: before[name] for name in MEASURED}  # nothing ran now: what was measured still holds
    storage.write_json(done_file, summary)
    return summary


def _mark(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _resume(recipe: Recipe, ledger: str, facts: dict[str, Any], mark: str) -> None:
    root = storage.join(recipe.storage, "completions")
    if recipe.resume == "never":
        for stale in (ledger, storage.join(recipe.storage, "episodes"), storage.join(recipe.storage, "rejects")):
            storage.remove(stale)
        return
    if storage.exists(ledger):
        return
    summary = storage.join(recipe.storage, SUMMARY)
    others = storage.list_folders(root)
    if not others:
        return
    latest = storage.read_json(summary)["ledger"] if storage.exists(summary) else others[-1]
    old = storage.read_json(storage.join(root, latest, "about.json"))
    changed = ", ".join(k for k in facts if facts[k] != old.get(k)) or "nothing that is recorded"
    if recipe.resume == "always":
        raise UserError(
            f"{recipe.storage}: its completions were made with other settings ({changed}); set resume=if_possible to start anew"
        )
    print(
        f"generate: {changed} changed; starting anew, the old completions stay in {storage.join(root, latest)}", file=sys.stderr
    )


def _summary(
    recipe: Recipe, mark: str, requested: int, counts: dict[str, int], done: Throughput, policy: str
) -> dict[str, Any]:
    accepted = counts.pop("accepted", 0)
    about = storage.read_json(storage.join(recipe.storage, "episodes", "about.json"))
    return {
        "requested": requested,
        "accepted": accepted,
        "rejected": sum(counts.values()),
        "reasons": counts,
        "ledger": mark,
        "scoring": about["scoring"],
        "policy": policy,
        "model": recipe.teacher.model,
        "generated_now": done.rows,
        "reused": done.reused,
        "input_tokens": done.input_tokens,
        "output_tokens": done.output_tokens,
        "startup_seconds": round(done.startup_seconds, 1),
        "generation_seconds": round(done.seconds, 1),
        "tokens_per_second": round(done.tokens_per_second, 1),
    }


def describe(summary: dict[str, Any]) -> str:
    """The lines that end the job: what was asked, accepted and rejected, by reason."""
    total = max(summary["requested"], 1)
    lines = [
        f"episodes: {summary['accepted']:,} accepted of {summary['requested']:,} ({100 * summary['accepted'] / total:.0f}%);"
        f" {summary['reused']:,} reused, {summary['generated_now']:,} made now in {duration(summary['generation_seconds'])}"
        f" at {summary['tokens_per_second']:,.0f} tokens/s"
    ]
    for reason, n in sorted(summary["reasons"].items(), key=lambda pair: -pair[1]):
        lines.append(f"  rejected, {reason}: {n:,} ({100 * n / total:.1f}%)")
    return "\n".join(lines)
