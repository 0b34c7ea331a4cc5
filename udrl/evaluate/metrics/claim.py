"""Verdicts: whether the numbers meet the claim and the targets.

The claim is that of the method's paper: a small student is within 6% of models 80 times its size, in relevance and in
diversity.
"""

from collections.abc import Mapping, Sequence

from udrl.evaluate.document import UNKNOWN, Claim, ClaimPart, Interval, JudgeProfile, Number, Scope, Target, TaskScope
from udrl.evaluate.metrics.control import all_met
from udrl.evaluate.outputs import STUDENT, TEACHER

BOUND = 0.94  # of the claim: student over other
RATIO_TARGET = 0.90  # of the teacher's mean relevance
WITHIN_2_TARGET = 0.80  # of the prompts
MIN_PROMPTS = 20  # of each policy on each task, for a verdict on diversity
DIVERSITY_LABELS = {"distinct_2": "distinct-2", "vendi": "Vendi"}  # the figures of DiversityRatios
SCORER = "the scorer that made the training reward"


def is_trivial_baseline(policy: str) -> bool:
    """Whether a policy's name is one of the evaluation's own trivial baselines."""
    return policy in ("echo", "shuffled") or policy.startswith("best-of-")


def rivals(policies: Sequence[str]) -> list[str]:
    """Return the policies that the claim compares the student with: the baselines, then the teacher."""
    baselines = [p for p in policies if p not in (STUDENT, TEACHER) and not is_trivial_baseline(p)]
    return [*baselines, *(p for p in policies if p == TEACHER)]


def judge_of_claim(judges: Mapping[str, JudgeProfile]) -> str | None:
    """Return the judge whose ratio decides the claim, None if no judge is fit.

    A fit judge is validated, is not the teacher, and has a ratio scale. Of several, the one with the best AUC on shuffled
    pairs decides.
    """
    fit = {name: judge for name, judge in judges.items() if judge.validated and judge.ratio_scale and not judge.is_teacher}
    return max(fit, key=lambda name: fit[name].auc.get("shuffled") or 0.0, default=None)


def decide_claim(overall: Scope, judges: Mapping[str, JudgeProfile]) -> Claim:
    """Decide whether the student is within 6% of each rival, in relevance by an independent judge and in diversity.

    A part is met if its whole interval is at least :data:`BOUND`, missed if all of it is below, else open. Without a fit judge,
    relevance is by the scorer that made the training reward: the student was trained towards it, so such a part can be missed
    but never met. Diversity of fewer than :data:`MIN_PROMPTS` prompts is open.
    """
    judge = judge_of_claim(judges)
    names = [name for name in rivals(list(overall.policies)) if name in overall.comparisons]
    parts = []
    for name in names:
        parts += [_relevance_part(overall, judge, name), *_diversity_parts(overall, name)]
    met = all_met(part.met for part in parts)
    return Claim(met=met, text=_sentence(met, names, parts), bound=BOUND, parts=parts)


def _relevance_part(overall: Scope, judge: str | None, rival: str) -> ClaimPart:
    comparison = overall.comparisons[rival]
    if judge is not None and judge in comparison.judges:
        return _part(f"relevance (judge {judge}) against {rival}", comparison.judges[judge].ratio)
    reason = "because no judge is fit" if judge is None else f"because judge {judge} did not score both"
    return _part(f"relevance ({SCORER}, {reason}) against {rival}", comparison.relevance.ratio, can_be_met=False)


def _diversity_parts(overall: Scope, rival: str) -> list[ClaimPart]:
    ratios, prompts = overall.diversity.ratios.get(rival), overall.diversity.fewest or 0
    enough = prompts >= MIN_PROMPTS
    parts = []
    for figure, label in DIVERSITY_LABELS.items():
        interval = getattr(ratios, figure) if ratios else UNKNOWN
        qualified = label if enough or not prompts else f"{label}, of {prompts} prompts only"
        parts.append(_part(f"diversity ({qualified}) against {rival}", interval, can_be_met=enough, can_be_missed=enough))
    return parts


