"""The tracker `system`: figures of the machine in the run's system.jsonl, every few seconds."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence

from llmtune import durable
from llmtune.errors import MachineError
from llmtune.tracking.machine import Machine
from llmtune.tracking.tracker import Histogram, Metrics, RunInfo, Sample

__all__ = ["SECONDS_BETWEEN_FIGURES", "SystemTracker"]

SECONDS_BETWEEN_FIGURES = 5.0
"""Reading them takes less than a millisecond of a processor."""


class SystemTracker:
    """Writes a line of figures when the run starts and every `seconds` after that, on a thread of its own."""

    name = "system"

    def __init__(self, machine: Machine | None = None, *, seconds: float = SECONDS_BETWEEN_FIGURES) -> None:
        self._machine = machine
        self._seconds = seconds
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, info: RunInfo) -> None:
        """Begin to write. Raises MachineError where the file cannot be opened."""
        # A resumed run goes on in the same file: nothing of these lines is made again.
        log = durable.AppendLog(info.folder / "system.jsonl")
        # A daemon, because a driver that hangs must not keep the process from ending.
        self._thread = threading.Thread(target=self._write, args=(log,), name="system-figures", daemon=True)
        self._thread.start()

    def log(self, step: int, metrics: Metrics) -> None:
        """Write nothing: the figures are by time."""

    def samples(self, step: int, rows: Sequence[Sample]) -> None:
        """Write nothing."""

    def histograms(self, step: int, histograms: Mapping[str, Histogram]) -> None:
        """Write nothing."""

    def finish(self, state: str) -> None:  # noqa: ARG002 - the last line does not depend on how the run ended
        """Write a last line, and close the file."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join(timeout=self._seconds)

    def _write(self, log: durable.AppendLog) -> None:
        machine = self._machine or Machine()
        try:
            is_last = False
            while not is_last:
                is_last = self._ended.wait(self._seconds)
                log.append(machine.figures().as_dict())
        except MachineError:
            return  # a full disk costs these lines, and the record of the run says so by itself
        finally:
            log.close()
            machine.close()
