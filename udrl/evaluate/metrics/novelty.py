"""How much of each output is copied from the prompts that the student was trained on.

Training prompts are streamed. Only the runs of words of the outputs are kept, each with a flag that says whether training has
it, so that 52 million training prompts need the memory of one batch.
"""

from collections.abc import Iterable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from udrl.evaluate.outputs import Columns

RUN = 8  # words
COPIED_8 = "copied_8"  # column, float (rows,)
BATCH = 100_000  # prompts
_ODD = np.uint64(0x9E3779B97F4A7C15)


def add_copied_column(rows: Columns, training: Iterable[pa.Table] | None) -> tuple[int, Columns]:
    """Return the number of training prompts, and the rows with the column :data:`COPIED_8`; case does not count.

    The column is the share of a prompt's runs of :data:`RUN` words that stand in training prompts. It is NaN for a shorter
    prompt, and for a rejected output: as 0 that would look original.

    Args:
        rows: of the default probe.
        training: tables with a column ``prompt``, read once; None: unknown, then there is no column.
    """
    if training is None:
        return 0, rows
    hashes, owner = hash_ngrams(split_words(pa.array(rows["prompt"].tolist(), pa.string())), RUN)
    distinct, index = np.unique(hashes, return_inverse=True)
    seen = np.zeros(len(distinct), dtype=bool)
    n_training = 0
    for part in training:
        for batch in part.select(["prompt"]).to_batches(max_chunksize=BATCH):
            n_training += batch.num_rows
            seen |= np.isin(distinct, hash_ngrams(split_words(batch.column("prompt")), RUN)[0])
    rejected = rows["rejected"]
    runs = np.bincount(owner, minlength=len(rejected))
    copied = np.bincount(owner, seen[index], len(rejected))
    shares = np.divide(copied, runs, out=np.full(len(rejected), np.nan), where=(runs > 0) & ~rejected)
    return n_training, {**rows, COPIED_8: shares}


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
