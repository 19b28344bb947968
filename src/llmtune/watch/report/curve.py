"""The charts of a run as an object that a notebook shows, while the run trains and afterwards."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmtune import durable
from llmtune.errors import CheckpointError, DataError
from llmtune.runs.run_file import read_run_file
from llmtune.watch.report.charts import charts_html
from llmtune.watch.report.markup import asset, text
from llmtune.watch.run_data import RunData
from llmtune.watch.series import Series

__all__ = ["Curve"]


class Curve:
    """Loss, gradient norm, learning rate, speed and memory over steps, as in the report.

    >>> curve = Curve("run")
    >>> curve.add({"step": 1, "train_mean_nll": 5.0})
    >>> curve.train, "<svg" in curve._repr_html_()
    ([(1, 5.0)], True)
    """

    def __init__(self, title: str = "") -> None:
        self.title = title
        self._run = RunData(Path(title or "run"))

    @classmethod
    def of_run(cls, folder: str | Path, *, last_step: int | None = None) -> Curve:
        """Read the curve of a run, which may be training, from its metrics.jsonl up to `last_step`.

        Raises DataError where there is no such file.
        """
        path = Path(folder) / "metrics.jsonl"
        if not path.is_file():
            raise DataError("there is no record of this run", where=str(path), fix="name a run's folder")
        curve = cls(Path(folder).name)
        with contextlib.suppress(CheckpointError):  # the levels that lines are held against; the lines do without
            curve._run.info = {**read_run_file(Path(folder))}
        for line in durable.read_lines(path):
            if last_step is None or line.get("step", 0) <= last_step:
                curve.add(line)
        return curve

    def add(self, line: Mapping[str, Any]) -> None:
        """Add the numbers of a step or an evaluation, by their names in metrics.jsonl."""
        self._run.take_metrics([line])

    @property
    def train(self) -> list[tuple[int, float]]:
        """(step, training loss of its window)."""
        return _points(self._run.metrics.get(self._run.loss_metric))

    @property
    def heldout(self) -> list[tuple[int, float]]:
        """(step, held-out loss after it)."""
        return _points(self._run.metrics.get(self._run.heldout_metric))

    def _repr_html_(self) -> str:
        """Return the charts for a notebook, with a style that holds within them alone."""
        charts = charts_html([self._run], with_values=False)
        if not charts:
            return f"<p>{text(self.title)}: no step yet</p>"
        style = asset("palette.css").replace(":root", "&") + asset("chart.css")
        frame = "& { background: var(--page); color: var(--ink); font: 14px/1.5 sans-serif; padding: .6rem; }"
        scoped = f"<style>.llmtune {{ {frame}{style} }}</style>"
        return f'<div class="llmtune">{scoped}<div class="charts">{charts}</div></div>'


def _points(series: Series | None) -> list[tuple[int, float]]:
    return [] if series is None else [(int(x), value) for x, value in series.finite()]
