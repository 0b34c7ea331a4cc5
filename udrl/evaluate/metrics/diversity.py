"""How varied each policy's accepted prompts are across intents, at equal length and equal number.

Longer texts and larger samples repeat more, and prompts for one intent are more alike than prompts for two. So all policies are
cut to one length, and each contributes one prompt for each of the same intents.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from udrl.evaluate.document import UNKNOWN, Diversity, DiversityFigures, DiversityRatios, Interval
from udrl.evaluate.metrics.control import average
from udrl.evaluate.metrics.intervals import jackknife, leave_out_groups
from udrl.evaluate.outputs import STUDENT, Columns, select

Embed = Callable[[list[str]], np.ndarray]  # texts -> unit vectors (texts, dimensions)
Words = list[str]  # one text, lower-case
SAMPLE = 500  # texts in the Vendi score, which takes the cube of their number
NAN = float("nan")


def distinct_pairs(texts: Iterable[Words]) -> float:
    """Return the share of distinct word pairs among all (distinct-2: Li et al. 2016)."""
    pairs = [pair for text in texts for pair in pairwise(text)]
    return len(set(pairs)) / len(pairs) if pairs else NAN


def similarities(texts: Sequence[Words], embed: Embed) -> np.ndarray:
    """Return the cosines (texts, texts) of the embeddings."""
    lines, positions = np.unique(np.array([" ".join(text) for text in texts], dtype=object), return_inverse=True)
    vectors = np.asarray(embed(lines.tolist()), dtype=float)[positions]
    return np.asarray(vectors @ vectors.T)


def vendi(similarity: np.ndarray) -> float:
    """Return the effective number of different texts, from 1 (copies) to n (nothing in common).

    It is the exponential of the entropy of the eigenvalues of the similarity (n, n) over n (Friedman & Dieng 2022,
    arXiv 2210.02410).
    """
    if not len(similarity):
        return NAN
    values = np.linalg.eigvalsh(similarity / len(similarity))
    values = values[values > 1e-12]  # eigenvalues that are 0 except for rounding
    return float(np.exp(-np.sum(values * np.log(values))))


Texts = dict[int, list[Words]]  # intent -> its texts
FIGURES = tuple(DiversityFigures.model_fields)


class IntentGroups(NamedTuple):
    """Groups of intents that a jackknife leaves out, the same for all policies and tasks."""

    intents: np.ndarray  # ids (intents,)
    remaining: np.ndarray  # of intervals.leave_out_groups, bool (groups, intents)

    @classmethod
    def of(cls, intent_ids: np.ndarray, seed: int = 0) -> "IntentGroups":
        intents = np.unique(intent_ids)
        return cls(intents, leave_out_groups(len(intents), seed))


class TaskDiversity(NamedTuple):
    """One task's diversity, without ratios."""

    diversity: Diversity
    without: dict[str, dict[str, np.ndarray]]  # by policy with figures: the figures without each group


def measure_task(
    rows: Columns,
    writers: Sequence[str],
    *,
    embed: Embed,
    groups: IntentGroups,
    seed: int = 0,
) -> TaskDiversity:
    """Measure each writer's diversity on one task's rows of the default probe.

    A writer with fewer than half as many answered intents as the median writer has no figures, as it would set everyone's
    number. Every prompt is cut to the lower quartile of the words of the writer that writes shortest; shorter prompts are left
    out. Each policy contributes its first remaining prompt for each intent that all writers have one for.

    Args:
        writers: all policies but the trivial baselines.
        embed: gives the similarity of the Vendi score.
        groups: measure also without each of these, for :func:`with_ratios`.
    """
    texts = {policy: _texts_by_intent(rows, policy) for policy in writers}
    answered = [len(by_intent) for by_intent in texts.values() if by_intent]
    least = max(1.0, float(np.median(answered)) / 2) if answered else 1.0
    figures = {policy: DiversityFigures() for policy, by_intent in texts.items() if by_intent}
    texts = {policy: by_intent for policy, by_intent in texts.items() if len(by_intent) >= least}
    length = _lowest_quartile([[len(text) for some in by_intent.values() for text in some] for by_intent in texts.values()])
    texts = {policy: _cut(by_intent, length) for policy, by_intent in texts.items()}
    shared = _ordered(set.intersection(*map(set, texts.values())) if texts else (), seed)
    without: dict[str, dict[str, np.ndarray]] = {}
    for policy, by_intent in texts.items() if shared else ():
        firsts = [by_intent[intent][0] for intent in shared]
        similarity = similarities(firsts[:SAMPLE], embed)
        figures[policy] = DiversityFigures(distinct_2=distinct_pairs(firsts), vendi=vendi(similarity))
        without[policy] = _without_groups(firsts, similarity, groups.remaining[:, np.searchsorted(groups.intents, shared)])
    words, n = (length if shared else 0), len(shared)
    return TaskDiversity(Diversity(words=words, n=n, fewest=n, policies=figures), without)


