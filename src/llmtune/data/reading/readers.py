"""The kinds of data files: how each is split into records, and how a record becomes a row.

Reading has two parts so that it can use all cores: `split` finds where records begin and end (cheap, in one process),
and `parse` makes a row of one record (in whichever process tokenizes it). A bounded amount is in memory at any time.
To add a kind of file, write its two functions and add a row to `READERS`.
"""

from __future__ import annotations

import contextlib
import csv
import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from typing import IO, Literal, NamedTuple

from llmtune.common.text import excerpt, printable
from llmtune.data.example import Row
from llmtune.data.reading.compression import is_seekable
from llmtune.data.reading.json_file import (
    CHUNK_BYTES,
    begins_list_of_objects,
    json_kind,
    split_conversation,
    split_json,
    split_json_table,
    split_objects,
)
from llmtune.data.reading.parse import (
    MAX_ROW_BYTES,
    BadRow,
    DamagedFileError,
    Payload,
    Record,
    TooLong,
    parse_fields,
    parse_json_row,
    too_long_row,
    without_byte_order_mark,
)
from llmtune.errors import in_one_line

__all__ = ["READERS", "Numbering", "Reader", "kind_of_content", "source_name"]

MAX_PACKED_PARQUET_BYTES = 512 * 2**20
"""A compressed parquet file is unpacked in memory, because parquet is read from its end; this is the largest."""

JSON_LINES = 10
"""First lines of a text file that are looked at: where they are JSON objects, it is a file of JSON lines."""

_COLUMNS = {
    *("prompt", "completion", "question", "answer", "query", "response"),
    *("instruction", "input", "output", "context", "system", "text", "messages"),
}
"""Names of columns by which a table is known in a text file, as workbooks export it with tabs."""

KIND_BYTES = 2**18
"""First bytes of a JSON file, by which its kind is recognized."""

Numbering = Literal["line", "index"]


class Reader(NamedTuple):
    """How one kind of file is read: how its records are numbered, found and parsed."""

    numbering: Numbering
    split: Callable[[IO[bytes]], Iterator[Record]]
    parse: Callable[[str, Record, float], Row | BadRow]
    shape: str | None = None
    """How a file is read that is not what its name says, for users."""


def source_name(label: str, numbering: Numbering, number: int) -> str:
    """The name of a record for users.

    >>> source_name("a.jsonl", "line", 3), source_name("a.json", "index", 0)
    ('a.jsonl:3', 'a.json[0]')
    """
    return f"{label}:{number}" if numbering == "line" else f"{label}[{number}]"


# --- lines: jsonl, txt


def _lines(stream: IO[bytes]) -> Iterator[tuple[int, bytes | TooLong, bool]]:
    r"""Lines with their numbers from 1, without their end; only `\n` ends a line.

    The flag marks a last line without an end.
    """
    number = 0
    # Two more than the limit, so that a line of exactly that length still comes with its end.
    while line := stream.readline(MAX_ROW_BYTES + 2):
        number += 1
        if number == 1:
            line = without_byte_order_mark(line)
            if b"\r" in line.rstrip(b"\r\n") and not line.endswith(b"\n"):
                fix = "end its lines with a line feed, for example with `tr '\\r' '\\n' < OLD > NEW`"
                raise DamagedFileError(None, "the lines of the file end with a carriage return alone (\\r)", fix)
        if len(line) > MAX_ROW_BYTES and not line.endswith(b"\n"):
            # Skip to the end of the line in pieces: it may be as long as the file.
            size = len(line)
            while (piece := stream.readline(CHUNK_BYTES)) and not piece.endswith(b"\n"):
                size += len(piece)
            yield number, TooLong(size + len(piece.rstrip(b"\n"))), False
        else:
            yield number, line.rstrip(b"\r\n"), not line.endswith(b"\n")


def _split_lines(stream: IO[bytes]) -> Iterator[Record]:
    """One record a line; a line of nothing but white space is no record."""
    for number, line, cut_off in _lines(stream):
        if isinstance(line, TooLong) or line.strip():
            yield Record(number, line, cut_off)


def _parse_json(source: str, record: Record, loss_weight: float) -> Row | BadRow:
    assert isinstance(record.payload, bytes | TooLong)
    return parse_json_row(source, record.payload, loss_weight, cut_off=record.cut_off)


