"""From a file's bytes to its records, one kind of file each; a bounded amount is in memory at any time.

Reading is cut in two so that it can use all cores: `split` finds where records begin and end (cheap, one process), and
`parse` makes a row of one record (in whichever process tokenizes it).
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple, cast

from llmtune.data.example import Row
from llmtune.data.reading.json_stream import CHUNK_BYTES, DamagedListError, ListScanner
from llmtune.data.reading.parse import (
    MAX_ROW_BYTES,
    BadRow,
    TooLong,
    json_value_problem,
    parse_json_record,
    parse_record_fields,
)
from llmtune.errors import in_one_line

__all__ = [
    "COMPRESSIONS",
    "READERS",
    "DamagedFileError",
    "Numbering",
    "Reader",
    "Record",
    "compression_errors",
    "is_json_lines",
    "open_bytes",
    "source_of",
]

MAX_PACKED_PARQUET_BYTES = 512 * 2**20
"""A compressed parquet file is unpacked in memory, because parquet is read from its end; this is the largest."""

_BOM = b"\xef\xbb\xbf"
_ROW_LISTS = frozenset({"messages", "conversations", "conversation"})
_JSON_CELLS = ("messages", "conversations", "conversation", "tools", "history")


class Record(NamedTuple):
    """One record, not yet parsed: its number (a line from 1, or an index from 0) and what its `parse` takes."""

    number: int
    payload: Any
    cut_off: bool = False


class DamagedFileError(Exception):
    """The file cannot be read from here on."""

    def __init__(self, number: int | None, what: str, fix: str) -> None:
        super().__init__(what)
        self.number, self.what, self.fix = number, what, fix


Numbering = Literal["line", "index"]


class Reader(NamedTuple):
    """How one kind of file is read: how its records are numbered, found and parsed."""

    numbering: Numbering
    split: Callable[[IO[bytes]], Iterator[Record]]
    parse: Callable[[str, Record, float], Row | BadRow]


def source_of(label: str, numbering: Numbering, number: int) -> str:
    """The place of a record as users read it.

    >>> source_of("a.jsonl", "line", 3), source_of("a.json", "index", 0)
    ('a.jsonl:3', 'a.json[0]')
    """
    return f"{label}:{number}" if numbering == "line" else f"{label}[{number}]"


# --- bytes
# ------------------------------------------------------------------------------------------------------------------------


class _ZstdStream(io.RawIOBase):
    """Decompressed bytes of a zstd file; unlike the library's own stream it notices a file that was cut off."""

    def __init__(self, file: IO[bytes]) -> None:
        import zstandard

        self._file = file
        self._new_frame = zstandard.ZstdDecompressor().decompressobj
        self._frame: Any = None
        self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, target: Any) -> int:
        """Fill `target` and return how many bytes, 0 at the end. Raises EOFError for a file that was cut off."""
        while not self._ready:
            data = self._frame.unused_data if self._frame is not None and self._frame.eof else b""
            data = data or self._file.read(CHUNK_BYTES // 8)
            if not data:
                if self._frame is not None and not self._frame.eof:
                    raise EOFError("the compressed file was cut off")
                return 0
            if self._frame is None or self._frame.eof:
                self._frame = self._new_frame()
            self._ready = self._frame.decompress(data)
        count = min(len(target), len(self._ready))
        target[:count], self._ready = self._ready[:count], self._ready[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def _open_gzip(path: Path) -> IO[bytes]:
    return cast("IO[bytes]", gzip.open(path, "rb"))


def _open_zstd(path: Path) -> IO[bytes]:
    return io.BufferedReader(_ZstdStream(path.open("rb")), CHUNK_BYTES)


COMPRESSIONS: dict[str, Callable[[Path], IO[bytes]]] = {".gz": _open_gzip, ".zst": _open_zstd}


def open_bytes(path: Path) -> IO[bytes]:
    """Open a file for reading, unpacked if its name ends in .gz or .zst."""
    opener = COMPRESSIONS.get(path.suffix.lower())
    return opener(path) if opener else path.open("rb", CHUNK_BYTES)


def compression_errors() -> tuple[type[Exception], ...]:
    """What the libraries raise when compressed bytes are damaged."""
    import zstandard

    return (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError)


def _without_bom(start: bytes) -> bytes:
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DamagedFileError(
            None, "the file is UTF-16, not UTF-8", "save it as UTF-8, for example with `iconv -f UTF-16 -t UTF-8`"
        )
    return start.removeprefix(_BOM)


def _lines(stream: IO[bytes]) -> Iterator[tuple[int, bytes | TooLong, bool]]:
    r"""Lines with their numbers from 1, without their end; only `\n` ends a line.

    The flag says that a last line has no end.
    """
    number = 0
    while line := stream.readline(MAX_ROW_BYTES + 2):
        number += 1
        if number == 1:
            line = _without_bom(line)
        if len(line) > MAX_ROW_BYTES and not line.endswith(b"\n"):
            size = len(line)
            while (more := stream.readline(CHUNK_BYTES)) and not more.endswith(b"\n"):
                size += len(more)
            yield number, TooLong(size + len(more.rstrip(b"\n"))), False
        else:
            yield number, line.rstrip(b"\r\n"), not line.endswith(b"\n")


# --- jsonl, txt
# -------------------------------------------------------------------------------------------------------------------


def _split_lines(stream: IO[bytes]) -> Iterator[Record]:
    """One record a line; a line of nothing but white space is no record."""
    for number, line, cut_off in _lines(stream):
        if isinstance(line, TooLong) or line.strip():
            yield Record(number, line, cut_off)


def _parse_json(source: str, record: Record, loss_weight: float) -> Row | BadRow:
    return parse_json_record(source, record.payload, loss_weight, cut_off=record.cut_off)


def _parse_text(source: str, record: Record, loss_weight: float) -> Row | BadRow:
    if isinstance(record.payload, TooLong):
        return parse_json_record(source, record.payload, loss_weight)
    return parse_record_fields(source, {"text": record.payload.decode("utf-8", "surrogateescape")}, loss_weight)


# --- json
# -------------------------------------------------------------------------------------------------------------------------

_HEAD_BYTES = CHUNK_BYTES


def is_json_lines(stream: IO[bytes]) -> bool:
    """Say whether a file named `.json` holds one object to a line after all, as many do."""
    head = _without_bom(stream.read(_HEAD_BYTES)).lstrip(b" \t\r\n")
    first_line, _, more = head.partition(b"\n")
    return bool(more.strip()) and isinstance(parse_json_record("", first_line.rstrip(b"\r"), 1.0), Row)


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
        whole = head + stream.read(MAX_ROW_BYTES + 1 - len(head))
        yield Record(0, whole if len(whole) <= MAX_ROW_BYTES else TooLong(len(whole)))
        return
    yield from _elements(ListScanner(stream, head[start:]), name)


def _elements(scanner: ListScanner, name: str | None) -> Iterator[Record]:
    count = 0
    try:
        for count, element in enumerate(scanner, start=1):
            yield Record(count - 1, element)
    except DamagedListError as damage:
        raise DamagedFileError(
            count, f"{damage}, after about {count} rows", "write the file again; it was cut off or edited"
        ) from None
    rest = scanner.rest(_HEAD_BYTES)
    if name is None:
        if rest.strip():
            raise DamagedFileError(count, "something follows the end of the list", "keep one list in the file")
        return
    after = json_value_problem("", b'{"":0' + rest)
    if isinstance(after, BadRow):
        raise DamagedFileError(
            count, f"what follows the list `{name}` is {after.what}", "write the file again; it was cut off or edited"
        )
    others = [
        key for key, value in after[0].items() if isinstance(value, list) and value and isinstance(value[0], dict)
    ]
    if others:
        raise DamagedFileError(
            count, f"the object holds more than one list of rows: `{name}`, `{others[0]}`", "keep one list in each file"
        )


def _list_inside(head: bytes) -> tuple[str | None, int]:
    """The key of the first list of objects in the object `head` begins, and where its first element begins."""
    decoder = json.JSONDecoder()
    text = head.decode("latin-1")  # one character a byte; only brackets and quotes are looked at
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
# ---------------------------------------------------------------------------------------------------------------------


class _CsvLines:
    """Lines for the csv module, which must not see one longer than memory: such a line is replaced and remembered."""

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
                what = f"the header is not a table row: {error}"
                raise DamagedFileError(start, what, "name each column once in the first line") from None
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
        if not name.strip() or names.count(name) > 1:
            what = (
                f"the header names the column {name!r} twice"
                if name.strip()
                else "the header has a column without a name"
            )
            raise DamagedFileError(line, what, "give each column its own name in the first line")


def _parse_cells(source: str, record: Record, loss_weight: float) -> Row | BadRow:
    if isinstance(record.payload, TooLong):
        return parse_json_record(source, record.payload, loss_weight)
    if isinstance(record.payload, str):
        return BadRow(
            source,
            None,
            record.payload,
            "put cells with commas, quotes or line ends in double quotes, and double the quotes in them",
        )
    fields: dict[str, Any] = dict(record.payload)
    for name in _JSON_CELLS:  # a table can only carry lists as JSON inside a cell
        cell = fields.get(name)
        if cell is not None and cell.lstrip()[:1] == "[":
            value = json_value_problem(source, cell.encode("utf-8", "surrogateescape"))
            if isinstance(value, BadRow):
                return value._replace(field=name)
            fields[name] = value[0]
    return parse_record_fields(source, fields, loss_weight)


# --- parquet, datasets
# ------------------------------------------------------------------------------------------------------------


def _split_parquet(stream: IO[bytes]) -> Iterator[Record]:
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile

    place: Any = stream
    if not isinstance(stream, io.BufferedReader) or isinstance(stream.raw, _ZstdStream):
        data = stream.read(MAX_PACKED_PARQUET_BYTES + 1)
        if len(data) > MAX_PACKED_PARQUET_BYTES:
            limit = f"{MAX_PACKED_PARQUET_BYTES // 2**20} MiB"
            raise DamagedFileError(
                None,
                f"a compressed parquet file may unpack to {limit} at most",
                "unpack it first; parquet is compressed inside",
            )
        place = pa.BufferReader(data)
    number = -1
    try:
        table = ParquetFile(place)
        for batch in table.iter_batches(batch_size=128):
            for fields in batch.to_pylist():
                number += 1
                yield Record(number, fields)
    except (
        pa.ArrowException,
        OSError,
        ValueError,
        OverflowError,
    ) as error:  # ValueError: text that is not UTF-8; Overflow: odd dates
        what = f"not a readable parquet file: {in_one_line(error)}"
        raise DamagedFileError(
            number + 1 if number >= 0 else None, what, "write the file again; it was cut off or is something else"
        ) from None


def _parse_fields(source: str, record: Record, loss_weight: float) -> Row | BadRow:
    return parse_record_fields(source, cast("Mapping[str, Any]", record.payload), loss_weight)


def _split_nothing(stream: IO[bytes]) -> Iterator[Record]:
    raise AssertionError(f"a data set has no byte stream: {stream}")


READERS: dict[str, Reader] = {
    ".jsonl": Reader("line", _split_lines, _parse_json),
    ".ndjson": Reader("line", _split_lines, _parse_json),
    ".json": Reader("index", _split_json, _parse_json),
    ".csv": Reader("line", lambda stream: _split_table(stream, ","), _parse_cells),
    ".tsv": Reader("line", lambda stream: _split_table(stream, "\t"), _parse_cells),
    ".parquet": Reader("index", _split_parquet, _parse_fields),
    ".txt": Reader("line", _split_lines, _parse_text),
    "dataset": Reader("index", _split_nothing, _parse_fields),
}
