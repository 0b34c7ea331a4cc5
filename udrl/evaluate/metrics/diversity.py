"""How varied each policy's accepted prompts are, across intents and within one, at equal length and equal number.

Longer texts and larger samples repeat more, and prompts for one intent are more alike than prompts for two. So all policies are
cut to one length, and across intents each contributes one prompt for each of the same intents. Trivial baselines follow the cut
but do not set it: an intent is shorter than a prompt for it.
"""

import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np

from udrl.evaluate.document import UNKNOWN, Diversity, DiversityFigures, DiversityRatios, Interval
from udrl.evaluate.metrics.control import average
from udrl.evaluate.metrics.intervals import jackknife, leave_out_groups
from udrl.evaluate.outputs import STUDENT, Columns, select

Embed = Callable[[list[str]], np.ndarray]  # texts -> unit vectors (texts, dimensions)
Words = list[str]  # one text, lower-case
SAMPLE = 500  # texts in Self-BLEU and the Vendi score, which both grow with their number
INTENTS = 100  # intents in the Vendi score within an intent
ORDER = 4  # longest n-gram of Self-BLEU
EPSILON = 0.1  # matches of an order of Self-BLEU that has none
NAN = float("nan")


def figures_across(texts: Sequence[Words], similarity: np.ndarray) -> dict[str, float]:
    """Return the figures of texts for different intents; ``similarity`` is that of the first :data:`SAMPLE` of them."""
    return {
        "distinct_1": distinct(texts, 1),
        "distinct_2": distinct(texts, 2),
        "compression": compression_ratio([" ".join(text) for text in texts]),
        "self_bleu": self_bleu(texts[:SAMPLE]),
        "vendi": vendi(similarity),
    }


def figures_within(by_intent: Sequence[Sequence[Words]], embed: Embed | None = None) -> dict[str, float]:
    """Return the mean figures of the texts for one intent, over the intents with several; NaN if there is none."""
    by_intent = [texts for texts in by_intent if len(texts) > 1]
    few = by_intent[:INTENTS]
    similarity = similarities([text for texts in few for text in texts], embed)
    ends = np.cumsum([len(texts) for texts in few], dtype=int)
    blocks = [slice(end - len(texts), end) for texts, end in zip(few, ends, strict=True)]
    scores = [vendi(similarity[block, block]) for block in blocks]
    distances = [np.mean([jaccard_distance(a, b) for a, b in combinations(texts, 2)]) for texts in by_intent]
    return {"within_distance": average(np.array(distances)), "within_vendi": average(np.array(scores))}


def ngrams(text: Words, n: int) -> list[tuple[str, ...]]:
    return [tuple(text[i : i + n]) for i in range(len(text) - n + 1)]


def distinct(texts: Sequence[Words], n: int) -> float:
    """Return the share of distinct n-grams among all n-grams (Li et al. 2016)."""
    grams = [gram for text in texts for gram in ngrams(text, n)]
    return len(set(grams)) / len(grams) if grams else NAN


def distinct_of_subsets(texts: Sequence[Words], n: int, subsets: np.ndarray) -> np.ndarray:
    """Return :func:`distinct` of each subset of texts of one length; ``subsets`` is bool (subsets, texts)."""
    codes: dict[tuple[str, ...], int] = {}
    grams = np.array([[codes.setdefault(gram, len(codes)) for gram in ngrams(text, n)] for text in texts])
    shares = np.full(len(subsets), NAN)
    for i, subset in enumerate(subsets):
        if grams[subset].size:
            shares[i] = len(np.unique(grams[subset])) / grams[subset].size
    return shares


def compression_ratio(texts: Sequence[str]) -> float:
    """Return the bytes of the texts, a line each, over their zlib bytes at level 9 (Shaib et al. 2024)."""
    raw = "\n".join(texts).encode()
    return len(raw) / len(zlib.compress(raw, 9)) if raw else NAN


def jaccard_distance(one: Words, other: Words) -> float:
    """Return the distance of two word sets: 0 for the same words, 1 with none in common."""
    a, b = set(one), set(other)
    return 1 - len(a & b) / len(a | b) if a | b else 0.0


def self_bleu(texts: Sequence[Words]) -> float:
    """Return the mean BLEU-4 of each text with all others as its references (Zhu et al. 2018, Texygen).

    As there, an order without a match counts :data:`EPSILON` matches (Chen & Cherry 2014, method 1), and a text that shares
    no word has 0. The brevity penalty uses the closest length. NaN with fewer than two texts.
    """
    if len(texts) < 2:
        return NAN
    logs = np.zeros(len(texts))
    shares_a_word = np.ones(len(texts), dtype=bool)
    for n in range(1, ORDER + 1):
        counts = [Counter(ngrams(text, n)) for text in texts]
        # The largest count of each n-gram, its text, and the largest count in another text: no pass over all pairs of texts.
        largest: dict[tuple[str, ...], tuple[int, int, int]] = {}
        for i, text_counts in enumerate(counts):
            for gram, count in text_counts.items():
                first, owner, second = largest.get(gram, (0, -1, 0))
                largest[gram] = (count, i, first) if count > first else (first, owner, max(second, count))
        for i, text_counts in enumerate(counts):
            references = ((count, largest[gram]) for gram, count in text_counts.items())
            matches = sum(min(count, second if owner == i else first) for count, (first, owner, second) in references)
            logs[i] += np.log((matches or EPSILON) / max(1, text_counts.total())) / ORDER
            if n == 1 and not matches:
                shares_a_word[i] = False
    lengths = Counter(len(text) for text in texts)
    penalties = [_brevity_penalty(len(text), lengths - Counter([len(text)])) for text in texts]
    return float(np.mean(np.where(shares_a_word, np.exp(logs) * penalties, 0.0)))


