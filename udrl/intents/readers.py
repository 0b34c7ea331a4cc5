"""Read intents from users' files: Parquet, JSON lines, CSV, TSV and text, by URI, streamed in the order of the file.

Bytes that are not UTF-8 are decoded to lone surrogates, so that :func:`read` can reject the cell that contains them; bad bytes
in other cells of the row do no harm.
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
from udrl.intents.intent import Intent

MAX_CHARACTERS = 2000  # characters of an intent
MAX_LINE = 1 << 22  # bytes of a line or a quoted CSV cell; the rest of a longer one is skipped
REJECT_CHARACTERS = 500  # characters of a rejected row that are stored
PARQUET_ROWS = 128  # rows of a Parquet file in memory at a time: few, because each may have a megabyte
FILE_TYPES = "parquet, jsonl, ndjson, json (one object per line), csv, tsv or txt"
_COMPRESSED = (".gz", ".bz2", ".zst")  # pyarrow decompresses files with these endings


class RowProblem(StrEnum):
    """Why a row gives no intent."""

    BLANK = "blank"
    NULL = "null"
    MALFORMED = "malformed row"
    NOT_UTF8 = "not UTF-8"
    TOO_LONG = "too long"
    DUPLICATE = "duplicate"


@dataclass(frozen=True)
class RejectedRow:
    """A row that gives no intent.

    ``row`` counts the source's rows from 0, without headers and blank lines of JSONL and CSV; ``text`` is the start of the
    value, or of the row if the row can't be parsed.
    """

    row: int
    text: str
    reason: RowProblem


@dataclass(frozen=True)
class _BadValue:
    text: str
    reason: RowProblem


def read(uri: str, column: str, limit: int | None, on_reject: Callable[[RejectedRow], None] | None = None) -> Iterator[Intent]:
    """Yield the distinct intents of a file, or of a folder of Parquet files, in order, up to ``limit``.

    White space is folded to single blanks. The subject of an intent is its own text with case folded. Rows that give no
    intent are passed to ``on_reject``: blank and null values, rows that can't be parsed, bytes that are not UTF-8, texts of
    more than 2,000 characters, and repetitions regardless of case.

    Raises:
        UserError: the file is absent, of an unknown type, unreadable, lacks the column, or has no usable intent.
    """
    counts: Counter[str] = Counter()
    seen: set[int] = set()
    for row, raw in enumerate(_values(uri, column)):
        value = _check(raw)
        if isinstance(value, str):
            key = stable_id(value.casefold())
            if key not in seen:
                seen.add(key)
                yield Intent(value, value.casefold())
                if limit is not None and len(seen) >= limit:
                    return
                continue
            value = _BadValue(value, RowProblem.DUPLICATE)
        counts[value.reason] += 1
        if on_reject:
            on_reject(RejectedRow(row, _printable(value.text[:REJECT_CHARACTERS]), value.reason))
    if not seen:
        rejects = ", ".join(f"{n} {reason}" for reason, n in sorted(counts.items())) or "empty"
        raise UserError(f"intents {uri}: no usable intent ({rejects}); give a file with one request per row")


def _check(value: str | _BadValue) -> str | _BadValue:
    """Return the intent's text, or the problem that the value has by itself."""
    if isinstance(value, _BadValue):
        return value
    if len(value) > 10 * MAX_CHARACTERS:  # too long even after folding; do not split a megabyte into words
        return _BadValue(value, RowProblem.TOO_LONG)
    text = " ".join(value.split())
    if not text:
        return _BadValue(text, RowProblem.BLANK)
    try:
        text.encode()
    except UnicodeEncodeError:  # lone surrogates: bad bytes, or escapes in JSON
        return _BadValue(text, RowProblem.NOT_UTF8)
    return _BadValue(text, RowProblem.TOO_LONG) if len(text) > MAX_CHARACTERS else text


def _printable(text: str) -> str:
    return "".join("\ufffd" if "\ud800" <= c <= "\udfff" else c for c in text)


def _values(uri: str, column: str) -> Iterator[str | _BadValue]:
    """Yield the raw values of the column, one for each row."""
    fs, path = storage.open_filesystem(uri)
    try:
        info = fs.get_file_info(path)
        if info.type == pafs.FileType.NotFound:
            raise UserError(f"intents {uri}: no such file; set intents.source to an existing one, or to builtin:composer")
        if info.type == pafs.FileType.Directory:
            files = storage.parquet_files(uri)
            if not files:
                raise UserError(f"intents {uri}: the folder has no .parquet file; name a file of another type directly")
            for file in files:
                yield from _parquet_values(fs, f"{path.rstrip('/')}/{file.rsplit('/', 1)[-1]}", file, column)
            return
        extension = _extension(path)
        if extension == "parquet":
            yield from _parquet_values(fs, path, uri, column)
        elif extension in ("jsonl", "ndjson", "json"):
            yield from _json_values(_lines(fs, path), uri, column)
        elif extension == "csv":
            yield from _column_values(_csv_rows(_lines(fs, path)), uri, column)
        elif extension == "tsv":
            yield from _column_values(map(_tsv_row, _lines(fs, path)), uri, column)
        elif extension == "txt":
            yield from _lines(fs, path)
        else:
            shown = f".{extension}" if extension else "no extension"
            raise UserError(f"intents {uri}: unknown file type ({shown}); use {FILE_TYPES}")
    except csv.Error as error:
        raise UserError(f"intents {uri}: not readable as CSV ({error}); look for an unclosed quote") from error
    except (pa.ArrowException, OSError) as error:
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"intents {uri}: can't be read ({first_line}); check that its content matches its extension") from error


