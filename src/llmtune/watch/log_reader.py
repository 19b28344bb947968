"""Reading a JSON-lines file again and again while another process writes it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from llmtune.durable.files import parse_line

__all__ = ["LogReader", "NewLines"]

TAIL_BYTES = 256
"""Bytes before the place read to that must still be there, or the file is read from its start again."""


class NewLines(NamedTuple):
    """The outcome of one reading."""

    lines: list[dict[str, Any]]
    """Complete lines since the reading before; all lines where `is_restart`."""
    is_restart: bool
    """Whether the file was cut, replaced or removed, so that everything read before is void."""


class LogReader:
    """Reads the complete lines that a file gained since the last reading; a missing file has none.

    A resumed run cuts the lines of steps that it makes again and appends other ones. The file is then read from its
    start. Lines that are no JSON objects are left out.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._start_over()

    def _start_over(self) -> None:
        self._offset = 0
        self._tail = b""
        self._file_id: tuple[int, int] | None = None

    def read(self) -> NewLines:
        """Read what is new. A file that cannot be read now is left for the next time."""
        try:
            with self.path.open("rb") as file:
                return self._read(file)
        except FileNotFoundError:
            was_there = self._file_id is not None
            self._start_over()
            return NewLines([], was_there)
        except OSError:
            return NewLines([], is_restart=False)

    def _read(self, file: BinaryIO) -> NewLines:
        status = os.fstat(file.fileno())
        file_id = (status.st_dev, status.st_ino)
        file.seek(self._offset - len(self._tail))
        is_same = self._file_id in (None, file_id) and file.read(len(self._tail)) == self._tail
        restart = not is_same
        if restart:
            self._start_over()
            file.seek(0)
        self._file_id = file_id
        new = file.read()
        complete = new[: new.rfind(b"\n") + 1]  # the rest is being written
        self._offset += len(complete)
        self._tail = (self._tail + complete)[-TAIL_BYTES:]
        # Split at b"\n" only: JSON text may hold other characters that end a line elsewhere.
        lines = [value for line in complete.split(b"\n")[:-1] if (value := parse_line(line + b"\n")) is not None]
        return NewLines(lines, restart)
