"""What the evaluation measures, as pure functions of one table of outputs.

One rule runs through: a rejected or empty output has relevance 0 (and judge 0: no text tells nothing of the intent), for
every policy alike, so that refusing never pays.
"""

import zlib
from itertools import combinations
from typing import Any

import numpy as np
import pyarrow as pa

from udrl.episodes import COMPONENTS, KEYS
from udrl.evaluation import control, intervals
from udrl.evaluation.control import Columns

PROBES = ("default", "length", "reward")  # which question a row answers
OUTPUTS = pa.schema(
    [
        *KEYS,
        ("probe", pa.string()),
        ("prompt", pa.string()),  # empty when rejected
        ("reason", pa.string()),  # empty, or an udrl.episodes.Reason
        ("n_words", pa.int32()),
        *((component, pa.float32()) for component in COMPONENTS),
        ("reward", pa.float32()),
        ("judge", pa.float32()),  # the independent judge's score; NaN when off
    ]
)

STUDENT, TEACHER = "student", "teacher"
RATIO_TARGET = 0.90  # of the teacher's mean relevance
WITHIN_2_TARGET = 0.80  # of the prompts


def columns(outputs: pa.Table) -> Columns:
    """The table as arrays of shape (rows,), the rule for rejected rows applied; ``rejected`` is a column of its own."""
    rows = {name: np.asarray(outputs[name].to_pylist(), dtype=object) for name in ("task", "policy", "probe", "prompt")}
    rows |= {
        name: _numbers(outputs, name).astype(np.int64) for name in ("command_words", "command_reward", "n_words", "variation")
    }
    rows["intent_id"] = outputs["intent_id"].to_numpy()  # 63 bits: not by way of a float
    reason = np.asarray(outputs["reason"].to_pylist(), dtype=object)
    rows["rejected"] = np.array([bool(r) or not p for r, p in zip(reason, rows["prompt"], strict=True)], dtype=bool)
    rows["relevance"] = np.where(rows["rejected"], 0.0, _numbers(outputs, "relevance", np.nan))
    rows["reward"] = np.where(rows["rejected"], 0.0, _numbers(outputs, "reward", np.nan))
    judge = _numbers(outputs, "judge", np.nan)
    rows["judge"] = np.where(rows["rejected"] & ~np.isnan(judge).all(), 0.0, judge)
    return rows


def _numbers(outputs: pa.Table, name: str, absent: float = 0.0) -> np.ndarray:
    column = outputs[name].to_pylist()
    return np.array([absent if value is None else value for value in column], dtype=float)


def compute(outputs: pa.Table, *, bootstrap: int = 1000, seed: int = 0) -> dict[str, Any]:
    """All numbers of the report.

    Returns:
        ``overall`` and, under ``tasks``, the same per task: ``policies`` (per policy n, rejected, relevance and judge
        intervals, words), ``ratio`` and ``difference`` (student to teacher, relevance), ``judge_difference``, ``diversity``;
        per task also ``length`` and ``reward`` (see :mod:`udrl.evaluation.control`). ``overall`` has ``length`` without
        levels. Then ``rejected`` (student, per probe) and ``targets``. Unknown numbers are NaN, unknown flags None.
    """
    rows = columns(outputs)
    options = {"resamples": bootstrap, "seed": seed}
    tasks: dict[str, Any] = {}
    for task in sorted(set(rows["task"])):
        mine = _where(rows, rows["task"] == task)
        tasks[task] = {
            **compare(_where(mine, mine["probe"] == "default"), **options),
            "diversity": diversity(_where(mine, mine["probe"] == "default"), seed=seed),
            "length": control.length_table(_probe(mine, "length")),
            "reward": control.reward_table(_probe(mine, "reward"), **options),
        }
    length = control.length_table(_probe(rows, "length"))
    metrics: dict[str, Any] = {
        "overall": {
            **compare(_where(rows, rows["probe"] == "default"), **options),
            "diversity": _average_diversity([task["diversity"] for task in tasks.values()]),
            "length": {name: value for name, value in length.items() if name != "levels"},
        },
        "tasks": tasks,
        "rejected": {
            probe: control.average(_where(rows, (rows["probe"] == probe) & (rows["policy"] == STUDENT))["rejected"])
            for probe in PROBES
        },
        "bootstrap": bootstrap,
        "intents": len(np.unique(rows["intent_id"])),
        "rows": outputs.num_rows,
    }
    return {**metrics, "targets": targets(metrics)}


