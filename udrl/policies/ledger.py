"""The ledger: the Parquet files of raw completions, and a journal of the runs that paid for them.

A shard is the unit of durable progress. Its rows are in files named ``part-<shard>-<hash>-<rows>.parquet``, so a listing
shows which shards are complete and whether one has changed. A retried task may write a row twice; readers keep the first row
of an id.
"""

import datetime
import hashlib
import math
import time
import uuid
from collections.abc import Sequence

import pyarrow as pa

from udrl import storage
from udrl.policies.statistics import CompletionStatistics
from udrl.run import Document

# ---- completions


def part_name(shard: int, table: pa.Table) -> str:
    """Return the name of the file for some rows of a shard.

    The same rows get the same name, so that a retried write is idempotent.
    """
    digest = hashlib.blake2b(digest_size=8)
    for name in ("episode_id", "completion"):
        digest.update(repr(table.column(name).to_pylist()).encode())
    return f"part-{shard:08d}-{digest.hexdigest()}-{table.num_rows}.parquet"


def list_parts(ledger: str) -> dict[int, list[str]]:
    """Return the file names of each shard that has rows, shards in order."""
    parts: dict[int, list[str]] = {}
    for name in storage.list_files(ledger):  # sorted
        if name.startswith("part-"):
            parts.setdefault(int(name.split("-")[1]), []).append(name)
    return parts


def read_shard(ledger: str, names: Sequence[str]) -> pa.Table:
    """Return the completions of one shard from its files, each id once."""
    table = pa.concat_tables([storage.read_table(storage.join(ledger, name)) for name in names])
    first = {row_id: i for i, row_id in reversed(list(enumerate(table.column("episode_id").to_pylist())))}
    return table if len(first) == table.num_rows else table.take(sorted(first.values()))


def read_ids(ledger: str, names: Sequence[str]) -> set[int]:
    """Return the request ids in the files of a shard."""
    tables = [storage.read_table(storage.join(ledger, name), ["episode_id"]) for name in names]
    return {row_id for table in tables for row_id in table.column("episode_id").to_pylist()}


def count_rows(ledger: str) -> dict[int, int]:
    """Return the number of rows of each shard that has rows.

    The files of one shard may overlap after a retry; then distinct ids are counted.
    """

    def count(names: list[str]) -> int:
        return int(names[0].removesuffix(".parquet").split("-")[3]) if len(names) == 1 else len(read_ids(ledger, names))

    return {shard: count(names) for shard, names in list_parts(ledger).items()}


# ---- attempts

JOURNAL_SECONDS = 30  # seconds between two writes of a journal entry


class Attempt(Document):
    """The cost of one run of the vLLM stage on a ledger.

    That of a killed run is incomplete by up to :data:`JOURNAL_SECONDS`.
    """

    started: str  # ISO 8601, UTC
    rows: int
    prompts: int
    accepted: int
    input_tokens: int
    cached_tokens: int
    output_tokens: int
    seconds: float
    busy_seconds: float
    ended: bool


def load_attempts(ledger: str) -> list[Attempt]:
    """Return every attempt on this ledger, killed ones included, oldest first."""
    folder = storage.join(ledger, "attempts")
    return [Attempt.load(storage.join(folder, name)) for name in storage.list_files(folder)]


class AttemptJournal:
    """Save this run's :class:`Attempt` while it runs, in case it is killed."""

    def __init__(self, ledger: str) -> None:
        self._started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        name = f"{self._started.replace(':', '')}-{uuid.uuid4().hex[:8]}.json"
        self._uri = storage.join(ledger, "attempts", name)
        self._start = time.monotonic()
        self._last_write = -math.inf

    def write(self, statistics: CompletionStatistics, *, ended: bool = False) -> None:
        """Save the statistics so far, at most every :data:`JOURNAL_SECONDS`."""
        now = time.monotonic()
        if not ended and now - self._last_write < JOURNAL_SECONDS:
            return
        self._last_write = now
        Attempt(
            started=self._started,
            rows=statistics.rows,
            prompts=statistics.prompts,
            accepted=statistics.accepted,
            input_tokens=statistics.input_tokens,
            cached_tokens=statistics.cached_tokens,
            output_tokens=statistics.output_tokens,
            seconds=round(now - self._start, 1),
            busy_seconds=round(statistics.busy_seconds, 1),
            ended=ended,
        ).save(self._uri)
