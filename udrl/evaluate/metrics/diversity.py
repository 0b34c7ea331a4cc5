"""How varied each policy's accepted prompts are, across intents and within one, at equal length and equal number.

Longer texts and larger samples repeat more, and draws for one intent are more alike than draws for two. So all policies are
cut to one length, and across intents each gives one prompt to each of the same intents. Yardsticks follow the cut but do not
set it: an intent is shorter than what is written for it.
"""

import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np

from udrl.evaluate.metrics import intervals
from udrl.evaluate.metrics.control import average
from udrl.evaluate.outputs import STUDENT, Columns, where

Embed = Callable[[list[str]], np.ndarray]  # texts -> unit vectors (texts, dimensions)
Words = list[str]  # one text, lower-case
Draws = dict[int, list[Words]]  # intent -> texts for it
ACROSS = ("distinct_1", "distinct_2", "compression", "self_bleu", "vendi")
WITHIN = ("within_distance", "within_vendi")
COMPARED = ("distinct_2", "vendi")  # figures whose ratio of two policies has an interval
SAMPLE = 500  # prompts of a policy and task in Self-BLEU and the Vendi score: both grow with their number
INTENTS = 100  # intents of a policy and task in the Vendi score within an intent
ORDER = 4  # longest n-gram of Self-BLEU
EPSILON = 0.1  # stands for no match at all of an order
NAN = float("nan")


class Groups(NamedTuple):
    """Groups of intents to leave out, the same for all policies and tasks."""

    intents: np.ndarray  # ids (intents,)
    kept: np.ndarray  # of udrl.evaluate.metrics.intervals.groups, bool (groups, intents)

    @classmethod
    def of(cls, intent_ids: np.ndarray, seed: int = 0) -> "Groups":
        """Groups of the different ones among ``intent_ids``."""
        intents = np.unique(intent_ids)
        return cls(intents, intervals.groups(len(intents), seed))


class Varied(NamedTuple):
    """One task's diversity."""

    table: dict[str, Any]  # of the document, see measure
    without: dict[str, dict[str, np.ndarray]]  # by writer that set the cut: of each of COMPARED, its values without each group


def measure(
    rows: Columns, *, writers: Sequence[str], embed: Embed | None = None, seed: int = 0, groups: Groups | None = None
) -> Varied:
    """The figures of each policy of one task's rows of the default probe.

    A writer with fewer than half as many answered intents as the median writer takes no part: it would set everyone's number.
    Every prompt is cut to the lower quartile of the words of the writer that writes shortest; shorter prompts are left out.
    Across intents each policy gives its first prompt that is left to each intent that all writers have one for. Within an
    intent it gives as many draws as the lower quartile of the writer with the fewest; intents with fewer draws are left out.

    Args:
        rows: of :func:`udrl.evaluate.outputs.columns`.
        writers: the policies that set the cut.
        embed: gives the Vendi score's kernel, their cosine; None: the cosine of word-pair counts.
        groups: also measure without each of these groups of intents, for :func:`ratios`.

    Returns:
        The table: ``words`` and ``n`` of the comparison across intents, and per policy ``distinct_1`` and ``distinct_2``
        (distinct over all n-grams; higher is more varied; Li et al. 2016), ``compression`` (bytes over zlib bytes; lower is
        more varied; Shaib et al. 2024), ``self_bleu`` (lower is more varied; Zhu et al. 2018), ``vendi`` (effective number of
        different prompts; Friedman & Dieng 2022), ``within_distance`` (mean Jaccard distance of word sets of an intent's
        draws), ``within_vendi`` (mean Vendi score of an intent's draws). NaN where a policy has too few prompts (a yardstick
        that lacks some of the intents gives others instead); a yardstick without any figure is left out.
    """
    drawn = {policy: _draws(rows, policy) for policy in sorted(set(rows["policy"]))}
    setting = _setting({policy: len(drawn[policy]) for policy in writers if policy in drawn})
    sizes = [[len(text) for texts in drawn[policy].values() for text in texts] for policy in setting]
    length = max(2, int(min((np.quantile(found, 0.25) for found in sizes), default=0)))
    drawn = {policy: _cut(draws, length) for policy, draws in drawn.items()}
    shared = _ordered(set.intersection(*(set(drawn[policy]) for policy in setting)) if setting else (), seed)
    fewest = [[len(texts) for texts in drawn[policy].values() if len(texts) > 1] for policy in setting]
    several = max(2, int(min((np.quantile(found, 0.25) for found in fewest if found), default=0)))
    figures: dict[str, dict[str, float]] = {}
    without: dict[str, dict[str, np.ndarray]] = {}
    for policy, draws in drawn.items():
        figures[policy] = dict.fromkeys((*ACROSS, *WITHIN), NAN)
        if policy in writers and policy not in setting:
            continue
        others = _ordered(draws.keys() - set(shared), seed)
        chosen = [*(intent for intent in shared if intent in draws), *others][: len(shared)]
        if shared and len(chosen) == len(shared):
            texts = [draws[intent][0] for intent in chosen]
            similar = kernel(texts[:SAMPLE], embed)
            figures[policy] |= _across(texts, similar)
            if groups is not None and policy in setting:
                kept = groups.kept[:, np.searchsorted(groups.intents, chosen)]
                without[policy] = {"distinct_2": distinct_of(texts, 2, kept), "vendi": vendi_of(similar, kept)}
        several_each = [draws[intent][:several] for intent in _ordered(draws, seed) if len(draws[intent]) >= several]
        figures[policy] |= within(several_each, embed)
    figures = {p: found for p, found in figures.items() if p in writers or not np.isnan([*found.values()]).all()}
    return Varied({"words": length if shared else 0, "n": len(shared), "policies": figures}, without)


