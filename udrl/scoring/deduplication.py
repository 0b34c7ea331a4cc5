"""What was said before: exact and near-duplicate prompts, found as they stream past, in memory that is fixed beforehand.

Near-duplicates are found by MinHash and locality-sensitive hashing (Broder 1997; Leskovec et al., Mining of Massive
Datasets, chapter 3) with a Bloom filter a band in place of a table (LSHBloom, arXiv 2411.04257): an episode takes a few
dozen bytes, and none of its text is kept. rensa makes the signatures (Rust, a whole shard in one call), rbloom the filters.
datasketch has LSHBloom itself, but one Python object a text, and its filters want a C library that has to be compiled.
"""

import hashlib
import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

import numpy as np

from udrl.recipe import Deduplicate
from udrl.scoring.rewards import words

PERMUTATIONS = 128
SEED = 1
NEW, EXACT, NEAR = 0, 1, 2
_ROUND = np.uint64(0x9E3779B97F4A7C15)


def shingles(prompt: str) -> list[str]:
    """Pairs of neighbouring words, case-folded: a changed word costs two of them, and a changed order is a difference.

    A text of one word, or in a script without spaces, is its own shingle: it is near to nothing but itself.
    """
    said = words(prompt)
    return [f"{a} {b}" for a, b in pairwise(said)] or said or [prompt.casefold()]


@lru_cache
def bands(near: float) -> tuple[int, int]:
    """(bands, rows a band) of at most PERMUTATIONS values, for which pairs collide where their similarity passes ``near``:
    the smallest sum of wrongly found pairs below and missed pairs above, over all similarities."""
    s = np.linspace(0, 1, 1001)

    def error(b: int, r: int) -> float:
        found = 1 - (1 - s**r) ** b
        return float(np.where(s < near, found, 1 - found).sum())

    choices = [(b, r) for b in range(1, PERMUTATIONS + 1) for r in range(1, PERMUTATIONS // b + 1)]
    return min(choices, key=lambda choice: error(*choice))


def keys(texts: Sequence[tuple[str, str, str]], near: float | None) -> np.ndarray:
    """What to look up of each (intent, task, prompt): uint64 of shape (texts, 1 + bands).

    Column 0 stands for intent, task and prompt; the others for the task and one band of the prompt's signature.
    """
    exact = np.array([_exact(*text) for text in texts], dtype=np.uint64).reshape(-1, 1)
    if near is None or not texts:
        return np.hstack([exact, np.zeros((len(texts), bands(near)[0] if near else 0), dtype=np.uint64)])
    from rensa import RMinHash

    matrix = RMinHash.digest_matrix_from_token_sets([shingles(prompt) for _, _, prompt in texts], PERMUTATIONS, SEED)
    n, rows = bands(near)
    signatures = np.array(matrix.to_rows(), dtype=np.uint64)[:, : n * rows].reshape(len(texts), n, rows)
    of_task = {task: np.uint64(_digest(task)) for _, task, _ in texts}
    mixed = np.repeat(np.array([of_task[task] for _, task, _ in texts], dtype=np.uint64)[:, None], n, axis=1)
    for row in range(rows):
        mixed = (mixed ^ signatures[:, :, row]) * _ROUND
        mixed ^= mixed >> np.uint64(29)
    # A Bloom filter takes Python's hash of a number, which is the number itself below 2**61 - 1.
    return np.hstack([exact, mixed >> np.uint64(4)])


def _exact(intent: str, task: str, prompt: str) -> int:
    return _digest(f"{intent}\x1f{task}\x1f{prompt.casefold()}")


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 4


class BloomDeduplicator:
    """The prompts said so far, as Bloom filters for ``expected`` of them.

    The one state of deduplication; it lives in a Ray actor. Shards come in order, each once: what is kept must not depend
    on which was parsed first. ``start`` is the number of the first.
    """

    def __init__(self, expected: int, config: Deduplicate, start: int = 0) -> None:
        from rbloom import Bloom

        filters = 1 + (bands(config.near)[0] if config.near else 0)
        self.filters = [Bloom(max(expected, 1), config.false_positives) for _ in range(filters)]
        self.next = 0

    def add_known(self, order: int, rows: np.ndarray) -> int:
        """Add the :func:`keys` of prompts that were kept in an earlier run or round; return how many."""
        self._take(order)
        for row in rows.tolist():
            for found, key in zip(self.filters, row, strict=True):
                found.add(key)
        return len(rows)

    def check_and_add(self, order: int, rows: np.ndarray) -> np.ndarray:
        """NEW, EXACT or NEAR for each row of :func:`keys`, int8; the new ones are added."""
        self._take(order)
        verdicts = np.zeros(len(rows), dtype=np.int8)
        exact, near = self.filters[0], self.filters[1:]
        for i, (whole, *parts) in enumerate(rows.tolist()):
            if whole in exact:
                verdicts[i] = EXACT
            elif any(part in found for part, found in zip(parts, near, strict=True)):
                verdicts[i] = NEAR
            else:
                exact.add(whole)
                for part, found in zip(parts, near, strict=True):
                    found.add(part)
        return verdicts

    def _take(self, order: int) -> None:
        if order != self.next:
            raise RuntimeError(f"deduplication: step {order} came where {self.next} was due")
        self.next += 1


def bytes_of(expected: int, config: Deduplicate) -> int:
    """Memory of the filters for ``expected`` prompts: -ln(p) / ln(2)^2 bits of each, in one filter and in one a band."""
    bits = -math.log(config.false_positives) / math.log(2) ** 2
    return math.ceil(max(expected, 1) * bits / 8) * (1 + (bands(config.near)[0] if config.near else 0))


def megabytes_per_million(config: Deduplicate) -> float:
    """Memory of the filters for a million prompts."""
    return bytes_of(1_000_000, config) / 1e6
