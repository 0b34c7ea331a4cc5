"""Upside-down reinforcement learning in rounds: explore, score, relabel, retrain (Srivastava et al. 2019, arXiv 1912.02877).

Round 0 trains on the teacher's episodes. In each further round the student of the one before writes under commands from just
above what the buffer achieved; what it wrote is scored, joins the buffer with its own outcome as its command, and the next
student starts from the last one's weights. A round that was killed goes on where it was; a finished one starts nothing.
"""

import sys
from collections.abc import Sequence
from typing import Any

from udrl import storage
from udrl.context import StageContext
from udrl.errors import UserError
from udrl.hashing import fingerprint
from udrl.recipe import Recipe, dump
from udrl.run import EpisodeSource, ScoringPaths
from udrl.scoring.score import ScoringResult, score
from udrl.tasks import Task, load_tasks
from udrl.train import diversity_guard as guard
from udrl.train import fit as train
from udrl.train import round_record as record
from udrl.train.achieved import rewards_of
from udrl.train.explore import Plan, explore, plan
from udrl.train.export import TRAINING
from udrl.train.fit import Training
from udrl.train.gpt2 import Shape

SUMMARY = "rounds.json"
ROUND = "round.json"


def run(recipe: Recipe, engine_actor: type | None = None) -> dict[str, Any]:
    """Train the student through ``recipe.rounds`` rounds into ``student/``; return its training's facts, and ``rounds``.

    Where a round's prompts have lost too much of round 0's diversity, the student of the round before is the last one.
    ``engine_actor`` replaces the engine (see :class:`~udrl.context.StageContext`).

    Raises:
        UserError: no finished generate stage, another student lies in ``student/`` under ``resume: always``, or the
            objective leaves the student without commands to explore under.
        StalledError: a stage was silent for ``recipe.watchdog_minutes``.
    """
    if not recipe.rounds:
        return train.run(recipe)
    if recipe.train.objective != "udrl":
        raise UserError(
            f"rounds: a student of train.objective={recipe.train.objective} takes no commands to explore under; set"
            " train.objective=udrl, or rounds=0"
        )
    tasks = load_tasks(recipe.tasks)
    storage.require_writable(recipe.storage)
    begin = train.first(recipe, _student(recipe, 0))
    if recipe.resume == "never":
        storage.remove(storage.join(recipe.storage, "rounds"))
    else:
        _adopt(recipe, begin)
    facts = train.fit(recipe, begin)
    rounds = [_first(recipe, begin)]
    for k in range(1, recipe.rounds + 1):
        made = _explored(recipe, k, tasks, StageContext.of(recipe, engine_actor))
        made["refused"] = guard.verdict(made["accepted"], made["diversity"], recipe.explore.min_diversity)
        made |= {"keep": None, "before": rounds[-1]["achieved"]}
        rounds.append(made)
        if made["refused"]:
            print(f"round {k}: not trained on: {made['refused']}; the student of round {k - 1} stands", file=sys.stderr)
        else:
            made["keep"] = guard.keep(sum(one["accepted"] for one in rounds[:-1]), made["accepted"], recipe.explore.replay)
            facts = train.fit(_retraining(recipe), _training(recipe, begin, rounds, facts))
        storage.write_json(storage.join(_folder(recipe, k), ROUND), made)
        if made["refused"]:
            break
    last = rounds[-1]["round"] - bool(rounds[-1]["refused"])
    if recipe.resume == "never" or _fingerprint(_target(recipe)) != facts["fingerprint"]:
        copy_student(_student(recipe, last), _target(recipe))
    storage.write_bytes(storage.join(recipe.storage, "recipe.yaml"), dump(recipe).encode())
    storage.write_json(storage.join(recipe.storage, SUMMARY), {"rounds": rounds, "student": last})
    return {**facts, "rounds": rounds}


def describe(facts: dict[str, Any]) -> str:
    """The lines that end the job: the student, and where there were rounds, one line each."""
    lines = record.table(facts["rounds"]) if facts.get("rounds") else []
    return "\n".join([train.describe(facts), *lines])


def _folder(recipe: Recipe, k: int) -> str:
    return storage.join(recipe.storage, "rounds", str(k))


def _student(recipe: Recipe, k: int) -> str:
    return storage.join(_folder(recipe, k), "student")


def _target(recipe: Recipe) -> str:
    return storage.join(recipe.storage, "student")


def _episodes(recipe: Recipe, k: int) -> str:
    return storage.join(_folder(recipe, k) if k else recipe.episodes_storage(), "episodes")


def _fingerprint(student: str) -> str | None:
    """Of a finished export, else None."""
    uri = storage.join(student, TRAINING)
    return storage.read_json(uri)["fingerprint"] if storage.exists(uri) else None