def table(rows: Columns, *, writers: Sequence[str], embed: Embed | None = None, seed: int = 0) -> dict[str, Any]:
    """The table of :func:`measure` alone."""
    return measure(rows, writers=writers, embed=embed, seed=seed).table


def _draws(rows: Columns, policy: str) -> Draws:
    """The accepted prompts of a policy by intent, in the order of their variations."""
    mine = where(rows, (rows["policy"] == policy) & ~rows["rejected"])
    found: Draws = {}
    for i in np.argsort(mine["variation"], kind="stable"):
        found.setdefault(int(mine["intent_id"][i]), []).append(mine["prompt"][i].lower().split())
    return found


def _setting(answered: dict[str, int]) -> list[str]:
    """The policies that set length and number, from how many intents each has a prompt for."""
    least = np.median([*answered.values()]) / 2 if answered else 0
    return [policy for policy, number in answered.items() if number and number >= least]


def _cut(draws: Draws, length: int) -> Draws:
    """All texts at one length; what is shorter is left out."""
    kept = {intent: [text[:length] for text in texts if len(text) >= length] for intent, texts in draws.items()}
    return {intent: texts for intent, texts in kept.items() if texts}


def _ordered(intents: Iterable[int], seed: int) -> list[int]:
    """The intents in an order that the seed gives and that is the same for all policies."""
    # Mixed with an odd number, as 64 bits: an order of ids that does not depend on which other ids there are.
    return sorted(intents, key=lambda intent: (intent ^ seed) * 0x9E3779B97F4A7C15 % 2**64)


def across(texts: Sequence[Words], embed: Embed | None = None) -> dict[str, float]:
    """The figures over texts of different intents."""
    return _across(texts, kernel(texts[:SAMPLE], embed))


def _across(texts: Sequence[Words], similar: np.ndarray) -> dict[str, float]:
    """The same, with the kernel of the first :data:`SAMPLE` texts."""
    return {
        "distinct_1": distinct(texts, 1),
        "distinct_2": distinct(texts, 2),
        "compression": compression_ratio([" ".join(text) for text in texts]),
        "self_bleu": self_bleu(texts[:SAMPLE]),
        "vendi": vendi(similar),
    }


