"""TensorBoard as a tracker: an event file in `tensorboard/` of the run folder.

TensorBoard's SummaryWriter has another queue and thread, which prints a traceback when the disk refuses. A tracker of
llmtune has both already, so its records are written directly, and an error of the disk is reported once, as for every
tracker (P11).
"""

from __future__ import annotations

import itertools
import os
import platform
import time
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING

from llmtune import durable
from llmtune.common.records import flat_items
from llmtune.common.secrets import redacted
from llmtune.tracking.tracker import Histogram, Metrics, RunInfo, Sample, gradient_flow, grouped_name

if TYPE_CHECKING:
    from pathlib import Path

    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary

__all__ = ["TensorBoardTracker"]


class _EventFile:
    """One event file; when `add` returns its record is complete for a reader, though not synced to the disk.

    purge_step: TensorBoard hides records of earlier files from this step on.
    Raises OSError when the disk refuses.
    """

    def __init__(self, folder: Path, purge_step: int | None) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.tensorflow_stub.io.gfile import GFile
        from tensorboard.summary.writer.record_writer import RecordWriter

        durable.make_folder(folder)
        self._event = Event
        now = time.time()
        # The form in which TensorBoard looks for files; the last number keeps two of one second apart.
        name = f"events.out.tfevents.{now:.0f}.{platform.node()}.{os.getpid()}.{time.monotonic_ns()}"
        self._records = RecordWriter(GFile(str(folder / name), "wb"))
        self._write(Event(wall_time=now, file_version="brain.Event:2"))
        # A resumed run makes these steps again, and both would be drawn.
        if purge_step is not None:
            self._write(Event(wall_time=now, step=purge_step, file_version="brain.Event:2"))
            self._write(Event(wall_time=now, step=purge_step, session_log=SessionLog(status=SessionLog.START)))

    def add_graph(self, graph: bytes) -> None:
        self._write(self._event(wall_time=time.time(), graph_def=graph))

    def add(self, summary: Summary, step: int) -> None:
        self._write(self._event(wall_time=time.time(), step=step, summary=summary))

    def _write(self, event: Event) -> None:
        self._records.write(event.SerializeToString())

    def close(self) -> None:
        self._records.close()


class TensorBoardTracker:
    """Writes scalars, samples as text, and histograms; a resume hides the records beyond its first step."""

    name = "tensorboard"

    def __init__(self) -> None:
        self._summary: ModuleType
        """torch's functions that make a record, from `start` on: tensorboard may not be installed."""
        self._events: _EventFile | None = None
        self._hparams: dict[str, bool | str | float] = {}
        self._evaluated: dict[str, float] = {}

    def start(self, info: RunInfo) -> None:
        """Open the event file and write the config and the architecture as text."""
        from torch.utils.tensorboard import summary

        self._summary = summary
        self._events = _EventFile(info.folder / "tensorboard", info.start_step + 1 if info.start_step else None)
        self._hparams = {
            key: value if isinstance(value, bool | int | float) else str(value)
            for key, value in flat_items(redacted(info.config))
        }
        for title, values in (
            ("config", redacted(info.config)),
            ("parameters", info.parameters),
            ("architecture", info.architecture),
            ("modules", info.modules),
            ("origins", info.origins),
            ("ledger", info.ledger),
        ):
            if values:
                self._events.add(summary.text(title, _as_markdown_table(values)), info.start_step)
        if info.graph is not None:
            self._events.add_graph(info.graph)

    def log(self, step: int, metrics: Metrics) -> None:
        """Write every number but the step, which is the axis, as a scalar."""
        assert self._events is not None, "start comes first"
        for key, value in metrics.items():
            if key != "step" and isinstance(value, (int, float)):
                if key.startswith("eval_"):
                    self._evaluated[grouped_name(key)] = value
                self._events.add(self._summary.scalar(grouped_name(key), value), step)

    def samples(self, step: int, rows: Sequence[Sample]) -> None:
        """Write each answer as text under the number of its prompt."""
        assert self._events is not None, "start comes first"
        for number, row in enumerate(rows):
            self._events.add(
                self._summary.text(
                    f"samples/{number}", _as_code(row.get("prompt", "")) + "\n\n" + _as_code(row.get("text", ""))
                ),
                step,
            )

    def histograms(self, step: int, histograms: Mapping[str, Histogram]) -> None:
        """Write histograms as they were counted."""
        assert self._events is not None, "start comes first"
        for name, (counts, edges, _) in histograms.items():
            # The values are gone, so sums are those of the bins' middles.
            middles = [(low + high) / 2 for low, high in itertools.pairwise(edges)]
            self._events.add(
                self._summary.histogram_raw(
                    name,
                    min=edges[0],
                    max=edges[-1],
                    num=sum(counts),
                    sum=sum(count * middle for count, middle in zip(counts, middles, strict=True)),
                    sum_squares=sum(count * middle**2 for count, middle in zip(counts, middles, strict=True)),
                    bucket_limits=list(edges[1:]),
                    bucket_counts=list(counts),
                ),
                step,
            )

        for name, norm in gradient_flow(histograms).items():
            self._events.add(self._summary.scalar(name, norm), step)

    def finish(self, state: str) -> None:
        """Write the run's state and its row of the hyperparameter table, and close the file."""
        assert self._events is not None, "start comes first"
        # The table's columns of results are the newest values of these scalars.
        for summary in self._summary.hparams(self._hparams, self._evaluated):
            self._events.add(summary, 0)
        self._events.add(self._summary.text("state", state), 0)
        self._events.close()


def _as_code(text: object) -> str:
    """Return text as an indented Markdown block, in which an answer cannot become markup or a link."""
    return "\n".join(f"    {line}" for line in str(text).splitlines() or [""])


def _as_markdown_table(values: Mapping[str, object]) -> str:
    rows = [f"| {name} | `{value}` |" for name, value in flat_items(values)]
    return "\n".join(["| key | value |", "| --- | --- |", *rows])
