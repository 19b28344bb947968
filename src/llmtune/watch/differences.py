"""How runs differ: keys of their configs, and the numbers they ended with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from statistics import median
from typing import Any

from llmtune.config.dump import value_text
from llmtune.config.schema import SourceConfig
from llmtune.watch.run_data import RunData
from llmtune.watch.series import Series

__all__ = ["as_in_config", "differing_keys", "numbers_of"]

NAMES_OF_A_RUN = ("run.name", "run.output_dir", "run.notes")
"""Keys in which runs differ that are the same training."""


def differing_keys(runs: Sequence[RunData]) -> dict[str, list[Any]]:
    """Return the config keys in which the runs differ, with the value of each run; None where a run has none."""
    configs = [run.flat_config for run in runs]
    keys = dict.fromkeys(key for config in configs for key in config if key not in NAMES_OF_A_RUN)
    values = {key: [config.get(key) for config in configs] for key in keys}
    return {key: row for key, row in values.items() if any(value != row[0] for value in row)}


def as_in_config(key: str, value: Any) -> str:
    """Return a value of a run's record as it stands in a config: a source of rows without the fields it leaves out.

    >>> as_in_config("data.train", [{"path": "a.jsonl", "weight": 1.0, "share": None}, {"path": "b", "share": 0.5}])
    '[a.jsonl, {path: b, share: 0.5}]'
    """
    if key in ("data.train", "data.eval") and isinstance(value, list):
        known = {field.name for field in fields(SourceConfig)}
        value = [SourceConfig(**row) if isinstance(row, dict) and known.issuperset(row) else row for row in value]
    return value_text(value)


def numbers_of(runs: Sequence[RunData]) -> dict[str, list[float | None]]:
    """Return the numbers that the runs ended with, each by its name; None for a run without it."""
    numbers = {name: [number(run) for run in runs] for name, number in NUMBERS.items()}
    return {name: row for name, row in numbers.items() if any(value is not None for value in row)}


def _of(metric: Callable[[RunData], str], number: Callable[[list[float]], float]) -> Callable[[RunData], float | None]:
    def value(run: RunData) -> float | None:
        values = run.metrics.get(metric(run), Series()).finite().values
        return number(values) if values else None

    return value


def _loss(run: RunData, metric: str) -> str:
    """The name of a metric that is a loss; empty for that of a run that learns from rewards."""
    return metric if run.measured == "loss" else ""


NUMBERS: dict[str, Callable[[RunData], float | None]] = {
    "steps": lambda run: float(run.step) or None,
    "training loss, last": _of(lambda run: _loss(run, run.loss_metric), lambda values: values[-1]),
    "held-out loss, first": _of(lambda run: _loss(run, run.heldout_metric), lambda values: values[0]),
    "held-out loss, last": _of(lambda run: _loss(run, run.heldout_metric), lambda values: values[-1]),
    "held-out loss, best": _of(lambda run: _loss(run, run.heldout_metric), min),
    "training reward, last": _of(lambda _: "reward", lambda values: values[-1]),
    "held-out reward, first": _of(lambda _: "eval_reward", lambda values: values[0]),
    "held-out reward, last": _of(lambda _: "eval_reward", lambda values: values[-1]),
    "held-out reward, best": _of(lambda _: "eval_reward", max),
    "exact answers, last": _of(lambda _: "eval_exact_answers", lambda values: values[-1]),
    "skipped steps": lambda run: float(len(run.skipped)) or None,
    "tokens/s, median": _of(lambda _: "tokens_per_second", median),
    "memory in bytes, most": _of(lambda _: "memory_bytes", max),
    "seconds in steps": _of(lambda _: "step_seconds", sum),
}
"""Numbers by name; a further one is one row."""