def _brevity_penalty(length: int, others: Counter[int]) -> float:
    closest = min(others, key=lambda other: (abs(other - length), other))
    return 1.0 if length >= closest else float(np.exp(1 - closest / max(1, length)))


def similarities(texts: Sequence[Words], embed: Embed | None = None) -> np.ndarray:
    """Return the cosines (texts, texts) of the embeddings, or of the counts of word pairs without ``embed``."""
    if not texts:
        return np.zeros((0, 0))
    if embed is not None:
        lines = [" ".join(text) for text in texts]
        distinct_lines, positions = np.unique(np.array(lines, dtype=object), return_inverse=True)
        vectors = np.asarray(embed(distinct_lines.tolist()), dtype=float)[positions]
        return np.asarray(vectors @ vectors.T)
    from scipy import sparse

    counts = [Counter(ngrams(text, 2)) for text in texts]
    columns = {gram: i for i, gram in enumerate(dict.fromkeys(gram for text_counts in counts for gram in text_counts))}
    norms = [np.sqrt(sum(count * count for count in text_counts.values())) for text_counts in counts]
    values = [count / norm for text_counts, norm in zip(counts, norms, strict=True) for count in text_counts.values()]
    indices = [columns[gram] for text_counts in counts for gram in text_counts]
    starts = np.cumsum([0, *(len(text_counts) for text_counts in counts)])
    vectors = sparse.csr_matrix((values, indices, starts), shape=(len(texts), max(1, len(columns))))
    return np.asarray((vectors @ vectors.T).toarray())


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


def vendi_of_subsets(similarity: np.ndarray, subsets: np.ndarray) -> np.ndarray:
    """Return :func:`vendi` of each subset of texts; ``subsets`` is bool (subsets, n or more), of which the first n count."""
    from threadpoolctl import threadpool_limits

    # Threads cost more than they save on matrices of this size, and next to other work they wait for seconds.
    with threadpool_limits(1):
        return np.array([vendi(similarity[np.ix_(subset, subset)]) for subset in subsets[:, : len(similarity)]])


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
    without: dict[str, dict[str, np.ndarray]]  # by policy that set the cut: figures of DiversityRatios without each group


def measure_task(
    rows: Columns,
    writers: Sequence[str],
    *,
    embed: Embed | None = None,
    seed: int = 0,
    groups: IntentGroups | None = None,
) -> TaskDiversity:
    """Measure each policy's diversity on one task's rows of the default probe.

    A writer with fewer than half as many answered intents as the median writer is left out, as it would set everyone's number.
    Every prompt is cut to the lower quartile of the words of the writer that writes shortest; shorter prompts are left out.
    Across intents, each policy contributes its first remaining prompt for each intent that all writers have one for. Within an
    intent, it contributes as many prompts as the lower quartile of the writer with the fewest; intents with fewer are left out.
    A figure is NaN if a policy has too few prompts. A trivial baseline that lacks some of the intents contributes others; one
    without any figure is left out.

    Args:
        writers: the policies that set the cut: all but the trivial baselines.
        embed: gives the similarity of the Vendi score; None: the cosine of the counts of word pairs.
        groups: also measure without each of these, for :func:`with_ratios`.
    """
    texts = {policy: _texts_by_intent(rows, policy) for policy in sorted(set(rows["policy"]))}
    setters = _policies_that_set_the_cut({policy: len(texts[policy]) for policy in writers if policy in texts})
    length = _lowest_quartile([[len(text) for some in texts[policy].values() for text in some] for policy in setters])
    texts = {policy: _cut(by_intent, length) for policy, by_intent in texts.items()}
    shared = _ordered(set.intersection(*(set(texts[policy]) for policy in setters)) if setters else (), seed)
    several = _lowest_quartile([[len(some) for some in texts[policy].values() if len(some) > 1] for policy in setters])
    figures: dict[str, DiversityFigures] = {}
    without: dict[str, dict[str, np.ndarray]] = {}
    for policy, by_intent in texts.items():
        if policy in writers and policy not in setters:
            figures[policy] = DiversityFigures()
            continue
        others = _ordered(by_intent.keys() - set(shared), seed)
        intents = [*(intent for intent in shared if intent in by_intent), *others][: len(shared)]
        across: dict[str, float] = {}
        if shared and len(intents) == len(shared):
            firsts = [by_intent[intent][0] for intent in intents]
            similarity = similarities(firsts[:SAMPLE], embed)
            across = figures_across(firsts, similarity)
            if groups is not None and policy in setters:
                subsets = groups.remaining[:, np.searchsorted(groups.intents, intents)]
                pairs, scores = distinct_of_subsets(firsts, 2, subsets), vendi_of_subsets(similarity, subsets)
                without[policy] = {"distinct_2": pairs, "vendi": scores}
        within = [by_intent[intent][:several] for intent in _ordered(by_intent, seed) if len(by_intent[intent]) >= several]
        measured = DiversityFigures(**across, **figures_within(within, embed))
        if policy in writers or measured != DiversityFigures():
            figures[policy] = measured
    return TaskDiversity(Diversity(words=length if shared else 0, n=len(shared), policies=figures), without)