def _where(rows: Columns, keep: np.ndarray) -> Columns:
    return {name: column[keep] for name, column in rows.items()}


def _probe(rows: Columns, probe: str) -> Columns:
    return _where(rows, (rows["probe"] == probe) & (rows["policy"] == STUDENT))


def compare(rows: Columns, *, resamples: int = 1000, seed: int = 0) -> dict[str, Any]:
    """The policies of the default probe beside each other, with the student's distance to the teacher paired by intent."""
    options: dict[str, Any] = {"resamples": resamples, "seed": seed}
    policies = {}
    for policy in sorted(set(rows["policy"])):
        mine = _where(rows, rows["policy"] == policy)
        policies[policy] = {
            "n": len(mine["intent_id"]),
            "rejected": control.average(mine["rejected"]),
            "words": control.average(mine["n_words"][~mine["rejected"]]),
            "relevance": intervals.mean(mine["relevance"], mine["intent_id"], **options).plain(),
            "judge": intervals.mean(mine["judge"], mine["intent_id"], **options).plain(),
        }
    student, teacher = (_where(rows, rows["policy"] == policy) for policy in (STUDENT, TEACHER))
    pair = {m: (student[m], student["intent_id"], teacher[m], teacher["intent_id"]) for m in ("relevance", "judge")}
    # Rejected prompts left out on both sides: the harder reading for a student that is rejected less often.
    kept = [_where(side, ~side["rejected"]) for side in (student, teacher)]
    accepted = [column for side in kept for column in (side["relevance"], side["intent_id"])]
    return {
        "policies": policies,
        "ratio": intervals.ratio(*pair["relevance"], **options).plain(),
        "ratio_accepted": intervals.ratio(*accepted, **options).plain(),
        "difference": intervals.difference(*pair["relevance"], **options).plain(),
        "judge_difference": intervals.difference(*pair["judge"], **options).plain(),
    }


def diversity(rows: Columns, *, seed: int = 0) -> dict[str, Any]:
    """How varied each policy's accepted prompts are, at equal length and equal number.

    Longer texts and larger samples repeat more, so every prompt is cut to the same number of words (the lower quartile of
    the policy that writes shortest; shorter prompts are left out) and each policy gives as many prompts, drawn by ``seed``.

    Returns:
        ``words`` and ``n`` of the comparison, and per policy: ``distinct_2`` (distinct over all word pairs; higher is more
        varied, Li et al. 2016), ``compression`` (bytes over zlib bytes; lower is more varied, Shaib et al. 2024),
        ``within_intent`` (mean Jaccard distance of the word sets of prompts to the same intent; NaN with one sample).
    """
    texts: dict[str, list[list[str]]] = {}
    owners: dict[str, np.ndarray] = {}
    for policy in sorted(set(rows["policy"])):
        mine = _where(rows, (rows["policy"] == policy) & ~rows["rejected"])
        texts[policy], owners[policy] = [p.lower().split() for p in mine["prompt"]], mine["intent_id"]
    quartiles = [np.quantile([len(t) for t in words], 0.25) for words in texts.values() if words]
    length = max(2, int(min(quartiles, default=0)))
    for policy, words in texts.items():
        keep = [i for i, text in enumerate(words) if len(text) >= length]
        texts[policy], owners[policy] = [words[i][:length] for i in keep], owners[policy][keep]
    number = min((len(words) for words in texts.values() if words), default=0)
    found = {}
    for policy, words in texts.items():
        drawn = np.random.default_rng(seed).permutation(len(words))[:number]
        sample = [words[i] for i in drawn]
        found[policy] = {
            "distinct_2": distinct(sample, 2),
            "compression": compression_ratio([" ".join(text) for text in sample]),
            "within_intent": within_intent(words, owners[policy]),
        }
    return {"words": length if number else 0, "n": number, "policies": found}


