"""How varied each policy's accepted prompts are, across intents and within one, at equal length and equal number.

Longer texts and larger samples repeat more, so all policies are cut to one length and give as many prompts, drawn by seed.
Yardsticks follow the cut but do not set it: an intent is shorter than what is written for it.
"""

import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from udrl.evaluation.control import average
from udrl.evaluation.outputs import Columns, where

Embed = Callable[[list[str]], np.ndarray]  # texts -> unit vectors (texts, dimensions)
Words = list[str]  # one text, lower-case
ACROSS = ("distinct_1", "distinct_2", "compression", "self_bleu", "vendi")
WITHIN = ("within_distance", "within_vendi")
SAMPLE = 500  # prompts of a policy and task in Self-BLEU and the Vendi score: both grow with their number
INTENTS = 100  # intents of a policy and task in the Vendi score within an intent
ORDER = 4  # longest n-gram of Self-BLEU
EPSILON = 0.1  # stands for no match at all of an order
NAN = float("nan")


def table(rows: Columns, *, writers: Sequence[str], embed: Embed | None = None, seed: int = 0) -> dict[str, Any]:
    """The figures of each policy of one task's rows of the default probe.

    Every prompt is cut to the lower quartile of the words of the writer that writes shortest (shorter prompts are left out),
    and each policy gives as many prompts as the writer with the fewest. Within an intent, each gives as many draws as the
    lower quartile of the writer with the fewest; intents with fewer draws are left out.

    Args:
        rows: of :func:`udrl.evaluation.outputs.columns`.
        writers: the policies that set the cut.
        embed: gives the Vendi score's kernel, their cosine; None: the cosine of word-pair counts.

    Returns:
        ``words`` and ``n`` of the comparison, and per policy: ``distinct_1`` and ``distinct_2`` (distinct over all n-grams;
        higher is more varied; Li et al. 2016), ``compression`` (bytes over zlib bytes; lower is more varied; Shaib et al.
        2024), ``self_bleu`` (lower is more varied; Zhu et al. 2018), ``vendi`` (effective number of different prompts;
        Friedman & Dieng 2022), ``within_distance`` (mean Jaccard distance of word sets of an intent's draws), ``within_vendi``
        (mean Vendi score of an intent's draws). NaN where a policy has too few prompts; a yardstick without any figure is left
        out.
    """
    texts: dict[str, list[Words]] = {}
    owners: dict[str, np.ndarray] = {}
    for policy in sorted(set(rows["policy"])):
        mine = where(rows, (rows["policy"] == policy) & ~rows["rejected"])
        texts[policy], owners[policy] = [p.lower().split() for p in mine["prompt"]], mine["intent_id"]
    setting = [policy for policy in writers if texts.get(policy)] or [policy for policy in texts if texts[policy]]
    length = max(2, int(min((np.quantile([len(t) for t in texts[policy]], 0.25) for policy in setting), default=0)))
    for policy, words in texts.items():
        keep = [i for i, text in enumerate(words) if len(text) >= length]
        texts[policy], owners[policy] = [words[i][:length] for i in keep], owners[policy][keep]
    number = min((len(texts[policy]) for policy in setting if texts[policy]), default=0)
    groups = {policy: _groups(words, owners[policy], seed) for policy, words in texts.items()}
    sizes = [[len(group) for group in groups[policy] if len(group) > 1] for policy in setting]
    draws = max(2, int(min((np.quantile(found, 0.25) for found in sizes if found), default=0)))
    found: dict[str, dict[str, float]] = {}
    for policy, words in texts.items():
        drawn = np.random.default_rng(seed).permutation(len(words))[:number]
        enough = number and len(drawn) == number
        found[policy] = {
            **(across([words[i] for i in drawn], embed) if enough else dict.fromkeys(ACROSS, NAN)),
            **within([group[:draws] for group in groups[policy] if len(group) >= draws], embed),
        }
    found = {
        policy: figures for policy, figures in found.items() if policy in writers or not np.isnan([*figures.values()]).all()
    }
    return {"words": length if number else 0, "n": number, "policies": found}


def _groups(texts: Sequence[Words], owners: np.ndarray, seed: int) -> list[list[Words]]:
    """The texts of each intent, the intents in an order that the seed gives and that is the same for all policies."""
    found: dict[int, list[Words]] = {}
    for text, owner in zip(texts, owners, strict=True):
        found.setdefault(int(owner), []).append(text)
    # Mixed with an odd number, as 64 bits: an order of ids that does not depend on which other ids there are.
    mixed = {owner: (owner ^ seed) * 0x9E3779B97F4A7C15 % 2**64 for owner in found}
    return [found[owner] for owner in sorted(found, key=lambda owner: mixed[owner])]


def across(texts: Sequence[Words], embed: Embed | None = None) -> dict[str, float]:
    """The figures over texts of different intents."""
    few = texts[:SAMPLE]
    return {
        "distinct_1": distinct(texts, 1),
        "distinct_2": distinct(texts, 2),
        "compression": compression_ratio([" ".join(text) for text in texts]),
        "self_bleu": self_bleu(few),
        "vendi": vendi(kernel(few, embed)),
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
    """Mean over tasks: pooled texts would compare one task's vocabulary with another's. ``n`` is the sum."""
    policies = sorted({policy for task in of_tasks for policy in task["policies"]})
    found: dict[str, Any] = {policy: {} for policy in policies}
    for policy in policies:
        figures = [task["policies"][policy] for task in of_tasks if policy in task["policies"]]
        for name in (*ACROSS, *WITHIN):
            known = np.array([f[name] for f in figures if not np.isnan(f[name])])
            found[policy][name] = average(known)
    words = np.array([task["words"] for task in of_tasks if task["n"]])
    return {"words": round(average(words), 1) if len(words) else 0, "n": sum(t["n"] for t in of_tasks), "policies": found}


def _grams(text: Words, n: int) -> list[tuple[str, ...]]:
    return [tuple(text[i : i + n]) for i in range(len(text) - n + 1)]


def distinct(texts: Sequence[Words], n: int) -> float:
    """Distinct n-grams over all n-grams of tokenised texts (Li et al. 2016)."""
    grams = [gram for text in texts for gram in _grams(text, n)]
    return len(set(grams)) / len(grams) if grams else NAN


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
