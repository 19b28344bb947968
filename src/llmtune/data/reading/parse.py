"""Parse one record of a file strictly, into a row or the reason why it is not one.

No URL, path or name inside a record is ever opened.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from llmtune.data.example import Row
from llmtune.errors import Problem

__all__ = [
    "MAX_ROW_BYTES",
    "BadRow",
    "DamagedFileError",
    "Payload",
    "Record",
    "TooLong",
    "Unreadable",
    "describe_value",
    "is_conversation",
    "parse_fields",
    "parse_json_row",
    "parse_json_value",
    "quoted",
    "too_long_row",
    "with_lists",
    "without_byte_order_mark",
]

MAX_ROW_BYTES = 16 * 2**20
"""Longest record that is read.

A longer one is nearly always a file without line ends, and would not fit any model's context.
"""

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_WIDE_ENCODINGS = (
    ("UTF-32", re.compile(rb"\xff\xfe\0\0|\0\0\xfe\xff|[^\0]\0\0\0|\0\0\0[^\0]")),
    ("UTF-16", re.compile(rb"\xff\xfe|\xfe\xff")),
    ("UTF-16LE", re.compile(rb"[^\0]\0[^\0]\0")),
    ("UTF-16BE", re.compile(rb"\0[^\0]\0[^\0]")),
)
"""Encodings by the first bytes of a file: a byte order mark, or ASCII characters of two or four bytes each."""
_SHOWN_CHARACTERS = 60


class BadRow(NamedTuple):
    """A record that cannot be used: its name, the field at fault (None: the whole record), the problem and the fix.

    With `whole_file` the rest of the file cannot be read at all, so that skipping single rows is no answer.
    """

    source: str
    field: str | None
    problem: str
    fix: str
    whole_file: bool = False
    number: int = -1
    """With `whole_file`: the line or index from which the file cannot be read; -1: from its beginning."""

    def as_problem(self) -> Problem:
        """The same as the problem of an error, `file:line: field: problem`."""
        return Problem(f"{self.field}: {self.problem}" if self.field else self.problem, self.source, self.fix)


class TooLong(NamedTuple):
    """Stands for a record longer than `MAX_ROW_BYTES`."""

    size_bytes: int


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


@dataclass(frozen=True, slots=True)
class Unreadable:
    """Stands in a row for a value that its author cannot have meant; an error only where the value is used."""

    problem: str
    fix: str


def _unreadable_constant(name: str) -> Unreadable:
    return Unreadable(f"{name} is not a JSON number", "write null, or leave the field out")


def _marked_repeated_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        names = [name for name, _ in pairs]
        repeated = Unreadable("the key stands twice in one object", "keep one of the two values")
        fields |= {name: repeated for name in fields if names.count(name) > 1}
    return fields


# Python reads NaN and keeps the last of two equal keys; both are slips that would go unnoticed.
_DECODER = json.JSONDecoder(parse_constant=_unreadable_constant, object_pairs_hook=_marked_repeated_keys)


def parse_fields(source: str, fields: Mapping[str, object], loss_weight: float) -> Row | BadRow:
    """Make a row of fields that a library has parsed; text that is not valid Unicode is marked where it stands."""
    marked = _without_surrogates(source, fields)
    if isinstance(marked, BadRow):
        return marked
    assert isinstance(marked, Mapping)
    return Row(source, marked, loss_weight)


def too_long_row(source: str, record: TooLong) -> BadRow:
    """The refusal of a record longer than `MAX_ROW_BYTES`."""
    problem = f"the row has {record.size_bytes:,} bytes, more than the {MAX_ROW_BYTES:,} that are read"
    return BadRow(source, None, problem, "split it into several rows, one JSON object to a line")


def without_byte_order_mark(start: bytes) -> bytes:
    """The first bytes of a file without their byte order mark. Raises DamagedFileError for UTF-16 and UTF-32."""
    for name, beginning in _WIDE_ENCODINGS:
        if beginning.match(start):
            fix = f"save it as UTF-8, for example with `iconv -f {name} -t UTF-8`"
            raise DamagedFileError(None, f"the file is {name}, not UTF-8", fix)
    return start.removeprefix(BYTE_ORDER_MARK)


def parse_json_row(source: str, record: bytes | TooLong, loss_weight: float, *, cut_off: bool = False) -> Row | BadRow:
    """Parse one JSON object, or a bare list of messages; a comma after it is ignored.

    Refused, each with its reason: invalid UTF-8, anything but one object, nesting too deep to read, and records longer
    than `MAX_ROW_BYTES`. NaN, Infinity, the value of a repeated key and text with half a surrogate pair are
    `Unreadable`. `cut_off` marks the last record of a file that has no line end after it; its refusal says so. U+2028
    and other Unicode line ends are text like any other.

    >>> parse_json_row("a.jsonl:1", b'{"text": "hi"}', 1.0)
    Row(source='a.jsonl:1', fields={'text': 'hi'}, loss_weight=1.0)
    >>> parse_json_row("a.jsonl:2", b'{"text": "hi", "score": NaN}', 1.0).fields["score"].problem
    'NaN is not a JSON number'
    """
    if isinstance(record, TooLong):
        return too_long_row(source, record)
    if (without_space := record.rstrip(b" \t\r\n")).endswith(b","):  # as in a list that was cut into lines
        record = without_space[:-1]
    parsed = parse_json_value(source, record, cut_off=cut_off)
    if isinstance(parsed, BadRow):
        return parsed
    (value,) = parsed
    if is_conversation(value):
        value = {"messages": value}
    if isinstance(value, Unreadable):
        return BadRow(source, None, value.problem, value.fix)
    if not isinstance(value, dict):
        fix = "give each row as one JSON object {...}"
        if isinstance(value, str):
            fix = 'name what the text is, for example {"text": "..."}, or save the texts line by line as .txt'
        elif isinstance(value, list):
            example = '{"prompt": "...", "completion": "..."}' if len(value) == 2 else '{"messages": [...]}'
            fix = f"name what is in the list, for example {example}"
        return BadRow(source, None, f"a row must be an object, this is {describe_value(value)}", fix)
    return Row(source, value, loss_weight)


LIST_CELLS = ("messages", "conversations", "conversation", "tools", "history")
"""Fields that hold lists, which tables carry as JSON text."""


def with_lists(row: Row) -> Row | BadRow:
    """The row with the lists that stand in it as JSON text; BadRow for a text that begins as a list and is none."""
    lists: dict[str, object] = {}
    for name in LIST_CELLS:
        cell = row.fields.get(name)
        if isinstance(cell, str) and cell.lstrip()[:1] == "[":
            value = parse_json_value(row.source, cell.encode("utf-8", "surrogateescape"))
            if isinstance(value, BadRow):
                return value._replace(field=name)
            lists[name] = value[0]
    return replace(row, fields={**row.fields, **lists}) if lists else row


def is_conversation(value: object) -> bool:
    """Whether a value is a list that begins with a message, which is a row without its name."""
    first = value[0] if isinstance(value, list) and value else None
    return isinstance(first, dict) and ({"role", "content"} <= first.keys() or {"from", "value"} <= first.keys())


def parse_json_value(source: str, record: bytes, *, cut_off: bool = False) -> tuple[object] | BadRow:
    """The JSON value of `record` in a tuple of one, or the reason why it cannot be read."""
    try:
        text = record.decode("utf-8")
    except UnicodeDecodeError as error:
        problem = f"byte {error.start + 1} of the row (0x{record[error.start]:02x}) is not valid UTF-8"
        return BadRow(source, None, problem, "save the file as UTF-8, for example with iconv")
    try:
        value = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        if cut_off and error.pos >= len(text.rstrip()) - 1:
            fix = "write the file again, or delete its last line"
            return BadRow(source, None, "the last row is cut off in the middle", fix)
        reason = error.msg[0].lower() + error.msg[1:].removesuffix(" at")
        problem = (
            f"not JSON: {reason} at character {error.pos + 1}: {quoted(text[max(0, error.pos - 20) : error.pos + 20])}"
        )
        if error.msg == "Extra data" and text[error.pos :].lstrip()[:1] == "{":
            return BadRow(source, None, problem, "write each row on a line of its own; several stand on this one")
        return BadRow(source, None, problem, _json_fix(text, error.pos, cut_off))
    except RecursionError:
        fix = "a row needs a handful of levels; check how the file was written"
        return BadRow(source, None, "brackets are nested too deep to read", fix)
    except ValueError:  # Python's limit on the digits of an integer, against quadratic time
        fix = "write such a number as text, in quotes"
        return BadRow(source, None, "a number has more digits than can be read", fix)
    # Half a surrogate pair can only come from an escape: UTF-8 itself cannot carry one.
    if b"\\ud" in record or b"\\uD" in record:
        value = _without_surrogates(source, value)
    return value if isinstance(value, BadRow) else (value,)


def _json_fix(text: str, position: int, cut_off: bool) -> str:
    before, after = text[:position].rstrip(), text[position:].lstrip()
    # Pythons differ in whether the error stands at the comma or behind it.
    if (f"{before[-1:]}{after[:1]}" if after[:1] != "," else f",{after[1:].lstrip()[:1]}") in (",}", ",]"):
        return "take out the comma before the bracket that closes"
    if re.match(r"[A-Za-z_$]", after) and before[-1:] in ("{", ","):
        return "JSON wants double quotes around names and texts: write rows with a JSON library"
    # The quote that opens a key, and not an apostrophe in its value: that line may be cut off too.
    if re.match(r"\s*[\[{]*\s*'", text):
        return "JSON wants double quotes: write rows with a JSON library, not with str()"
    if re.search("[“”„«]", text):
        return 'JSON wants straight double quotes ("), and here are others'
    if not re.match(r"\s*[\[{\"]", text) and re.search("[,;\t|]", text):
        return "give each row as one JSON object on one line; a table's file ends in .csv or .tsv, plain text's in .txt"
    if cut_off:
        return "the file ends here without a line end; if it was cut off, write it again or delete its last line"
    return "give each row as one JSON object on one line"


def quoted(text: str) -> str:
    """The first characters of a text in quotes, as JSON: letters of every language as they are, others escaped."""
    piece = text[:_SHOWN_CHARACTERS]
    return json.dumps(piece, ensure_ascii=not piece.isprintable())


def describe_value(value: object) -> str:
    """Name a JSON value shortly, with the value in it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return f"the truth value {str(value).lower()}"
    if isinstance(value, (int, float)):
        return f"the number {str(value)[:_SHOWN_CHARACTERS]}"
    if isinstance(value, str):
        return f"the text {quoted(value)}"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, dict):
        keys = ", ".join(f"`{str(key)[:_SHOWN_CHARACTERS]}`" for key in list(value)[:4])
        return f"an object with {keys or 'nothing in it'}"
    return f"a value of type {type(value).__name__}"


