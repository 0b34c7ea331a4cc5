"""Diversity figures of a list of tokenized texts."""

import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import combinations

import numpy as np

from udrl.evaluate.metrics.control import average

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
