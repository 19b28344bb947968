"""Read the rows of a JSON document one by one from a stream, with a bounded amount of it in memory.

A list is cut at its commas by looking at quotes and brackets only. Each element is parsed by itself
later, so one broken element does not spoil the others.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import IO

from llmtune.data.reading.parse import (
    MAX_ROW_BYTES,
    BadRow,
    DamagedFileError,
    Record,
    TooLong,
    is_conversation,
    parse_json_value,
    without_byte_order_mark,
)

__all__ = [
    "CHUNK_BYTES",
    "begins_list_of_objects",
    "json_kind",
    "split_conversation",
    "split_json",
    "split_json_table",
    "split_objects",
    "table_rows",
]

CHUNK_BYTES = 2**20
_SPACE = b" \t\r\n"

# Searching for the next mark by regular expression is many times faster than a loop over bytes. Possessive quantifiers
# (*+) keep the match linear in long texts full of backslashes.
_BETWEEN_ELEMENTS = re.compile(rb'[\[\]{}",]')
_INSIDE_ELEMENT = re.compile(rb'[\[\]{}"]')
_STRING_BODY = re.compile(rb'[^"\\]*+(?:\\.[^"\\]*+)*+', re.DOTALL)


class DamagedListError(Exception):
    """The list does not end as a list: the rest of the file cannot be cut into elements."""


class ListScanner:
    """Iterates over the elements of the list whose `[` has just been read; `rest()` is the text after its `]`.

    Without `is_list` it iterates over the values with brackets of a file, one after another. A comma after the last
    element is ignored.

    Raises `DamagedListError` where the file ends inside the list or its brackets do not match.
    """

    def __init__(self, stream: IO[bytes], already_read: bytes, *, is_list: bool = True) -> None:
        self._stream = stream
        self._is_list = is_list
        self._buffer = already_read
        self._position = 0
        self._element = bytearray()
        self._element_bytes = 0
        self._element_start = 0

    def __iter__(self) -> Iterator[bytes | TooLong]:
        depth, in_string = 0, False
        while True:
            if in_string:
                body = _STRING_BODY.match(self._buffer, self._position)
                assert body is not None
                self._position = body.end()
                if self._buffer[self._position : self._position + 1] == b'"':
                    self._position, in_string = self._position + 1, False
                elif not self._fill():
                    raise DamagedListError("the file ends inside a quoted text")
                continue
            token = (_INSIDE_ELEMENT if depth else _BETWEEN_ELEMENTS).search(self._buffer, self._position)
            if token is None:
                self._position = len(self._buffer)
                if self._fill():
                    continue
                if self._is_list or depth:
                    raise DamagedListError(
                        f"the file ends {'before its list does' if self._is_list else 'in an object'}"
                    )
                if element := self._take():
                    yield element
                return
            mark = token.group()
            self._position = token.start()
            if depth == 0 and self._is_list and mark in b",]":
                element = self._take()
                self._position = self._element_start = self._position + 1
                if mark == b"]" and element == b"":
                    return
                yield element
                if mark == b"]":
                    return
                continue
            self._position += 1
            if mark == b'"':
                in_string = True
            elif mark in b"[{":
                depth += 1
            elif depth == 0 and mark != b",":
                raise DamagedListError(f"a `{mark.decode()}` closes something that was never opened")
            elif depth:
                depth -= 1
                if depth == 0 and not self._is_list:
                    element = self._take()
                    self._element_start = self._position
                    yield element

    def rest(self, limit_bytes: int) -> bytes:
        """The text after the list, up to `limit_bytes`."""
        rest = self._buffer[self._position :]
        return rest + self._stream.read(max(0, limit_bytes - len(rest)))

    def _fill(self) -> bool:
        """Read another chunk; False at the end of the stream.

        Scanned bytes move to the element; unscanned ones (at most half an escape) stay in the buffer.
        """
        self._append_scanned()
        data = self._stream.read(CHUNK_BYTES)
        self._buffer = self._buffer[self._position :] + data
        self._position = self._element_start = 0
        return bool(data)

    def _append_scanned(self) -> None:
        piece = self._buffer[self._element_start : self._position]
        self._element_bytes += len(piece)
        if self._element_bytes <= MAX_ROW_BYTES:
            self._element += piece
        else:
            self._element.clear()  # too long for a row: only its size is counted from here on

    def _take(self) -> bytes | TooLong:
        self._append_scanned()
        size = self._element_bytes
        element = (
            TooLong(size)
            if size > MAX_ROW_BYTES
            else bytes(self._element).strip(b" \t\r\n" if self._is_list else b" \t\r\n,")
        )
        self._element.clear()
        self._element_bytes = 0
        return element


# --- the kind of a file

MAX_TABLE_BYTES = 128 * 2**20
"""Largest table that is one JSON object: all of it is in memory before its first row is known."""
TABLE_FIX = 'write one row a line: `DataFrame.to_json(FILE, orient="records", lines=True)`'
_ROW_LISTS = frozenset({"messages", "conversations", "conversation"})
"""Keys of a single row in a `.json` file; a list under any other key is a list of rows."""
_TABLE_HEAD = re.compile(rb'\{\s*"(?:[^"\\]|\\.)*"\s*:\s*[\[{]')
"""The beginning of an object whose first value is a list or an object."""
_LIST_HEAD = re.compile(rb"\[\s*(?:\[\s*)?\{")
"""The beginning of a list of objects, or of lists of objects."""
_MESSAGE_KEYS = frozenset({"role", "content", "from", "value", "name", "weight"})
"""Keys of the messages of one conversation; with another (a number of the conversation) there may be several."""
_DECODER = json.JSONDecoder()


def json_kind(head: bytes, stream: IO[bytes], kind: str) -> str:
    """The kind of a `.json` or `.jsonl` file by its beginning and the rest, which is often another than its name says.

    | kind | what the file holds |
    | --- | --- |
    | `.jsonl` | one object a line |
    | `.json` | a list of objects, an object that holds one, or one object |
    | `json objects` | objects of several lines each, one after another |
    | `json table` | one object that holds a table by columns or by rows, as pandas and `datasets` write it |
    | `json conversation` | the list of messages of one conversation |

    Where the beginning of the file does not decide, it is what its name says.
    """
    line, _, rest = head.partition(b"\n")
    on_line = _value_at_start(line)
    is_line = on_line is not None and not line[on_line[1] :].strip(_SPACE + b",")
    value = on_line[0] if on_line is not None else None
    if is_line and rest.strip() and (isinstance(value, dict) or kind != ".json"):
        return ".jsonl"  # rows that are refused one by one
    if head[:1] == b"[":
        is_list_a_line = line.strip() != b"[" and rest.lstrip(_SPACE)[:1] == b"["
        if kind != ".json" and (is_conversation(value) or is_list_a_line or not _LIST_HEAD.match(head)):
            return kind  # one row, or a broken one
        element = _value_at_start(head[1:].lstrip(_SPACE))
        first = element[0] if element is not None else None
        is_message = isinstance(first, dict) and is_conversation([first]) and first.keys() <= _MESSAGE_KEYS
        return "json conversation" if is_message else ".json"
    if head[:1] != b"{":
        return kind
    whole = _value_at_start(head)
    if whole is None:
        return _kind_of_long_object(stream, head, line, kind)
    if after := head[whole[1] :].strip(_SPACE + b","):
        return "json objects" if after[:1] == b"{" and whole[1] > len(line) else kind
    is_row = kind != ".json" and isinstance(whole[0], dict) and _is_one_row(whole[0])
    if _list_inside(head)[0] is None and not is_row and table_rows(whole[0]) is not None:
        return "json table"
    return kind if is_line else ".json"


def begins_list_of_objects(text: bytes) -> bool:
    r"""Whether a text begins as a JSON list whose first element is an object.

    >>> begins_list_of_objects(b'[\n{"text": "a"},'), begins_list_of_objects(b"[Chorus]")
    (True, False)
    """
    text = text.lstrip(_SPACE)
    element = _value_at_start(text[1:].lstrip(_SPACE)) if text[:1] == b"[" else None
    return element is not None and isinstance(element[0], dict)


def _is_one_row(value: Mapping[str, object]) -> bool:
    """Whether an object of lists on a line of its own is a row with a list, and no table by columns."""
    are_lists = all(isinstance(part, list) for part in value.values())
    return are_lists and (len(value) == 1 or not _ROW_LISTS.isdisjoint(value))


def _value_at_start(text: bytes) -> tuple[object, int] | None:
    """The JSON value that a text begins with, and the byte after it; None where it does not begin with a whole one."""
    characters = text.decode("utf-8", "surrogateescape")
    try:
        value, end = _DECODER.raw_decode(characters)
    except (ValueError, RecursionError):
        return None
    return value, len(characters[:end].encode("utf-8", "surrogateescape"))


def _kind_of_long_object(stream: IO[bytes], head: bytes, line: bytes, kind: str) -> str:
    """The kind of a file whose first object does not end in its beginning, or is broken; `line` is its first line."""
    name, _ = _list_inside(head)
    if kind != ".json" and (name is None or name in _ROW_LISTS):
        return "json objects" if line.strip() == b"{" else kind  # another first line is a broken row
    if kind != ".json" and line.rstrip()[-1:] not in (b"{", b"[", b","):
        return kind
    if name is not None or not _TABLE_HEAD.match(head):
        return ".json"
    text = head + stream.read(MAX_TABLE_BYTES + 1 - len(head))
    parsed = parse_json_value("", text) if len(text) <= MAX_TABLE_BYTES else None
    is_table = parsed is None or (isinstance(parsed, tuple) and table_rows(parsed[0]) is not None)
    return "json table" if is_table else ".json"


# --- records


def split_json(stream: IO[bytes]) -> Iterator[Record]:
    """Elements of a list, or of the one list inside an object; or a single row as an object."""
    head = without_byte_order_mark(stream.read(CHUNK_BYTES)).lstrip(_SPACE)
    if not head:
        return
    if head[:1] == b"[":
        yield from _elements(ListScanner(stream, head[1:]), None)
        return
    name, start = _list_inside(head)
    if name is None or name in _ROW_LISTS:
        yield _whole(stream, head)
        return
    yield from _elements(ListScanner(stream, head[start:]), name)


def split_conversation(stream: IO[bytes]) -> Iterator[Record]:
    """One record: the complete file."""
    yield _whole(stream, without_byte_order_mark(stream.read(CHUNK_BYTES)))


def _whole(stream: IO[bytes], head: bytes) -> Record:
    text = head + stream.read(MAX_ROW_BYTES + 1 - len(head))
    return Record(0, text if len(text) <= MAX_ROW_BYTES else TooLong(len(text)))


def split_objects(stream: IO[bytes]) -> Iterator[Record]:
    """Objects one after another, whatever their lines; commas between them are ignored."""
    head = without_byte_order_mark(stream.read(CHUNK_BYTES))
    yield from _elements(ListScanner(stream, head, is_list=False), None)


def split_json_table(stream: IO[bytes]) -> Iterator[Record]:
    """The rows of a table that is written as one object. Raises DamagedFileError for no table or a huge one."""
    text = without_byte_order_mark(stream.read(MAX_TABLE_BYTES + 1))
    if len(text) > MAX_TABLE_BYTES:
        problem = f"the file is one table, of which {MAX_TABLE_BYTES // 2**20} MiB are read at most"
        raise DamagedFileError(None, problem, TABLE_FIX)
    parsed = parse_json_value("", text)
    rows = table_rows(parsed[0]) if isinstance(parsed, tuple) else None
    if rows is None:
        raise DamagedFileError(None, "the file is no table any more", "write the file again")
    for number, fields in enumerate(rows):
        yield Record(number, fields)


def table_rows(value: object) -> list[dict[str, object]] | None:
    """The rows of a table that is one object, or None for an object that is no table.

    The columns may be lists (`Dataset.to_dict`) or objects by row number (`DataFrame.to_json`); the rows may be objects
    by their number or name (`orient="index"`) or lists beside the names (`orient="split"`).

    >>> table_rows({"q": ["a", "b"]}) == table_rows({"q": {"0": "a", "1": "b"}})
    True
    >>> table_rows({"0": {"q": "a"}, "1": {"q": "b"}}) == table_rows({"columns": ["q"], "data": [["a"], ["b"]]})
    True
    """
    if not isinstance(value, dict) or not value:
        return None
    names, parts = list(value), list(value.values())
    if {"columns", "data"} <= value.keys() <= {"columns", "data", "index"}:
        names, cells = value["columns"], value["data"]
        are_rows = isinstance(names, list) and isinstance(cells, list)
        if are_rows and all(isinstance(row, list) and len(row) == len(names) for row in cells):
            return [dict(zip(map(str, names), row, strict=True)) for row in cells]
        return None
    if all(isinstance(part, list) and part and not isinstance(part[0], dict) for part in parts):
        is_even = len({len(part) for part in parts}) == 1
        return [dict(zip(names, row, strict=True)) for row in zip(*parts, strict=True)] if is_even else None
    if not all(isinstance(part, dict) and part for part in parts):
        return None
    numbers = parts[0].keys()
    if all(number.isdigit() for number in numbers) and all(part.keys() == numbers for part in parts):
        return [{name: part[number] for name, part in value.items()} for number in numbers]
    # `orient="index"`: rows by their number or name, all with the same columns. Two messages are no rows.
    is_by_name = len(parts) > 1 and all(part.keys() == numbers for part in parts) and not numbers <= _MESSAGE_KEYS
    return parts if is_by_name or all(name.isdigit() for name in names) else None


def _elements(scanner: ListScanner, name: str | None) -> Iterator[Record]:
    """Records of a list, which is the value of `name` in an object unless that is None."""
    rewrite = "write the file again; it was cut off or edited"
    count = 0
    try:
        for count, element in enumerate(scanner, start=1):
            yield Record(count - 1, element)
    except DamagedListError as damage:
        raise DamagedFileError(count, f"{damage}, after about {count} rows", rewrite) from None
    rest = scanner.rest(CHUNK_BYTES)
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
