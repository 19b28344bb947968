"""Files that grow by one JSON line at a time; a crash loses at most the line that was being written."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from llmtune.durable.files import json_text
from llmtune.durable.system import call, sync_folder, translate_os_errors, write_fully

__all__ = ["AppendLog", "read_lines"]


class AppendLog:
    """A file of JSON objects, one a line, that grows at its end.

    Each line goes to the system completely before `append` returns, so a killed process loses no appended line; `sync`
    makes them survive a power loss too. Opening cuts off the remains of an interrupted write: a line without its
    newline, or lines that are not JSON objects. For one writer at a time. Every method raises MachineError when the
    system refuses; a refused line leaves no trace.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path).absolute()
        with translate_os_errors("open", self.path):
            is_new = not self.path.exists()
            flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
            self._descriptor: int | None = call("open", os.fspath(self.path), flags, 0o666)
            if is_new:
                # Or a power loss could take the name of the file with all its lines.
                sync_folder(self.path.parent)
        self.lines = 0
        """Lines in the file."""
        self._size = 0
        try:
            self._cut()
        except BaseException:  # the caller gets no object that it could close
            self.close()
            raise

    def append(self, value: Mapping[str, object]) -> None:
        """Add `value` as one line."""
        line = (json_text(value) + "\n").encode("utf-8", "backslashreplace")
        descriptor = self._open_descriptor()
        with translate_os_errors("append to", self.path):
            try:
                write_fully(descriptor, line)
            except OSError:
                call("truncate", descriptor, self._size)  # half a line would hide the next one from every reader
                raise
        self._size += len(line)
        self.lines += 1

    def sync(self) -> None:
        """Wait until every line is on the disk."""
        with translate_os_errors("sync", self.path):
            call("fsync", self._open_descriptor())

    def truncate_to(self, lines: int) -> int:
        """Keep the first `lines` lines and return the number of dropped ones."""
        before = self.lines
        self._cut(lines)
        return before - self.lines

    def close(self) -> None:
        """Close the file; appending is an error afterwards."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> AppendLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open_descriptor(self) -> int:
        assert self._descriptor is not None, f"{self.path} is closed"
        return self._descriptor

    def _cut(self, most_lines: int | None = None) -> None:
        """Cut the file after `most_lines` lines, and before the first line that is torn or no JSON object."""
        size = lines = 0
        with translate_os_errors("read", self.path), self.path.open("rb") as file:
            for line in file:
                if lines == most_lines or parse_line(line) is None:
                    break
                size += len(line)
                lines += 1
        descriptor = self._open_descriptor()
        with translate_os_errors("cut", self.path):
            if os.fstat(descriptor).st_size != size:
                call("truncate", descriptor, size)
                # Synced at once, so that a power loss cannot bring cut lines back behind those appended later.
                call("fsync", descriptor)
        self._size, self.lines = size, lines


def parse_line(line: bytes) -> dict[str, Any] | None:
    r"""Return the JSON object of one complete line; None when it is torn or no JSON object.

    >>> parse_line(b'{"step": 1}\n'), parse_line(b'{"step": 1}'), parse_line(b'[1]\n')
    ({'step': 1}, None, None)
    """
    if not line.endswith(b"\n"):
        return None
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def read_lines(path: Path | str) -> list[dict[str, Any]]:
    """Return the complete lines of a log that another process may be writing; a missing file has none.

    Raises MachineError.
    """
    path = Path(path)
    with translate_os_errors("read", path):
        if not path.exists():
            return []
        lines = path.read_bytes().splitlines(keepends=True)
    return [value for line in lines if (value := parse_line(line)) is not None]
