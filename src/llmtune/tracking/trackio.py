"""Trackio as a tracker: in its own folder on this machine (`TRACKIO_DIR`), where `trackio show` finds the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from llmtune.common.records import flat_items
from llmtune.common.secrets import redacted
from llmtune.common.text import PrintLine, print_to_stderr
from llmtune.tracking.tracker import Histogram, Metrics, RunInfo, Sample, gradient_flow, grouped_name

if TYPE_CHECKING:
    import trackio

__all__ = ["TrackioTracker"]


class TrackioTracker:
    """Sends config, metrics, answers, histograms and gradient flow to Trackio; a resumed run goes on by its name."""

    name = "trackio"

    def __init__(self, project: str, *, print_line: PrintLine = print_to_stderr) -> None:
        self._project, self._print_line = project, print_line
        self._run: trackio.Run
        """From `start` on."""
        self._samples: list[list[object]] = []

    def start(self, info: RunInfo) -> None:
        """Open the run under the name of its folder."""
        import trackio
        import trackio.run
        import trackio.utils

        # It prints to stdout, which is for data, and has no switch for that.
        for module in (trackio, trackio.run, trackio.utils):
            vars(module)["print"] = _print_nothing
        further = {"parameters": info.parameters, "architecture": info.architecture, "origins": info.origins}
        self._run = trackio.init(
            project=self._project,
            name=info.name,
            config=dict(flat_items({**redacted(info.config), **further, "rows": info.ledger})),
            resume="allow",
            embed=False,
            auto_log_gpu=False,  # a run has these figures in system.jsonl
            auto_log_cpu=False,
        )
        self._print_line(f'trackio has the run; `trackio show --project "{self._project}"` opens it')

    def log(self, step: int, metrics: Metrics) -> None:
        """Send every number of a line."""
        numbers = {grouped_name(key): value for key, value in metrics.items() if isinstance(value, int | float)}
        self._run.log({key: value for key, value in numbers.items() if key != "train/step"}, step=step)

    def samples(self, step: int, rows: Sequence[Sample]) -> None:
        """Send all answers so far as one table."""
        import trackio

        self._samples += [[step, row.get("prompt", ""), row.get("text", "")] for row in rows]
        table = trackio.Table(columns=["step", "prompt", "answer"], data=self._samples)
        self._run.log({"samples": table}, step=step)

    def histograms(self, step: int, histograms: Mapping[str, Histogram]) -> None:
        """Send histograms as they were counted, and the gradient flow."""
        import trackio

        counted = {
            name: trackio.Histogram(np_histogram=(np.array(row.counts), np.array(row.edges)))
            for name, row in histograms.items()
        }
        self._run.log({**counted, **gradient_flow(histograms)}, step=step)

    def finish(self, state: str) -> None:
        """Record how the run ended, and wait until it is written."""
        self._run.log({"finished": float(state == "finished")})
        self._run.finish()


def _print_nothing(*arguments: object, **keywords: object) -> None:
    """Do nothing with a line of Trackio."""
