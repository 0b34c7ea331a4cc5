"""What a policy's outputs copy from the prompts that the student was trained on.

Training prompts stream through: what is kept are the outputs' own n-grams, each with a mark once training has it. So 52
million training prompts take the memory of one batch.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from udrl.evaluate.metrics.control import average
from udrl.evaluate.outputs import Columns

ORDERS = (5, 8)  # words of a run
BATCH = 100_000  # prompts
BITS = 23  # of a hash: a table of 8 MiB
_ODD = np.uint64(0x9E3779B97F4A7C15)
_LAST = np.uint64((1 << BITS) - 1)


def table(rows: Columns, training: Iterable[pa.Table] | None) -> dict[str, Any]:
    """Copied shares of each policy's accepted prompts, whatever their task; case and white space do not count.

    Args:
        rows: of the default probe.
        training: tables with a column ``prompt``, read once; None: nothing is known.

    Returns:
        ``training``, the number of training prompts; per policy ``exact`` (share of prompts that stand word for word in
        training), ``copied_5`` and ``copied_8`` (mean share of a prompt's 5-grams and 8-grams that stand in training prompts;
        NaN where no prompt is that long).
    """
    if training is None:
        return {"policies": {}, "training": 0}
    kept = ~rows["rejected"]
    policies = rows["policy"][kept]
    words = split(pa.array(rows["prompt"][kept].tolist(), pa.string()))
    texts = pc.binary_join(words, " ")
    grams = {n: ngrams(words, n) for n in ORDERS}
    known = {n: np.unique(hashes) for n, (hashes, _) in grams.items()}
    ends = {n: _ends(hashes) for n, hashes in known.items()}
    seen = {n: np.zeros(len(hashes), dtype=bool) for n, hashes in known.items()}
    exact: set[str] = set()
    wanted, prompts = pc.unique(texts), 0
    for part in training:
        for batch in part.select(["prompt"]).to_batches(max_chunksize=BATCH):
            prompts += batch.num_rows
            there = split(batch.column("prompt"))
            lines = pc.binary_join(there, " ")
            exact.update(pc.unique(lines.filter(pc.is_in(lines, value_set=wanted))).to_pylist())
            for n in ORDERS:
                seen[n][_found(known[n], ends[n], ngrams(there, n)[0])] = True
    copied = np.array([text in exact for text in texts.to_pylist()], dtype=float)
    shares = {n: _shares(seen[n][np.searchsorted(known[n], hashes)], owner, len(texts)) for n, (hashes, owner) in grams.items()}
    found = {}
    for policy in sorted(set(policies)):
        mine = policies == policy
        found[policy] = {"exact": average(copied[mine])}
        for n, share in shares.items():
            found[policy][f"copied_{n}"] = average(share[mine & ~np.isnan(share)])
    return {"policies": found, "training": prompts}


def split(prompts: pa.Array) -> pa.ListArray:
    """The lower-case words of each text."""
    return pc.utf8_split_whitespace(pc.utf8_trim_whitespace(pc.utf8_lower(pc.fill_null(prompts, ""))))


def ngrams(words: pa.ListArray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Hashes (uint64) of all n-grams of tokenised texts, and the text (position) that each is from.

    The hashes hold within one process: Python salts those of its strings.
    """
    flat = words.flatten().dictionary_encode()
    hashed = np.array([hash(word) for word in flat.dictionary.to_pylist()], dtype=np.int64).view(np.uint64)
    word = hashed[flat.indices.to_numpy(zero_copy_only=False)] if len(flat) else hashed
    text = np.repeat(np.arange(len(words)), pc.list_value_length(words).to_numpy(zero_copy_only=False))
    many = max(0, len(word) - n + 1)
    mixed = np.zeros(many, dtype=np.uint64)
    for i in range(n):
        mixed = mixed * _ODD + word[i : i + many]  # modulo 2**64
    inside = text[:many] == text[n - 1 : n - 1 + many]
    return mixed[inside], text[:many][inside]


def _ends(known: np.ndarray) -> np.ndarray:
    """Which last bits occur among the hashes, bool (2**BITS,)."""
    last = np.zeros(1 << BITS, dtype=bool)
    last[known & _LAST] = True
    return last


def _found(known: np.ndarray, ends: np.ndarray, hashes: np.ndarray) -> np.ndarray:
    """Positions in the sorted ``known``, of which ``ends`` are the last bits, of those ``hashes`` that are there."""
    if not len(known):
        return np.zeros(0, dtype=int)
    # Nearly all of training is not there: a look at the last bits spares the binary search, which is most of the time.
    hashes = hashes[ends[hashes & _LAST]]
    place = np.minimum(np.searchsorted(known, hashes), len(known) - 1)
    return place[known[place] == hashes]


def _shares(marked: np.ndarray, owner: np.ndarray, texts: int) -> np.ndarray:
    """Share of each text's n-grams that are marked (texts,), NaN without any."""
    total = np.bincount(owner, minlength=texts)
    return np.divide(np.bincount(owner, marked, texts), total, out=np.full(texts, np.nan), where=total > 0)