def with_ratios(task: TaskDiversity) -> Diversity:
    """Return one task's diversity with its ratios."""
    return task.diversity.model_copy(update={"ratios": _ratios([task])})


def average_over_tasks(tasks: Sequence[TaskDiversity]) -> Diversity:
    """Return the mean over tasks; pooled texts would compare one task's vocabulary with another's.

    A policy without a figure on some task has none here, since its other tasks may be the more varied ones. ``n`` is the sum.
    """
    by_task = [task.diversity for task in tasks]
    policies = sorted({policy for task in by_task for policy in task.policies})
    words = np.array([task.words for task in by_task if task.n])
    return Diversity(
        words=round(average(words), 1) if len(words) else 0,
        n=sum(task.n for task in by_task),
        fewest=min((task.n for task in by_task), default=0),
        policies={policy: _average_figures(by_task, policy) for policy in policies},
        ratios=_ratios(tasks),
    )


def _average_figures(tasks: Sequence[Diversity], policy: str) -> DiversityFigures:
    means = {}
    for figure in FIGURES:
        measured = [task for task in tasks if any(_value(task, other, figure) is not None for other in task.policies)]
        values = [_value(task, policy, figure) for task in measured]
        means[figure] = average(np.array(values, dtype=float))  # None becomes NaN
    return DiversityFigures(**means)


def _value(task: Diversity, policy: str, figure: str) -> float | None:
    return getattr(task.policies[policy], figure) if policy in task.policies else None


def _ratios(tasks: Sequence[TaskDiversity]) -> dict[str, DiversityRatios]:
    """Return the student's mean over tasks over that of each other writer.

    Both lose the same intents with each group, so an effect that intents have on both is not noise.
    """
    rivals = sorted({policy for task in tasks for policy in task.without} - {STUDENT})
    return {
        rival: DiversityRatios(distinct_2=_ratio(tasks, rival, "distinct_2"), vendi=_ratio(tasks, rival, "vendi"))
        for rival in rivals
    }


def _ratio(tasks: Sequence[TaskDiversity], rival: str, figure: str) -> Interval:
    if not all(policy in task.without for task in tasks for policy in (STUDENT, rival)):
        return UNKNOWN
    means, means_without = [], []
    for policy in (STUDENT, rival):
        means.append(np.mean(np.array([_value(task.diversity, policy, figure) for task in tasks], dtype=float)))
        means_without.append(np.mean([task.without[policy][figure] for task in tasks], axis=0))
    return jackknife(float(means[0] / means[1]), means_without[0] / means_without[1])


def _texts_by_intent(rows: Columns, policy: str) -> Texts:
    """Return the accepted prompts of a policy by intent, in the order of their variations."""
    accepted = select(rows, (rows["policy"] == policy) & ~rows["rejected"])
    texts: Texts = {}
    for i in np.argsort(accepted["variation"], kind="stable"):
        texts.setdefault(int(accepted["intent_id"][i]), []).append(accepted["prompt"][i].lower().split())
    return texts


def _policies_that_set_the_cut(answered: dict[str, int]) -> list[str]:
    """Return the policies that set length and number, from the number of intents that each has a prompt for."""
    least = np.median([*answered.values()]) / 2 if answered else 0
    return [policy for policy, intents in answered.items() if intents and intents >= least]


def _lowest_quartile(sizes_by_policy: Iterable[Sequence[int]]) -> int:
    """Return the lower quartile of the policy that has the lowest, at least 2."""
    return max(2, int(min((np.quantile(sizes, 0.25) for sizes in sizes_by_policy if sizes), default=0)))


def _cut(texts: Texts, length: int) -> Texts:
    """Cut all texts to one length; shorter ones are left out."""
    cut = {intent: [text[:length] for text in some if len(text) >= length] for intent, some in texts.items()}
    return {intent: some for intent, some in cut.items() if some}


def _ordered(intents: Iterable[int], seed: int) -> list[int]:
    """Return the intents in a seeded order that is the same for all policies."""
    # A product of 64 bits with an odd number: an order of ids that does not depend on which other ids there are.
    return sorted(intents, key=lambda intent: (intent ^ seed) * 0x9E3779B97F4A7C15 % 2**64)
