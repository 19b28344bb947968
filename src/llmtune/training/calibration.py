"""Measure how fast a run trains on this machine by a few real steps, and keep the rate for the next plan."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from itertools import islice

from llmtune.engine.devices import Devices
from llmtune.engine.loop import StepResult, train_steps
from llmtune.engine.state import TrainingState
from llmtune.plan.forecast import Forecaster
from llmtune.training.build import TrainingSetup, build_setup

__all__ = ["measure", "steps_from_the_start"]

STEPS = 4
"""Steps of a calibration; the first warms up and is not counted."""


def measure(forecaster: Forecaster, devices: Devices) -> tuple[float, int]:
    """Train a few real steps, keep their rate, and return (tokens per second, most memory held in bytes).

    Nothing is written but the rate. Raises ModelError, MachineError or DivergedError.
    """
    setup = build_setup(forecaster.prepared, forecaster.options, devices)
    results = list(islice(steps_from_the_start(setup), STEPS))
    counted = results[1:] or results
    rate = statistics.median(result.num_tokens / result.step_seconds for result in counted)
    forecaster.store_rate(rate)
    return rate, results[-1].memory_bytes


def steps_from_the_start(setup: TrainingSetup) -> Iterator[StepResult]:
    """Train a new model, without evaluation, checkpoint or record between two steps; raises DivergedError."""
    return train_steps(
        objective=setup.objective,
        update=setup.update,
        windows=setup.windows(0),
        learning_rate=setup.learning_rate,
        precision=setup.precision,
        state=TrainingState(),
        devices=setup.devices,
        max_skipped_steps=STEPS,
    )
