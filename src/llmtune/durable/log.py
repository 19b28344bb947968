"""Files that grow by one JSON line at a time and lose at most the line that was being written."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from llmtune.durable.files import json_text
from llmtune.durable.system import call, sync_folder, translate_os_errors, write_fully

__all__ = ["AppendLog", "read_lines"]


class AppendLog:
    """A file of JSON objects, one a line, that only grows at its end.

    Each line goes to the system whole before `append` returns, so a killed process loses nothing that was appended;
    `sync` makes it survive a power loss too. Opening cuts off what an interrupted write left at the end: a line without
    its newline, or lines that are not JSON objects. Not for several writers at once. Every method raises MachineError
    when the system refuses; a refused line leaves no trace.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path).absolute()
        with translate_os_errors("open", self.path):
            is_new = not self.path.exists()
            flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
            self._descriptor: int | None = call("open", os.fspath(self.path), flags, 0o666)
            if is_new:
                sync_folder(self.path.parent)
        self.lines = 0
        """Lines in the file."""
        self._size = 0
        try:
            self._keep_while(lambda _: True)
        except BaseException:
            self.close()
            raise

    def append(self, value: Mapping[str, Any]) -> None:
        """Add `value` as one line."""
        line = (json_text(value) + "\n").encode("utf-8", "backslashreplace")
        descriptor = self._open_descriptor()
        with translate_os_errors("append to", self.path):
            try:
                write_fully(descriptor, line)
            except OSError:
                call("truncate", descriptor, self._size)
                raise
        self._size += len(line)
        self.lines += 1

    def sync(self) -> None:
        """Wait until every line is on the disk."""
        with translate_os_errors("sync", self.path):
            call("fsync", self._open_descriptor())

    def truncate_to(self, lines: int) -> int:
        """Keep the first `lines` lines and return how many were dropped."""
        before = self.lines
        kept = iter(range(lines))
        self._keep_while(lambda _: next(kept, None) is not None)
        return before - self.lines

    def truncate_to_step(self, step: int) -> int:
        """Keep the lines up to the first with a `step` beyond `step` and return how many were dropped.

        This is what a resume from the checkpoint of `step` does: the lines that follow will be written again, byte for
        byte.
        """
        before = self.lines
        self._keep_while(lambda value: not value.get("step", 0) > step)
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

    def _keep_while(self, wanted: Callable[[dict[str, Any]], bool]) -> None:
        """Cut the file before the first line that is torn, no JSON object, or not `wanted`."""
        size = lines = 0
        with translate_os_errors("read", self.path), self.path.open("rb") as file:
            for line in file:
                value = parsed(line)
                if value is None or not wanted(value):
                    break
                size += len(line)
                lines += 1
        descriptor = self._open_descriptor()
        with translate_os_errors("cut", self.path):
            if os.fstat(descriptor).st_size != size:
                call("truncate", descriptor, size)
                call("fsync", descriptor)
        self._size, self.lines = size, lines


def parsed(line: bytes) -> dict[str, Any] | None:
    r"""Return the JSON object of one whole line, or None when it is torn or something else.

    >>> parsed(b'{"step": 1}\n'), parsed(b'{"step": 1}'), parsed(b'[1]\n')
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
    """Return the whole lines of a log that another process may be writing; none when there is no such file.

    Raises MachineError.
    """
    path = Path(path)
    with translate_os_errors("read", path):
        if not path.exists():
            return []
        return [value for line in path.read_bytes().splitlines(keepends=True) if (value := parsed(line)) is not None]
