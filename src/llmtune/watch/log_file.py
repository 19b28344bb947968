"""A redirected log of a training (`llmtune train ... 2> FILE`) as the data of a run."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

from llmtune.watch.run_data import RunData, Sample
from llmtune.watch.series import Series

__all__ = ["LogFile"]

_PLAN = re.compile(r"plan    ([\d,]+) steps, ([\d,]+) an epoch")
_SAMPLE = re.compile(r"\[step (\d+)\] (.*) -> (.*)")
_END = re.compile(r"(finished|stopped) after step (\d+)")
_METRICS = {"loss": "train_mean_nll", "learning_rate": "learning_rate", "grad_norm": "grad_norm"}
_EPOCH_ROUNDING = 0.005
"""A line has its epoch in two digits after the point."""


class LogFile:
    """Reads the lines that the log gained at each `refresh`, into `data`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._start_over()

    def _start_over(self) -> None:
        self.data = RunData(self._path)
        self.data.info = {"state": "unknown"}
        self._offset = 0
        self._step = 0
        self._steps_per_epoch: int | None = None

    def refresh(self) -> bool:
        """Read what is new, and return whether anything was; a file that was cut is read from its start."""
        try:
            with self._path.open("rb") as file:
                file.seek(0, 2)
                is_cut = file.tell() < self._offset
                if is_cut:
                    self._start_over()
                file.seek(self._offset)
                new = file.read()
        except OSError:
            return False
        complete = new[: new.rfind(b"\n") + 1]
        self._offset += len(complete)
        for line in complete.decode("utf-8", "replace").splitlines():
            self._take(line)
        return is_cut or bool(complete)

    def _take(self, line: str) -> None:
        if line.startswith("{'"):
            self._take_numbers(line)
        elif (sample := _SAMPLE.match(line)) is not None:
            self.data.samples.append(Sample(int(sample[1]), sample[2], sample[3]))
        elif (plan := _PLAN.match(line)) is not None:
            total, self._steps_per_epoch = (int(number.replace(",", "")) for number in plan.groups())
            self.data.info = {"state": "unknown", "total_steps": total}
        elif (end := _END.match(line)) is not None:
            self.data.info = {**self.data.info, "state": end[1]}

    def _take_numbers(self, line: str) -> None:
        try:
            # `nan` and `inf` stand in such a line as bare words.
            values = ast.literal_eval(re.sub(r"\b(nan|-?inf)\b", "None", line))
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            return
        if not isinstance(values, dict):
            return
        if "eval_loss" in values:
            self._put("eval_mean_nll", values["eval_loss"])
            return
        self._step = self._next_step(values.get("epoch"))
        for name, metric in _METRICS.items():
            if name in values:
                self._put(metric, values[name])

    def _put(self, metric: str, value: Any) -> None:
        if value is None or isinstance(value, int | float):
            self.data.metrics.setdefault(metric, Series()).put(self._step, value)

    def _next_step(self, epoch: Any) -> int:
        """The step of a line: the one after the last, unless the epoch says that lines are further apart."""
        if self._steps_per_epoch is None or not isinstance(epoch, int | float):
            return self._step + 1
        by_epoch = epoch * self._steps_per_epoch
        is_next = abs(self._step + 1 - by_epoch) <= _EPOCH_ROUNDING * self._steps_per_epoch + 0.5
        return self._step + 1 if is_next else max(round(by_epoch), self._step + 1)
