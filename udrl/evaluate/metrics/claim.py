"""Verdicts: whether the numbers meet the claim and the targets.

The claim is that of the method's paper: a small student is within 6% of models 80 times its size, in relevance and in
diversity. Every verdict is drawn from a 95% interval: met if all of it is on the right side of the bound, missed if all of it
is on the wrong side, else open.
"""

from collections.abc import Mapping, Sequence

from udrl.evaluate.document import (
    UNKNOWN,
    Claim,
    ClaimPart,
    Interval,
    JudgeProfile,
    PolicyComparison,
    Scope,
    Target,
    TaskScope,
)
from udrl.evaluate.formatting import interval, percent_tenths, points
from udrl.evaluate.judges.validation import weakest
from udrl.evaluate.metrics.control import all_met
from udrl.evaluate.outputs import STUDENT, TEACHER

BOUND = 0.94  # of the claim: student over other
RATIO_TARGET = 0.90  # of the teacher's mean
WITHIN_2_TARGET = 0.80  # of the prompts
COPIED_TARGET = 0.02  # student minus teacher, mean share of runs of 8 words
MIN_INTENTS = 20  # fewer: a bootstrap over intents covers too little (86% instead of 95% with 6 intents)
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


def deciding_judges(judges: Mapping[str, JudgeProfile]) -> list[str]:
    """Return the judges that decide the claim, best first: validated, independent, with a ratio scale.

    They are ordered by the control that each tells worst. A judge that is the scorer, the teacher, of the teacher's family or
    a baseline has no say: the student was trained towards the first, and the others may lean to wording of their own.
    """
    fit = [name for name, judge in judges.items() if judge.validated and judge.ratio_scale and judge.relation == "independent"]
    return sorted(fit, key=lambda name: -(weakest(judges[name].deciding_areas)[1].low or 0.0))


def decide_claim(overall: Scope, judges: Mapping[str, JudgeProfile], intents: int) -> Claim:
    """Decide whether the student is within 6% of each rival, in relevance and in diversity.

    Two deciding judges (see :func:`deciding_judges`) must agree on relevance. The scorer that made the training reward may
    only convict: the student was trained towards it, so its praise is worth nothing and its blame is. With fewer than
    :data:`MIN_INTENTS` intents, or :data:`MIN_PROMPTS` prompts for diversity, a part is open.
    """
    deciding = deciding_judges(judges)[:2]
    names = [name for name in rivals(list(overall.policies)) if name in overall.comparisons]
    enough = intents >= MIN_INTENTS
    parts = []
    for name in names:
        parts += [*_relevance_parts(overall.comparisons[name], deciding, name, enough), *_diversity_parts(overall, name)]
    met = all_met(part.met for part in parts)
    return Claim(met=met, text=_sentence(met, names, parts, intents, deciding), bound=BOUND, parts=parts)


def _relevance_parts(comparison: PolicyComparison, deciding: Sequence[str], rival: str, enough: bool) -> list[ClaimPart]:
    parts = []
    for judge in deciding:
        ratio = comparison.judges.get(judge, UNKNOWN)
        parts.append(_part(f"relevance (judge {judge}) against {rival}", ratio, enough, enough))
    if len(deciding) == 1:  # one judge may convict, and two must agree to acquit
        parts.append(ClaimPart(name=f"relevance (a second judge) against {rival}", interval=UNKNOWN, met=None))
    scorer = _part(f"relevance ({SCORER}) against {rival}", comparison.relevance, False, enough)
    return [*parts, scorer] if scorer.met is False or not deciding else parts


def _diversity_parts(overall: Scope, rival: str) -> list[ClaimPart]:
    ratios, prompts = overall.diversity.ratios.get(rival), overall.diversity.fewest or 0
    enough = prompts >= MIN_PROMPTS
    parts = []
    for figure, label in DIVERSITY_LABELS.items():
        ratio = getattr(ratios, figure) if ratios else UNKNOWN
        qualified = label if enough or not prompts else f"{label}, of {prompts} prompts only"
        parts.append(_part(f"diversity ({qualified}) against {rival}", ratio, enough, enough))
    return parts


def _part(name: str, ratio: Interval, can_be_met: bool, can_be_missed: bool) -> ClaimPart:
    met = at_least(ratio, BOUND)
    return ClaimPart(name=name, interval=ratio, met=met if (can_be_met if met else can_be_missed) else None)