def _adopt(recipe: Recipe, begin: Training) -> None:
    """A run that was made without rounds has round 0's student in ``student/`` already: it is taken, not trained again.

    Raises:
        UserError: what lies there is neither that nor a round's, and ``resume: always`` forbids to replace it.
    """
    there = _fingerprint(_target(recipe))
    if there is None:
        return
    if there == train.fingerprint(recipe, begin):
        if _fingerprint(begin.target) is None:
            copy_student(_target(recipe), begin.target)
        return
    ours = storage.list_folders(storage.join(recipe.storage, "rounds"))
    if recipe.resume == "always" and there not in [_fingerprint(_student(recipe, int(k))) for k in ours]:
        raise UserError(
            f"{_target(recipe)}: made with other settings or episodes; resume=if_possible or resume=never trains anew"
        )


def copy_student(source: str, target: str) -> None:
    """Copy an exported student; what marks it as whole comes last."""
    storage.remove(target)
    names = storage.list_files(source)
    for name in [*(n for n in names if n != TRAINING), TRAINING]:
        storage.write_bytes(storage.join(target, name), storage.read_bytes(storage.join(source, name)))


def _first(recipe: Recipe, begin: Training) -> dict[str, Any]:
    """The line of round 0."""
    made = storage.read_json(storage.join(recipe.episodes_storage(), "generate.json"))
    before = storage.join(_folder(recipe, 0), ROUND)
    origin = fingerprint(begin.origin)
    if storage.exists(before) and (known := storage.read_json(before))["origin"] == origin:
        return dict(known)
    facts = {
        "round": 0,
        "origin": origin,
        "requested": made.get("requested"),
        "accepted": made["accepted"],
        "achieved": rewards_of(_episodes(recipe, 0)),
        "refused": "",
    }
    storage.write_json(before, facts)
    return facts


def _explored(recipe: Recipe, k: int, tasks: Sequence[Task], context: StageContext) -> dict[str, Any]:
    """Explore and score round ``k``, as far as that is not done, and return what it came to."""
    folder = _folder(recipe, k)
    what = plan(recipe, k, _student(recipe, k - 1), folder)
    origin = fingerprint([what.mark, _scoring(recipe), [t.model_dump() for t in tasks]])
    done = storage.join(folder, ROUND)
    if storage.exists(done) and (known := storage.read_json(done))["origin"] == origin:
        print(f"round {k}: explored and scored already: {folder}", file=sys.stderr)
        return dict(known)
    buffer = [_episodes(recipe, j) for j in range(k)]
    storage.remove(done)  # it vouches for episodes that scoring may clear now
    explore(recipe, what, tasks, buffer, context)
    paths = ScoringPaths(folder)
    scored = score(what.ledger, paths, tasks, recipe.rewards, f"round {k}: score", earlier=buffer, context=context)
    facts = {"round": k, "origin": origin, **_account(recipe, what, scored)}
    # Written before the training too: a driver that is killed there need not look at the episodes again.
    storage.write_json(done, facts)
    return facts


def _scoring(recipe: Recipe) -> dict[str, Any]:
    """What of the rewards' settings decides a score: not where or in which batches it is computed."""
    return recipe.rewards.model_dump(exclude={"placement": True, "batch_size": True, "judge": {"placement"}})


def _account(recipe: Recipe, what: Plan, scored: ScoringResult) -> dict[str, Any]:
    episodes = _episodes(recipe, what.round)
    requested = what.intents * len(what.vocabulary.tasks) * recipe.explore.samples
    if scored.total != requested:
        raise RuntimeError(f"accounting: {scored.accepted} accepted + {scored.rejected} rejected is not {requested} requested")
    asked = record.asked(episodes, storage.join(_folder(recipe, what.round), "rejects"))
    return {
        "ledger": what.mark,
        "student": what.policy.revision,
        "requested": requested,
        "accepted": scored.accepted,
        "rejected": scored.rejected,
        "reasons": scored.reasons,
        "commands": {task: asked[task].plain() for task in sorted(asked)},
        "achieved": rewards_of(episodes),
        "diversity": guard.diversity(_episodes(recipe, 0), episodes, what.intents),
    }


def _training(recipe: Recipe, begin: Training, rounds: Sequence[dict[str, Any]], last: dict[str, Any]) -> Training:
    """The retraining of the newest of ``rounds``, from the student that ``last`` describes: earlier episodes whole, of the
    new ones as many as replay allows. Bins are computed over all of them."""
    *earlier, new = rounds
    k = new["round"]
    sources = [EpisodeSource(folder=_episodes(recipe, one["round"])) for one in earlier]
    origin = [begin.origin, *([one["origin"], one["accepted"]] for one in rounds[1:]), last["fingerprint"]]
    return Training(
        sources=(*sources, EpisodeSource(folder=_episodes(recipe, k), keep=new["keep"])),
        target=_student(recipe, k),
        origin=origin,
        round=k,
        start=_student(recipe, k - 1),
    )


def _retraining(recipe: Recipe) -> Recipe:
    """The recipe with the epochs and the learning rate of a later round."""
    lr = recipe.explore.lr or Shape.of(recipe.student, recipe.train).lr / 3
    changed = recipe.train.model_copy(update={"epochs": recipe.explore.epochs, "lr": lr})
    return recipe.model_copy(update={"train": changed})