def _extension(path: str) -> str:
    name = path.rsplit("/", 1)[-1].lower()
    for ending in _COMPRESSED:
        name = name.removesuffix(ending)
    return name.rpartition(".")[2] if "." in name else ""


def _lines(fs: pafs.FileSystem, path: str) -> Iterator[str]:
    """Yield the lines with their ends, cut at ``MAX_LINE``; a byte order mark is dropped."""
    with fs.open_input_stream(path) as source:
        lines = _byte_lines(source)
        first = next(lines, None)
        if first is not None:
            yield _decode(first.removeprefix(b"\xef\xbb\xbf"))
        yield from map(_decode, lines)


def _byte_lines(source: pa.NativeFile) -> Iterator[bytes]:
    pieces: list[bytes] = []  # of the current line; joined once, even if the line spans many chunks
    size = 0
    while chunk := source.read(1 << 20):
        *complete, rest = chunk.split(b"\n")
        for line in complete:
            if size + len(line) > MAX_LINE:
                yield b"".join([*pieces, line])[:MAX_LINE]
            else:
                yield b"".join([*pieces, line, b"\n"])
            pieces, size = [], 0
        size += len(rest)
        if rest and size - len(rest) <= MAX_LINE:
            pieces.append(rest)
    if pieces:
        yield b"".join(pieces)[:MAX_LINE]


def _decode(line: bytes) -> str:
    return line.decode("utf-8", "surrogateescape")


def _csv_rows(lines: Iterable[str]) -> Iterator[list[str]]:
    csv.field_size_limit(MAX_LINE)  # Python's default of 128 KiB would end the job at one large cell
    exhausted = False

    def tracked_lines() -> Iterator[str]:
        nonlocal exhausted
        yield from lines
        exhausted = True

    reader = csv.reader(tracked_lines())
    line = 1  # at which the next row begins
    for row in reader:
        # The file ends inside a quoted cell: if the quote was opened by mistake, all later rows would be lost silently.
        if exhausted and reader.line_num > line:
            raise csv.Error(f"the file ends inside a quote of the row that begins at line {line:,}")
        yield row
        line = reader.line_num + 1


def _column_values(rows: Iterable[list[str]], uri: str, column: str) -> Iterator[str | _BadValue]:
    """Yield the column of a table with a header row."""
    rows = iter(rows)
    header = next((row for row in rows if row), [])
    names = [name.strip() for name in header]
    if names and column not in names:
        raise _no_column(uri, column, names)
    for row in rows:
        index = names.index(column)
        if row:  # a blank line is not a row
            yield row[index] if index < len(row) else _BadValue(", ".join(row)[:REJECT_CHARACTERS], RowProblem.MALFORMED)


def _tsv_row(line: str) -> list[str]:
    """Split a line at its tabs.

    TSV has no quoting, so a single quote is text; quotes around a whole cell, which some exporters write, are removed.
    """
    cells = line.rstrip("\r\n").split("\t")
    return [c[1:-1].replace('""', '"') if len(c) > 1 and c[0] == c[-1] == '"' else c for c in cells] if line.strip() else []


def _json_values(lines: Iterable[str], uri: str, column: str) -> Iterator[str | _BadValue]:
    has_column, other_names = False, set[str]()
    for number, line in enumerate(lines):
        if not line.strip():
            continue
        if number == 0 and line.lstrip().startswith("["):
            raise UserError(f"intents {uri}: a JSON array; write one object per line, for example with: jq -c '.[]'")
        # A line that was cut does not parse; a character has at most four bytes.
        reason = RowProblem.TOO_LONG if len(line) >= MAX_LINE // 4 else RowProblem.MALFORMED
        malformed = _BadValue(line[:REJECT_CHARACTERS].rstrip("\n"), reason)
        try:
            row: Any = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            yield malformed
        elif column in row:
            has_column = True
            value = row[column]
            yield value if isinstance(value, str) else _BadValue("", RowProblem.NULL) if value is None else malformed
        else:
            if len(other_names) < 100:
                other_names |= row.keys()
            yield malformed
    if other_names and not has_column:
        raise _no_column(uri, column, sorted(other_names))


def _parquet_values(fs: pafs.FileSystem, path: str, uri: str, column: str) -> Iterator[str | _BadValue]:
    with fs.open_input_file(path) as source:
        # A buffer size makes pyarrow read pages as they are needed instead of a row group's whole column.
        file = pq.ParquetFile(source, buffer_size=1 << 20)
        schema = file.schema_arrow
        if column not in schema.names:
            raise _no_column(uri, column, schema.names)
        type_ = schema.field(column).type
        type_ = type_.value_type if pa.types.is_dictionary(type_) else type_
        is_text = pa.types.is_string(type_) or pa.types.is_large_string(type_) or pa.types.is_string_view(type_)
        if not is_text and not pa.types.is_binary(type_) and not pa.types.is_large_binary(type_):
            raise UserError(f"intents {uri}: column {column!r} has type {type_}, not text; set intents.column to a text column")
        for batch in file.iter_batches(batch_size=PARQUET_ROWS, columns=[column]):
            # Cast to bytes, because a writer may have put bytes that are not UTF-8 into a string column.
            for value in batch.column(0).cast(type_).cast(pa.large_binary()).to_pylist():
                yield _BadValue("", RowProblem.NULL) if value is None else _decode(value)


def _no_column(uri: str, column: str, names: list[str]) -> UserError:
    shown = _printable(", ".join(names[:20])) + (", ..." if len(names) > 20 else "")
    return UserError(f"intents {uri}: no column {column!r}; it has {shown}; choose one with intents.column=NAME")
