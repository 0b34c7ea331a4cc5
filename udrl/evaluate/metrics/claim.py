"""What was claimed and promised, held against the numbers.

The claim is the method's paper's: a small student within 6% of models 80 times its size, in relevance and in diversity.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from udrl.evaluate.metrics.control import every
from udrl.evaluate.metrics.intervals import UNKNOWN
from udrl.evaluate.outputs import STUDENT, TEACHER

BOUND = 0.94  # student over other, of the claim
RATIO_TARGET = 0.90  # of the teacher's mean relevance
WITHIN_2_TARGET = 0.80  # of the prompts
FEWEST = 20  # prompts of a policy and task, for a verdict on diversity
VARIED = {"distinct_2": "distinct-2", "vendi": "Vendi"}
SCORER = "the scorer that made the training reward"
NAN = float("nan")


def is_trivial_baseline(policy: str) -> bool:
    """Whether a policy's name is one of the evaluation's own yardsticks."""
    return policy in ("echo", "shuffled") or policy.startswith("best-of-")


def others(policies: Sequence[str]) -> list[str]:
    """Whom the claim is about: the baselines, and the teacher."""
    baselines = [p for p in policies if p not in (STUDENT, TEACHER) and not is_trivial_baseline(p)]
    return [*baselines, *(p for p in policies if p == TEACHER)]


def judge_of_claim(judges: Mapping[str, Mapping[str, Any]]) -> str | None:
    """The judge whose ratio decides: believable, not the teacher's own model, with a scale that has a zero; of several the one
    that tells other intents' prompts best. None where there is no such judge."""
    fit = [name for name, told in judges.items() if told.get("believable") and told.get("ratio") and not told.get("of_teacher")]
    return max(fit, key=lambda name: (judges[name].get("auc") or {}).get("shuffled", 0.0), default=None)


def claim(overall: Mapping[str, Any], judges: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Is the student within 6% of each of the others: relevance by an independent judge, and diversity.

    A part is met if its whole interval is at least :data:`BOUND`, missed if all of it is below, else open (None). Without a
    judge that is fit, relevance is by the scorer that made the training reward: the student was trained towards it, so such a
    part can be missed and never met. Diversity of fewer than :data:`FEWEST` prompts is open. The claim is met if all parts
    are, missed if one is.

    Args:
        overall: the document's scope of all tasks.
        judges: the document's facts of each judge.
    """
    judge = judge_of_claim(judges)
    varied = overall["diversity"]
    parts = []
    held = [name for name in others(list(overall["policies"])) if name in overall["against"]]
    for name in held:
        against = overall["against"][name]
        asked = judge is not None and judge in against["judges"]
        why = "for want of a judge that is fit" if judge is None else f"as judge {judge} was not asked"
        by = f"judge {judge}" if asked else f"{SCORER}, {why}"
        ratio = (against["judges"][judge] if asked else against["relevance"])["ratio"]
        parts.append(_part(f"relevance ({by}) against {name}", ratio, may_meet=asked))
        for figure, called in VARIED.items():
            interval = varied["ratios"].get(name, {}).get(figure, UNKNOWN.plain())
            few = varied["fewest"] < FEWEST
            said = f"{called}, of {varied['fewest']} prompts only" if few and varied["fewest"] else called
            parts.append(_part(f"diversity ({said}) against {name}", interval, may_meet=not few, may_miss=not few))
    met = every(part["met"] for part in parts)
    return {"met": met, "text": _sentence(met, held, parts), "bound": BOUND, "parts": parts}


def _part(what: str, interval: dict[str, float], *, may_meet: bool, may_miss: bool = True) -> dict[str, Any]:
    met = True if may_meet and interval["low"] >= BOUND else False if may_miss and interval["high"] < BOUND else None
    return {"what": what, "interval": interval, "met": met}


def _sentence(met: bool | None, held: Sequence[str], parts: Sequence[dict[str, Any]]) -> str:
    if not held:
        return "Neither a baseline nor the teacher wrote, so there is nothing to hold the student against."
    named = ["the teacher" if name == TEACHER else name for name in held]
    whom = " and ".join([", ".join(named[:-1]), named[-1]] if len(named) > 1 else named)
    whom += " (no baseline wrote)" if list(held) == [TEACHER] else ""
    if met:
        return f"The student is within {1 - BOUND:.0%} of {whom} in relevance and in diversity."
    found = [part for part in parts if part["met"] is met]
    told = "; ".join(part["what"] + _tell(part["interval"]) for part in found)
    if met is False:
        return f"The student is not within {1 - BOUND:.0%} of {whom}: {told}."
    text = f"Not decided whether the student is within {1 - BOUND:.0%} of {whom}: {told}."
    trained = any(SCORER in part["what"] for part in found)
    return f"{text} What {SCORER} says can be missed, but not met." if trained else text


def _tell(interval: dict[str, float]) -> str:
    if np.isnan(interval["value"]):
        return " was not measured"
    if interval["low"] == interval["high"]:
        return f" is {interval['value']:.1%}"
    return f" is {interval['value']:.1%} ({interval['low']:.1%} to {interval['high']:.1%})"


def targets(overall: Mapping[str, Any], tasks: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What was promised, what was measured, and whether it is met (None: not measured)."""
    ratio, accepted = _relevance(overall, "ratio"), _relevance(overall, "ratio_accepted")
    within = overall["length"]["within_2"]
    return [
        _target(
            "student's mean relevance is at least 90% of the teacher's, over all tasks", _at_least(ratio, RATIO_TARGET), ratio
        ),
        _target("the same among accepted prompts alone", _at_least(accepted, RATIO_TARGET), accepted),
        _on_every_task(
            "student's mean relevance is at least 90% of the teacher's, on every task",
            {name: _at_least(_relevance(task, "ratio"), RATIO_TARGET) for name, task in tasks.items()},
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


def _relevance(scope: Mapping[str, Any], name: str) -> float:
    against = scope["against"].get(TEACHER)
    return float(against["relevance"][name]["value"]) if against else NAN


def _target(name: str, met: bool | None, measured: float) -> dict[str, Any]:
    return {"target": name, "met": met, "measured": "-" if np.isnan(measured) else f"{100 * measured:.1f}%"}


def _on_every_task(name: str, met: dict[str, bool | None]) -> dict[str, Any]:
    """One task that misses misses the target; one that was not measured leaves it open."""
    missed, unknown = [t for t, m in met.items() if m is False], [t for t, m in met.items() if m is None]
    known = len(met) - len(unknown)
    measured = f"{known - len(missed)} of {known} tasks" if known else "-"
    measured += f"; missed by {', '.join(missed)}" if missed else ""
    measured += f"; not measured on {', '.join(unknown)}" if unknown and known else ""
    return {"target": name, "met": every(met.values()), "measured": measured}


def _at_least(value: float, bound: float) -> bool | None:
    return None if np.isnan(value) else bool(value >= bound)