def _without_surrogates(source: str, value: object) -> object:
    """The value with `Unreadable` in place of each text with half a surrogate pair; BadRow where a key has one."""
    surrogate = _lone_surrogate(value)
    if surrogate is None:
        return value
    path, code, is_key = surrogate
    if not is_key:
        with contextlib.suppress(RecursionError):
            return _marked_surrogates(value)
    problem = _surrogate_problem(code)
    return BadRow(source, path, problem.problem, problem.fix)


def _marked_surrogates(value: object) -> object:
    if isinstance(value, str):
        half = next((ord(character) for character in value if "\ud800" <= character <= "\udfff"), None)
        return value if half is None else _surrogate_problem(half)
    if isinstance(value, Mapping):
        return {key: _marked_surrogates(item) for key, item in value.items()}
    return [_marked_surrogates(item) for item in value] if isinstance(value, (list, tuple)) else value


def _lone_surrogate(fields: object) -> tuple[str | None, int, bool] | None:
    """Find text with half a surrogate pair: its path, the half's code, and whether it is a key; or None.

    A key comes before any other.
    """
    found = None
    pending: list[tuple[str, object, bool]] = [("", fields, False)]  # a list, not recursion: nesting may be deep
    while pending:
        path, value, is_key = pending.pop()
        if isinstance(value, str):
            try:
                value.encode("utf-8")
            except UnicodeEncodeError as error:
                if is_key:
                    return path or None, ord(value[error.start]), True
                found = found or (path or None, ord(value[error.start]), False)
        elif isinstance(value, Mapping):
            pending.extend(
                (f"{path}.{_encodable(key)}" if path else _encodable(key), item, False) for key, item in value.items()
            )
            pending.extend((path, key, True) for key in value)
        elif isinstance(value, (list, tuple)):
            pending.extend((f"{path}[{index}]", item, False) for index, item in enumerate(value))
    return found


def _encodable(key: object) -> str:
    return str(key).encode("utf-8", "replace").decode("utf-8")


def _surrogate_problem(code: int) -> Unreadable:
    if 0xDC80 <= code <= 0xDCFF:  # how undecodable bytes come out of the csv and txt readers
        problem = f"byte 0x{code - 0xDC00:02x} is not valid UTF-8"
        return Unreadable(problem, "save the file as UTF-8, for example with iconv")
    problem = f"half a surrogate pair (\\u{code:04x}) is not a character"
    return Unreadable(problem, "write characters beyond U+FFFF as they are, or as both halves of their pair")
