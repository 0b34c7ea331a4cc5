"""Intents from files that users bring: Parquet, JSON lines, CSV, TSV and text, by URI, streamed in the order of the file.

Text is decoded so that bytes that are not UTF-8 stay recognisable (as lone surrogates) until :func:`read` judges the cell
that they stand in: a bad byte elsewhere in the row costs nothing.
"""

import csv
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from udrl import storage
from udrl.errors import UserError
from udrl.hashing import stable_id
from udrl.intents.split import Intent

MAX_CHARACTERS = 2000
# A longer line (or quoted CSV cell) is not held: its start is kept for the rejects and the rest is skipped.
MAX_LINE = 1 << 22  # bytes
KEPT = 500  # characters of a rejected row
# Rows of a Parquet file that are in memory at a time: few, because each may hold a megabyte.
PARQUET_ROWS = 128
KINDS = "parquet, jsonl, ndjson, json (one object a line), csv, tsv or txt"
_COMPRESSED = (".gz", ".bz2", ".zst")  # pyarrow opens these by their ending


class Problem(StrEnum):
    """Why a row gives no intent."""

    BLANK = "blank"
    NULL = "null"
    MALFORMED = "malformed row"
    NOT_UTF8 = "not UTF-8"
    TOO_LONG = "too long"
    DUPLICATE = "duplicate"


@dataclass(frozen=True)
class Reject:
    """A row that gave no intent. ``row`` counts the source's rows from 0, without headers and JSONL's or CSV's blank lines;
    ``text`` is the start of the value, or of the row where it can't be parsed."""

    row: int
    text: str
    reason: Problem


@dataclass(frozen=True)
class _Bad:
    text: str
    reason: Problem


def read(uri: str, column: str, limit: int | None, rejected: Callable[[Reject], None] | None = None) -> Iterator[Intent]:
    """Yield the distinct intents of a file, or of a folder of Parquet files, in order; ``limit`` ends it early.

    White space is folded to single blanks. Rows that give no intent (:class:`Problem`: blank and null values, rows that
    can't be parsed, bytes that are not UTF-8, texts over 2,000 characters, repetitions with case folded) are left out and
    handed to ``rejected`` one by one, where it is given. The subject of such an intent is its own text, case folded.

    Raises:
        UserError: the file is absent, of an unknown kind, unreadable, lacks the column, or holds no usable intent.
    """
    counts: Counter[str] = Counter()
    seen: set[int] = set()
    for row, value in enumerate(_values(uri, column)):
        found = _judge(value)
        if isinstance(found, str):
            key = stable_id(found.casefold())
            if key not in seen:
                seen.add(key)
                yield Intent(found, found.casefold())
                if limit is not None and len(seen) >= limit:
                    return
                continue
            found = _Bad(found, Problem.DUPLICATE)
        counts[found.reason] += 1
        if rejected:
            rejected(Reject(row, _printable(found.text[:KEPT]), found.reason))
    if not seen:
        told = ", ".join(f"{n} {reason}" for reason, n in sorted(counts.items())) or "empty"
        raise UserError(f"intents {uri}: no usable intent ({told}); give a file with one request a row")


def _judge(value: str | _Bad) -> str | _Bad:
    """The intent's text, or what is wrong with it as far as it alone tells."""
    if isinstance(value, _Bad):
        return value
    if len(value) > 10 * MAX_CHARACTERS:  # whatever folding would leave of it; a megabyte is not split into words
        return _Bad(value, Problem.TOO_LONG)
    text = " ".join(value.split())
    if not text:
        return _Bad(text, Problem.BLANK)
    try:
        text.encode()
    except UnicodeEncodeError:  # lone surrogates: bad bytes, or spelled out in JSON
        return _Bad(text, Problem.NOT_UTF8)
    return _Bad(text, Problem.TOO_LONG) if len(text) > MAX_CHARACTERS else text


def _printable(text: str) -> str:
    return "".join("\ufffd" if "\ud800" <= c <= "\udfff" else c for c in text)


def _values(uri: str, column: str) -> Iterator[str | _Bad]:
    """The raw values of the column, one for each row."""
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
            yield from _pick(_csv_rows(_lines(fs, path)), uri, column)
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
    """Lines with their ends; a byte order mark is dropped. Of a line over ``MAX_LINE`` there is the start alone."""
    with fs.open_input_stream(path) as source:
        pieces = _pieces(source)
        first = next(pieces, None)
        if first is not None:
            yield _decode(first.removeprefix(b"\xef\xbb\xbf"))
        yield from map(_decode, pieces)


