"""Intents from files that users bring: Parquet, JSON lines, CSV, TSV and text, by URI, streamed in the order of the file."""

import csv
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from udrl import storage
from udrl.errors import UserError
from udrl.intents.split import Intent, stable_hash

MAX_CHARACTERS = 2000
KINDS = "parquet, jsonl, ndjson, json (one object a line), csv, tsv or txt"
_COMPRESSED = (".gz", ".bz2", ".zst")  # pyarrow opens these by their ending


def read(uri: str, column: str, limit: int | None, dropped: Counter[str] | None = None) -> Iterator[Intent]:
    """Yield the distinct intents of a file, or of a folder of Parquet files, in order; ``limit`` ends it early.

    White space is folded to single blanks; bytes that are not UTF-8 are replaced. Blank values, malformed rows, texts over
    2,000 characters and repetitions (case folded) are left out and counted in ``dropped`` by reason, where it is given.
    The subject of such an intent is its own text, case folded.

    Raises:
        UserError: the file is absent, of an unknown kind, unreadable, lacks the column, or holds no usable intent.
    """
    dropped = Counter() if dropped is None else dropped
    seen: set[int] = set()
    for value in _values(uri, column):
        text = _fold(value)
        key = stable_hash(text.casefold())
        if value is None:
            dropped["malformed"] += 1
        elif not text:
            dropped["blank"] += 1
        elif len(text) > MAX_CHARACTERS:
            dropped["too long"] += 1
        elif key in seen:
            dropped["duplicate"] += 1
        else:
            seen.add(key)
            yield Intent(text, text.casefold())
            if limit is not None and len(seen) >= limit:
                return
    if not seen:
        counts = ", ".join(f"{n} {reason}" for reason, n in sorted(dropped.items())) or "empty"
        raise UserError(f"intents {uri}: no usable intent ({counts}); give a file with one request a row")


def _fold(value: str | None) -> str:
    # Lone surrogates (JSON may spell them) can't be written as UTF-8, so they are replaced like any other bad byte.
    return " ".join((value or "").encode("utf-8", "replace").decode("utf-8").split())


def _values(uri: str, column: str) -> Iterator[str | None]:
    """The raw values of the column; None for a row that can't be parsed."""
    fs, path = storage.open_filesystem(uri)
    try:
        info = fs.get_file_info(path)
        if info.type == pafs.FileType.NotFound:
            raise UserError(f"intents {uri}: no such file; set intents.source to an existing one, or to builtin:composer")
        if info.type == pafs.FileType.Directory:
            names = [name for name in storage.list_files(uri) if name.endswith(".parquet")]
            if not names:
                raise UserError(f"intents {uri}: the folder holds no .parquet file; name a file of another kind directly")
            for name in names:
                yield from _parquet(fs, f"{path.rstrip('/')}/{name}", storage.join(uri, name), column)
            return
        kind = _kind(path)
        if kind == "parquet":
            yield from _parquet(fs, path, uri, column)
        elif kind in ("jsonl", "ndjson", "json"):
            yield from _json_lines(_lines(fs, path), uri, column)
        elif kind == "csv":
            yield from _pick(csv.reader(_lines(fs, path)), uri, column)
        elif kind == "tsv":
            yield from _pick(map(_tsv_row, _lines(fs, path)), uri, column)
        elif kind == "txt":
            yield from _lines(fs, path)
        else:
            raise UserError(f"intents {uri}: unknown kind of file {'.' + kind if kind else '(no extension)'}; use {KINDS}")
    except csv.Error as error:
        raise UserError(f"intents {uri}: not readable as CSV ({error}); look for an unclosed quote") from error
    except (pa.ArrowException, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"intents {uri}: can't be read ({reason}); check that it is what its extension says") from error


def _kind(path: str) -> str:
    name = path.rsplit("/", 1)[-1].lower()
    for ending in _COMPRESSED:
        name = name.removesuffix(ending)
    return name.rpartition(".")[2] if "." in name else ""


def _lines(fs: pafs.FileSystem, path: str) -> Iterator[str]:
    """Lines with their ends, decoded with replacement; a byte order mark is dropped. Only one line is held."""
    first, rest = True, b""
    with fs.open_input_stream(path) as source:
        while chunk := source.read(1 << 20):
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                yield (line.removeprefix(b"\xef\xbb\xbf") if first else line).decode("utf-8", "replace") + "\n"
                first = False
    if rest:
        yield (rest.removeprefix(b"\xef\xbb\xbf") if first else rest).decode("utf-8", "replace")


def _pick(rows: Iterable[list[str]], uri: str, column: str) -> Iterator[str | None]:
    """The column of a table with a header row."""
    rows = iter(rows)
    header = next((row for row in rows if row), [])
    names = [name.strip() for name in header]
    if names and column not in names:
        raise _no_column(uri, column, names)
    for row in rows:
        place = names.index(column)
        if row:  # a blank line is no row
            yield row[place] if place < len(row) else None


def _tsv_row(line: str) -> list[str]:
    """Cells between tabs. TSV has no quoting (a lone quote is text), but exporters that quote whole cells are understood."""
    cells = line.rstrip("\r\n").split("\t")
    return [c[1:-1].replace('""', '"') if len(c) > 1 and c[0] == c[-1] == '"' else c for c in cells] if line.strip() else []


def _json_lines(lines: Iterable[str], uri: str, column: str) -> Iterator[str | None]:
    found, names = False, set[str]()
    for number, line in enumerate(lines):
        if not line.strip():
            continue
        if number == 0 and line.lstrip().startswith("["):
            raise UserError(f"intents {uri}: a JSON array; write one object a line (jq -c '.[]' makes it so)")
        try:
            row: Any = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            yield None
            continue
        if column in row:
            found = True
            value = row[column]
            yield value if isinstance(value, str) else "" if value is None else None
        else:
            if len(names) < 100:
                names |= row.keys()
            yield None
    if names and not found:
        raise _no_column(uri, column, sorted(names))


def _parquet(fs: pafs.FileSystem, path: str, uri: str, column: str) -> Iterator[str | None]:
    with fs.open_input_file(path) as source:
        file = pq.ParquetFile(source)
        schema = file.schema_arrow
        if column not in schema.names:
            raise _no_column(uri, column, schema.names)
        kind = schema.field(column).type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
        if not text and not pa.types.is_binary(kind) and not pa.types.is_large_binary(kind):
            raise UserError(f"intents {uri}: column {column!r} holds {kind}, not text; set intents.column to a text column")
        for batch in file.iter_batches(batch_size=4096, columns=[column]):
            # As bytes, because a writer may have put bytes that are not UTF-8 into a string column.
            for value in batch.column(0).cast(kind).cast(pa.large_binary()).to_pylist():
                yield "" if value is None else value.decode("utf-8", "replace")


def _no_column(uri: str, column: str, names: list[str]) -> UserError:
    shown = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
    return UserError(f"intents {uri}: no column {column!r}; it has {shown}; choose one with intents.column=...")
