"""The kinds of data files: how each is split into records, and how a record becomes a row.

Reading has two parts so that it can use all cores: `split` finds where records begin and end (cheap, in one process),
and `parse` makes a row of one record (in whichever process tokenizes it). A bounded amount is in memory at any time.
To add a kind of file, write its two functions and add a row to `READERS`.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping
from typing import IO, Literal, NamedTuple

from llmtune.data.example import Row
from llmtune.data.reading.compression import is_seekable
from llmtune.data.reading.json_stream import CHUNK_BYTES, DamagedListError, ListScanner
from llmtune.data.reading.parse import (
    MAX_ROW_BYTES,
    BadRow,
    TooLong,
    parse_fields,
    parse_json_row,
    parse_json_value,
    too_long_row,
)
from llmtune.errors import in_one_line

__all__ = ["READERS", "DamagedFileError", "Numbering", "Reader", "Record", "is_json_lines", "source_name"]

MAX_PACKED_PARQUET_BYTES = 512 * 2**20
"""A compressed parquet file is unpacked in memory, because parquet is read from its end; this is the largest."""

_BOM = b"\xef\xbb\xbf"
_ROW_LISTS = frozenset({"messages", "conversations", "conversation"})
"""Keys of a single row in a `.json` file; a list under any other key is a list of rows."""
_JSON_CELLS = ("messages", "conversations", "conversation", "tools", "history")

Payload = bytes | str | TooLong | Mapping[str, object]


class Record(NamedTuple):
    """One record, not yet parsed: its number (a line from 1, or an index from 0) and its content.

    The content is bytes, the fields of a table row, or text: the reason why the record is no table row. `cut_off` marks
    a last line without a line end.
    """

    number: int
    payload: Payload
    cut_off: bool = False


class DamagedFileError(Exception):
    """The file cannot be read from record `number` on (None: from its beginning)."""

    def __init__(self, number: int | None, problem: str, fix: str) -> None:
        super().__init__(problem)
        self.number, self.problem, self.fix = number, problem, fix


Numbering = Literal["line", "index"]


class Reader(NamedTuple):
    """How one kind of file is read: how its records are numbered, found and parsed."""

    numbering: Numbering
    split: Callable[[IO[bytes]], Iterator[Record]]
    parse: Callable[[str, Record, float], Row | BadRow]


def source_name(label: str, numbering: Numbering, number: int) -> str:
    """The name of a record for users.

    >>> source_name("a.jsonl", "line", 3), source_name("a.json", "index", 0)
    ('a.jsonl:3', 'a.json[0]')
    """
    return f"{label}:{number}" if numbering == "line" else f"{label}[{number}]"


# --- lines: jsonl, txt


def _without_bom(start: bytes) -> bytes:
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        fix = "save it as UTF-8, for example with `iconv -f UTF-16 -t UTF-8`"
        raise DamagedFileError(None, "the file is UTF-16, not UTF-8", fix)
    return start.removeprefix(_BOM)


def _lines(stream: IO[bytes]) -> Iterator[tuple[int, bytes | TooLong, bool]]:
    r"""Lines with their numbers from 1, without their end; only `\n` ends a line.

    The flag marks a last line without an end.
    """
    number = 0
    while line := stream.readline(MAX_ROW_BYTES + 2):
        number += 1
        if number == 1:
            line = _without_bom(line)
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
    return parse_fields(source, {"text": record.payload.decode("utf-8", "surrogateescape")}, loss_weight)


# --- json

_HEAD_BYTES = CHUNK_BYTES


def is_json_lines(stream: IO[bytes]) -> bool:
    """Whether a file named `.json` holds one object a line, as many do."""
    head = _without_bom(stream.read(_HEAD_BYTES)).lstrip(b" \t\r\n")
    first_line, _, rest = head.partition(b"\n")
    return bool(rest.strip()) and isinstance(parse_json_row("", first_line.rstrip(b"\r"), 1.0), Row)


def _split_json(stream: IO[bytes]) -> Iterator[Record]:
    """Elements of a list, or of the one list inside an object; or a single row as an object."""
    head = _without_bom(stream.read(_HEAD_BYTES)).lstrip(b" \t\r\n")
    if not head:
        return
    if head[:1] == b"[":
        yield from _elements(ListScanner(stream, head[1:]), None)
        return
    name, start = _list_inside(head)
    if name is None or name in _ROW_LISTS:
        text = head + stream.read(MAX_ROW_BYTES + 1 - len(head))
        yield Record(0, text if len(text) <= MAX_ROW_BYTES else TooLong(len(text)))
        return
    yield from _elements(ListScanner(stream, head[start:]), name)


def _elements(scanner: ListScanner, name: str | None) -> Iterator[Record]:
    """Records of a list, which is the value of `name` in an object unless that is None."""
    rewrite = "write the file again; it was cut off or edited"
    count = 0
    try:
        for count, element in enumerate(scanner, start=1):
            yield Record(count - 1, element)
    except DamagedListError as damage:
        raise DamagedFileError(count, f"{damage}, after about {count} rows", rewrite) from None
    rest = scanner.rest(_HEAD_BYTES)
    if name is None:
        if rest.strip():
            raise DamagedFileError(count, "something follows the end of the list", "keep one list in the file")
        return
    # The list was scanned, not parsed: put a number in its place to parse the object around it.
    parsed = parse_json_value("", b'{"":0' + rest)
    if isinstance(parsed, BadRow):
        raise DamagedFileError(count, f"what follows the list `{name}` is {parsed.problem}", rewrite)
    (fields,) = parsed
    assert isinstance(fields, dict)
    others = [key for key, value in fields.items() if isinstance(value, list) and value and isinstance(value[0], dict)]
    if others:
        problem = f"the object holds more than one list of rows: `{name}`, `{others[0]}`"
        raise DamagedFileError(count, problem, "keep one list in each file")


def _list_inside(head: bytes) -> tuple[str | None, int]:
    """The key of the first list of objects in the object `head` begins, and where its first element begins."""
    decoder = json.JSONDecoder()
    text = head.decode("latin-1")  # one character a byte, so that positions agree; only ASCII marks are looked for
    position = 1
    try:
        while True:
            position += len(text[position:]) - len(text[position:].lstrip(" \t\r\n,"))
            if text[position : position + 1] != '"':
                return None, 0
            key, position = decoder.raw_decode(text, position)
            after = text[position:].lstrip(" \t\r\n")
            position = len(text) - len(after) + 1
            value = text[position:].lstrip(" \t\r\n")
            position = len(text) - len(value)
            if value[:1] == "[" and value[1:].lstrip(" \t\r\n")[:1] in ("{", "]"):
                return key.encode("latin-1").decode("utf-8", "replace"), position + 1
            _, position = decoder.raw_decode(text, position)
    except (ValueError, RecursionError):
        return None, 0


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


def _split_table(stream: IO[bytes], delimiter: str) -> Iterator[Record]:
    csv.field_size_limit(MAX_ROW_BYTES)
    lines = _CsvLines(stream)
    table = csv.reader(iter(lines), delimiter=delimiter, strict=True)
    names: list[str] | None = None
    while True:
        start = table.line_num + 1
        try:
            cells = next(table, None)
        except csv.Error as error:
            if names is None:
                problem = f"the header is not a table row: {error}"
                raise DamagedFileError(start, problem, "name each column once in the first line") from None
            yield Record(start, f"not a table row: {error}")
            continue
        line = table.line_num
        if cells is None:
            return
        long_lines = [lines.too_long.pop(number) for number in range(start, line + 1) if number in lines.too_long]
        if long_lines and names is not None:
            yield Record(start, long_lines[0])
        elif names is None:
            if cells:  # an empty line is no header
                names = cells
                _check_header(names, start)
        elif len(cells) == len(names):
            yield Record(start, dict(zip(names, cells, strict=True)))
        elif cells:
            yield Record(start, f"the row has {len(cells)} cells, the header {len(names)}")


def _check_header(names: list[str], line: int) -> None:
    for name in names:
        repeated = bool(name.strip()) and names.count(name) > 1
        if repeated or not name.strip():
            problem = (
                f"the header names the column {name!r} twice" if repeated else "the header has a column without a name"
            )
            raise DamagedFileError(line, problem, "give each column its own name in the first line")


def _parse_cells(source: str, record: Record, loss_weight: float) -> Row | BadRow:
    payload = record.payload
    if isinstance(payload, TooLong):
        return too_long_row(source, payload)
    if isinstance(payload, str):
        fix = "put cells with commas, quotes or line ends in double quotes, and double the quotes in them"
        return BadRow(source, None, payload, fix)
    assert isinstance(payload, dict)
    fields: dict[str, object] = dict(payload)
    for name in _JSON_CELLS:  # a table can only carry lists as JSON inside a cell
        cell = payload.get(name)
        if cell is not None and cell.lstrip()[:1] == "[":
            value = parse_json_value(source, cell.encode("utf-8", "surrogateescape"))
            if isinstance(value, BadRow):
                return value._replace(field=name)
            fields[name] = value[0]
    return parse_fields(source, fields, loss_weight)


# --- parquet, datasets


def _split_parquet(stream: IO[bytes]) -> Iterator[Record]:
    import pyarrow as pa  # takes a second; other kinds of files do without
    from pyarrow.parquet import ParquetFile

    file: IO[bytes] | pa.BufferReader = stream
    if not is_seekable(stream):
        data = stream.read(MAX_PACKED_PARQUET_BYTES + 1)
        if len(data) > MAX_PACKED_PARQUET_BYTES:
            problem = f"a compressed parquet file may unpack to {MAX_PACKED_PARQUET_BYTES // 2**20} MiB at most"
            raise DamagedFileError(None, problem, "unpack it first; parquet is compressed inside")
        file = pa.BufferReader(data)
    number = -1
    try:
        for batch in ParquetFile(file).iter_batches(batch_size=128):
            for fields in batch.to_pylist():
                number += 1
                yield Record(number, fields)
    except (
        pa.ArrowException,
        OSError,
        ValueError,
        OverflowError,
    ) as error:  # ValueError: not UTF-8; Overflow: odd dates
        problem = f"not a readable parquet file: {in_one_line(error)}"
        fix = "write the file again; it was cut off or is something else"
        raise DamagedFileError(number + 1 if number >= 0 else None, problem, fix) from None


def _parse_mapping(source: str, record: Record, loss_weight: float) -> Row | BadRow:
    assert isinstance(record.payload, Mapping)
    return parse_fields(source, record.payload, loss_weight)


def _split_nothing(stream: IO[bytes]) -> Iterator[Record]:
    raise AssertionError(f"a data set has no byte stream: {stream}")


READERS: dict[str, Reader] = {
    ".jsonl": Reader("line", _split_lines, _parse_json),
    ".ndjson": Reader("line", _split_lines, _parse_json),
    ".json": Reader("index", _split_json, _parse_json),
    ".csv": Reader("line", lambda stream: _split_table(stream, ","), _parse_cells),
    ".tsv": Reader("line", lambda stream: _split_table(stream, "\t"), _parse_cells),
    ".parquet": Reader("index", _split_parquet, _parse_mapping),
    ".txt": Reader("line", _split_lines, _parse_text),
    "dataset": Reader("index", _split_nothing, _parse_mapping),
}