def _average_diversity(of_tasks: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean over tasks: pooled texts would compare one task's vocabulary with another's."""
    policies = sorted({policy for task in of_tasks for policy in task["policies"]})
    found: dict[str, Any] = {policy: {} for policy in policies}
    for policy in policies:
        figures = [task["policies"][policy] for task in of_tasks if policy in task["policies"]]
        for name in ("distinct_2", "compression", "within_intent"):
            known = np.array([f[name] for f in figures if not np.isnan(f[name])])
            found[policy][name] = control.average(known)
    return {"policies": found}


def distinct(texts: list[list[str]], n: int) -> float:
    """Distinct n-grams over all n-grams of tokenised texts."""
    grams = [tuple(text[i : i + n]) for text in texts for i in range(len(text) - n + 1)]
    return len(set(grams)) / len(grams) if grams else float("nan")


def compression_ratio(texts: list[str]) -> float:
    """Bytes of the texts, a line each, over their zlib bytes (level 9)."""
    raw = "\n".join(texts).encode()
    return len(raw) / len(zlib.compress(raw, 9)) if raw else float("nan")


def within_intent(texts: list[list[str]], owners: np.ndarray) -> float:
    """Mean over intents of the mean Jaccard distance between word sets: 0 for copies, 1 with no word in common."""
    groups: dict[int, list[set[str]]] = {}
    for text, owner in zip(texts, owners, strict=True):
        groups.setdefault(int(owner), []).append(set(text))
    per_intent = [
        np.mean([1 - len(a & b) / len(a | b) for a, b in combinations(group, 2)]) for group in groups.values() if len(group) > 1
    ]
    return float(np.mean(per_intent)) if per_intent else float("nan")


def targets(metrics: dict[str, Any]) -> list[dict[str, Any]]:
    """What was promised, what was measured, and whether it is met (None: not measured)."""
    tasks, overall = metrics["tasks"], metrics["overall"]
    ratio, within = overall["ratio"]["value"], overall["length"]["within_2"]
    accepted = overall["ratio_accepted"]["value"]
    return [
        _target(
            "student's mean relevance is at least 90% of the teacher's, over all tasks", _at_least(ratio, RATIO_TARGET), ratio
        ),
        _target("the same among accepted prompts alone", _at_least(accepted, RATIO_TARGET), accepted),
        _on_every_task(
            "student's mean relevance is at least 90% of the teacher's, on every task",
            {name: _at_least(task["ratio"]["value"], RATIO_TARGET) for name, task in tasks.items()},
        ),
        _target("80% of prompts land within two words of the commanded length", _at_least(within, WITHIN_2_TARGET), within),
        _on_every_task(
            "mean achieved words rises with commanded words, on every task",
            {name: task["length"]["rises"] for name, task in tasks.items()},
        ),
        _on_every_task(
            "mean achieved relevance rises from the bottom to the top commanded bin, on every task",
            {name: task["reward"]["rises"] for name, task in tasks.items()},
        ),
    ]


def _target(name: str, met: bool | None, measured: float) -> dict[str, Any]:
    return {"target": name, "met": met, "measured": "-" if np.isnan(measured) else f"{100 * measured:.1f}%"}


def _on_every_task(name: str, met: dict[str, bool | None]) -> dict[str, Any]:
    """One task that misses misses the target; one that was not measured leaves it open."""
    missed, unknown = [t for t, m in met.items() if m is False], [t for t, m in met.items() if m is None]
    known = len(met) - len(unknown)
    measured = f"{known - len(missed)} of {known} tasks" if known else "-"
    measured += f"; missed by {', '.join(missed)}" if missed else ""
    measured += f"; not measured on {', '.join(unknown)}" if unknown and known else ""
    return {"target": name, "met": False if missed else None if unknown or not met else True, "measured": measured}


def _at_least(value: float, bound: float) -> bool | None:
    return None if np.isnan(value) else bool(value >= bound)
