"""A recipe made concrete: its intents, its tasks, who is asked, and where the answers go."""

from dataclasses import dataclass
from typing import Any

from udrl import intents, models, storage
from udrl.generate.expand import ABOUT as EXPANDED
from udrl.generate.expand import TRAIN, expand_intents
from udrl.hashing import fingerprint
from udrl.policies.policy import Policy
from udrl.policies.requests import Requests, count_intents, intent_requests
from udrl.policies.teacher import teacher_policy
from udrl.recipe import Recipe
from udrl.run import IntentPaths
from udrl.tasks import Task, load_tasks


@dataclass(frozen=True)
class Work:
    """What one recipe asks for. ``facts`` is all that the ledger's rows depend on, ``mark`` its hash."""

    tasks: list[Task]
    policy: Policy
    requests: Requests
    prompts: int
    n_train: int  # intents asked about, grown ones included
    split: intents.IntentSplit
    folder: str  # of the intents
    facts: dict[str, Any]
    mark: str
    ledger: str
    says: str


def prepare(recipe: Recipe, grow: bool = True) -> Work:
    """Read or compose the intents and cut the requests. No engine starts, unless the recipe grows its intents and ``grow``.

    Raises:
        UserError: intents, tasks, model or storage can't be used.
    """
    tasks = load_tasks(recipe.tasks)
    storage.require_writable(recipe.storage)
    policy = teacher_policy(recipe.teacher, tasks)
    models.resolve(recipe.rewards.embedder)  # found out now, not after the generation is paid for
    # Beside other sources' intents, not over them: a run that is refused below must not have touched the old one.
    folder = storage.join(recipe.storage, "intents", fingerprint([recipe.intents.model_dump(), recipe.seed]))
    split = intents.split_intents(recipe.intents, recipe.seed, IntentPaths(folder))
    train = storage.join(folder, "train.parquet")
    more: dict[str, Any] = {}
    if recipe.intents.expand and grow:
        expand_intents(recipe, folder)
        train = storage.join(folder, TRAIN)
        more = {"expanded": storage.read_json(storage.join(folder, EXPANDED))["mark"]}
    n_train = count_intents(train)
    names, samples = [t.name for t in tasks], recipe.teacher.samples
    size = recipe.teacher.shard_size or shard_size(n_train * len(tasks) * samples)
    requests = intent_requests(policy, train, names, samples, size, recipe.teacher.structured)
    prompts = n_train * len(tasks) * samples
    facts = {
        "teacher": policy.fingerprint_inputs(),
        "intents": recipe.intents.model_dump(),
        "tasks": names,
        "samples": samples,
        "shard_size": size,
        "seed": recipe.seed,
        "intents_digest": split.digest,
        **more,
    }
    mark = fingerprint(facts)
    ledger = storage.join(recipe.storage, "completions", mark)
    says = (
        f"{n_train:,} intents x {len(tasks)} tasks x {samples} samples = {prompts:,} prompts by {recipe.teacher.model},"
        f" in {requests.shards:,} files; {split.n_heldout:,} intents held out"
    )
    return Work(tasks, policy, requests, prompts, n_train, split, folder, facts, mark, ledger, says)


def shard_size(requests: int) -> int:
    """Requests of one file: some 4,096 files at most, each of minutes at most for one engine."""
    return min(max(-(-requests // 4096), 128), 16384)
