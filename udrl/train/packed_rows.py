"""Packed rows on storage: Arrow IPC files, mapped into memory and not read into it.

A run of 52M episodes has some 12 GB of rows, and every worker takes them in an order of its own. Files are uncompressed, so
that a row is where its number says: a worker maps all files, touches what it takes, and the workers of a node share the page
cache. What lies on an object store is fetched once a node, into ``rows/`` of the cache folder, and stays there.
"""

import fcntl
import hashlib
import os
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs

from udrl import models, storage
from udrl.train.packing import Batch

SUFFIX = ".arrow"
CONNECTIONS = 8  # files fetched at a time


def write(uri: str, packed: Batch, vocab_size: int) -> None:
    """Write one file of rows. Tokens take two bytes each where ``vocab_size`` allows it."""
    columns = {
        "tokens": _lists(packed.tokens, pa.uint16() if vocab_size <= 2**16 else pa.uint32()),
        "positions": _lists(packed.positions, pa.uint16()),
        "targets": _lists(packed.targets, pa.uint8()),  # a byte each: a bitmap can't be looked at in place
        "target_count": pa.array(packed.targets.sum(axis=1), pa.int32()),
    }
    batch = pa.record_batch(columns)
    with storage.whole_file(uri) as file, pa.ipc.new_file(file, batch.schema) as sink:
        sink.write_batch(batch)


class Rows:
    """The rows of several files as one sequence, in the order of ``paths``; nothing is read before it is taken.

    Args:
        paths: local files.
        context: tokens of a row.
    """

    def __init__(self, paths: Sequence[str], context: int) -> None:
        batches = [batch for batch in map(_map, paths) if batch.num_rows]
        self.context = context
        self._columns = [tuple(_matrix(batch, name) for name in ("tokens", "positions", "targets")) for batch in batches]
        self._first = np.cumsum([0, *(batch.num_rows for batch in batches)])  # the number of each file's first row
        counts = [batch.column("target_count").to_numpy() for batch in batches]
        #: Tokens that carry loss in each row, int32 (rows,).
        self.target_counts = np.concatenate([np.zeros(0, dtype=np.int32), *counts])

    def __len__(self) -> int:
        return int(self._first[-1])

    def take(self, indices: np.ndarray) -> Batch:
        """The rows of these numbers, in any order: int64 tokens and positions, bool targets, each (len(indices), context)."""
        indices = np.asarray(indices, dtype=np.int64)
        if len(indices) and not 0 <= indices.min() <= indices.max() < len(self):
            raise IndexError(f"rows {indices.min()}..{indices.max()} of {len(self)}")
        shape = (len(indices), self.context)
        tokens, positions, targets = np.empty(shape, np.int64), np.empty(shape, np.int64), np.empty(shape, bool)
        files = np.searchsorted(self._first, indices, side="right") - 1
        for file in np.unique(files):
            mine = np.flatnonzero(files == file)
            at = indices[mine] - self._first[file]
            for out, column in zip((tokens, positions, targets), self._columns[file], strict=True):
                out[mine] = column[at]
        return Batch(tokens, positions, targets)


def local_files(folder: str, mark: str) -> list[str]:
    """Local paths of the files of rows under ``folder``, sorted by name; fetched where storage is not local.

    ``mark`` names what the rows are: a node that has fetched it once fetches it no more. Of several workers on a node that
    ask at once, one fetches and the others wait for it. A file appears whole, so what a killed worker had fetched is kept.
    """
    names = [name for name in storage.list_files(folder) if name.endswith(SUFFIX)]
    if storage.is_local(folder):
        return [os.path.join(storage.open_filesystem(folder)[1], name) for name in names]
    target = os.path.join(models.cache_folder(), "rows", hashlib.sha256(f"{folder} {mark}".encode()).hexdigest()[:16])
    fetch(folder, names, target)
    return [os.path.join(target, name) for name in names]


def fetch(folder: str, names: Sequence[str], target: str) -> int:
    """Copy those of ``names`` under ``folder`` that the local folder ``target`` lacks; return how many those were."""
    os.makedirs(target, exist_ok=True)
    fs, path = storage.open_filesystem(folder)

    def copy(name: str) -> None:
        partial = os.path.join(target, f".{name}.{uuid.uuid4().hex}")
        try:
            pafs.copy_files(f"{path}/{name}", partial, source_filesystem=fs, destination_filesystem=pafs.LocalFileSystem())
            os.replace(partial, os.path.join(target, name))
        finally:
            if os.path.exists(partial):
                os.remove(partial)

    with open(os.path.join(target, ".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # let go when this process closes the file or dies
        missing = [name for name in names if not os.path.exists(os.path.join(target, name))]
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            list(pool.map(copy, missing))
    return len(missing)


def _map(path: str) -> pa.RecordBatch:
    # The batch's buffers keep the mapping alive; the file itself is closed, so that thousands of files need no open handles.
    with pa.memory_map(path) as file:
        return pa.ipc.open_file(file).get_batch(0)


def _lists(matrix: np.ndarray, kind: pa.DataType) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(matrix.reshape(-1).astype(kind.to_pandas_dtype())), matrix.shape[1])


def _matrix(batch: pa.RecordBatch, name: str) -> np.ndarray:
    column = batch.column(name)
    return column.flatten().to_numpy(zero_copy_only=True).reshape(len(column), -1)