def _parse_text(source: str, record: Record, loss_weight: float) -> Row | BadRow:
    if isinstance(record.payload, TooLong):
        return too_long_row(source, record.payload)
    assert isinstance(record.payload, bytes)
    # Bytes that are not UTF-8 become surrogates, which the check of the fields finds and names.
    return parse_fields(source, {"text": record.payload.decode("utf-8", "surrogateescape")}, loss_weight)


# --- csv, tsv


class _CsvLines:
    """Lines for the csv module; a line longer than `MAX_ROW_BYTES` is replaced by an empty cell and remembered."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._lines = _lines(stream)
        self.too_long: dict[int, TooLong] = {}

    def __iter__(self) -> Iterator[str]:
        for number, line, cut_off in self._lines:
            if isinstance(line, TooLong):
                self.too_long[number] = line
                line = b'""'
            yield line.decode("utf-8", "surrogateescape") + ("" if cut_off else "\n")


_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_NAMED_DELIMITER = re.compile(r'"?sep=(.)"?\s*')
"""A first line that names the delimiter, for Excel."""


def _table_kind(stream: IO[bytes], kind: str) -> str:
    """The kind of a table: another delimiter counts where it alone cuts the first two lines into as many cells."""
    # The beginning is enough for two rows, and a file may be larger than the memory.
    text = without_byte_order_mark(stream.read(2**16)).decode("utf-8", "surrogateescape")
    lines = text.splitlines(keepends=True)
    if lines and (named := _NAMED_DELIMITER.fullmatch(lines[0])):
        return f"table {named[1]}" if f"table {named[1]}" in READERS else kind
    if lines and _is_object(lines[0].encode("utf-8", "surrogateescape")):
        return "json lines"
    counts = {delimiter: _cells_of_first_rows(lines, delimiter) for delimiter in (",", ";", "\t", "|")}
    own = _DELIMITERS[kind]
    others = [
        delimiter for delimiter, count in counts.items() if delimiter != own and len(set(count)) == 1 and max(count) > 1
    ]
    # By the header alone: rows may hold the mark too, as in numbers with a decimal comma.
    return f"table {others[0]}" if counts[own][:1] in ([], [1]) and len(others) == 1 else kind


def _cells_of_first_rows(lines: list[str], delimiter: str) -> list[int]:
    """The numbers of cells that the first two rows have under a delimiter; empty where they are no table rows."""
    try:
        rows = itertools.islice((row for row in csv.reader(lines, delimiter=delimiter, strict=True) if row), 2)
        return [len(row) for row in rows]
    except csv.Error:
        return []


class _Header:
    """The names of a table's columns, without those that hold nothing: row numbers in front, empty cells at the end.

    pandas writes row numbers below an empty name. Raises DamagedFileError for a name that is missing or repeated.
    """

    def __init__(self, names: list[str], line: int) -> None:
        self.width = len(names)
        self._first = int(len(names) > 1 and not names[0].strip())
        self._last = self.width
        while self._last - self._first > 1 and not names[self._last - 1].strip():
            self._last -= 1
        self.names = [name.strip() for name in names[self._first : self._last]]
        for name in self.names:
            if not name:
                raise _unnamed_column(line)
            if self.names.count(name) > 1:
                fix = "give each column its own name in the first line"
                raise DamagedFileError(line, f"the header names the column {name!r} twice", fix)

    def row(self, cells: list[str], line: int) -> dict[str, object]:
        """The cells of a row by their names. Raises DamagedFileError for a column without a name that holds data."""
        if self._first and not cells[0].strip().isdigit():
            raise _unnamed_column(line, cells[0])
        for cell in cells[self._last :]:
            if cell.strip():
                raise _unnamed_column(line, cell)
        return dict(zip(self.names, cells[self._first : self._last], strict=True))


def _unnamed_column(line: int, cell: str = "") -> DamagedFileError:
    holds = f", and it holds {cell[:60]!r}" if cell else ""
    problem = f"the header has a column without a name{holds}"
    return DamagedFileError(line, problem, "give each column its own name in the first line")


def _split_table(stream: IO[bytes], delimiter: str) -> Iterator[Record]:
    # Python's own limit is 128 KiB, which a long document in a cell exceeds.
    csv.field_size_limit(MAX_ROW_BYTES)
    lines = _CsvLines(stream)
    text = iter(lines)
    first = next(text, "")
    # A header written `prompt, completion` says that the cells below have that space too.
    is_spaced = f"{delimiter} " in first
    table = csv.reader(itertools.chain([first], text), delimiter=delimiter, skipinitialspace=is_spaced, strict=True)
    header: _Header | None = None
    while True:
        start = table.line_num + 1
        try:
            cells = next(table, None)
        except csv.Error as error:
            if header is None:
                problem = f"the header is not a table row: {error}"
                raise DamagedFileError(start, problem, "name each column once in the first line") from None
            yield Record(start, f"not a table row: {error}")
            continue
        line = table.line_num
        if cells is None:
            return
        long_lines = [lines.too_long.pop(number) for number in range(start, line + 1) if number in lines.too_long]
        if long_lines and header is not None:
            yield Record(start, long_lines[0])
        elif header is None:
            # Neither an empty line nor Excel's `sep=;` is a header.
            if cells and not _NAMED_DELIMITER.fullmatch(delimiter.join(cells)):
                header = _Header(cells, start)
        elif len(cells) > 1 and not any(cell.strip() for cell in cells):
            continue  # a spreadsheet's empty line
        elif len(cells) >= header.width and not any(cell.strip() for cell in cells[header.width :]):
            yield Record(start, header.row(cells[: header.width], start))  # a comma too many ends the line
        elif cells:
            title = f" (`{excerpt(header.names[0])}`; is that a line above the header?)" if header.width == 1 else ""
            yield Record(start, f"the row has {len(cells)} cells, the header {header.width}{title}")


def _parse_cells(source: str, record: Record, loss_weight: float) -> Row | BadRow:
    payload = record.payload
    if isinstance(payload, TooLong):
        return too_long_row(source, payload)
    if isinstance(payload, str):
        fix = "put cells with commas, quotes or line ends in double quotes, and double the quotes in them"
        return BadRow(source, None, payload, fix)
    assert isinstance(payload, dict)
    return parse_fields(source, payload, loss_weight)


# --- parquet, datasets


def _split_parquet(stream: IO[bytes]) -> Iterator[Record]:
    from pyarrow import ArrowException, BufferReader, parquet  # takes a second; other kinds of files do without

    file: IO[bytes] | BufferReader = stream
    if not is_seekable(stream):
        # Parquet is read from its end, so a compressed one has to be unpacked into memory.
        data = stream.read(MAX_PACKED_PARQUET_BYTES + 1)
        if len(data) > MAX_PACKED_PARQUET_BYTES:
            problem = f"a compressed parquet file may unpack to {MAX_PACKED_PARQUET_BYTES // 2**20} MiB at most"
            raise DamagedFileError(None, problem, "unpack it first; parquet is compressed inside")
        file = BufferReader(data)
    number = -1
    try:
        # In small batches: rows with long texts would fill the memory by the default of 65,536.
        for batch in parquet.ParquetFile(file).iter_batches(batch_size=128):
            others = [field.name for field in batch.schema if re.search("binary|map<", str(field.type))]
            for fields in batch.to_pylist():
                number += 1
                yield Record(number, fields | {name: _plain(fields[name]) for name in others})
    except (
        ArrowException,
        OSError,
        ValueError,
        OverflowError,
    ) as error:  # ValueError: not UTF-8; Overflow: odd dates
        problem = f"not a readable parquet file: {in_one_line(error)}"
        fix = "write the file again; it was cut off or is something else"
        head = stream.read(2**10) if number < 0 and is_seekable(stream) and not stream.seek(0) else b""
        if head.lstrip()[:1] in (b"{", b"["):
            problem, fix = "the file is JSON, whatever its name says", "end its name in .jsonl, or .json for a list"
        elif head and printable(text := head.decode("utf-8", "replace"), keep="\n\r\t") == text:
            problem, fix = "the file is text, whatever its name says", "end its name in .csv, .tsv or .txt"
        raise DamagedFileError(number + 1 if number >= 0 else None, problem, fix) from None


def _plain(value: object) -> object:
    r"""A cell of parquet with objects in place of maps, and texts in place of bytes, where these are UTF-8.

    >>> _plain([[("role", b"user")]]), _plain(b"\xff")
    ([{'role': 'user'}], b'\xff')
    """
    if isinstance(value, list) and value and isinstance(value[0], tuple):  # a map, as pyarrow gives it
        value = dict(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    with contextlib.suppress(UnicodeDecodeError):  # Spark and Impala write texts as bytes
        return value.decode("utf-8") if isinstance(value, bytes) else value
    return value


def _parse_mapping(source: str, record: Record, loss_weight: float) -> Row | BadRow:
    assert isinstance(record.payload, Mapping)
    return parse_fields(source, record.payload, loss_weight)


def _split_nothing(stream: IO[bytes]) -> Iterator[Record]:
    raise AssertionError(f"a data set has no byte stream: {stream}")


def kind_of_content(stream: IO[bytes], kind: str) -> str:
    """The kind of a file (a key of `READERS`) by what it holds, where that is another than its name says."""
    if kind in (".json", ".jsonl", ".ndjson"):
        head = without_byte_order_mark(stream.read(KIND_BYTES)).lstrip(b" \t\r\n")
        line, _, rest = head.partition(b"\n")
        # The common case: more than one line, of which the first one is a row.
        is_lines = bool(rest.strip()) and isinstance(parse_json_row("", line.rstrip(b"\r"), 1.0), Row)
        return ".jsonl" if is_lines else json_kind(head, stream, kind)
    if kind == ".txt":
        return _kind_of_text(stream)
    return _table_kind(stream, kind) if kind in _DELIMITERS else kind


def _kind_of_text(stream: IO[bytes]) -> str:
    """The kind of a `.txt` file: lines of text, unless its first lines are JSON, or a table of fields known here."""
    first = [record.payload for record in itertools.islice(_split_lines(stream), JSON_LINES)]
    if first and all(_is_object(line) for line in first):
        return "json lines"
    lines = [line for line in first if isinstance(line, bytes)]
    if begins_list_of_objects(b"\n".join(lines)):
        kind = json_kind(b"\n".join(lines).lstrip(), stream, ".json")
        return "json list" if kind == ".json" else kind
    header = lines[0].decode("utf-8", "surrogateescape") if lines else ""
    for delimiter in (",", ";", "\t", "|"):
        names = [name.strip().strip('"') for name in header.split(delimiter)]
        if len(names) > 1 and _COLUMNS.issuperset(names):
            return f"table {delimiter}"
    return ".txt"


def _is_object(line: Payload) -> bool:
    if not isinstance(line, bytes) or line.lstrip()[:1] != b"{":
        return False
    return isinstance(parse_json_row("", line, 1.0), Row)


def _table_reader(delimiter: str, shape: str | None = None) -> Reader:
    return Reader("line", lambda stream: _split_table(stream, delimiter), _parse_cells, shape)


READERS: dict[str, Reader] = {
    ".jsonl": Reader("line", _split_lines, _parse_json),
    ".ndjson": Reader("line", _split_lines, _parse_json),
    "json lines": Reader("line", _split_lines, _parse_json, "one JSON object a line"),
    ".json": Reader("index", split_json, _parse_json),
    "json list": Reader("index", split_json, _parse_json, "a JSON list"),
    "json objects": Reader("index", split_objects, _parse_json, "objects one after another"),
    "json table": Reader("index", split_json_table, _parse_mapping, "one table, as pandas and `datasets` write it"),
    "json conversation": Reader("index", split_conversation, _parse_json, "the messages of one conversation"),
    ".csv": _table_reader(","),
    ".tsv": _table_reader("\t"),
    "table ;": _table_reader(";", "a table with `;` between its columns"),
    "table |": _table_reader("|", "a table with `|` between its columns"),
    "table ,": _table_reader(",", "a table with commas between its columns"),
    "table \t": _table_reader("\t", "a table with tabs between its columns"),
    ".parquet": Reader("index", _split_parquet, _parse_mapping),
    ".txt": Reader("line", _split_lines, _parse_text),
    "dataset": Reader("index", _split_nothing, _parse_mapping),
}
"""Readers by the ending of a file, or by what a file holds whose ending says something else."""
