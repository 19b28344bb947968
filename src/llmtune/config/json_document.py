r"""JSON text -> the same tree as YAML, so that a JSON config has line numbers and refuses duplicate keys too.

PyYAML cannot read all of JSON: not `\ud83d\ude00`, as Python writes a character above U+FFFF.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable
from json.decoder import JSONDecodeError, scanstring  # type: ignore[attr-defined]

from llmtune.common.text import excerpt
from llmtune.config.document import MAX_DEPTH, Entry, Listing, Node, Origin, Scalar, Table, Unreadable, shown
from llmtune.errors import Problem

__all__ = ["parse_json"]

_BLANK = re.compile(r"[ \t\r\n]*")
_WORD = re.compile(r"true|false|null|-?[0-9]+(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")


def parse_json(text: str, origin_of: Callable[[int], Origin], problems: list[Problem]) -> Node:
    """Turn one JSON value into a tree; `origin_of(line)` returns the origin of a value on that 1-based line.

    Duplicate keys are added to `problems`. An empty text is an empty value.

    Raises:
        Unreadable: the text is not JSON or nests without bound; names the line.
    """
    reader = _Reader(text, origin_of, problems)
    start = reader.skip(0)
    if start == len(text):
        return Scalar("", True, origin_of(1))
    node, end = reader.value(start, depth=0)
    if (end := reader.skip(end)) != len(text):
        raise reader.wrong("nothing may follow the closing bracket", end)
    return node


class _Reader:
    """A recursive reader over one text.

    Every method takes a position and returns what it read and the position behind it.
    """

    def __init__(self, text: str, origin_of: Callable[[int], Origin], problems: list[Problem]) -> None:
        self.text = text
        self.line_starts = [0, *(match.end() for match in re.finditer("\n", text))]
        self.origin_of = origin_of
        self.problems = problems

    def origin(self, position: int) -> Origin:
        """The origin of a position, in characters from 0."""
        return self.origin_of(bisect_right(self.line_starts, position))

    def wrong(self, reason: str, position: int) -> Unreadable:
        """The error to raise for the text at a position; it shows the next 20 characters."""
        shown_text = excerpt(self.text[position : position + 20], 20) or "the end of the file"
        fix = None
        if shown_text.startswith(("//", "/*", "#")):
            fix = "JSON has no comments: take it out, or end the file's name in .yaml and begin comments with #"
        elif shown_text[:1] in ("}", "]") and self.text[:position].rstrip()[-1:] == ",":
            fix = "take out the comma before the bracket that closes"
        elif shown_text.startswith("'"):
            fix = "JSON wants double quotes"
        elif re.match(r"[-+]?(NaN|Infinity|None|True|False|[A-Z])", shown_text):
            fix = "JSON has numbers, texts in double quotes, true, false and null"
        return Unreadable(f"not valid JSON: {reason}, found `{shown_text}`", self.origin(position).where, fix)

    def skip(self, position: int) -> int:
        """The next position that is not blank."""
        match = _BLANK.match(self.text, position)
        assert match
        return match.end()

    def value(self, position: int, depth: int) -> tuple[Node, int]:
        """Any value; `depth` counts the brackets around it.

        Raises Unreadable beyond MAX_DEPTH and for text that is not JSON, as do the methods below.
        """
        origin = self.origin(position)
        if depth > MAX_DEPTH:
            raise Unreadable(f"nested more than {MAX_DEPTH} levels deep", origin.where)
        first = self.text[position : position + 1]
        if first == '"':
            string, end = self.string(position)
            return Scalar(string, False, origin, 1 + len(string)), end
        if first == "[":
            return self.listing(position, depth)
        if first == "{":
            return self.table(position, depth)
        word = _WORD.match(self.text, position)
        if not word:
            raise self.wrong("a value is missing", position)
        return Scalar(word.group(), True, origin), word.end()

    def string(self, position: int) -> tuple[str, int]:
        """The text of a string whose opening quote stands here, escapes resolved."""
        try:
            return scanstring(self.text, position + 1, True)
        except JSONDecodeError as error:
            raise self.wrong(error.msg.lower(), error.pos) from error

    def listing(self, position: int, depth: int) -> tuple[Node, int]:
        """A list whose bracket stands here."""
        origin, items = self.origin(position), []
        at = self.skip(position + 1)
        if self.text[at : at + 1] == "]":
            return Listing((), origin), at + 1
        while True:
            item, at = self.value(at, depth + 1)
            items.append(item)
            at = self.skip(at)
            if self.text[at : at + 1] == "]":
                return Listing(tuple(items), origin), at + 1
            at = self.comma(at)

    def table(self, position: int, depth: int) -> tuple[Node, int]:
        """An object whose brace stands here.

        A key that stands twice is noted as a problem and keeps its first value.
        """
        origin, entries = self.origin(position), dict[str, Entry]()
        at = self.skip(position + 1)
        if self.text[at : at + 1] == "}":
            return Table((), origin), at + 1
        while True:
            if self.text[at : at + 1] != '"':
                raise self.wrong("a key in double quotes is missing", at)
            key_origin = self.origin(at)
            key, at = self.string(at)
            at = self.skip(at)
            if self.text[at : at + 1] != ":":
                raise self.wrong("`:` is missing", at)
            value, at = self.value(self.skip(at + 1), depth + 1)
            if key in entries:
                first = entries[key].origin.where
                self.problems.append(
                    Problem(
                        f"key `{excerpt(key)}` stands twice (`{shown(value)}` here; first at {first})",
                        key_origin.where,
                        "keep one of them",
                    )
                )
            else:
                entries[key] = Entry(key, value, key_origin)
            at = self.skip(at)
            if self.text[at : at + 1] == "}":
                return Table(tuple(entries.values()), origin), at + 1
            at = self.comma(at)

    def comma(self, position: int) -> int:
        """The position behind a comma, and behind the blanks after it."""
        if self.text[position : position + 1] != ",":
            raise self.wrong("`,` or a closing bracket is missing", position)
        return self.skip(position + 1)
