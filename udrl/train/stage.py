"""The train stage: upside-down reinforcement learning in rounds (Srivastava et al. 2019, arXiv 1912.02877).

Round 0 trains the student on the teacher's episodes. In each further round, the student of the round before writes prompts
under commands from just above the best rewards of the replay buffer. Its prompts are scored and join the buffer, labeled with
their own outcomes, and the next student is trained from the last one's weights. A killed run resumes where it stopped; a
finished run starts neither an engine nor a training.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from udrl import storage
from udrl.context import StageContext
from udrl.errors import UserError
from udrl.hashing import fingerprint
from udrl.recipe import Recipe, Rewards, dump
from udrl.run import EpisodeSource, GenerateSummary, RoundRecord, RoundsSummary, Run, StudentPaths, TrainingSummary
from udrl.scoring.score import score
from udrl.tasks import Task, load_tasks
from udrl.train import round_statistics
from udrl.train.explore import Exploration, explore, plan_exploration
from udrl.train.fit import Training, describe_training, first_training, fit, training_fingerprint
from udrl.train.gpt2 import Shape
from udrl.train.round_statistics import command_statistics, reward_statistics, rounds_table

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainResult:
    """The training of the run's student, and all rounds; ``rounds`` is empty if the recipe has none."""

    training: TrainingSummary
    rounds: list[RoundRecord]


def run(recipe: Recipe, engine_actor: type | None = None) -> TrainResult:
    """Train the run's student, in ``recipe.rounds`` rounds of exploration, and export it to ``student/``.

    If a round's prompts have lost too much of round 0's diversity, the rounds end and the student of the round before is the
    run's. ``engine_actor`` replaces the engine (see :class:`~udrl.context.StageContext`).

    Raises:
        UserError: there is no finished generate stage, ``student/`` has another student under ``resume: always``, or the
            objective trains students that follow no commands to explore under.
        StalledError: a stage made no progress for ``recipe.watchdog_minutes``.
    """
    if not recipe.rounds:
        return TrainResult(fit(recipe, first_training(recipe, Run(recipe.storage).student.folder)), [])
    if recipe.train.objective != "udrl":
        raise UserError(
            f"rounds: students of train.objective={recipe.train.objective} follow no commands to explore under; set"
            " train.objective=udrl, or rounds=0"
        )
    return _run_rounds(recipe, StageContext.of(recipe, engine_actor))


def describe(result: TrainResult) -> str:
    """Return the lines that end the job: the student, and a table of the rounds if there are any."""
    student = describe_training(result.training)
    return f"{student}\n{rounds_table(result.rounds)}" if result.rounds else student


def _run_rounds(recipe: Recipe, context: StageContext) -> TrainResult:
    paths, tasks = Run(recipe.storage), load_tasks(recipe.tasks)
    storage.require_writable(recipe.storage)
    first = first_training(recipe, paths.round(0).student.folder)
    if recipe.resume == "never":
        storage.remove(paths.all_rounds)
    else:
        _adopt_student(recipe, first)
    training = fit(recipe, first)
    rounds = [_record_first_round(recipe, first)]
    for k in range(1, recipe.rounds + 1):
        record = _decide_on_training(recipe, rounds, _explore_and_score(recipe, k, tasks, context))
        rounds.append(record)
        if record.refused:
            log.warning(f"round {k}: not trained on: {record.refused}; the run's student is that of round {k - 1}")
        else:
            training = fit(with_retraining_settings(recipe), plan_retraining(recipe, first, rounds, training))
        record.save(paths.round(k).record)
        if record.refused:
            break
    last = rounds[-1].round - 1 if rounds[-1].refused else rounds[-1].round
    if recipe.resume == "never" or _exported_fingerprint(paths.student) != training.fingerprint:
        copy_student(paths.round(last).student, paths.student)
    storage.write_bytes(paths.recipe, dump(recipe).encode())
    RoundsSummary(rounds=rounds, student=last).save(paths.rounds_summary)
    return TrainResult(training, rounds)


# ---- round 0


def _adopt_student(recipe: Recipe, first: Training) -> None:
    """Use the student of a run that was made without rounds as round 0's, rather than train it again.

    Raises:
        UserError: ``student/`` has neither that student nor a round's, and ``resume: always`` forbids to replace it.
    """
    paths = Run(recipe.storage)
    exported = _exported_fingerprint(paths.student)
    if exported is None:
        return
    if exported == training_fingerprint(recipe, first):
        if _exported_fingerprint(paths.round(0).student) is None:
            copy_student(paths.student, paths.round(0).student)
        return
    if recipe.resume != "always":
        return
    rounds = [int(name) for name in storage.list_folders(paths.all_rounds)]
    if exported not in [_exported_fingerprint(paths.round(k).student) for k in rounds]:
        raise UserError(
            f"{paths.student.folder}: trained with other settings or episodes; set resume=if_possible or resume=never to train"
            " another student"
        )


def _record_first_round(recipe: Recipe, first: Training) -> RoundRecord:
    """Return the record of the teacher's episodes, and write it if it is absent or belongs to others."""
    uri, origin = Run(recipe.storage).round(0).record, fingerprint(first.origin)
    saved = RoundRecord.load_if_exists(uri)
    if saved and saved.origin == origin:
        return saved
    generated = GenerateSummary.load(Run(recipe.episodes_storage()).generate_summary)
    record = RoundRecord(
        round=0,
        origin=origin,
        requested=generated.requested,
        accepted=generated.accepted,
        achieved=reward_statistics(_episodes_folder(recipe, 0)),
    )
    record.save(uri)
    return record


