"""Files under a run's storage URI: local paths, ``s3://``, ``gs://``, whatever pyarrow opens.

Every write is whole or absent: local files are written beside their place and renamed, object stores put whole
objects. So a reader never sees half a file, and a file that exists is done.
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
READ_THREADS = 16  # files read at a time: threads wait for storage, not for the CPU


def open_filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    """Return the filesystem of ``uri`` and the path in it. A plain path is a local one.

    Raises:
        UserError: the scheme is unknown or the URI can't be opened.
    """
    try:
        if "://" not in uri:
            return pafs.LocalFileSystem(), os.path.abspath(os.path.expanduser(uri))
        if uri.startswith(("gs://", "gcs://")) and "retry_limit_seconds" not in uri:
            # Without it, missing credentials are retried for a quarter of an hour before they are told.
            uri += ("&" if "?" in uri else "?") + "retry_limit_seconds=20"
        return pafs.FileSystem.from_uri(uri)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{uri}: can't be opened ({_first_line(error)}); use a path, s3://, gs:// or hdfs://") from error


def join(uri: str, *parts: str) -> str:
    """Join path parts below a URI."""
    path, mark, query = uri.partition("?") if "://" in uri else (uri, "", "")
    return "/".join([path.rstrip("/"), *parts]) + mark + query


def absolute(uri: str) -> str:
    """Make a local path absolute, so that workers with another working folder find it; leave a URI as it is."""
    return uri if "://" in uri else os.path.abspath(os.path.expanduser(uri))


def without_credentials(uri: str) -> str:
    """Return a URI without its user, password and query, any of which may hold a key."""
    return re.sub(r"//[^/@]*@", "//", uri.partition("?")[0]) if "://" in uri else uri


def is_local(uri: str) -> bool:
    return isinstance(open_filesystem(uri)[0], pafs.LocalFileSystem)


def exists(uri: str) -> bool:
    fs, path = open_filesystem(uri)
    try:
        return fs.get_file_info(path).type != pafs.FileType.NotFound
    except OSError as error:
        raise UserError(f"{uri}: can't be reached ({_first_line(error)})") from error


def list_files(uri: str) -> list[str]:
    """Names of the files directly under ``uri``, sorted; empty where the folder is absent."""
    fs, path = open_filesystem(uri)
    selector = pafs.FileSelector(path, allow_not_found=True)
    infos = fs.get_file_info(selector)
    return sorted(info.base_name for info in infos if info.type == pafs.FileType.File and info.base_name[0] != ".")


def list_folders(uri: str) -> list[str]:
    """Names of the folders directly under ``uri``, sorted; empty where it is absent."""
    fs, path = open_filesystem(uri)
    infos = fs.get_file_info(pafs.FileSelector(path, allow_not_found=True))
    return sorted(info.base_name for info in infos if info.type == pafs.FileType.Directory)


def file_sizes(uri: str) -> dict[str, int]:
    """Bytes of every file below ``uri``, by its path relative to it; empty where it is absent."""
    fs, path = open_filesystem(uri)
    infos = fs.get_file_info(pafs.FileSelector(path, allow_not_found=True, recursive=True))
    return {info.path[len(path.rstrip("/")) + 1 :]: info.size for info in infos if info.type == pafs.FileType.File}


def remove(uri: str) -> None:
    """Delete a file or a folder with all it holds; nothing happens where it is absent."""
    fs, path = open_filesystem(uri)
    kind = fs.get_file_info(path).type
    if kind == pafs.FileType.Directory:
        fs.delete_dir(path)
    elif kind == pafs.FileType.File:
        fs.delete_file(path)


def require_writable(uri: str) -> None:
    """Write and delete a probe under ``uri``, so that a job fails before it has paid for anything.

    Raises:
        UserError: the storage can't be written.
    """
    open_filesystem(uri)  # what it refuses is told with the user's URI, not with the probe's
    probe = join(uri, f".probe-{uuid.uuid4().hex}")
    try:
        write_bytes(probe, b"")
        remove(probe)
    except OSError as error:
        raise UserError(f"storage {uri}: not writable ({_first_line(error)}); set storage=<a folder or URI you own>") from error


def write_bytes(uri: str, data: bytes) -> None:
    fs, path = open_filesystem(uri)
    if isinstance(fs, pafs.LocalFileSystem):
        with atomic_file(uri) as file:
            file.write(data)
    else:
        with fs.open_output_stream(path) as out:
            out.write(data)


@contextlib.contextmanager
def atomic_file(uri: str) -> Iterator[BinaryIO]:
    """A binary file to stream into, which appears at ``uri`` when the block ends and not at all when it raises."""
    fs, path = open_filesystem(uri)
    local = isinstance(fs, pafs.LocalFileSystem)
    if local:
        fs.create_dir(os.path.dirname(path), recursive=True)
    # An object store would publish what an aborted stream had written, so for those the file is made locally first.
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
    fs, path = open_filesystem(uri)
    try:
        with fs.open_input_stream(path) as source:
            return source.read()
    except FileNotFoundError as error:
        raise UserError(f"{uri}: no such file") from error


def write_json(uri: str, value: Any) -> None:
    write_bytes(uri, (json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True) + "\n").encode())


def read_json(uri: str) -> Any:
    return json.loads(read_bytes(uri))


def write_table(uri: str, table: pa.Table) -> None:
    """Write one Parquet file."""
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, table.schema, compression="zstd") as writer:
        if table.num_rows:  # Hugging Face datasets takes a row group's size as its batch size, and fails on one of none
            writer.write_table(table)
    write_bytes(uri, sink.getvalue().to_pybytes())


def read_table(uri: str, columns: list[str] | None = None) -> pa.Table:
    """Read one Parquet file."""
    fs, path = open_filesystem(uri)
    with fs.open_input_file(path) as source:
        return pq.ParquetFile(source).read(columns=columns)


def map_files(function: Callable[[str], Result], uris: Sequence[str]) -> list[Result]:
    """Apply ``function`` to each file in threads, which wait for storage; results keep the order of ``uris``."""
    with ThreadPoolExecutor(READ_THREADS) as pool:
        return list(pool.map(function, uris))


def parquet_files(uri: str) -> list[str]:
    """Return the URIs of the Parquet files directly under ``uri``, sorted by name."""
    return [join(uri, name) for name in list_files(uri) if name.endswith(".parquet")]


def iter_tables(uri: str, columns: list[str] | None = None) -> Iterator[pa.Table]:
    """Yield the Parquet files directly under ``uri`` one by one, sorted by name."""
    return (read_table(file, columns) for file in parquet_files(uri))


def upload_folder(local: str, uri: str) -> None:
    """Copy a local folder to ``uri`` (the files of one finished model, say)."""
    fs, path = open_filesystem(uri)
    fs.create_dir(path, recursive=True)
    pafs.copy_files(local, path, source_filesystem=pafs.LocalFileSystem(), destination_filesystem=fs)


def download_folder(uri: str, local: str) -> str:
    """Copy a folder under ``uri`` to a local one and return its path; a local ``uri`` is returned as it is."""
    fs, path = open_filesystem(uri)
    if isinstance(fs, pafs.LocalFileSystem):
        return path
    os.makedirs(local, exist_ok=True)
    pafs.copy_files(path, local, source_filesystem=fs, destination_filesystem=pafs.LocalFileSystem())
    return local


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
