"""metrics.jsonl, samples.jsonl and events.jsonl: the record of a run.

This is the one tracker that is not behind the queue. No line of the record may be dropped, and after a resume the file
must be byte for byte (but for times) the one of the run never stopped; so the training writes it itself, at the step
boundary, and its position is part of every checkpoint.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path

from llmtune import durable
from llmtune.common.text import PrintLine, silent
from llmtune.errors import MachineError
from llmtune.tracking.health import HealthMonitor
from llmtune.tracking.tracker import Metrics, Sample

__all__ = ["RunRecord"]


class RunRecord:
    """The three files, open for appending; events.jsonl holds what the health checks see in metrics.jsonl.

    A checkpoint stores `position()` and a resumed run passes it to `rewind`, which drops the lines of steps that will
    be made again. A full disk does not end a run here: refused lines wait in memory, in order, until `sync` or `close`
    raises for those that are still refused (P7). Each new event is printed as a line.
    """

    def __init__(self, folder: Path, print_line: PrintLine = silent) -> None:
        self._folder, self._print_line = folder, print_line
        self._metrics = _RetryingLog(folder / "metrics.jsonl")
        self._samples = _RetryingLog(folder / "samples.jsonl")
        self._events = _RetryingLog(folder / "events.jsonl")
        self._health = HealthMonitor()

    def log(self, step: int, metrics: Metrics) -> None:
        """Append one line of metrics, and the events that it gives rise to."""
        line = {"step": step, **metrics}
        self._metrics.append(line)
        for event in self._health.see(line):
            self._events.append(event)
            self._print_line(f"{event['level']}: step {event['step']}: {event['message']}; {event['advice']}")

    def samples(self, step: int, rows: Sequence[Sample]) -> None:
        """Append one line for each answer."""
        for row in rows:
            self._samples.append({"step": step, **row})

    def position(self) -> dict[str, int]:
        """Return the number of lines of each file, for a checkpoint."""
        return {"metrics": self._metrics.lines, "samples": self._samples.lines}

    def rewind(self, position: Mapping[str, int]) -> int:
        """Drop the lines after `position` and return their number. Raises MachineError when the disk refuses."""
        dropped = self._metrics.truncate_to(position["metrics"]) + self._samples.truncate_to(position["samples"])
        # The checks go on as if the run was never stopped: their state follows from the lines that are kept.
        self._health = HealthMonitor()
        self._events.truncate_to(0)
        for event in self._health.see_all(durable.read_lines(self._folder / "metrics.jsonl")):
            self._events.append(event)
        return dropped

    def sync(self) -> None:
        """Wait until every line is on the disk.

        Called before a checkpoint is committed, because `rewind` to its position needs them. Raises MachineError.
        """
        self._metrics.sync()
        self._samples.sync()
        self._events.sync()

    def close(self) -> None:
        """Sync and close both files. Raises MachineError for lines that are still refused."""
        try:
            self.sync()
        finally:
            self._metrics.close()
            self._samples.close()
            self._events.close()


class _RetryingLog:
    """A durable log that keeps refused lines and writes them later, in order."""

    def __init__(self, path: Path) -> None:
        self._log = durable.AppendLog(path)
        self._waiting: deque[Mapping[str, object]] = deque()

    @property
    def lines(self) -> int:
        """Lines written and waiting."""
        return self._log.lines + len(self._waiting)

    def append(self, value: Mapping[str, object]) -> None:
        """Write the waiting lines and this one; where the disk refuses, it waits too."""
        self._waiting.append(value)
        with contextlib.suppress(MachineError):  # tried again at the next line; `sync` raises
            self._write()

    def _write(self) -> None:
        while self._waiting:
            self._log.append(self._waiting[0])
            # After the write: a refused line stays first in order.
            self._waiting.popleft()

    def sync(self) -> None:
        """Write the waiting lines and sync. Raises MachineError where they are still refused."""
        self._write()
        self._log.sync()

    def truncate_to(self, lines: int) -> int:
        """Keep the first `lines` lines and return the number of dropped ones. Raises MachineError."""
        self._write()
        return self._log.truncate_to(lines)

    def close(self) -> None:
        self._log.close()