# ---- rounds of exploration


def _explore_and_score(recipe: Recipe, k: int, tasks: Sequence[Task], context: StageContext) -> RoundRecord:
    """Explore and score round ``k``, unless that is done already."""
    paths, exploration = Run(recipe.storage).round(k), plan_exploration(recipe, k)
    origin = round_fingerprint(exploration, recipe.rewards, tasks)
    saved = RoundRecord.load_if_exists(paths.record)
    if saved and saved.origin == origin:
        log.info(f"round {k}: already explored and scored: {paths.folder}")
        return saved
    storage.remove(paths.record)  # it vouches for the episodes that scoring replaces now
    buffer = [_episodes_folder(recipe, j) for j in range(k)]
    explore(recipe, exploration, tasks, buffer, context)
    label, n_prompts = f"round {k}: score", exploration.n_prompts
    scored = score(exploration.ledger, paths.scoring, tasks, recipe.rewards, label, earlier=buffer, context=context)
    if scored.total != n_prompts:
        raise RuntimeError(f"accounting: {scored.accepted} accepted + {scored.rejected} rejected is not {n_prompts} requested")
    record = RoundRecord(
        round=k,
        origin=origin,
        ledger=exploration.manifest.fingerprint,
        student=exploration.policy.revision,
        requested=n_prompts,
        accepted=scored.accepted,
        rejected=scored.rejected,
        reasons=scored.reasons,
        commands=command_statistics(paths.scoring.episodes, paths.scoring.rejects),
        achieved=reward_statistics(paths.scoring.episodes),
        diversity=round_statistics.measure_diversity(
            _episodes_folder(recipe, 0), paths.scoring.episodes, exploration.n_intents
        ),
    )
    # Written before the training, so that a driver that is killed during it need not read the episodes again.
    record.save(paths.record)
    return record


def round_fingerprint(exploration: Exploration, rewards: Rewards, tasks: Sequence[Task]) -> str:
    """Return the fingerprint of everything that a round's episodes depend on.

    Placement and batch sizes of scoring are left out, because they do not change a score.
    """
    scoring = rewards.model_dump(exclude={"placement": True, "batch_size": True, "judge": {"placement"}})
    return fingerprint([exploration.manifest.fingerprint, scoring, [task.model_dump() for task in tasks]])


def _decide_on_training(recipe: Recipe, earlier: Sequence[RoundRecord], record: RoundRecord) -> RoundRecord:
    """Add to a round's record whether it is trained on, and with which share of its episodes."""
    refused = round_statistics.reason_to_refuse(record.accepted, record.diversity, recipe.explore.min_diversity)
    n_earlier = sum(one.accepted for one in earlier)
    keep = None if refused else round_statistics.share_to_train_on(n_earlier, record.accepted, recipe.explore.replay)
    return record.model_copy(update={"before": earlier[-1].achieved, "refused": refused, "keep": keep})


def plan_retraining(recipe: Recipe, first: Training, rounds: Sequence[RoundRecord], last: TrainingSummary) -> Training:
    """Return the training of the newest of ``rounds``, which starts from the student that ``last`` describes.

    It is on all earlier episodes and on as many new ones as the record's ``keep`` allows.
    """
    *earlier, new = rounds
    paths = Run(recipe.storage)
    return Training(
        sources=(
            *(EpisodeSource(folder=_episodes_folder(recipe, record.round)) for record in earlier),
            EpisodeSource(folder=_episodes_folder(recipe, new.round), keep=1.0 if new.keep is None else new.keep),
        ),
        target=paths.round(new.round).student.folder,
        origin=[first.origin, *([record.origin, record.accepted] for record in rounds[1:]), last.fingerprint],
        round=new.round,
        start=paths.round(new.round - 1).student.folder,
    )


def with_retraining_settings(recipe: Recipe) -> Recipe:
    """Return the recipe with the epochs and the learning rate of later rounds."""
    lr = recipe.explore.lr or Shape.of(recipe.student, recipe.train).lr / 3
    train = recipe.train.model_copy(update={"epochs": recipe.explore.epochs, "lr": lr})
    return recipe.model_copy(update={"train": train})


# ---- students and episodes on storage


def copy_student(source: StudentPaths, target: StudentPaths) -> None:
    """Replace the student in ``target``; its ``training.json``, which marks the copy as complete, is written last."""
    storage.remove(target.folder)
    for name in storage.list_files(source.folder):
        uri = storage.join(source.folder, name)
        if uri != source.training:
            storage.write_bytes(storage.join(target.folder, name), storage.read_bytes(uri))
    storage.write_bytes(target.training, storage.read_bytes(source.training))


def _exported_fingerprint(student: StudentPaths) -> str | None:
    """Return the fingerprint of a complete export, None if there is none."""
    training = TrainingSummary.load_if_exists(student.training)
    return training.fingerprint if training else None


def _episodes_folder(recipe: Recipe, k: int) -> str:
    scoring = Run(recipe.storage).round(k).scoring if k else Run(recipe.episodes_storage()).scoring
    return scoring.episodes