def _part(name: str, interval: Interval, can_be_met: bool = True, can_be_missed: bool = True) -> ClaimPart:
    met = None
    if can_be_met and interval.low is not None and interval.low >= BOUND:
        met = True
    elif can_be_missed and interval.high is not None and interval.high < BOUND:
        met = False
    return ClaimPart(name=name, interval=interval, met=met)


def _sentence(met: bool | None, names: Sequence[str], parts: Sequence[ClaimPart]) -> str:
    if not names:
        return "Neither a baseline nor the teacher wrote prompts, so the student has no rival."
    labels = ["the teacher" if name == TEACHER else name for name in names]
    rivals = " and ".join([", ".join(labels[:-1]), labels[-1]] if len(labels) > 1 else labels)
    if list(names) == [TEACHER]:
        rivals += " (no baseline wrote)"
    if met:
        return f"The student is within {1 - BOUND:.0%} of {rivals} in relevance and in diversity."
    deciding = [part for part in parts if part.met is met]
    reasons = "; ".join(part.name + _measured(part.interval) for part in deciding)
    if met is False:
        return f"The student is not within {1 - BOUND:.0%} of {rivals}: {reasons}."
    text = f"Not decided whether the student is within {1 - BOUND:.0%} of {rivals}: {reasons}."
    by_scorer = any(SCORER in part.name for part in deciding)
    return f"{text} A part measured by {SCORER} can be missed, but not met." if by_scorer else text


def _measured(interval: Interval) -> str:
    if interval.value is None:
        return " was not measured"
    if interval.low is None or interval.high is None or interval.low == interval.high:
        return f" is {interval.value:.1%}"
    return f" is {interval.value:.1%} ({interval.low:.1%} to {interval.high:.1%})"


def check_targets(overall: Scope, tasks: Mapping[str, TaskScope]) -> list[Target]:
    """Return each target with its measurement, and whether it is met (None: not measured)."""
    ratio, ratio_accepted = _ratios_to_teacher(overall)
    within_2 = overall.length.within_2
    return [
        _target("student's mean relevance is at least 90% of the teacher's, over all tasks", ratio, RATIO_TARGET),
        _target("the same among accepted prompts only", ratio_accepted, RATIO_TARGET),
        _target_on_every_task(
            "student's mean relevance is at least 90% of the teacher's, on every task",
            {name: _at_least(_ratios_to_teacher(task)[0], RATIO_TARGET) for name, task in tasks.items()},
        ),
        _target("80% of prompts land within two words of the commanded length", within_2, WITHIN_2_TARGET),
        _target_on_every_task(
            "mean achieved words rises with commanded words, on every task",
            {name: task.length.rises for name, task in tasks.items()},
        ),
        _target_on_every_task(
            "mean achieved relevance rises from the bottom to the top commanded bin, on every task",
            {name: task.reward.rises for name, task in tasks.items()},
        ),
    ]


def _ratios_to_teacher(scope: Scope) -> tuple[Number, Number]:
    """Return the ratio of mean relevance, of all prompts and of the accepted ones."""
    if TEACHER not in scope.comparisons:
        return None, None
    relevance = scope.comparisons[TEACHER].relevance
    return relevance.ratio.value, relevance.ratio_accepted.value


def _target(name: str, value: Number, bound: float) -> Target:
    return Target(name=name, met=_at_least(value, bound), measured="-" if value is None else f"{100 * value:.1f}%")


def _target_on_every_task(name: str, met: Mapping[str, bool | None]) -> Target:
    """One task that misses the target misses it; one that was not measured leaves it open."""
    missed, unknown = [t for t, m in met.items() if m is False], [t for t, m in met.items() if m is None]
    known = len(met) - len(unknown)
    measured = f"{known - len(missed)} of {known} tasks" if known else "-"
    measured += f"; missed by {', '.join(missed)}" if missed else ""
    measured += f"; not measured on {', '.join(unknown)}" if unknown and known else ""
    return Target(name=name, met=all_met(met.values()), measured=measured)


def _at_least(value: Number, bound: float) -> bool | None:
    return None if value is None else value >= bound
