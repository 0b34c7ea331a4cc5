"""Write the intents of a run: training and held-out intents, split by subject, and the rows that give no intent."""

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
from udrl.intents.intent import ROW_GROUP, Intent, intents_table, is_heldout, open_intents_writer
from udrl.intents.readers import RejectedRow, read
from udrl.run import IntentPaths

REJECTS_SCHEMA = pa.schema([("row", pa.int64()), ("text", pa.string()), ("reason", pa.string())])


@dataclass(frozen=True)
class IntentSplit:
    """Counts of the intents and subjects written, and of the source's rows that give no intent, by reason.

    ``digest`` is a hash of all intents in their order: it reveals a source that changed under the same name.
    """

    n_train: int
    n_heldout: int
    n_subjects: int
    reject_reasons: dict[str, int] = field(default_factory=dict)
    digest: str = ""


def split_intents(config: recipe.Intents, seed: int, paths: IntentPaths) -> IntentSplit:
    """Read or compose the intents and write the training, held-out and rejects files of ``paths``.

    Intents have the columns intent_id (63-bit hash of the text), intent, subject. Rejects have row (its position in the
    source), text (its first 500 characters), reason. The same recipe gives the same rows. The files appear together at the
    end, or none of them does.

    Raises:
        UserError: the source can't be read or gives no intent, or no subject is left to train on.
    """
    reasons: Counter[str] = Counter()
    counts = {"train": 0, "heldout": 0}
    subjects: set[int] = set()
    digest = hashlib.blake2b(digest_size=8)
    with contextlib.ExitStack() as stack:
        reject = stack.enter_context(_open_rejects(paths.rejects, reasons))
        intents = _source(config, seed, reject)
        # The first intent is read before any file is created, so that a bad source leaves no empty folder.
        intents = itertools.chain([next(intents)], intents)
        writers = {
            "train": stack.enter_context(open_intents_writer(paths.train)),
            "heldout": stack.enter_context(open_intents_writer(paths.heldout)),
        }
        for name, group in _row_groups(intents, config.heldout):
            counts[name] += len(group)
            subjects.update(stable_id(intent.subject) for intent in group)
            digest.update("\n".join([name, *(intent.text for intent in group)]).encode())
            writers[name].write_table(intents_table(group), row_group_size=ROW_GROUP)
        if not counts["train"]:
            raise UserError(
                f"intents.heldout: all {counts['heldout']} intents of {config.source} are held out and none is left to train on"
                f" ({config.heldout}); lower intents.heldout or give more intents"
            )
    return IntentSplit(counts["train"], counts["heldout"], len(subjects), dict(reasons), digest.hexdigest())


def _source(config: recipe.Intents, seed: int, reject: Callable[[RejectedRow], None]) -> Iterator[Intent]:
    if not config.source.startswith("builtin:"):
        return read(config.source, config.column, config.limit, reject)
    if config.source != "builtin:composer":
        raise UserError(f"intents.source: no such built-in source ({config.source}); use builtin:composer or a file's URI")
    if config.limit is None:
        raise UserError("intents.limit: missing, but intents.source is the built-in composer; set the number of intents")
    return compose(config.limit, seed)


def _row_groups(intents: Iterator[Intent], heldout_share: float) -> Iterator[tuple[str, list[Intent]]]:
    """Yield (split, intents of one row group)."""
    pending: dict[str, list[Intent]] = {"train": [], "heldout": []}
    for intent in intents:
        name = "heldout" if is_heldout(intent.subject, heldout_share) else "train"
        pending[name].append(intent)
        if len(pending[name]) == ROW_GROUP:
            yield name, pending[name]
            pending[name] = []
    yield from ((name, group) for name, group in pending.items() if group)


@contextlib.contextmanager
def _open_rejects(uri: str, reasons: Counter[str]) -> Iterator[Callable[[RejectedRow], None]]:
    """Yield a function that takes rejected rows; their file appears at ``uri`` when the block ends.

    ``reasons`` counts them as they come.
    """
    pending: list[RejectedRow] = []
    # Rows may be rejected before the first intent is read, at a time when no file may have been created under `uri` yet.
    with tempfile.TemporaryFile() as spool:
        with pq.ParquetWriter(spool, REJECTS_SCHEMA, compression="zstd") as writer:

            def flush() -> None:
                columns = [[r.row for r in pending], [r.text for r in pending], [str(r.reason) for r in pending]]
                writer.write_table(pa.table(columns, schema=REJECTS_SCHEMA))
                pending.clear()

            def add(row: RejectedRow) -> None:
                reasons[str(row.reason)] += 1
                pending.append(row)
                if len(pending) == ROW_GROUP:
                    flush()

            yield add
            flush()
        spool.seek(0)
        with storage.atomic_file(uri) as sink:
            shutil.copyfileobj(spool, sink)
