"""Metrics of one's own: asked after every step, written beside ours, and unable to change the run.

A metric sees a `StepResult`: plain numbers. What it draws from random generators is put back, what it raises is said
once, and only the value `Stop(...)` ends the training - at a step boundary, saved, to be resumed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from llmtune.common.printing import PrintLine
from llmtune.engine.loop import StepResult
from llmtune.engine.state import capture_rng, restore_rng
from llmtune.errors import UsageError

__all__ = ["Measures", "Metric", "MetricObject", "Stop", "as_function"]

Values = Mapping[str, Any]


@dataclass(frozen=True)
class Stop:
    """What a metric returns to end the training after this step.

    >>> Stop("the loss is low enough").reason
    'the loss is low enough'
    """

    reason: str
    """Said when the run stops."""


class MetricObject(Protocol):
    """An object that is asked after every step."""

    def on_step(self, step: StepResult, /) -> Values | Stop | None:
        """Return values for the step's line, `Stop(reason)`, or nothing."""
        ...


MetricFunction = Callable[[StepResult], Values | Stop | None]
Metric = MetricFunction | MetricObject


def as_function(metric: Metric) -> MetricFunction:
    """Return what is called after each step. Raises UsageError for what is neither a function nor has `on_step`."""
    found = getattr(metric, "on_step", metric)
    if not callable(found):
        fix = "give a function of a step, or an object with a method `on_step(step)`"
        raise UsageError(f"{metric!r} is no metric", where="metrics", fix=fix)
    function: MetricFunction = found
    return function


class Measures:
    """All metrics of a run; called with each step, returns the values for its line and never raises."""

    def __init__(self, metrics: Iterable[Metric], *, device: torch.device, print_line: PrintLine) -> None:
        self._functions = [(_name_of(one), as_function(one)) for one in metrics]
        self._device, self._print_line = device, print_line
        self._said: set[str] = set()
        self.stop: Stop | None = None
        """The newest `Stop` a metric returned."""

    def __len__(self) -> int:
        return len(self._functions)

    def __call__(self, step: StepResult) -> dict[str, float | int | str | bool | None]:
        """Ask every metric; random generators are afterwards what they were."""
        values: dict[str, Any] = {}
        ours = step.metrics().keys()
        generators = capture_rng(self._device)
        for name, function in self._functions:
            try:
                given = function(step)
                if isinstance(given, Stop):
                    self.stop = given
                elif given is not None:
                    values |= self._usable(name, given, ours)
            except (Exception, SystemExit) as error:  # noqa: BLE001 - it is the user's code, and a metric never ends a run by failing
                self._once(
                    f"{name}:error",
                    f"warning: metric {name} failed at step {step.step}: {type(error).__name__}: {error}",
                )
        restore_rng(generators, self._device)
        return values

    def _usable(self, name: str, given: Values, ours: Iterable[str]) -> dict[str, Any]:
        """Return the values a line can hold; the others are named once."""
        kept = {}
        for key, value in given.items():
            number = value.item() if hasattr(value, "item") else value
            if str(key) in ours:
                self._once(f"{name}:{key}", f"warning: metric {name} gives `{key}`, which is ours; left out")
            elif not isinstance(number, bool | int | float | str | None):
                self._once(
                    f"{name}:{key}",
                    f"warning: metric {name} gives `{key}` as {type(value).__name__}, no plain value; left out",
                )
            else:
                kept[str(key)] = None if isinstance(number, float) and not math.isfinite(number) else number
        return kept

    def _once(self, key: str, line: str) -> None:
        if key not in self._said:
            self._said.add(key)
            self._print_line(line)


def _name_of(metric: Metric) -> str:
    return getattr(metric, "__name__", None) or type(metric).__name__
