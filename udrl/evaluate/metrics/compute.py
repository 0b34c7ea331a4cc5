"""What the evaluation measures, as pure functions of its tables: the numbers of the report's document.

One rule runs through: a rejected or empty output counts as relevance 0, and for a judge as a prompt for another intent, for
all policies alike, so that refusing never pays (see :mod:`udrl.evaluate.outputs`).
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from udrl.evaluate.metrics import accuracy, claim, control, diversity, intervals, novelty
from udrl.evaluate.outputs import JUDGE, PROBES, STUDENT, Columns, columns, where
from udrl.tasks import Task

Facts = Mapping[str, Mapping[str, Any]]  # by judge: what the document tells of it
Options = dict[str, Any]  # resamples and seed of the intervals


def compute(
    outputs: pa.Table,
    *,
    tasks: Sequence[Task],
    judges: Facts,
    pairwise: pa.Table | None,
    training: Iterable[pa.Table] | None,
    embed: diversity.Embed | None,
    bootstrap: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """All numbers of the report.

    Args:
        outputs: of :data:`~udrl.evaluate.outputs.OUTPUTS`, with a column for each pointwise judge.
        tasks: gives the format rules.
        judges: of each judge ``ratio``, ``unrelated``, ``believable``, ``of_teacher`` and ``auc``.
        pairwise: of :data:`~udrl.evaluate.outputs.PAIRWISE`.
        training: tables of task, prompt and policy, streamed once: what the student was trained on.
        embed: texts -> unit vectors (texts, dimensions), for the Vendi scores.

    Returns:
        ``intents``, ``rows``, ``bootstrap``, ``seed``, ``overall``, ``tasks``, ``novelty``, ``rejected`` (of the student, by
        probe), ``claim``, ``targets``. ``overall`` and each of ``tasks`` hold ``policies``, ``against`` (the student beside
        every other policy), ``diversity``, ``length``, ``reach`` and ``accuracy``; a task also ``reward``. Unknown numbers
        are NaN, unknown flags None.
    """
    rows = columns(outputs)
    options: Options = {"resamples": bootstrap, "seed": seed}
    default = where(rows, rows["probe"] == "default")
    sample: accuracy.Texts = {}
    heard = None if training is None else accuracy.listen(training, sample, seed=seed)
    copied = novelty.table(default, heard)  # reads the stream to its end, and so fills the sample
    default, taught = accuracy.mark(default, tasks, sample, seed=seed)
    pairs = _pairs(pairwise, default)

    def scope(rows: Columns, pairs: Columns) -> dict[str, Any]:
        found = policies(rows, **options)
        beside = {name: against(rows, pairs, name, judges, options) for name in found if STUDENT in found and name != STUDENT}
        return {"policies": found, "against": beside, "accuracy": accuracy.table(rows, taught)}

    of_tasks: dict[str, Any] = {}
    varied: list[diversity.Varied] = []
    groups = diversity.Groups.of(default["intent_id"], seed)
    writers = [policy for policy in sorted(set(default["policy"])) if not claim.is_trivial_baseline(policy)]
    for task in sorted(set(rows["task"])):
        mine, here = where(rows, rows["task"] == task), where(default, default["task"] == task)
        varied.append(diversity.measure(here, writers=writers, embed=embed, seed=seed, groups=groups))
        of_tasks[task] = {
            **scope(here, where(pairs, pairs["task"] == task)),
            "diversity": {**varied[-1].table, "ratios": diversity.ratios(varied[-1:])},
            "length": control.length_table(_student(mine, "length")),
            "reach": control.length_table(_student(mine, "reach")),
            "reward": control.reward_table(_student(mine, "reward"), **options),
        }
    overall = {
        **scope(default, pairs),
        "diversity": {**diversity.over_tasks([task.table for task in varied]), "ratios": diversity.ratios(varied)},
        **{
            probe: control.over_tasks(_student(rows, probe), [task[probe] for task in of_tasks.values()])
            for probe in ("length", "reach")
        },
    }
    return {
        "intents": len(np.unique(rows["intent_id"])),
        "rows": outputs.num_rows,
        "bootstrap": bootstrap,
        "seed": seed,
        "overall": overall,
        "tasks": of_tasks,
        "novelty": copied,
        "rejected": {probe: control.average(_student(rows, probe)["rejected"]) for probe in PROBES},
        "claim": claim.claim(overall, judges),
        "targets": claim.targets(overall, of_tasks),
    }


def _student(rows: Columns, probe: str) -> Columns:
    return where(rows, (rows["probe"] == probe) & (rows["policy"] == STUDENT))


def policies(rows: Columns, *, resamples: int = 1000, seed: int = 0) -> dict[str, Any]:
    """Each policy's n, share rejected, mean words of accepted prompts, and relevance and judges with intervals."""
    found = {}
    for policy in sorted(set(rows["policy"])):
        mine = where(rows, rows["policy"] == policy)
        means = {
            name: intervals.mean(mine[name], mine["intent_id"], resamples=resamples, seed=seed).plain()
            for name in ("relevance", *_judged(rows).values())
        }
        found[policy] = {
            "n": len(mine["intent_id"]),
            "rejected": control.average(mine["rejected"]),
            "words": control.average(mine["n_words"][~mine["rejected"]]),
            "relevance": means["relevance"],
            "judges": {judge: means[name] for judge, name in _judged(rows).items()},
        }
    return found


