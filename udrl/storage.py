"""Files under a run's storage URI: a local path, ``s3://``, ``gs://`` or another URI that pyarrow opens.

All writes are atomic: local files are written under a temporary name in the same folder and renamed, and object stores put
whole objects. A reader never sees a partial file, and a file that exists is complete.
"""

import contextlib
import json
import os
import re
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO, TypeVar

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from udrl.errors import UserError

Result = TypeVar("Result")
READ_THREADS = 16  # files read in parallel; the threads wait for storage, not for the CPU
GCS_RETRY_SECONDS = 20  # pyarrow's default retries missing credentials for 15 minutes before it reports them


def open_filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    """Return the filesystem of ``uri`` and the path in it; a path without a scheme is local.

    Raises:
        UserError: the scheme is unknown or the URI can't be opened.
    """
    try:
        if "://" not in uri:
            return pafs.LocalFileSystem(), os.path.abspath(os.path.expanduser(uri))
        if uri.startswith(("gs://", "gcs://")) and "retry_limit_seconds" not in uri:
            uri += ("&" if "?" in uri else "?") + f"retry_limit_seconds={GCS_RETRY_SECONDS}"
        return pafs.FileSystem.from_uri(uri)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{uri}: can't be opened ({_first_line(error)}); use a path, s3://, gs:// or hdfs://") from error


def join(uri: str, *parts: str) -> str:
    """Join path parts below a URI; a URI's query stays at its end."""
    path, separator, query = uri.partition("?") if "://" in uri else (uri, "", "")
    return "/".join([path.rstrip("/"), *parts]) + separator + query


def absolute(uri: str) -> str:
    """Make a local path absolute, so that workers with another working folder find it; return a URI unchanged."""
    return uri if "://" in uri else os.path.abspath(os.path.expanduser(uri))


def without_credentials(uri: str) -> str:
    """Return a URI without its user, password and query, any of which may hold a key."""
    return re.sub(r"//[^/@]*@", "//", uri.partition("?")[0]) if "://" in uri else uri


def is_local(uri: str) -> bool:
    """Return whether ``uri`` is a path or ``file://`` URI of this machine."""
    return isinstance(open_filesystem(uri)[0], pafs.LocalFileSystem)


def exists(uri: str) -> bool:
    """Return whether there is a file or folder at ``uri``.

    Raises:
        UserError: the storage can't be reached.
    """
    fs, path = open_filesystem(uri)
    try:
        return fs.get_file_info(path).type != pafs.FileType.NotFound
    except OSError as error:
        raise UserError(f"{uri}: can't be reached ({_first_line(error)}); check the URI and the credentials") from error


def list_files(uri: str) -> list[str]:
    """Return the names of the files directly under ``uri``, sorted, without hidden ones; none if the folder is absent."""
    fs, path = open_filesystem(uri)
    infos = fs.get_file_info(pafs.FileSelector(path, allow_not_found=True))
    return sorted(info.base_name for info in infos if info.type == pafs.FileType.File and info.base_name[0] != ".")


def list_folders(uri: str) -> list[str]:
    """Return the names of the folders directly under ``uri``, sorted; none if it is absent."""
    fs, path = open_filesystem(uri)
    infos = fs.get_file_info(pafs.FileSelector(path, allow_not_found=True))
    return sorted(info.base_name for info in infos if info.type == pafs.FileType.Directory)


def file_sizes(uri: str) -> dict[str, int]:
    """Return the bytes of every file below ``uri``, by relative path; none if the folder is absent."""
    fs, path = open_filesystem(uri)
    infos = fs.get_file_info(pafs.FileSelector(path, allow_not_found=True, recursive=True))
    return {info.path[len(path.rstrip("/")) + 1 :]: info.size for info in infos if info.type == pafs.FileType.File}


def remove(uri: str) -> None:
    """Delete a file, or a folder and its contents; do nothing if it is absent."""
    fs, path = open_filesystem(uri)
    kind = fs.get_file_info(path).type
    if kind == pafs.FileType.Directory:
        fs.delete_dir(path)
    elif kind == pafs.FileType.File:
        fs.delete_file(path)