def within(groups: Sequence[Sequence[Words]], embed: Embed | None = None) -> dict[str, float]:
    """The figures over the draws of one intent, averaged over intents; NaN without an intent of several draws."""
    groups = [group for group in groups if len(group) > 1]
    few = groups[:INTENTS]
    similar = kernel([text for group in few for text in group], embed)
    ends = np.cumsum([len(group) for group in few], dtype=int)
    scores = [vendi(similar[end - len(group) : end, end - len(group) : end]) for group, end in zip(few, ends, strict=True)]
    distances = [np.mean([jaccard(a, b) for a, b in combinations(group, 2)]) for group in groups]
    return {"within_distance": average(np.array(distances)), "within_vendi": average(np.array(scores))}


def over_tasks(of_tasks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean over tasks: pooled texts would compare one task's vocabulary with another's. A policy without a figure on some task
    has none here, since its other tasks may be the more varied ones. ``n`` is the sum, ``fewest`` the ``n`` of the task with
    the fewest."""
    policies = sorted({policy for task in of_tasks for policy in task["policies"]})
    found: dict[str, Any] = {policy: {} for policy in policies}
    for policy in policies:
        for name in (*ACROSS, *WITHIN):
            there = [task for task in of_tasks if any(not np.isnan(f[name]) for f in task["policies"].values())]
            found[policy][name] = average(np.array([task["policies"].get(policy, {}).get(name, np.nan) for task in there]))
    words = np.array([task["words"] for task in of_tasks if task["n"]])
    numbers = [task["n"] for task in of_tasks]
    return {
        "words": round(average(words), 1) if len(words) else 0,
        "n": sum(numbers),
        "fewest": min(numbers, default=0),
        "policies": found,
    }


def ratios(of_tasks: Sequence[Varied]) -> dict[str, Any]:
    """The student's mean over tasks over that of each other writer, by writer and each of :data:`COMPARED`.

    Both lose the same intents with each group, so what intents do to both is no noise. Unknown unless both have the figure on
    every task.
    """
    found: dict[str, Any] = {}
    for other in sorted({policy for task in of_tasks for policy in task.without} - {STUDENT}):
        known = all(policy in task.without for task in of_tasks for policy in (STUDENT, other))
        found[other] = {
            figure: (_ratio(of_tasks, other, figure) if known else intervals.UNKNOWN).plain() for figure in COMPARED
        }
    return found


def _ratio(of_tasks: Sequence[Varied], other: str, figure: str) -> intervals.Interval:
    whole, without = [], []
    for policy in (STUDENT, other):
        whole.append(np.mean([task.table["policies"][policy][figure] for task in of_tasks]))
        without.append(np.mean([task.without[policy][figure] for task in of_tasks], axis=0))
    return intervals.jackknife(float(whole[0] / whole[1]), without[0] / without[1])


def _grams(text: Words, n: int) -> list[tuple[str, ...]]:
    return [tuple(text[i : i + n]) for i in range(len(text) - n + 1)]


def distinct(texts: Sequence[Words], n: int) -> float:
    """Distinct n-grams over all n-grams of tokenised texts (Li et al. 2016)."""
    grams = [gram for text in texts for gram in _grams(text, n)]
    return len(set(grams)) / len(grams) if grams else NAN


def distinct_of(texts: Sequence[Words], n: int, kept: np.ndarray) -> np.ndarray:
    """The same of some texts at a time, all of one length; ``kept`` says which, bool (times, texts). NaN of no text."""
    place: dict[tuple[str, ...], int] = {}
    grams = np.array([[place.setdefault(gram, len(place)) for gram in _grams(text, n)] for text in texts])
    found = np.full(len(kept), NAN)
    for i, some in enumerate(kept):
        if grams[some].size:
            seen = np.zeros(len(place), dtype=bool)
            seen[grams[some]] = True
            found[i] = seen.sum() / grams[some].size
    return found


def compression_ratio(texts: Sequence[str]) -> float:
    """Bytes of the texts, a line each, over their zlib bytes, level 9 (Shaib et al. 2024)."""
    raw = "\n".join(texts).encode()
    return len(raw) / len(zlib.compress(raw, 9)) if raw else NAN


def jaccard(one: Words, other: Words) -> float:
    """Distance of the word sets: 0 for the same words, 1 with none in common."""
    a, b = set(one), set(other)
    return 1 - len(a & b) / len(a | b) if a | b else 0.0


def self_bleu(texts: Sequence[Words]) -> float:
    """Mean BLEU-4 of each text with all others as its references (Zhu et al. 2018, Texygen).

    As there, an order without a match counts :data:`EPSILON` matches (Chen & Cherry 2014, method 1), and a text that shares
    no word has 0. The brevity penalty looks at the closest length. NaN with fewer than two texts.
    """
    if len(texts) < 2:
        return NAN
    logs = np.zeros(len(texts))
    alone = np.zeros(len(texts), dtype=bool)
    for n in range(1, ORDER + 1):
        counts = [Counter(_grams(text, n)) for text in texts]
        # The largest count of each n-gram, whose it is, and the largest of anyone else: no pass over all pairs of texts.
        most: dict[tuple[str, ...], tuple[int, int, int]] = {}
        for i, mine in enumerate(counts):
            for gram, count in mine.items():
                first, owner, second = most.get(gram, (0, -1, 0))
                most[gram] = (count, i, first) if count > first else (first, owner, max(second, count))
        for i, mine in enumerate(counts):
            others = ((count, most[gram]) for gram, count in mine.items())
            matched = sum(min(count, second if owner == i else first) for count, (first, owner, second) in others)
            logs[i] += np.log((matched or EPSILON) / max(1, mine.total())) / ORDER
            if n == 1 and not matched:
                alone[i] = True
    lengths = Counter(len(text) for text in texts)
    penalties = [_brevity(len(text), lengths - Counter([len(text)])) for text in texts]
    return float(np.mean(np.where(alone, 0.0, np.exp(logs) * penalties)))


def _brevity(length: int, others: Counter[int]) -> float:
    closest = min(others, key=lambda other: (abs(other - length), other))
    return 1.0 if length >= closest else float(np.exp(1 - closest / max(1, length)))


def kernel(texts: Sequence[Words], embed: Embed | None = None) -> np.ndarray:
    """Cosines (texts, texts) of the embeddings, or of word-pair counts where there is no ``embed``."""
    if not texts:
        return np.zeros((0, 0))
    if embed is not None:
        lines = [" ".join(text) for text in texts]
        known = sorted(set(lines))
        place = {line: i for i, line in enumerate(known)}
        vectors = np.asarray(embed(known), dtype=float)[[place[line] for line in lines]]
        return np.asarray(vectors @ vectors.T)
    from scipy import sparse

    counts = [Counter(_grams(text, 2)) for text in texts]
    column = {gram: i for i, gram in enumerate(dict.fromkeys(gram for mine in counts for gram in mine))}
    norms = [np.sqrt(sum(count * count for count in mine.values())) for mine in counts]
    values = [count / norm for mine, norm in zip(counts, norms, strict=True) for count in mine.values()]
    columns = [column[gram] for mine in counts for gram in mine]
    starts = np.cumsum([0, *(len(mine) for mine in counts)])
    pairs = sparse.csr_matrix((values, columns, starts), shape=(len(texts), max(1, len(column))))
    return np.asarray((pairs @ pairs.T).toarray())


def vendi(similar: np.ndarray) -> float:
    """Effective number of different texts, 1 (copies) to n (nothing in common): the exponential of the entropy of the
    eigenvalues of the kernel (n, n) over n (Friedman & Dieng 2022, arXiv 2210.02410)."""
    if not len(similar):
        return NAN
    values = np.linalg.eigvalsh(similar / len(similar))
    values = values[values > 1e-12]  # rounding leaves specks beside zero
    return float(np.exp(-np.sum(values * np.log(values))))


def vendi_of(similar: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """The same of some texts at a time; ``kept`` says which, bool (times, n or more), of which the first n count."""
    from threadpoolctl import threadpool_limits

    # Matrices of this size are done before several threads have found each other; beside other work they wait for seconds.
    with threadpool_limits(1):
        return np.array([vendi(similar[np.ix_(some, some)]) for some in kept[:, : len(similar)]])
