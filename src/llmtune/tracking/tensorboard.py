"""TensorBoard as a tracker: event files in the run folder's `tensorboard/`, written by torch.utils.tensorboard."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llmtune.runs.secrets import redacted
from llmtune.tracking.tracker import Histogram, RunInfo, grouped_name

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

__all__ = ["TensorBoardTracker"]

SECONDS_BETWEEN_FLUSHES = 10


class TensorBoardTracker:
    """Writes scalars, samples as text, and histograms. After a resume, what was logged beyond the resumed step is purged from view."""

    name = "tensorboard"

    def __init__(self) -> None:
        self._writer: SummaryWriter | None = None

    def start(self, info: RunInfo) -> None:
        """Open the event file and write the config and the architecture as text."""
        from torch.utils.tensorboard import SummaryWriter

        purge_step = info.start_step + 1 if info.start_step else None
        self._writer = SummaryWriter(log_dir=str(info.folder / "tensorboard"), purge_step=purge_step, flush_secs=SECONDS_BETWEEN_FLUSHES)
        for title, values in (("config", redacted(info.config)), ("parameters", info.parameters), ("architecture", info.architecture)):
            if values:
                self._writer.add_text(title, _as_markdown_table(values), global_step=info.start_step)

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Write every number as a scalar; the step is the axis and not a curve of its own."""
        assert self._writer is not None, "start comes first"
        for key, value in metrics.items():
            if key != "step" and isinstance(value, (int, float)):
                self._writer.add_scalar(grouped_name(key), value, global_step=step)

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write each answer as text under its prompt's number."""
        assert self._writer is not None, "start comes first"
        for number, row in enumerate(rows):
            self._writer.add_text(
                f"samples/{number}", _as_code(row.get("prompt", "")) + "\n\n" + _as_code(row.get("text", "")), global_step=step
            )

    def histograms(self, step: int, histograms: Mapping[str, Histogram]) -> None:
        """Write histograms as they were counted."""
        assert self._writer is not None, "start comes first"
        for name, (counts, edges) in histograms.items():
            middles = [(low + high) / 2 for low, high in itertools.pairwise(edges)]
            self._writer.add_histogram_raw(
                name,
                min=edges[0],
                max=edges[-1],
                num=sum(counts),
                sum=sum(count * middle for count, middle in zip(counts, middles, strict=True)),
                sum_squares=sum(count * middle**2 for count, middle in zip(counts, middles, strict=True)),
                bucket_limits=list(edges[1:]),
                bucket_counts=list(counts),
                global_step=step,
            )

    def finish(self, state: str) -> None:
        """Write what is pending and close the file."""
        assert self._writer is not None, "start comes first"
        self._writer.add_text("state", state)
        self._writer.close()


def _as_code(text: object) -> str:
    """Return text as an indented Markdown block: nothing in an answer can become markup or a link."""
    return "\n".join(f"    {line}" for line in str(text).splitlines() or [""])


def _as_markdown_table(values: Mapping[str, Any]) -> str:
    rows = [f"| {name} | `{value}` |" for name, value in _flat(values)]
    return "\n".join(["| key | value |", "| --- | --- |", *rows])


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Return nested values with dotted names.

    >>> _flat({"a": {"b": 1}, "c": 2})
    [('a.b', 1), ('c', 2)]
    """
    flat: list[tuple[str, Any]] = []
    for key, value in values.items():
        flat.extend(_flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [(f"{prefix}{key}", value)])
    return flat
