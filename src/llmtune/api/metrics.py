"""The user's metrics: called after every step, logged beside llmtune's own, and unable to change the run.

A metric is a function of a step, or an object with a method `on_step`. It receives a `StepResult`, which holds plain
numbers, and returns one of:

- a mapping of names to plain values (bool, int, float, str or None; a 0-d tensor or NumPy number is converted), which
  are added to the step's line of metrics.jsonl and sent to every tracker; a name of llmtune's metrics is left out, and
  a number that is not finite becomes None;
- `Stop(reason)`, which ends the training at this step boundary, saved, to be resumed;
- None.

Random generators are restored afterwards; an exception is printed once and costs only the values of its metric.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch

from llmtune.common.text import PrintLine
from llmtune.engine.loop import StepResult
from llmtune.engine.state import capture_rng, restore_rng
from llmtune.errors import UsageError

__all__ = ["Metric", "MetricObject", "Stop", "UserMetrics", "Values", "as_function"]

Values: TypeAlias = Mapping[str, object]
PlainValue: TypeAlias = bool | int | float | str | None


@dataclass(frozen=True)
class Stop:
    """Returned by a metric to end the training after this step.

    >>> Stop("the loss is low enough").reason
    'the loss is low enough'
    """

    reason: str
    """Printed when the run stops."""


class MetricObject(Protocol):
    """A metric with state."""

    def on_step(self, step: StepResult, /) -> Values | Stop | None:
        """Return values for the step's line, `Stop(reason)`, or None."""
        ...


MetricFunction: TypeAlias = Callable[[StepResult], Values | Stop | None]
Metric: TypeAlias = MetricFunction | MetricObject


def as_function(metric: Metric) -> MetricFunction:
    """Return the function of a metric. Raises UsageError for an object that is no function and has no `on_step`."""
    candidate = getattr(metric, "on_step", metric)
    if not callable(candidate):
        fix = "give a function of a step, or an object with a method `on_step(step)`"
        raise UsageError(f"{metric!r} is no metric", where="metrics", fix=fix)
    function: MetricFunction = candidate
    return function


class UserMetrics:
    """All metrics of a run; called with each step, returns the values for its line and never raises."""

    def __init__(self, metrics: Iterable[Metric], *, device: torch.device, print_line: PrintLine) -> None:
        self._functions = [(_name_of(metric), as_function(metric)) for metric in metrics]
        self._device, self._print_line = device, print_line
        self._warned: set[str] = set()
        self.stop: Stop | None = None
        """The newest `Stop` a metric returned."""

    def __call__(self, step: StepResult) -> dict[str, PlainValue]:
        """Call every metric with `step` and return their values; random generators are restored."""
        values: dict[str, PlainValue] = {}
        reserved = step.metrics().keys()
        generators = capture_rng(self._device)
        for name, function in self._functions:
            try:
                result = function(step)
                if isinstance(result, Stop):
                    self.stop = result
                elif result is not None:
                    values |= self._plain_values(name, result, reserved)
            except (Exception, SystemExit) as error:  # noqa: BLE001 - the user's code may raise anything and never ends a run
                reason = f"{type(error).__name__}: {error}"
                self._warn_once(f"{name}:error", f"metric {name} failed at step {step.step}: {reason}")
        # A metric that draws a number must not change the next step's dropout.
        restore_rng(generators, self._device)
        return values

    def _plain_values(self, name: str, values: Values, reserved: Collection[str]) -> dict[str, PlainValue]:
        """Return the values a line can hold; warn once about each of the others."""
        plain: dict[str, PlainValue] = {}
        for key, value in values.items():
            number = value.item() if hasattr(value, "item") else value
            if str(key) in reserved:
                self._warn_once(f"{name}:{key}", f"metric {name} gives `{key}`, which is ours; left out")
            elif not isinstance(number, bool | int | float | str | None):
                kind = type(value).__name__
                self._warn_once(f"{name}:{key}", f"metric {name} gives `{key}` as {kind}, no plain value; left out")
            else:
                # As in the other metrics of a line: JSON has no NaN.
                plain[str(key)] = None if isinstance(number, float) and not math.isfinite(number) else number
        return plain

    def _warn_once(self, key: str, warning: str) -> None:
        if key not in self._warned:
            self._warned.add(key)
            self._print_line(f"warning: {warning}")


def _name_of(metric: Metric) -> str:
    return getattr(metric, "__name__", None) or type(metric).__name__
