"""One record of a file, strictly read: a row, or the reason why it is not one.

Nothing a record says is followed: no URL, path or name in it is ever opened.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from llmtune.data.example import Row
from llmtune.errors import Problem

__all__ = ["MAX_ROW_BYTES", "BadRow", "TooLong", "json_value_problem", "parse_json_record", "parse_record_fields"]

MAX_ROW_BYTES = 16 * 2**20
"""Longest record that is read.

A longer one is nearly always a file without line ends, and would not fit any model's context.
"""

_SHOWN_CHARACTERS = 60


class BadRow(NamedTuple):
    """A record that cannot be used: its place, the field at fault (None: the whole record), what is wrong and the fix.

    With `whole_file` the rest of the file cannot be read at all, so that skipping single rows is no answer.
    """

    source: str
    field: str | None
    what: str
    fix: str
    whole_file: bool = False
    number: int = -1
    """With `whole_file`: the line or index from which the file cannot be read; -1: from its beginning."""

    def problem(self) -> Problem:
        """The same as an error's problem, `file:line: field: what`."""
        return Problem(f"{self.field}: {self.what}" if self.field else self.what, self.source, self.fix)


class TooLong(NamedTuple):
    """What is left of a record longer than `MAX_ROW_BYTES`: its size."""

    size_bytes: int


class _RefusedError(Exception):
    """A JSON value that Python would read but that is not what the file's author can have meant."""

    def __init__(self, field: str | None, what: str, fix: str) -> None:
        super().__init__(what)
        self.field, self.what, self.fix = field, what, fix


def _refuse_constant(name: str) -> None:
    raise _RefusedError(None, f"{name} is not a JSON number", "write null, or leave the field out")


def _refuse_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        names = [name for name, _ in pairs]
        name = next(name for name in names if names.count(name) > 1)
        raise _RefusedError(name, "the key stands twice in one object", "keep one of the two values")
    return fields


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant, object_pairs_hook=_refuse_repeated_keys)


def parse_record_fields(source: str, fields: Mapping[str, Any], loss_weight: float) -> Row | BadRow:
    """Make a row of fields that a library has read already; text that is not valid Unicode is refused."""
    bad = _lone_surrogate(fields)
    return _surrogate_row(source, bad) if bad is not None else Row(source, fields, loss_weight)


def parse_json_record(
    source: str, record: bytes | TooLong, loss_weight: float, *, cut_off: bool = False
) -> Row | BadRow:
    """Read one JSON object, strictly.

    Refused, each with its reason: invalid UTF-8, anything that is not one object, NaN and Infinity, a key that stands
    twice, text with half a surrogate pair, nesting too deep to read, and records longer than `MAX_ROW_BYTES`. With
    `cut_off` the record is the last of a file that has no line end after it, which is said if it cannot be read. U+2028
    and other Unicode line ends are text like any other.

    >>> parse_json_record("a.jsonl:1", b'{"text": "hi"}', 1.0)
    Row(source='a.jsonl:1', fields={'text': 'hi'}, loss_weight=1.0)
    >>> parse_json_record("a.jsonl:2", b'{"text": NaN}', 1.0).what
    'NaN is not a JSON number'
    """
    if isinstance(record, TooLong):
        what = f"the row has {record.size_bytes:,} bytes, more than the {MAX_ROW_BYTES:,} that are read"
        return BadRow(source, None, what, "split it into several rows, one JSON object to a line")
    value = json_value_problem(source, record, cut_off=cut_off)
    if isinstance(value, BadRow):
        return value
    if not isinstance(value[0], dict):
        fix = (
            "give each row as one JSON object {...}"
            if not record.lstrip().startswith(b"[")
            else "name a file that holds one list `.json`"
        )
        return BadRow(source, None, f"a row must be an object, this is {_describe(value[0])}", fix)
    return Row(source, value[0], loss_weight)


