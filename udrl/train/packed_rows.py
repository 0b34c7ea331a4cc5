"""Packed rows on storage: uncompressed Arrow IPC files that workers map into memory.

A run of 52M episodes has about 12 GB of rows, and every worker reads them in random order. Because the files are uncompressed,
a row's number determines its place: a worker maps all files, touches only the rows that it takes, and the workers of a node
share the page cache. Files on an object store are fetched once per node into ``rows/`` of the cache folder.
"""

import fcntl
import os
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs

from udrl import models, storage
from udrl.hashing import fingerprint_of_bytes
from udrl.train.packing import Batch

SUFFIX = ".arrow"
CONNECTIONS = 8  # files fetched at a time


def write_rows(uri: str, batch: Batch, vocab_size: int) -> None:
    """Write one file of rows. Tokens take two bytes each if ``vocab_size`` allows it."""
    columns = {
        "tokens": _fixed_size_lists(batch.tokens, pa.uint16() if vocab_size <= 2**16 else pa.uint32()),
        "positions": _fixed_size_lists(batch.positions, pa.uint16()),
        "targets": _fixed_size_lists(batch.targets, pa.uint8()),  # a byte each: a bitmap can't be viewed as an array
        "target_count": pa.array(batch.targets.sum(axis=1), pa.int32()),
    }
    record_batch = pa.record_batch(columns)
    with storage.atomic_file(uri) as file, pa.ipc.new_file(file, record_batch.schema) as sink:
        sink.write_batch(record_batch)


class PackedRows:
    """The rows of several files as one sequence, in the order of ``paths``; rows are read when they are taken.

    Args:
        paths: local files.
        context: tokens of a row.
    """

    def __init__(self, paths: Sequence[str], context: int) -> None:
        files = [file for file in map(_map_file, paths) if file.num_rows]
        self.context = context
        self._columns = [tuple(_matrix(file, name) for name in ("tokens", "positions", "targets")) for file in files]
        self._first_rows = np.cumsum([0, *(file.num_rows for file in files)])  # the number of each file's first row
        counts = [file.column("target_count").to_numpy() for file in files]
        #: Tokens that carry loss in each row, int32 (rows,).
        self.target_counts = np.concatenate([np.zeros(0, dtype=np.int32), *counts])

    def __len__(self) -> int:
        return int(self._first_rows[-1])

    def take(self, indices: np.ndarray) -> Batch:
        """Return the rows with these numbers, in any order.

        Returns:
            int64 tokens and positions and bool targets, each of shape (len(indices), context).

        Raises:
            IndexError: a number is out of range.
        """
        indices = np.asarray(indices, dtype=np.int64)
        if len(indices) and not 0 <= indices.min() <= indices.max() < len(self):
            raise IndexError(f"rows {indices.min()}..{indices.max()} of {len(self)}")
        shape = (len(indices), self.context)
        tokens, positions, targets = np.empty(shape, np.int64), np.empty(shape, np.int64), np.empty(shape, bool)
        files = np.searchsorted(self._first_rows, indices, side="right") - 1
        for file in np.unique(files):
            in_file = np.flatnonzero(files == file)
            rows = indices[in_file] - self._first_rows[file]
            for out, column in zip((tokens, positions, targets), self._columns[file], strict=True):
                out[in_file] = column[rows]
        return Batch(tokens, positions, targets)


def local_files(folder: str, content: str) -> list[str]:
    """Return local paths of the files of rows under ``folder``, sorted by name; fetch them if storage is not local.

    ``content`` identifies the rows: a node that has fetched them once does not fetch them again. If several workers of a node
    call this at once, one fetches and the others wait. Each file appears atomically, so the finished files of a
    killed worker are valid.
    """
    names = [name for name in storage.list_files(folder) if name.endswith(SUFFIX)]
    if storage.is_local(folder):
        return [os.path.join(storage.open_filesystem(folder)[1], name) for name in names]
    target = os.path.join(models.cache_folder(), "rows", fingerprint_of_bytes(f"{folder} {content}".encode()))
    fetch_files(folder, names, target)
    return [os.path.join(target, name) for name in names]


def fetch_files(folder: str, names: Sequence[str], target: str) -> int:
    """Copy the files that the local folder ``target`` lacks and return their number."""
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
        fcntl.flock(lock, fcntl.LOCK_EX)  # released when this process closes the file or dies
        missing = [name for name in names if not os.path.exists(os.path.join(target, name))]
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            list(pool.map(copy, missing))
    return len(missing)


def _map_file(path: str) -> pa.RecordBatch:
    # The buffers keep the mapping alive; the file itself is closed, so that thousands of files need no open handles.
    with pa.memory_map(path) as file:
        return pa.ipc.open_file(file).get_batch(0)


def _fixed_size_lists(matrix: np.ndarray, kind: pa.DataType) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(matrix.reshape(-1).astype(kind.to_pandas_dtype())), matrix.shape[1])


def _matrix(file: pa.RecordBatch, name: str) -> np.ndarray:
    column = file.column(name)
    return column.flatten().to_numpy(zero_copy_only=True).reshape(len(column), -1)
