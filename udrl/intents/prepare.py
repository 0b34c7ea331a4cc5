"""The intents of a run: read or composed, split by subject, written to two Parquet files; what gave no intent to a third."""

import contextlib
import hashlib
import itertools
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.parquet as pq

from udrl import recipe, storage
from udrl.errors import UserError
from udrl.hashing import stable_id
from udrl.intents.composer import compose
from udrl.intents.readers import Reject, read
from udrl.intents.split import Intent, is_heldout

SCHEMA = pa.schema([("intent_id", pa.int64()), ("intent", pa.string()), ("subject", pa.string())])
REJECTS = pa.schema([("row", pa.int64()), ("text", pa.string()), ("reason", pa.string())])
ROW_GROUP = 4096  # rows


@dataclass(frozen=True)
class Summary:
    """What was written. ``dropped`` counts the rows that gave no intent (those of ``rejects.parquet``), ``reasons`` says why;
    ``digest`` stands for the intents themselves, in their order, so that a source that changed under its name is noticed."""

    n_train: int
    n_heldout: int
    n_subjects: int
    dropped: int
    reasons: dict[str, int] = field(default_factory=dict)
    digest: str = ""


def prepare(config: recipe.Intents, seed: int, out: str) -> Summary:
    """Write ``out/train.parquet`` and ``out/heldout.parquet``: intent_id (63-bit hash of the text), intent, subject.

    Rows that give no intent are written to ``out/rejects.parquet``: row (position in the source), text (its first 500
    characters), reason. Existing files are written again; the same recipe gives the same rows. All files appear at the
    end, or none.

    Raises:
        UserError: the source can't be read or gives nothing, or no subject is left to train on.
    """
    reasons: Counter[str] = Counter()
    counts = {"train": 0, "heldout": 0}
    subjects: set[int] = set()
    digest = hashlib.blake2b(digest_size=8)
    with contextlib.ExitStack() as stack:
        rejected = stack.enter_context(_rejects(storage.join(out, "rejects.parquet"), reasons))
        intents = _source(config, seed, rejected)
        # The first intent is drawn before anything is made, so that a bad source leaves no empty folder.
        intents = itertools.chain([next(intents)], intents)
        writers = {name: stack.enter_context(_writer(storage.join(out, f"{name}.parquet"))) for name in counts}
        for name, group in _batches(intents, config.heldout):
            counts[name] += len(group)
            subjects.update(stable_id(intent.subject) for intent in group)
            digest.update("\n".join([name, *(intent.text for intent in group)]).encode())
            writers[name].write_table(_table(group), row_group_size=ROW_GROUP)
        if not counts["train"]:
            raise UserError(
                f"intents.heldout={config.heldout}: all {counts['heldout']} intents of {config.source} are held out"
                " and none is left to train on; lower intents.heldout or give more intents"
            )
    return Summary(counts["train"], counts["heldout"], len(subjects), reasons.total(), dict(reasons), digest.hexdigest())


def _source(config: recipe.Intents, seed: int, rejected: Callable[[Reject], None]) -> Iterator[Intent]:
    if not config.source.startswith("builtin:"):
        return read(config.source, config.column, config.limit, rejected)
    if config.source != "builtin:composer":
        raise UserError(f"intents.source={config.source}: no such built-in source; use builtin:composer or a file's URI")
    if config.limit is None:
        raise UserError("intents.limit: must be set when intents.source is the built-in composer")
    return compose(config.limit, seed)


def _batches(intents: Iterator[Intent], share: float) -> Iterator[tuple[str, list[Intent]]]:
    """Groups of one row group each, by the split that they belong to."""
    waiting: dict[str, list[Intent]] = {"train": [], "heldout": []}
    for intent in intents:
        name = "heldout" if is_heldout(intent.subject, share) else "train"
        waiting[name].append(intent)
        if len(waiting[name]) == ROW_GROUP:
            yield name, waiting[name]
            waiting[name] = []
    yield from ((name, group) for name, group in waiting.items() if group)


def _table(group: list[Intent]) -> pa.Table:
    columns = [[stable_id(i.text) for i in group], [i.text for i in group], [i.subject for i in group]]
    return pa.table(columns, schema=SCHEMA)


@contextlib.contextmanager
def _writer(uri: str) -> Iterator[pq.ParquetWriter]:
    with storage.whole_file(uri) as sink, pq.ParquetWriter(sink, SCHEMA, compression="zstd") as writer:
        yield writer


@contextlib.contextmanager
def _rejects(uri: str, reasons: Counter[str]) -> Iterator[Callable[[Reject], None]]:
    """A sink of rejects, which appear at ``uri`` when the block ends and are counted in ``reasons`` as they come."""
    waiting: list[Reject] = []
    # Rows may be rejected before the first intent is found, and then nothing must have been made under ``uri`` yet.
    with tempfile.TemporaryFile() as spool:
        with pq.ParquetWriter(spool, REJECTS, compression="zstd") as writer:

            def write() -> None:
                columns = [[r.row for r in waiting], [r.text for r in waiting], [str(r.reason) for r in waiting]]
                writer.write_table(pa.table(columns, schema=REJECTS))
                waiting.clear()

            def add(reject: Reject) -> None:
                reasons[str(reject.reason)] += 1
                waiting.append(reject)
                if len(waiting) == ROW_GROUP:
                    write()

            yield add
            write()
        spool.seek(0)
        with storage.whole_file(uri) as sink:
            shutil.copyfileobj(spool, sink)
