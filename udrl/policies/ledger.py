"""Requests in shards, and the ledger of completions that they become.

A shard is the unit of durable progress: its rows are written as ``part-<shard>-<hash>-<rows>.parquet``, so a listing tells
what is done, and that it changed. A retried task may write a row twice; readers take the first row of an id.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa

from udrl import storage
from udrl.policies.policy import Row


@dataclass(frozen=True)
class Requests:
    """A sharded set of requests. ``rows(shard)`` runs in a Ray task and yields rows with the key columns of an episode."""

    total: int
    shards: int
    rows: Callable[[int], Iterator[Row]]
    shard_size: Callable[[int], int]

    @classmethod
    def of_rows(cls, rows: list[Row], size: int) -> "Requests":
        """Requests from a list that fits in memory, such as an evaluation's."""
        pieces = [rows[i : i + size] for i in range(0, len(rows), size)]
        return cls(len(rows), len(pieces), lambda shard: iter(pieces[shard]), lambda shard: len(pieces[shard]))


def part_name(shard: int, table: pa.Table) -> str:
    """The name of the file for some rows of a shard: the same rows get the same name, so a writer that is tried again
    replaces its file."""
    digest = hashlib.blake2b(digest_size=8)
    for name in ("episode_id", "completion"):
        digest.update(repr(table.column(name).to_pylist()).encode())
    return f"part-{shard:08d}-{digest.hexdigest()}-{table.num_rows}.parquet"


def list_parts(out: str) -> dict[int, list[str]]:
    """File names of each shard that has rows under ``out``, from one listing; shards in order."""
    found: dict[int, list[str]] = {}
    for name in storage.list_files(out):  # sorted
        if name.startswith("part-"):
            found.setdefault(int(name.split("-")[1]), []).append(name)
    return found


def read_shard(out: str, names: Sequence[str]) -> pa.Table:
    """The completions of one shard from its files, each id once: a retried task may have written some rows twice."""
    table = pa.concat_tables([storage.read_table(storage.join(out, name)) for name in names])
    first = {row_id: i for i, row_id in reversed(list(enumerate(table.column("episode_id").to_pylist())))}
    return table if len(first) == table.num_rows else table.take(sorted(first.values()))


def ids_of(out: str, names: Sequence[str]) -> set[int]:
    """The request ids that a shard's files hold."""
    tables = [storage.read_table(storage.join(out, name), ["episode_id"]) for name in names]
    return {i for table in tables for i in table.column("episode_id").to_pylist()}


def rows_done(out: str) -> dict[int, int]:
    """Rows that each shard has. Of a shard in several files the ids are counted, since files may overlap after a retry."""

    def count(names: list[str]) -> int:
        return int(names[0].removesuffix(".parquet").split("-")[3]) if len(names) == 1 else len(ids_of(out, names))

    return {shard: count(names) for shard, names in list_parts(out).items()}
