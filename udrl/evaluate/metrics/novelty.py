"""How much of a policy's outputs is copied from the prompts that the student was trained on.

Training prompts are streamed. Only the n-grams of the outputs are kept, each with a flag that says whether training has it, so
that 52 million training prompts need the memory of one batch.
"""

from collections.abc import Iterable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from udrl.evaluate.document import CopiedShares, Novelty
from udrl.evaluate.metrics.control import average
from udrl.evaluate.outputs import Columns

ORDERS = (5, 8)  # words of an n-gram
COPIED_8 = "copied_8"  # column, float (rows,)
BATCH = 100_000  # prompts
BITS = 23  # of a hash: a table of 8 MiB
_ODD = np.uint64(0x9E3779B97F4A7C15)
_LOW_BITS = np.uint64((1 << BITS) - 1)


class _SeenGrams:
    """The n-grams of the outputs, and which of them training has."""

    def __init__(self, words: pa.ListArray, n: int) -> None:
        hashes, self.owner = hash_ngrams(words, n)
        self.n, self.texts = n, len(words)
        self.distinct, self.index = np.unique(hashes, return_inverse=True)
        self.seen = np.zeros(len(self.distinct), dtype=bool)
        self.low_bits = np.zeros(1 << BITS, dtype=bool)
        self.low_bits[self.distinct & _LOW_BITS] = True

    def look_for(self, words: pa.ListArray) -> None:
        """Flag the n-grams that stand in ``words``, training prompts."""
        if not len(self.distinct):
            return
        hashes, _ = hash_ngrams(words, self.n)
        # Most n-grams of training are in no output: a look at the low bits spares most of the binary searches.
        hashes = hashes[self.low_bits[hashes & _LOW_BITS]]
        positions = np.minimum(np.searchsorted(self.distinct, hashes), len(self.distinct) - 1)
        self.seen[positions[self.distinct[positions] == hashes]] = True

    def shares(self) -> np.ndarray:
        """Return the share of each text's n-grams that training has, (texts,), NaN without any."""
        total = np.bincount(self.owner, minlength=self.texts)
        seen = np.bincount(self.owner, self.seen[self.index], self.texts)
        return np.divide(seen, total, out=np.full(self.texts, np.nan), where=total > 0)


def copied_shares(rows: Columns, training: Iterable[pa.Table] | None) -> tuple[Novelty, Columns]:
    """Return the copied share of each policy's accepted prompts, over all tasks; case and white space do not count.

    The rows are returned with the column :data:`COPIED_8`. A rejected output has no share: as 0 it would look original.

    Args:
        rows: of the default probe.
        training: tables with a column ``prompt``, read once; None: unknown.
    """
    if training is None:
        return Novelty(policies={}, training=0), rows
    accepted = ~rows["rejected"]
    policies = rows["policy"][accepted]
    words = split_words(pa.array(rows["prompt"][accepted].tolist(), pa.string()))
    texts = pc.binary_join(words, " ")
    distinct_texts = pc.unique(texts)
    grams = {n: _SeenGrams(words, n) for n in ORDERS}
    exact: set[str] = set()
    n_training = 0
    for part in training:
        for batch in part.select(["prompt"]).to_batches(max_chunksize=BATCH):
            n_training += batch.num_rows
            batch_words = split_words(batch.column("prompt"))
            prompts = pc.binary_join(batch_words, " ")
            exact.update(pc.unique(prompts.filter(pc.is_in(prompts, value_set=distinct_texts))).to_pylist())
            for order in grams.values():
                order.look_for(batch_words)
    copied = np.array([text in exact for text in texts.to_pylist()], dtype=float)
    shares = {n: order.shares() for n, order in grams.items()}

    def mean_share(n: int, by_policy: np.ndarray) -> float:
        return average(shares[n][by_policy & ~np.isnan(shares[n])])

    copied_8 = np.full(len(accepted), np.nan)
    copied_8[accepted] = shares[8]
    by_policy = Novelty(
        policies={
            policy: CopiedShares(
                exact=average(copied[policies == policy]),
                copied_5=mean_share(5, policies == policy),
                copied_8=mean_share(8, policies == policy),
            )
            for policy in sorted(set(policies))
        },
        training=n_training,
    )
    return by_policy, {**rows, COPIED_8: copied_8}


def split_words(prompts: pa.Array) -> pa.ListArray:
    """Return the lower-case words of each text."""
    return pc.utf8_split_whitespace(pc.utf8_trim_whitespace(pc.utf8_lower(pc.fill_null(prompts, ""))))


def hash_ngrams(words: pa.ListArray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the hashes (uint64) of all n-grams of tokenized texts, and the position of the text that each is from.

    Hashes hold within one process only: Python salts the hashes of strings.
    """
    flat = words.flatten().dictionary_encode()
    by_code = np.array([hash(word) for word in flat.dictionary.to_pylist()], dtype=np.int64).view(np.uint64)
    word = by_code[flat.indices.to_numpy(zero_copy_only=False)] if len(flat) else by_code
    text = np.repeat(np.arange(len(words)), pc.list_value_length(words).to_numpy(zero_copy_only=False))
    starts = max(0, len(word) - n + 1)
    mixed = np.zeros(starts, dtype=np.uint64)
    for i in range(n):
        mixed = mixed * _ODD + word[i : i + starts]  # modulo 2**64
    within_text = text[:starts] == text[n - 1 : n - 1 + starts]
    return mixed[within_text], text[:starts][within_text]