def json_value_problem(source: str, record: bytes, *, cut_off: bool = False) -> tuple[Any] | BadRow:
    """The JSON value of `record` in a tuple of one, or why it cannot be read."""
    try:
        text = record.decode("utf-8")
    except UnicodeDecodeError as error:
        what = f"byte {error.start + 1} of the row (0x{record[error.start]:02x}) is not valid UTF-8"
        return BadRow(source, None, what, "save the file as UTF-8, for example with iconv")
    try:
        value = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        if cut_off and error.pos >= len(text.rstrip()) - 1:
            return BadRow(
                source, None, "the last row is cut off in the middle", "write the file again, or delete its last line"
            )
        what = f"not JSON: {error.msg[0].lower()}{error.msg[1:].removesuffix(' at')} at character {error.pos + 1}: {_excerpt(text, error.pos)}"
        return BadRow(source, None, what, _json_fix(text, cut_off))
    except _RefusedError as refused:
        return BadRow(source, refused.field, refused.what, refused.fix)
    except RecursionError:
        return BadRow(
            source,
            None,
            "brackets are nested too deep to read",
            "a row needs a handful of levels; check how the file was written",
        )
    except ValueError:
        return BadRow(
            source, None, "a number has more digits than can be read", "write such a number as text, in quotes"
        )
    # Half a surrogate pair can only come from an escape: UTF-8 itself cannot carry one.
    if b"\\ud" in record or b"\\uD" in record:
        bad = _lone_surrogate(value)
        if bad is not None:
            return _surrogate_row(source, bad)
    return (value,)


def _json_fix(text: str, cut_off: bool) -> str:
    if cut_off:
        return "the file ends here without a line end; if it was cut off, write it again or delete its last line"
    if text.lstrip()[:1] in ("'", "{") and "'" in text[:20]:
        return "JSON wants double quotes: write rows with a JSON library, not with str()"
    return "give each row as one JSON object on one line"


def _excerpt(text: str, position: int) -> str:
    piece = text[max(0, position - 20) : position + 20]
    return json.dumps(piece, ensure_ascii=False) if piece.isprintable() else json.dumps(piece)


def _describe(value: object) -> str:
    """Name a JSON value shortly, with the value in it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return f"the truth value {str(value).lower()}"
    if isinstance(value, (int, float)):
        return f"the number {str(value)[:_SHOWN_CHARACTERS]}"
    if isinstance(value, str):
        return f"the text {json.dumps(value[:_SHOWN_CHARACTERS])}"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, dict):
        return f"an object with {', '.join(f'`{str(key)[:_SHOWN_CHARACTERS]}`' for key in list(value)[:4]) or 'nothing in it'}"
    return f"a value of type {type(value).__name__}"


describe_value = _describe


def _lone_surrogate(value: object, path: str = "") -> tuple[str | None, int] | None:
    """Find text with half a surrogate pair: its field's path and the half's code, or None."""
    pending: list[tuple[str, object]] = [(path, value)]
    while pending:
        path, value = pending.pop()
        if isinstance(value, str):
            try:
                value.encode("utf-8")
            except UnicodeEncodeError as error:
                return path or None, ord(value[error.start])
        elif isinstance(value, Mapping):
            pending.extend(
                (f"{path}.{_printable(key)}" if path else _printable(key), one) for key, one in value.items()
            )
            pending.extend((path, key) for key in value)
        elif isinstance(value, (list, tuple)):
            pending.extend((f"{path}[{index}]", one) for index, one in enumerate(value))
    return None


def _printable(key: object) -> str:
    return str(key).encode("utf-8", "replace").decode("utf-8")


def _surrogate_row(source: str, found: tuple[str | None, int]) -> BadRow:
    field, code = found
    if 0xDC80 <= code <= 0xDCFF:  # how undecodable bytes come out of the csv and txt readers
        return BadRow(
            source,
            field,
            f"byte 0x{code - 0xDC00:02x} is not valid UTF-8",
            "save the file as UTF-8, for example with iconv",
        )
    what = f"half a surrogate pair (\\u{code:04x}) is not a character"
    return BadRow(source, field, what, "write characters beyond U+FFFF as they are, or as both halves of their pair")