def _judged(rows: Columns) -> dict[str, str]:
    """Pointwise judge -> its column."""
    return {name.removeprefix(JUDGE): name for name in rows if name.startswith(JUDGE)}


def against(rows: Columns, pairs: Columns, other: str, judges: Facts, options: Options) -> dict[str, Any]:
    """The student beside another policy, paired by intent.

    Returns:
        ``relevance``: ``difference``, ``ratio`` and ``ratio_accepted`` (rejected prompts left out on both sides: the harder
        reading for a student that is rejected less often); by pointwise judge ``difference`` and ``ratio``, which is of what
        both score above prompts for other intents (the judge's ``unrelated``, taken as known), and is itself unknown where the
        judge's scale has none or the other policy is not surely above that; by pairwise judge see :func:`preferred`.
    """
    sides = [where(rows, rows["policy"] == policy) for policy in (STUDENT, other)]

    def paired(name: str, sides: Sequence[Columns]) -> list[np.ndarray]:
        return [column for side in sides for column in (side[name], side["intent_id"])]

    def judged(judge: str, name: str) -> dict[str, Any]:
        told, ratio = judges.get(judge, {}), intervals.UNKNOWN
        if told.get("ratio"):
            mine, intents, theirs, their_intents = paired(name, sides)
            mine, theirs = mine - told["unrelated"], theirs - told["unrelated"]
            if intervals.mean(theirs, their_intents, **options).low > 0:
                ratio = intervals.ratio(mine, intents, theirs, their_intents, **options)
        return {"difference": intervals.difference(*paired(name, sides), **options).plain(), "ratio": ratio.plain()}

    accepted = [where(side, ~side["rejected"]) for side in sides]
    mine = where(pairs, pairs["other"] == other)
    return {
        "relevance": {
            "difference": intervals.difference(*paired("relevance", sides), **options).plain(),
            "ratio": intervals.ratio(*paired("relevance", sides), **options).plain(),
            "ratio_accepted": intervals.ratio(*paired("relevance", accepted), **options).plain(),
        },
        "judges": {judge: judged(judge, name) for judge, name in _judged(rows).items()},
        "pairwise": {judge: preferred(where(mine, mine["judge"] == judge), options) for judge in sorted(set(mine["judge"]))},
    }


def preferred(pairs: Columns, options: Options) -> dict[str, Any]:
    """How often one judge prefers the student's prompt.

    Returns:
        ``preferred``: mean preference with interval, 0.5 is even, unknown where the judge answered for no pair; ``n`` pairs
        with a verdict, of which ``settled`` without the judge, as a prompt was rejected; and of those that it was shown
        ``position_bias``, the mean preference where the student stands first minus where it stands second, and
        ``consistent``, the share with the same winner in both orders.
    """
    first, second = pairs["first"], pairs["second"]
    known = ~np.isnan(first + second)
    shown = pairs["shown"] & known
    same = np.sign(first[shown] - 0.5) == np.sign(second[shown] - 0.5)
    preferred = intervals.mean((first + second) / 2, pairs["intent_id"], **options) if shown.any() else intervals.UNKNOWN
    return {
        "preferred": preferred.plain(),
        "n": int(known.sum()),
        "settled": int((known & ~shown).sum()),
        "position_bias": control.average(first[shown] - second[shown]),
        "consistent": control.average(same),
    }


def _pairs(pairwise: pa.Table | None, default: Columns) -> Columns:
    """The comparisons as arrays of shape (pairs,): NaN where a judge gave no verdict; ``shown`` where none was rejected."""
    rows = pairwise.to_pylist() if pairwise is not None else []
    found = {name: np.array([row[name] for row in rows], dtype=object) for name in ("judge", "task", "other")}
    found["intent_id"] = np.array([row["intent_id"] for row in rows], dtype=np.int64)
    for name in ("first", "second"):
        said = [row[name] if row["parsed"] and row[name] is not None else np.nan for row in rows]
        found[name] = np.array(said, dtype=float)
    keys = zip(default["task"], default["intent_id"], default["policy"], default["variation"], strict=True)
    rejected = dict(zip(keys, default["rejected"], strict=True))

    def refused(row: dict[str, Any], policy: str) -> bool:
        """A policy without that variation is compared by its variation 0, as the judges do."""
        place = (row["task"], row["intent_id"], policy)
        return bool(rejected.get((*place, row["variation"]), rejected.get((*place, 0), False)))

    found["shown"] = np.array([not (refused(row, STUDENT) or refused(row, row["other"])) for row in rows], dtype=bool)
    return found
