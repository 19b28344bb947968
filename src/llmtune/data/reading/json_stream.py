"""Read the elements of a JSON list one by one from a stream, with a bounded amount of it in memory.

The stream is cut at the commas of the list by looking at quotes and brackets only. Each element is parsed by itself
later, so one broken element does not spoil the others.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import IO

from llmtune.data.reading.parse import MAX_ROW_BYTES, TooLong

__all__ = ["CHUNK_BYTES", "DamagedListError", "ListScanner"]

CHUNK_BYTES = 2**20

# Searching for the next mark by regular expression is many times faster than a loop over bytes. Possessive quantifiers
# (*+) keep the match linear in long texts full of backslashes.
_BETWEEN_ELEMENTS = re.compile(rb'[\[\]{}",]')
_INSIDE_ELEMENT = re.compile(rb'[\[\]{}"]')
_STRING_BODY = re.compile(rb'[^"\\]*+(?:\\.[^"\\]*+)*+', re.DOTALL)


class DamagedListError(Exception):
    """The list does not end as a list: the rest of the file cannot be cut into elements."""


class ListScanner:
    """Iterates over the elements of the list whose `[` has just been read; `rest()` is the text after its `]`.

    Raises `DamagedListError` where the file ends inside the list or its brackets do not match.
    """

    def __init__(self, stream: IO[bytes], already_read: bytes) -> None:
        self._stream = stream
        self._buffer = already_read
        self._position = 0
        self._element = bytearray()
        self._element_bytes = 0
        self._element_start = 0

    def __iter__(self) -> Iterator[bytes | TooLong]:
        depth, in_string, count = 0, False, 0
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
                if not self._fill():
                    raise DamagedListError("the file ends before its list does")
                continue
            mark = token.group()
            self._position = token.start()
            if depth == 0 and mark in b",]":
                element = self._take()
                self._position = self._element_start = self._position + 1
                if mark == b"]" and element == b"" and count == 0:
                    return
                count += 1
                yield element
                if mark == b"]":
                    return
                continue
            self._position += 1
            if mark == b'"':
                in_string = True
            elif mark in b"[{":
                depth += 1
            elif depth == 0:
                raise DamagedListError("a `}` closes something that was never opened")
            else:
                depth -= 1

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
        element = TooLong(size) if size > MAX_ROW_BYTES else bytes(self._element).strip(b" \t\r\n")
        self._element.clear()
        self._element_bytes = 0
        return element