def require_writable(uri: str) -> None:
    """Write and delete a probe under ``uri``, so that a job fails before it has generated anything.

    Raises:
        UserError: the storage can't be written.
    """
    open_filesystem(uri)  # its errors should name the user's URI, not the probe's
    probe = join(uri, f".probe-{uuid.uuid4().hex}")
    try:
        write_bytes(probe, b"")
        remove(probe)
    except OSError as error:
        raise UserError(f"storage {uri}: not writable ({_first_line(error)}); set storage=<a folder or URI you own>") from error


def write_bytes(uri: str, data: bytes) -> None:
    """Write one file; create missing local folders."""
    fs, path = open_filesystem(uri)
    if isinstance(fs, pafs.LocalFileSystem):
        with atomic_file(uri) as file:
            file.write(data)
    else:
        with fs.open_output_stream(path) as out:
            out.write(data)


@contextlib.contextmanager
def atomic_file(uri: str) -> Iterator[BinaryIO]:
    """Open a binary file that appears at ``uri`` when the block ends, and does not if the block raises."""
    fs, path = open_filesystem(uri)
    local = isinstance(fs, pafs.LocalFileSystem)
    if local:
        fs.create_dir(os.path.dirname(path), recursive=True)
    # An object store would publish the bytes of an aborted stream, so its files are written locally first.
    folder = os.path.dirname(path) if local else tempfile.gettempdir()
    partial = os.path.join(folder, f".{os.path.basename(path)}.{uuid.uuid4().hex}")
    try:
        with open(partial, "wb") as out:
            yield out
        if local:
            os.replace(partial, path)
        else:
            pafs.copy_files(partial, path, source_filesystem=pafs.LocalFileSystem(), destination_filesystem=fs)
    finally:
        if os.path.exists(partial):
            os.remove(partial)


def read_bytes(uri: str) -> bytes:
    """Read one file.

    Raises:
        UserError: there is no such file.
    """
    fs, path = open_filesystem(uri)
    try:
        with fs.open_input_stream(path) as source:
            return source.read()
    except FileNotFoundError as error:
        raise UserError(f"{uri}: no such file; run the job that writes it, or correct the path") from error


def write_json(uri: str, value: Any) -> None:
    """Write JSON with sorted keys, so that equal values give equal files."""
    write_bytes(uri, (json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True) + "\n").encode())


def read_json(uri: str) -> Any:
    """Read a JSON file; documents with a type have :meth:`udrl.run.Document.load`."""
    return json.loads(read_bytes(uri))


def write_table(uri: str, table: pa.Table) -> None:
    """Write one Parquet file, compressed with zstd."""
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, table.schema, compression="zstd") as writer:
        if table.num_rows:  # Hugging Face datasets uses a row group's size as its batch size and fails on an empty one
            writer.write_table(table)
    write_bytes(uri, sink.getvalue().to_pybytes())


def read_table(uri: str, columns: list[str] | None = None) -> pa.Table:
    """Read one Parquet file, or the given columns of it."""
    fs, path = open_filesystem(uri)
    with fs.open_input_file(path) as source:
        return pq.ParquetFile(source).read(columns=columns)


def map_files(function: Callable[[str], Result], uris: Sequence[str]) -> list[Result]:
    """Apply ``function`` to each file in threads; the results are in the order of ``uris``."""
    with ThreadPoolExecutor(READ_THREADS) as pool:
        return list(pool.map(function, uris))


def parquet_files(uri: str) -> list[str]:
    """Return the URIs of the Parquet files directly under ``uri``, sorted by name."""
    return [join(uri, name) for name in list_files(uri) if name.endswith(".parquet")]


def iter_tables(uri: str, columns: list[str] | None = None) -> Iterator[pa.Table]:
    """Yield the Parquet files directly under ``uri`` one by one, sorted by name."""
    return (read_table(file, columns) for file in parquet_files(uri))


def upload_folder(local: str, uri: str) -> None:
    """Copy a local folder to ``uri``."""
    fs, path = open_filesystem(uri)
    fs.create_dir(path, recursive=True)
    pafs.copy_files(local, path, source_filesystem=pafs.LocalFileSystem(), destination_filesystem=fs)


def download_folder(uri: str, local: str) -> str:
    """Copy the folder at ``uri`` to ``local`` and return the local path; a local ``uri`` is used in place."""
    fs, path = open_filesystem(uri)
    if isinstance(fs, pafs.LocalFileSystem):
        return path
    os.makedirs(local, exist_ok=True)
    pafs.copy_files(path, local, source_filesystem=fs, destination_filesystem=pafs.LocalFileSystem())
    return local


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
