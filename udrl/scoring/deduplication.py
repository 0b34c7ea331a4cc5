"""Exact and near-duplicate prompts, detected in a stream with a fixed amount of memory.

Near-duplicates are found by MinHash and locality-sensitive hashing (Broder 1997; Leskovec et al., Mining of Massive Datasets,
chapter 3) with one Bloom filter per band instead of a table (LSHBloom, arXiv 2411.04257): a prompt takes a few dozen bytes,
and its text is not stored. rensa computes the signatures (Rust, a whole shard per call), rbloom is the filter. datasketch
includes LSHBloom, but creates one Python object per text, and its filters need a C library that has to be compiled.
"""

import hashlib
import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

import numpy as np

from udrl.recipe import Deduplicate
from udrl.text import words

PERMUTATIONS = 128  # hash functions of a signature
SEED = 1
NEW, EXACT, NEAR = 0, 1, 2  # verdicts
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


def shingles(prompt: str) -> list[str]:
    """Return the case-folded pairs of neighboring words, which depend on word order; a changed word changes two of them.

    A text of one word, or in a script without spaces, is a single shingle, so that it has no near-duplicates.
    """
    tokens = words(prompt)
    return [f"{a} {b}" for a, b in pairwise(tokens)] or tokens or [prompt.casefold()]


@lru_cache
def choose_bands(near: float) -> tuple[int, int]:
    """Return (bands, rows per band) of at most PERMUTATIONS values, for pairs that collide above the similarity ``near``.

    The choice minimizes the false positives below ``near`` plus the false negatives above it, summed over all similarities.
    """
    s = np.linspace(0, 1, 1001)

    def error(b: int, r: int) -> float:
        collision = 1 - (1 - s**r) ** b
        return float(np.where(s < near, collision, 1 - collision).sum())

    choices = [(b, r) for b in range(1, PERMUTATIONS + 1) for r in range(1, PERMUTATIONS // b + 1)]
    return min(choices, key=lambda choice: error(*choice))


def compute_keys(texts: Sequence[tuple[str, str, str]], near: float | None) -> np.ndarray:
    """Return the filter keys of (intent, task, prompt) triples: uint64 of shape (texts, 1 + bands).

    Column 0 identifies intent, task and prompt. Each other column identifies the task and one band of the prompt's signature;
    there are none if ``near`` is None.
    """
    exact = np.array([_exact_key(*text) for text in texts], dtype=np.uint64).reshape(-1, 1)
    if near is None or not texts:
        return np.hstack([exact, np.zeros((len(texts), choose_bands(near)[0] if near else 0), dtype=np.uint64)])
    from rensa import RMinHash

    matrix = RMinHash.digest_matrix_from_token_sets([shingles(prompt) for _, _, prompt in texts], PERMUTATIONS, SEED)
    n, rows = choose_bands(near)
    signatures = np.array(matrix.to_rows(), dtype=np.uint64)[:, : n * rows].reshape(len(texts), n, rows)
    task_keys = {task: np.uint64(_hash(task)) for _, task, _ in texts}
    mixed = np.repeat(np.array([task_keys[task] for _, task, _ in texts], dtype=np.uint64)[:, None], n, axis=1)
    for row in range(rows):
        mixed = (mixed ^ signatures[:, :, row]) * _MULTIPLIER
        mixed ^= mixed >> np.uint64(29)
    # rbloom uses Python's hash of an integer, which is the integer itself below 2**61 - 1.
    return np.hstack([exact, mixed >> np.uint64(4)])


def _exact_key(intent: str, task: str, prompt: str) -> int:
    return _hash(f"{intent}\x1f{task}\x1f{prompt.casefold()}")


def _hash(text: str) -> int:
    """Return 60 bits, so that rbloom takes the value unchanged."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 4


class BloomDeduplicator:
    """Bloom filters of the prompts so far, sized for ``expected`` prompts.

    It runs in a Ray actor and is the only state of deduplication. Its calls are numbered from 0 and must come in order, so
    that the result does not depend on which shard was parsed first.
    """

    def __init__(self, expected: int, config: Deduplicate) -> None:
        from rbloom import Bloom

        self.filters = [Bloom(max(expected, 1), config.false_positives) for _ in range(_count_filters(config))]
        self.next = 0

    def add_known(self, order: int, rows: np.ndarray) -> int:
        """Add the :func:`compute_keys` of prompts that an earlier run or round accepted and return their number."""
        self._check_order(order)
        for row in rows.tolist():
            for bloom, key in zip(self.filters, row, strict=True):
                bloom.add(key)
        return len(rows)

    def check_and_add(self, order: int, rows: np.ndarray) -> np.ndarray:
        """Return NEW, EXACT or NEAR (int8) for each row of :func:`compute_keys`, and add the new ones."""
        self._check_order(order)
        verdicts = np.zeros(len(rows), dtype=np.int8)
        exact, near = self.filters[0], self.filters[1:]
        for i, (exact_key, *band_keys) in enumerate(rows.tolist()):
            if exact_key in exact:
                verdicts[i] = EXACT
            elif any(key in bloom for key, bloom in zip(band_keys, near, strict=True)):
                verdicts[i] = NEAR
            else:
                exact.add(exact_key)
                for key, bloom in zip(band_keys, near, strict=True):
                    bloom.add(key)
        return verdicts

    def _check_order(self, order: int) -> None:
        if order != self.next:
            raise RuntimeError(f"deduplication: call {order} arrived when {self.next} was due")
        self.next += 1


def filter_bytes(expected: int, config: Deduplicate) -> int:
    """Return the memory of all filters for ``expected`` prompts: -ln(p) / ln(2)^2 bits per prompt and filter."""
    bits = -math.log(config.false_positives) / math.log(2) ** 2
    return math.ceil(max(expected, 1) * bits / 8) * _count_filters(config)


def megabytes_per_million(config: Deduplicate) -> float:
    """Return the memory of the filters for a million prompts."""
    return filter_bytes(1_000_000, config) / 1e6


def _count_filters(config: Deduplicate) -> int:
    """Return the number of filters: one for exact duplicates and one per band."""
    return 1 + (choose_bands(config.near)[0] if config.near else 0)
