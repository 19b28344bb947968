"""metrics.jsonl and samples.jsonl: the run's own record.

This is the one tracker that does not stand behind the queue. A line of the record may not be dropped, and after a
resume the file must be byte for byte (but for times) the one of the run never stopped; so the pipeline writes it
itself, at the step boundary, and its position is part of every checkpoint.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmtune import durable
from llmtune.errors import MachineError

__all__ = ["RunRecord"]


class RunRecord:
    """The two files, open for appending.

    A checkpoint stores `position()` and a resumed run hands it back to `rewind`, which drops the lines of steps that
    will be made again. A full disk does not end a run here: refused lines wait in memory, in order, and `sync` and
    `close` say so if they still do (P7).
    """

    def __init__(self, folder: Path) -> None:
        self._metrics = _PatientLog(folder / "metrics.jsonl")
        self._samples = _PatientLog(folder / "samples.jsonl")

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Append one line of metrics."""
        self._metrics.append({"step": step, **metrics})

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append one line for each answer."""
        for row in rows:
            self._samples.append({"step": step, **row})

    def position(self) -> dict[str, int]:
        """Return how many lines each file has: what a checkpoint stores."""
        return {"metrics": self._metrics.lines, "samples": self._samples.lines}

    def rewind(self, position: Mapping[str, int]) -> int:
        """Go back to `position` and return how many lines were dropped. Raises MachineError when the disk refuses."""
        return self._metrics.truncate_to(position["metrics"]) + self._samples.truncate_to(position["samples"])

    def sync(self) -> None:
        """Wait until the disk has every line. Called before a checkpoint that counts on them."""
        self._metrics.sync()
        self._samples.sync()

    def close(self) -> None:
        """Sync and close both files. Raises MachineError when lines are still refused."""
        try:
            self.sync()
        finally:
            self._metrics.close()
            self._samples.close()


class _PatientLog:
    """A durable log whose refused lines wait for their turn."""

    def __init__(self, path: Path) -> None:
        self._log = durable.AppendLog(path)
        self._waiting: deque[Mapping[str, Any]] = deque()

    @property
    def lines(self) -> int:
        """Lines written, and those that wait."""
        return self._log.lines + len(self._waiting)

    def append(self, value: Mapping[str, Any]) -> None:
        """Write a line after those that wait, or let it wait with them where the disk refuses."""
        self._waiting.append(value)
        with contextlib.suppress(MachineError):  # asked again at the next line, and for good at `sync`
            self._write()

    def _write(self) -> None:
        while self._waiting:
            self._log.append(self._waiting[0])
            self._waiting.popleft()

    def sync(self) -> None:
        """Write what waits and sync it to the disk. Raises MachineError where it is still refused."""
        self._write()
        self._log.sync()

    def truncate_to(self, lines: int) -> int:
        """Keep the first `lines` lines and return how many were cut. Raises MachineError."""
        self._write()
        return self._log.truncate_to(lines)

    def close(self) -> None:
        self._log.close()