def at_least(measured: Interval, bound: float) -> bool | None:
    """Return whether all of the interval is at least the bound (True) or below it (False); None: neither, or unknown."""
    if measured.low is None or measured.high is None:
        return None
    return True if measured.low >= bound else False if measured.high < bound else None


def _sentence(met: bool | None, names: Sequence[str], parts: Sequence[ClaimPart], intents: int, deciding: Sequence[str]) -> str:
    if not names:
        return "Neither a baseline nor the teacher wrote prompts, so the student has no rival."
    labels = ["the teacher" if name == TEACHER else name for name in names]
    rivals = " and ".join([", ".join(labels[:-1]), labels[-1]] if len(labels) > 1 else labels)
    if list(names) == [TEACHER]:
        rivals += " (no baseline wrote)"
    if met:
        return f"The student is within {1 - BOUND:.0%} of {rivals} in relevance and in diversity."
    reasons = "; ".join(
        f"{part.name} was not measured"
        if part.interval.value is None
        else f"{part.name} is {interval(part.interval, percent_tenths)}"
        for part in parts
        if part.met is met
    )
    if met is False:
        return f"The student is not within {1 - BOUND:.0%} of {rivals}: {reasons}."
    text = f"Not decided whether the student is within {1 - BOUND:.0%} of {rivals}: {reasons}."
    if intents < MIN_INTENTS:
        text += f" Too few intents for a verdict: {intents}, at least {MIN_INTENTS} are needed."
    if len(deciding) < 2:
        text += f" {len(deciding) or 'No'} judge is validated and independent; two must agree."
    return text


def check_targets(overall: Scope, tasks: Mapping[str, TaskScope], intents: int) -> list[Target]:
    """Return each target with its measurement and verdict; with fewer than :data:`MIN_INTENTS` intents all are open."""
    teacher = overall.comparisons.get(TEACHER)

    def ratio_target(name: str, quality: str) -> Target:
        return _target(name, getattr(teacher, quality) if teacher else UNKNOWN)

    targets = [
        ratio_target("student's mean relevance is at least 90% of the teacher's, over all tasks", "relevance"),
        ratio_target("the same among accepted prompts only", "relevance_accepted"),
        _target_on_every_task(
            "student's mean relevance is at least 90% of the teacher's, on every task",
            {
                name: at_least(task.comparisons[TEACHER].relevance, RATIO_TARGET) if TEACHER in task.comparisons else None
                for name, task in tasks.items()
            },
        ),
        ratio_target("student keeps at least 90% as many of the subject's words as the teacher", "coverage"),
        ratio_target("student's share of outputs that say nothing twice is at least 90% of the teacher's", "clean"),
        _copied_target(teacher.copied_8 if teacher else UNKNOWN),
        _target("80% of outputs land within two words of the commanded length", overall.length.within_2, WITHIN_2_TARGET),
        _target_on_every_task(
            "mean achieved words rises with commanded words, on every task",
            {name: task.length.rises for name, task in tasks.items()},
        ),
        _target_on_every_task(
            "mean achieved relevance rises from the bottom to the top commanded bin, on every task",
            {name: task.reward.rises for name, task in tasks.items()},
        ),
    ]
    return targets if intents >= MIN_INTENTS else [target.model_copy(update={"met": None}) for target in targets]


def _target(name: str, measured: Interval, bound: float = RATIO_TARGET) -> Target:
    return Target(name=name, met=at_least(measured, bound), measured=interval(measured, percent_tenths))


def _copied_target(difference: Interval) -> Target:
    name = f"student copies runs of 8 words from training at most {100 * COPIED_TARGET:.0f} points more often than the teacher"
    low, high = difference.low, difference.high
    met = None if low is None or high is None else True if high <= COPIED_TARGET else False if low > COPIED_TARGET else None
    measured = interval(difference, points)
    return Target(name=name, met=met, measured=measured if difference.value is None else f"{measured} points")


def _target_on_every_task(name: str, met: Mapping[str, bool | None]) -> Target:
    """One task that misses the target misses it; one that is open or was not measured leaves it open."""
    missed, unknown = [t for t, m in met.items() if m is False], [t for t, m in met.items() if m is None]
    measured = f"{len(met) - len(missed) - len(unknown)} of {len(met)} tasks" if len(unknown) < len(met) else "-"
    measured += f"; missed by {', '.join(missed)}" if missed else ""
    measured += f"; open on {', '.join(unknown)}" if unknown and len(unknown) < len(met) else ""
    return Target(name=name, met=all_met(met.values()), measured=measured)