def _pieces(source: pa.NativeFile) -> Iterator[bytes]:
    held: list[bytes] = []  # of the line that is being read; joined once, however many chunks it spans
    size = 0
    while chunk := source.read(1 << 20):
        *ended, rest = chunk.split(b"\n")
        for line in ended:
            if size + len(line) > MAX_LINE:
                yield b"".join([*held, line])[:MAX_LINE]
            else:
                yield b"".join([*held, line, b"\n"])
            held, size = [], 0
        size += len(rest)
        if rest and size - len(rest) <= MAX_LINE:
            held.append(rest)
    if held:
        yield b"".join(held)[:MAX_LINE]


def _decode(line: bytes) -> str:
    return line.decode("utf-8", "surrogateescape")


def _csv_rows(lines: Iterable[str]) -> Iterator[list[str]]:
    csv.field_size_limit(MAX_LINE)  # Python's own of 128 KiB would end the job at one large cell
    ended = False

    def told() -> Iterator[str]:
        nonlocal ended
        yield from lines
        ended = True

    reader = csv.reader(told())
    line = 1  # where the next row begins
    for row in reader:
        # The file ended inside a cell: had its quote been opened by mistake, all rows since would be gone unseen.
        if ended and reader.line_num > line:
            raise csv.Error(f"the file ends inside a quote of the row that begins at line {line:,}")
        yield row
        line = reader.line_num + 1


def _pick(rows: Iterable[list[str]], uri: str, column: str) -> Iterator[str | _Bad]:
    """The column of a table with a header row."""
    rows = iter(rows)
    header = next((row for row in rows if row), [])
    names = [name.strip() for name in header]
    if names and column not in names:
        raise _no_column(uri, column, names)
    for row in rows:
        place = names.index(column)
        if row:  # a blank line is no row
            yield row[place] if place < len(row) else _Bad(", ".join(row)[:KEPT], Problem.MALFORMED)


def _tsv_row(line: str) -> list[str]:
    """Cells between tabs. TSV has no quoting (a lone quote is text), but exporters that quote whole cells are understood."""
    cells = line.rstrip("\r\n").split("\t")
    return [c[1:-1].replace('""', '"') if len(c) > 1 and c[0] == c[-1] == '"' else c for c in cells] if line.strip() else []


def _json_lines(lines: Iterable[str], uri: str, column: str) -> Iterator[str | _Bad]:
    found, names = False, set[str]()
    for number, line in enumerate(lines):
        if not line.strip():
            continue
        if number == 0 and line.lstrip().startswith("["):
            raise UserError(f"intents {uri}: a JSON array; write one object a line (jq -c '.[]' makes it so)")
        # A line that was cut does not parse; characters may be a quarter of the bytes.
        malformed = _Bad(line[:KEPT].rstrip("\n"), Problem.TOO_LONG if len(line) >= MAX_LINE // 4 else Problem.MALFORMED)
        try:
            row: Any = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            yield malformed
            continue
        if column in row:
            found = True
            value = row[column]
            yield value if isinstance(value, str) else _Bad("", Problem.NULL) if value is None else malformed
        else:
            if len(names) < 100:
                names |= row.keys()
            yield malformed
    if names and not found:
        raise _no_column(uri, column, sorted(names))


def _parquet(fs: pafs.FileSystem, path: str, uri: str, column: str) -> Iterator[str | _Bad]:
    with fs.open_input_file(path) as source:
        # With a buffer size pages are read as they are needed, not a row group's whole column.
        file = pq.ParquetFile(source, buffer_size=1 << 20)
        schema = file.schema_arrow
        if column not in schema.names:
            raise _no_column(uri, column, schema.names)
        kind = schema.field(column).type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
        if not text and not pa.types.is_binary(kind) and not pa.types.is_large_binary(kind):
            raise UserError(f"intents {uri}: column {column!r} holds {kind}, not text; set intents.column to a text column")
        for batch in file.iter_batches(batch_size=PARQUET_ROWS, columns=[column]):
            # As bytes, because a writer may have put bytes that are not UTF-8 into a string column.
            for value in batch.column(0).cast(kind).cast(pa.large_binary()).to_pylist():
                yield _Bad("", Problem.NULL) if value is None else _decode(value)


def _no_column(uri: str, column: str, names: list[str]) -> UserError:
    shown = _printable(", ".join(names[:20])) + (", ..." if len(names) > 20 else "")
    return UserError(f"intents {uri}: no column {column!r}; it has {shown}; choose one with intents.column=...")