def _without_groups(texts: Sequence[Words], similarity: np.ndarray, remaining: np.ndarray) -> dict[str, np.ndarray]:
    """Return the figures of the texts that remain without each group; ``remaining`` is bool (groups, texts)."""
    from threadpoolctl import threadpool_limits

    pairs = [distinct_pairs(text for text, stays in zip(texts, kept, strict=True) if stays) for kept in remaining]
    # Threads cost more than they save on matrices of this size, and next to other work they wait for seconds.
    with threadpool_limits(1):
        scores = [vendi(similarity[np.ix_(kept, kept)]) for kept in remaining[:, : len(similarity)]]
    return {"distinct_2": np.array(pairs), "vendi": np.array(scores)}


def with_ratios(task: TaskDiversity) -> Diversity:
    """Return one task's diversity with its ratios."""
    return task.diversity.model_copy(update={"ratios": _ratios([task])})


def average_over_tasks(tasks: Sequence[TaskDiversity]) -> Diversity:
    """Return the mean over tasks; pooled texts would compare one task's vocabulary with another's.

    A policy without a figure on some task has none here, since its other tasks may be the more varied ones. ``n`` is the sum.
    """
    measured = [task.diversity for task in tasks if task.diversity.n]
    policies = sorted({policy for task in tasks for policy in task.diversity.policies})
    return Diversity(
        words=round(average(np.array([task.words for task in measured])), 1) if measured else 0,
        n=sum(task.n for task in measured),
        fewest=min((task.diversity.n for task in tasks), default=0),
        policies={
            policy: DiversityFigures(**{figure: _mean(measured, policy, figure) for figure in FIGURES}) for policy in policies
        },
        ratios=_ratios(tasks),
    )


def _mean(tasks: Sequence[Diversity], policy: str, figure: str) -> float:
    values = [getattr(task.policies.get(policy), figure, None) for task in tasks]
    return average(np.array(values, dtype=float))  # None becomes NaN


def _ratios(tasks: Sequence[TaskDiversity]) -> dict[str, DiversityRatios]:
    """Return the student's mean over tasks over that of each other writer.

    Both lose the same intents with each group, so an effect that intents have on both is not noise.
    """
    rivals = sorted({policy for task in tasks for policy in task.without} - {STUDENT})
    return {rival: DiversityRatios(**{figure: _ratio(tasks, rival, figure) for figure in FIGURES}) for rival in rivals}


def _ratio(tasks: Sequence[TaskDiversity], rival: str, figure: str) -> Interval:
    if not all(policy in task.without for task in tasks for policy in (STUDENT, rival)):
        return UNKNOWN
    mean, rival_mean = (_mean([task.diversity for task in tasks], policy, figure) for policy in (STUDENT, rival))
    without, rival_without = (np.mean([task.without[policy][figure] for task in tasks], axis=0) for policy in (STUDENT, rival))
    return jackknife(mean / rival_mean, without / rival_without)


def _texts_by_intent(rows: Columns, policy: str) -> Texts:
    """Return the accepted prompts of a policy by intent, in the order of their variations."""
    accepted = select(rows, (rows["policy"] == policy) & ~rows["rejected"])
    texts: Texts = {}
    for i in np.argsort(accepted["variation"], kind="stable"):
        texts.setdefault(int(accepted["intent_id"][i]), []).append(accepted["prompt"][i].lower().split())
    return texts


def _lowest_quartile(sizes_by_policy: Iterable[Sequence[int]]) -> int:
    """Return the lower quartile of the policy that has the lowest, at least 2."""
    return max(2, int(min((np.quantile(sizes, 0.25) for sizes in sizes_by_policy), default=0)))


def _cut(texts: Texts, length: int) -> Texts:
    """Cut all texts to one length; shorter ones are left out."""
    cut = {intent: [text[:length] for text in some if len(text) >= length] for intent, some in texts.items()}
    return {intent: some for intent, some in cut.items() if some}


def _ordered(intents: Iterable[int], seed: int) -> list[int]:
    """Return the intents in a seeded order that is the same for all policies."""
    # A product of 64 bits with an odd number: an order of ids that does not depend on which other ids there are.
    return sorted(intents, key=lambda intent: (intent ^ seed) * 0x9E3779B97F4A7C15 % 2**64)
