"""Backends that count, fail, kill or trace at a chosen operation: the way to try every moment at which a save can go
wrong.

Run something once under `Counting` to learn its number N of operations, then again for each n in 1..N under one of the
others. The method is SQLite's (https://www.sqlite.org/testing.html, sections 3 and 4).
"""

from __future__ import annotations

import os
import signal
from collections import Counter
from typing import Any, NamedTuple

from llmtune.durable.system import Backend, SystemBackend

__all__ = ["Counting", "Failing", "Killed", "Killing", "Operation", "Tracing", "Unsynced"]


class Counting:
    """Passes everything on and counts it."""

    def __init__(self, below: Backend | None = None) -> None:
        self._below = below or SystemBackend()
        self.count = 0
        """Operations so far."""
        self.by_kind: Counter[str] = Counter()

    def call(self, operation: str, *arguments: Any) -> Any:
        """Count and perform."""
        self.count += 1
        self.by_kind[operation] += 1
        return self._below.call(operation, *arguments)


class Failing:
    """Refuses operation `at` with `number` (an errno): that one, or `for_ever` that one and every later one, clean-up
    included.

    A write that is refused has written half of its data first, as on a disk that fills up. `number` None is a short
    write without an error: half of the data is written and the count returned; what does not write passes.
    """

    def __init__(self, at: int, number: int | None, *, for_ever: bool = False, below: Backend | None = None) -> None:
        self._below = below or SystemBackend()
        self._at = at
        self._number = number
        self._for_ever = for_ever
        self.count = 0
        self.fired = 0
        """Operations refused, or cut short."""

    def call(self, operation: str, *arguments: Any) -> Any:
        """Perform or refuse."""
        self.count += 1
        is_hit = self.count >= self._at if self._for_ever else self.count == self._at
        is_write = operation == "write"
        if not is_hit or (self._number is None and not is_write):
            return self._below.call(operation, *arguments)
        self.fired += 1
        written = self._below.call("write", arguments[0], _half(arguments[1])) if is_write else 0
        if self._number is None:
            return written
        raise OSError(self._number, os.strerror(self._number))


class Unsynced:
    """Performs everything but the syncs: for tests that need speed and lose no power."""

    def __init__(self) -> None:
        self._below = SystemBackend()

    def call(self, operation: str, *arguments: Any) -> Any:
        """Perform, unless it is a sync."""
        return None if operation == "fsync" else self._below.call(operation, *arguments)


class Killed(BaseException):
    """Stands for the end of the process, inside a test that wants to look at the disk afterwards."""


class Killing:
    """Ends the process at operation `at`: before it, or in the middle of it when it is a write.

    With `for_real` the process kills itself with SIGKILL. Otherwise `Killed` is raised, and from then on nothing
    reaches the disk any more, whatever clean-up still runs.
    """

    def __init__(self, at: int, *, for_real: bool = False, below: Backend | None = None) -> None:
        self._below = below or SystemBackend()
        self._at = at
        self._for_real = for_real
        self.count = 0

    def call(self, operation: str, *arguments: Any) -> Any:
        """Perform, or end."""
        self.count += 1
        if self.count < self._at:
            return self._below.call(operation, *arguments)
        if self.count == self._at and operation == "write":
            self._below.call("write", arguments[0], _half(arguments[1]))
        if self._for_real:
            os.kill(os.getpid(), signal.SIGKILL)
        raise Killed


class Operation(NamedTuple):
    """One traced operation: paths are absolute, `data` is what was written or what a synced file held."""

    kind: str
    path: str
    target: str = ""
    data: bytes = b""
    size: int = 0


class Tracing:
    """Performs everything and keeps a list of it, from which `power_loss` derives the states a power loss could leave."""  # noqa: E501

    def __init__(self, below: Backend | None = None) -> None:
        self._below = below or SystemBackend()
        self._paths: dict[int, tuple[str, int]] = {}
        self.operations: list[Operation] = []

    def mark(self, note: str) -> None:
        """Note that something was promised at this point, such as "step 2 is saved"."""
        self.operations.append(Operation("mark", note))

    def call(self, operation: str, *arguments: Any) -> Any:
        """Perform and note."""
        result = self._below.call(operation, *arguments)
        first = arguments[0]
        if operation == "open":
            self._paths[result] = (os.fspath(first), arguments[1])
            if arguments[1] & (os.O_CREAT | os.O_TRUNC):
                self.operations.append(Operation("open", os.fspath(first), size=arguments[1]))
        elif operation == "write":
            self.operations.append(Operation("write", self._paths[first][0], data=bytes(arguments[1][:result])))
        elif operation == "truncate":
            self.operations.append(Operation("truncate", self._paths[first][0], size=arguments[1]))
        elif operation == "fsync":
            path, flags = self._paths[first]
            if flags & os.O_DIRECTORY:
                self.operations.append(Operation("fsync folder", path))
            else:
                with open(path, "rb") as file:  # noqa: PTH123
                    self.operations.append(Operation("fsync", path, data=file.read()))
        elif operation in ("rename", "link"):
            self.operations.append(Operation(operation, os.fspath(first), os.fspath(arguments[1])))
        else:
            self.operations.append(Operation(operation, os.fspath(first)))
        return result


def _half(data: Any) -> Any:
    return data[: (len(data) + 1) // 2]
