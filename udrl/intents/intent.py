"""The intent, the decision which subjects are held out of training, and the Parquet files of intents."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from udrl import storage
from udrl.hashing import stable_id

INTENT_SCHEMA = pa.schema([("intent_id", pa.int64()), ("intent", pa.string()), ("subject", pa.string())])
ROW_GROUP = 4096  # rows


@dataclass(frozen=True)
class Intent:
    """A user's short request, and the subject that decides its split."""

    text: str
    subject: str


def is_heldout(subject: str, share: float) -> bool:
    """Return whether ``subject`` is held out of training; about ``share`` (0 to 1) of all subjects are.

    The decision depends on no seed, so that no round or rerun trains on a subject that another one evaluates. A larger share
    only adds subjects.
    """
    # The prefix keeps the decision independent of intent ids, which hash the same text for intents that users bring.
    return stable_id(f"heldout\x1f{subject.casefold()}") < share * 2**63


def is_validation(subject: str, share: float) -> bool:
    """Return whether training validates on ``subject`` instead of training on it; about ``share`` (0 to 1) of all are.

    The decision is independent of :func:`is_heldout`, and like that one depends on no seed.
    """
    return stable_id(f"validation\x1f{subject.casefold()}") < share * 2**63


def intents_table(intents: Sequence[Intent]) -> pa.Table:
    """Return rows of :data:`INTENT_SCHEMA`."""
    columns = [[stable_id(i.text) for i in intents], [i.text for i in intents], [i.subject for i in intents]]
    return pa.table(columns, schema=INTENT_SCHEMA)


@contextlib.contextmanager
def open_intents_writer(uri: str) -> Iterator[pq.ParquetWriter]:
    """Open an intents file for writing; it appears at ``uri`` when the block ends, unless the block raises."""
    with storage.atomic_file(uri) as sink, pq.ParquetWriter(sink, INTENT_SCHEMA, compression="zstd") as writer:
        yield writer


def iter_intents(uri: str) -> Iterator[pa.Table]:
    """Yield the row groups of an intents file."""
    fs, path = storage.open_filesystem(uri)
    with fs.open_input_file(path) as source:
        file = pq.ParquetFile(source)
        for group in range(file.num_row_groups):
            yield file.read_row_group(group)
