"""metrics.jsonl and samples.jsonl: the run's own record.

This is the one tracker that does not stand behind the queue. A line of the record may not be dropped, and after a resume the file must be
byte for byte (but for times) the one of the run never stopped; so the pipeline writes it itself, at the step boundary, and its position is
part of every checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmtune import durable

__all__ = ["RunRecord"]


class RunRecord:
    """The two files, open for appending.

    A checkpoint stores `position()` and a resumed run hands it back to `rewind`, which drops the lines of steps that will be made again.
    """

    def __init__(self, folder: Path) -> None:
        self._metrics = durable.AppendLog(folder / "metrics.jsonl")
        self._samples = durable.AppendLog(folder / "samples.jsonl")

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Append one line of metrics. Raises MachineError when the disk refuses."""
        self._metrics.append({"step": step, **metrics})

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append one line for each answer. Raises MachineError when the disk refuses."""
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
        """Sync and close both files."""
        self._metrics.close()
        self._samples.close()
